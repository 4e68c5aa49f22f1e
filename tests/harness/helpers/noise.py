"""Cases, runs and floors with the noise of rounding."""

from __future__ import annotations

import numpy as np

from gradproof.model.case import Case
from gradproof.model.network import Input
from gradproof.model.tensors import Tensor
from gradproof.reference import PRECISE, NumpyReference
from gradproof.verdict.agreement import FEW_RUNS
from gradproof.verdict.equations import INSIDE, Arithmetic, Equations, Floor
from gradproof.verdict.noise import Rounding
from helpers.examining import results
from helpers.networks import case_of, network, node, normal

SHIFT, GRID = False, True


def rounding(dtype: str = "float32", to_grid: bool = SHIFT, seed: int = 0) -> Rounding:
    """The rounding of a dtype, by shifts or to its grid."""
    return Rounding(np.dtype(dtype), np.random.default_rng(seed), to_grid)


def in_float64(of: Case) -> Case:
    """The same numbers for the reference."""
    return Case(of.network, "float64", of.exact_values, of.cotangent.astype(float))


CHAIN = network(
    Input("x", (4, 3)),
    node("h", "linear", "x", parameters="weight:w bias:b", features=5),
    node("s", "softmax", "h"),
    node("out", "layer_norm", "s", affine=False),
)


def chain_case(dtype: str = "float32") -> Case:
    """A linear layer, a softmax and a layer norm on normal numbers."""
    return case_of(CHAIN, dtype, x=normal(4, 3), w=normal(5, 3, seed=2), b=normal(5, seed=3))


def equations_of(of: Case, textbook: NumpyReference | None = None, fused: bool = False) -> Equations:
    """The equations of a run that is right, every tensor rounded once."""
    exact = results(NumpyReference(rows=PRECISE), in_float64(of))
    with np.errstate(over="ignore"):
        got = {key: np.asarray(array).astype(of.dtype) for key, array in exact.items()}
    return Equations(of, got, NumpyReference(rows=PRECISE), textbook or NumpyReference(), fused)


def floor(of: Case, key: Tensor, count: int = FEW_RUNS, arithmetic: Arithmetic = INSIDE) -> Floor:
    """The floor of one tensor whose readers, and whose node, all have this arithmetic."""
    return equations_of(of)[key].floor(count, {each.name: arithmetic for each in of.network.nodes})
