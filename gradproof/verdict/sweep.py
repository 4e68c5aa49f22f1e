"""The reference's own sweep over a network, from the first input to the last gradient, and what rounding does to it.

It is the second witness: it shows what an error did further down, and says what a network computes where an adapter
gave nothing.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from gradproof.model.case import Case
from gradproof.model.dtypes import is_floating, limits
from gradproof.model.network import Node
from gradproof.model.tensors import Tensor, tensors
from gradproof.reference import PRECISE, NumpyReference
from gradproof.reference.walk import Conventions
from gradproof.verdict.agreement import TensorCheck
from gradproof.verdict.equations import Floor
from gradproof.verdict.noise import Rounding, observe

RUNS = 16
"""Perturbed sweeps from which the floor is taken."""

THRESHOLD = 16.0
"""Noise units of a whole sweep above which a tensor is shown as off."""


class Sweep:
    """Both sweeps of the reference over one case, in float64.

    conventions: layer -> kink -> weight of the right-hand derivative.
    """

    def __init__(self, case: Case, conventions: Conventions) -> None:
        self._reference = NumpyReference(conventions, PRECISE)
        self._textbook = NumpyReference(conventions)
        self._case = case

    @cached_property
    def _forward(self) -> Any:
        return self._reference.forward(self._case.network, self._case.exact_values, "float64")

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        return dict(self._forward.outputs)

    @cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients, in the order in which a backward pass reaches them."""
        found = self._reference.backward(self._forward, self._case.cotangent.astype(np.float64))
        network = self._case.network
        wanted = {*network.differentiable}
        order = [*(node.name for node in reversed(network.nodes)), *found]
        return {name: found[name] for name in dict.fromkeys(order) if name in wanted}

    @cached_property
    def expected(self) -> dict[Tensor, np.ndarray]:
        return tensors(self.outputs, self.gradients)

    @cached_property
    def _runs(self) -> list[dict[Tensor, np.ndarray]]:
        return [self._run(index) for index in range(RUNS)]

    def _run(self, index: int) -> dict[Tensor, np.ndarray]:
        dtype = np.dtype(self._case.dtype)
        rounding = Rounding(dtype, np.random.default_rng((index, dtype.itemsize)), to_grid=index % 2 == 1)
        values = {
            name: observe(rounding.flushed(v), rounding) if is_floating(v) else v
            for name, v in self._case.exact_values.items()
        }
        forward = self._textbook.forward(self._case.network, values, "float64")
        cotangent = observe(rounding.flushed(self._case.cotangent.astype(np.float64)), rounding)
        gradients = self._textbook.backward(forward, cotangent)
        return {key: np.asarray(array) for key, array in tensors(forward.outputs, gradients).items()}

    def floor(self, key: Tensor) -> Floor:
        """What rounding every operation to the dtype does to one tensor."""
        with np.errstate(all="ignore"):
            spread = np.abs(np.stack([run[key] for run in self._runs]) - self.expected[key]).mean(axis=0)
        lost = ~np.isfinite(spread)
        return Floor(np.where(lost, 0.0, spread), lost)

    def off(self, key: Tensor, got: Any) -> TensorCheck | None:
        """How far an adapter's tensor is from this sweep's; None where rounding on the way explains it."""
        expected, info = self.expected[key], limits(self._case.dtype)
        with np.errstate(all="ignore"):
            error = np.abs(np.asarray(got, np.float64) - expected)
            rounding = 0.5 * float(info.eps) * np.abs(expected) + float(info.smallest_normal)
            if not (error > THRESHOLD * rounding).any():
                return None
            floor = self.floor(key)
            known = ~floor.lost & np.isfinite(error)
            mean = floor.spread[known].mean() if known.any() else 0.0
            units = np.where(known, error / (floor.spread + mean + rounding), 0.0)
        index = tuple(int(i) for i in np.unravel_index(int(units.argmax()), units.shape))
        if units[index] <= THRESHOLD:
            return None
        return TensorCheck(
            key,
            expected.shape,
            None,
            noise_units=float(units[index]),
            max_error=float(error[index]),
            index=index,
            expected=float(expected[index]),
            got=float(np.asarray(got, np.float64)[index]),
        )


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Floating arrays in the dtype, integer ones as they are."""
    if not is_floating(array):
        return array
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(dtype)


def alone_as_the_sweep_has_it(sweep: Sweep, case: Case, node: Node) -> Case:
    """The case of one node alone, on the sweep's inputs and cotangent rounded to the dtype."""
    network, stands_for = case.network.alone(node.name)
    known = {**{name: rounded(array, case.dtype) for name, array in sweep.outputs.items()}, **case.values}
    values = {own: known[name] for own, name in stands_for.items()}
    return Case(network, case.dtype, values, rounded(sweep.gradients[node.name], case.dtype), case.seed)
