"""A case: a network with its numbers, and the JSON file ("spec") that replays it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gradproof.model.dtypes import is_floating
from gradproof.model.layer import Domain
from gradproof.model.network import Network, NetworkError


@dataclass(frozen=True, eq=False)
class Case:
    """One network, one set of numbers, one dtype.

    values: name -> array for every input and parameter; floating ones in `dtype`, indices in int64.
    cotangent: the seed of the backward pass, of the output's shape, in `dtype`.
    seed: what the numbers were drawn from, None where they were given.

    Raises NetworkError where an array is missing, has another shape, or leaves its input's domain.
    """

    network: Network
    dtype: str
    values: Mapping[str, np.ndarray]
    cotangent: np.ndarray
    seed: int | None = None

    def __post_init__(self) -> None:
        wanted = {each.name: each.domain for each in self.network.inputs} | {
            name: Domain("real") for name in self.network.parameters
        }
        for name in sorted(wanted.keys() ^ self.values.keys()):
            raise NetworkError(f"values: {name!r} is {'missing' if name in wanted else 'not an input or parameter'}")
        for name, domain in wanted.items():
            self._check_array(f"values: {name!r}", self.values[name], self.network.shapes[name], domain)
        self._check_array("cotangent", self.cotangent, self.network.shapes[self.network.output], Domain("real"))

    def _check_array(self, what: str, array: np.ndarray, shape: tuple[int, ...], domain: Domain) -> None:
        if array.shape != shape:
            raise NetworkError(f"{what} has shape {list(array.shape)}, expected {list(shape)}")
        if not domain.contains(array):
            raise NetworkError(f"{what} holds numbers outside its domain: {domain}")
        if domain.floating and array.dtype != np.dtype(self.dtype):
            raise NetworkError(f"{what} is in {array.dtype}, expected {self.dtype}")

    @cached_property
    def exact_values(self) -> dict[str, np.ndarray]:
        """The same numbers for the reference: floating arrays upcast to float64."""
        return {name: upcast(value) for name, value in self.values.items()}


def upcast(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float64) if is_floating(value) else value


def redrawn(case: Case, seed: int = 0) -> Case:
    """The same network with ordinary numbers; integers, and signs, stay as they are."""
    generator = np.random.default_rng(seed)
    draw: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
        "real": generator.standard_normal,
        "unit": lambda shape: generator.uniform(size=shape),
        "positive": lambda shape: generator.uniform(0.5, 2.0, shape),
    }
    values = {
        name: draw[kind](value.shape).astype(case.dtype) if (kind := case.network.domain(name).kind) in draw else value
        for name, value in case.values.items()
    }
    return Case(case.network, case.dtype, values, draw["real"](case.cotangent.shape).astype(case.dtype))


def jittered(case: Case, seed: int) -> Case:
    """The same case with every floating number moved by up to a tenth; signs, and integers, stay as they are."""
    generator = np.random.default_rng(seed)

    def moved(array: np.ndarray, kind: str = "real") -> np.ndarray:
        if kind in ("index", "sign"):
            return array
        with np.errstate(all="ignore"):
            near = upcast(array) * generator.uniform(0.9, 1.1, array.shape)
            return np.asarray((np.minimum(near, 1.0) if kind == "unit" else near).astype(case.dtype))

    values = {name: moved(value, case.network.domain(name).kind) for name, value in case.values.items()}
    return Case(case.network, case.dtype, values, moved(case.cotangent))
