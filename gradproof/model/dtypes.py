"""The dtypes that gradients can be checked in. Importing this makes "bfloat16" a dtype that NumPy knows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

DTYPES = ("float64", "float32")
"""What is checked where nothing else is asked for."""

HALF = ("bfloat16", "float16")

VALID_DTYPES = (*DTYPES, *HALF)


def limits(dtype: str | np.dtype[Any]) -> Any:
    """The dtype's `eps`, `max`, `smallest_normal` and so on, as `numpy.finfo` has them; for bfloat16 too."""
    return ml_dtypes.finfo(np.dtype(dtype))  # type: ignore[no-untyped-call]


def is_floating(value: Any) -> bool:
    """Whether these are floating numbers; for bfloat16 NumPy itself does not know."""
    return isinstance(value, (np.ndarray, np.generic)) and (value.dtype.kind == "f" or value.dtype == "bfloat16")
