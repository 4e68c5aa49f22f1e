"""A known divergence, an adapter that has it, and the entries of the built-in adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gradproof.adapters
from gradproof.model.case import Case
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.walk import Row
from gradproof.verdict.divergence import Divergence, read_divergences
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject

Array = np.ndarray[Any, Any]

ENTRY = """
[[divergence]]
layer = "softplus"
dtypes = ["float64"]
argument = "x"
between = [20.0, inf]
kinds = ["value", "gradient"]
versions = ["1.2", "2"]
max_relative_error = 1e-6
witness = { x = 21.0 }
reason = "linear above 20"
link = "https://example.org"
"""

READ = Divergence(
    layer="softplus",
    dtypes=("float64",),
    argument="x",
    between=(20.0, float("inf")),
    kinds=("value", "gradient"),
    versions=("1.2", "2"),
    witness={"x": 21.0},
    reason="linear above 20",
    link="https://example.org",
    max_relative_error=1e-6,
)


def changed(old: str, new: str) -> str:
    """The entry above with something else in the place of this."""
    assert ENTRY.count(old) == 1
    return ENTRY.replace(old, new)


def softplus_row(
    value: Callable[[Array, Array], Array] = lambda out, x: out,
    slope: Callable[[Array, Array], Array] = lambda dx, x: dx,
) -> Row:
    """Softplus whose value and gradient are changed where they stand."""

    def forward(x: Array, beta: float) -> tuple[Array, Any]:
        out, cache = LAYERS["softplus"].forward(x, beta=beta)
        return value(out, x).astype(x.dtype), (x, cache)

    def backward(dout: Array, kept: Any) -> dict[str, Array]:
        x, cache = kept
        return {"x": slope(LAYERS["softplus"].backward(dout, cache)["x"], x).astype(x.dtype)}

    return forward, backward


class Diverging(NumpyReference):
    """The reference with another softplus; by default one that is the identity above 20, as torch's is."""

    def __init__(self, row: Row | None = None) -> None:
        super().__init__(rows={"softplus": row or softplus_row(value=lambda out, x: np.where(x > 20, x, out))})

    def version(self) -> str:
        return "1.2.3"


def examined_with(case: Case, *entries: Divergence, row: Row | None = None) -> Examination:
    """The diverging adapter with these entries, on one case."""
    return examine(Subject(Diverging(row), {}, entries), case)


def built_in(name: str) -> tuple[Divergence, ...]:
    """The known divergences of a built-in adapter, in the order of their file."""
    (directory,) = gradproof.adapters.__path__
    return read_divergences(Path(directory) / f"{name}.toml")
