"""The reference in half precision, with an arithmetic of one of the classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gradproof.model.adapter import Forward
from gradproof.model.case import Case, upcast
from gradproof.model.dtypes import is_floating
from gradproof.model.layer import Layer
from gradproof.model.network import Input, Network
from gradproof.model.options import Options, OptionValue
from gradproof.reference import LAYERS, NumpyReference
from gradproof.verdict.arithmetic import Classes
from gradproof.verdict.equations import Equations
from gradproof.verdict.judging import Subject
from gradproof.verdict.noise import Rounding, observe, rounded_inside
from gradproof.verdict.running import run
from helpers.networks import network, node

Array = np.ndarray[Any, Any]


class Nearest(Rounding):
    """To the nearest number of the dtype, as hardware rounds."""

    def __init__(self, dtype: str) -> None:
        super().__init__(np.dtype(dtype), np.random.default_rng(0), to_grid=True)

    def __call__(self, exact: Array, at_one: bool = False) -> Array:
        with np.errstate(over="ignore"):
            return np.asarray(exact).astype(self.dtype).astype(float)


class Half(NumpyReference):
    """The reference in half precision, with an arithmetic of one of the classes.

    rows: layer -> (forward, backward) in place of the table's own.
    """

    name = "half"

    def __init__(self, arithmetic: str, rows: Mapping[str, Any] | None = None) -> None:
        super().__init__(rows=rows)
        self.arithmetic = arithmetic
        self.runs = 0

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool:
        return True

    def _read(self, array: Array, nearest: Nearest) -> Array:
        exact = upcast(np.asarray(array))
        return observe(exact, nearest) if self.arithmetic == "every" and is_floating(exact) else exact

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        self.runs += 1
        nearest, known, caches = Nearest(dtype), dict(values), {}
        with np.errstate(all="ignore"):
            for node in network.nodes:
                reads = {source: self._read(known[source], nearest) for _, source in node.sources}
                out, cache = self.run_node(node, reads)
                caches[node.name] = rounded_inside(cache, nearest) if self.arithmetic == "stored" else cache
                known[node.name] = np.asarray(out).astype(dtype)
        return Forward({node.name: known[node.name].copy() for node in network.nodes}, (network, caches, dtype))

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        network, caches, dtype = forward.tape
        found = {network.output: cotangent.copy()}
        with np.errstate(all="ignore"):
            for node in reversed(network.nodes):
                dout = self._read(found[node.name], Nearest(dtype))
                terms = self.row(node)[1](dout, caches[node.name])
                for argument, source in node.sources:
                    if argument in terms:
                        term = np.asarray(terms[argument]).astype(dtype)
                        found[source] = found[source] + term if source in found else term
        return found


def alone(layer: str, dtype: str = "bfloat16", shape: Sequence[int] = (8, 16), **options: OptionValue) -> Case:
    """The layer alone on ordinary numbers, with every parameter that it needs."""
    made = LAYERS[layer]
    slots = made.parameters([tuple(shape)], made.complete(options))
    parameters = " ".join(f"{slot}:{slot}0" for slot in slots)
    of = network(Input("x", tuple(shape)), node("out", layer, "x", parameters=parameters, **options))
    draw = np.random.default_rng(1).normal
    values = {name: draw(size=of.shapes[name]).astype(dtype) for name in ("x", *of.parameters)}
    return Case(of, dtype, values, draw(size=of.shapes["out"]).astype(dtype))


def probe(adapter: NumpyReference) -> Callable[[Case], tuple[Equations, Mapping[str, Any]] | None]:
    """What runs a case through the adapter, and gives its equations and what it gave."""

    def tried(case: Case) -> tuple[Equations, Mapping[str, Any]]:
        got = run(adapter, case, 60.0).got
        return Subject(adapter, {}).equations(case, got), got

    return tried


def found_class(adapter: NumpyReference, case: Case) -> str:
    """The class of arithmetic that the case's one layer is found to have."""
    return Classes().of(case, probe(adapter)).name
