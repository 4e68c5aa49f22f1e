"""Numbers that are rounded where they should not be."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradproof.hypotheses.suspect import Array, Coarse, Guess, Suspect

# Precision.

PRECISIONS = ((24, "float32"), (11, "float16"), (8, "bfloat16"))
"""Significant bits -> the dtype that has them."""


def rounded_to(array: Array, bits: int) -> Array:
    """The nearest numbers with so many significant bits."""
    mantissa, exponent = np.frexp(array)
    scale = 2.0**bits
    return np.ldexp(np.rint(mantissa * scale) / scale, exponent)


def lower_precision(suspect: Suspect) -> Iterator[Coarse]:
    return (Coarse(bits, dtype) for bits, dtype in PRECISIONS)


def operands_rounded(suspect: Suspect) -> Iterator[Guess]:
    """Every array that is multiplied; a bias is only added."""
    for bits, dtype in ((11, "TF32 or float16"), (8, "bfloat16")):
        arrays = {
            name: each if "bias" in name or each.dtype.kind != "f" else rounded_to(each, bits)
            for name, each in suspect.arrays.items()
        }
        yield Guess(arrays=arrays, dout=rounded_to(suspect.dout, bits), detail=dtype)
        yield Guess(arrays=arrays, detail=dtype)
        yield Guess(dout=rounded_to(suspect.dout, bits), detail=dtype)
