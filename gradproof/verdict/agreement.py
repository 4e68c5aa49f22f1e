"""Does a tensor satisfy its equation, to within the rounding that the dtype explains?

The error of an element is counted in noise units: what is left of it beyond the rounding of the result to the dtype,
over (floor of the element + median floor of its tensor + one rounding in the arithmetic's own dtype).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradproof.model.dtypes import is_floating, limits
from gradproof.model.options import Shape
from gradproof.model.tensors import Tensor, Wrong
from gradproof.reference.algorithms import Algorithm
from gradproof.verdict.equations import ARITHMETICS, INSIDE, Arithmetic, Floor, Statement

THRESHOLD = 8.0
"""Noise units above which an element disagrees: one number for every dtype, depth and layer."""

SUFFICIENT = 4.0
"""Noise units up to which no more runs are made."""

FEW_RUNS, MANY_RUNS = 4, 64
"""Perturbed runs to begin with, and before anything is called wrong."""

WHOLE_ROUNDINGS = {"float64": 4.0, "float32": 4.0, "bfloat16": 1.0, "float16": 1.0}
"""dtype -> roundings of the result up to which an error needs no run: in half precision a right one makes but one."""

SMALLEST = {"float16": "smallest_subnormal"}
"""dtype -> which of its limits an error may have near 0; the smallest normal number where it is not named, for hardware
flushes subnormal numbers of other dtypes."""


SMALL_SHARE = 0.1
"""The share of a number that its noise may be where one asks to which side the number errs."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """All elements of a tensor that disagrees: which are wrong, by how much, and what was expected."""

    wrong: np.ndarray
    error: np.ndarray
    expected: np.ndarray


@dataclass(frozen=True)
class TensorCheck:
    """What was found for one tensor.

    kind: None where it agrees, else what is wrong.
    max_error, index, expected, got: the element with the most noise units (None where nothing was compared).
    noise_units: the worst over all verified elements. bound: whether that is an upper bound, of a tensor for which no
    noise was measured because its error is within a few roundings of the result.
    unverifiable: number of elements of which nothing can be said. evidence: all elements, where values disagree.
    algorithm: the layer, and the honest algorithms that lose these digits where its textbook formula would not.
    second_pass: it agrees after one backward pass, and what is said is of a second one on the same tape.
    """

    key: Tensor
    shape: Shape
    kind: Wrong | None
    noise_units: float = 0.0
    max_error: float | None = None
    index: tuple[int, ...] | None = None
    expected: Any = None
    got: Any = None
    bound: bool = False
    unverifiable: int = 0
    evidence: Evidence | None = field(default=None, repr=False, compare=False)
    algorithm: tuple[str, str] | None = None
    second_pass: bool = False

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=int))


def unknown(key: Tensor, got: Any) -> TensorCheck:
    """The check of a tensor that nobody asked for."""
    shape = getattr(got, "shape", ())
    return TensorCheck(key, shape, Wrong.MISSING, float("inf"), expected="nothing of this name", got="not asked for")


def judge(
    statement: Statement,
    got: Any,
    dtype: str,
    arithmetics: Mapping[str, Arithmetic] | None = None,
    algorithms: Mapping[str, Algorithm] | None = None,
    hopeless: float = math.inf,
    forgiving: bool = False,
) -> TensorCheck:
    """Check one tensor: present, of the right shape and dtype, finite, and as its equation says.

    arithmetics: node -> class of its arithmetic, inside where it is not named. algorithms: node -> the
    algorithm from which its floor is measured, where that is not the textbook's. hopeless: noise units of a few runs
    above which more of them are not made. forgiving: nothing is said of an element for which an algorithm
    leaves the range; else its floor is 0 there.
    """
    fault = _structural_fault(statement.expected, got, np.dtype(dtype))
    if fault:
        kind, wanted, found = fault
        return TensorCheck(statement.key, statement.expected.shape, kind, float("inf"), expected=wanted, got=found)
    if statement.open:
        count = statement.expected.size
        return TensorCheck(statement.key, statement.expected.shape, None, unverifiable=count)
    return _Comparison(statement, np.asarray(got, np.float64), dtype).result(
        arithmetics or {}, algorithms or {}, hopeless, forgiving
    )


def signed_roundings(
    statement: Statement,
    got: Any,
    dtype: str,
    arithmetics: Mapping[str, Arithmetic],
    algorithms: Mapping[str, Algorithm],
    near: bool,
) -> np.ndarray:
    """The error of every element in roundings of the result, positive where its magnitude is too large.

    near: count the noise floor to a rounding, for numbers that hardly differ are rounded to the same side all the way.
    NaN where noise is more than a small share of the number, or the error more than all of it, as where numbers cancel.
    """
    comparison = _Comparison(statement, np.asarray(got, np.float64), dtype)
    floor = statement.floor(FEW_RUNS, arithmetics, algorithms)
    with np.errstate(all="ignore"):
        signs = np.sign(comparison.got - statement.expected) * np.where(statement.expected < 0.0, -1.0, 1.0)
        rounding = comparison.rounding + (floor.spread if near else 0.0)
        signed = np.where(comparison.error == 0.0, 0.0, signs * comparison.error / rounding)
        size = np.abs(statement.expected)
        masked = floor.lost | (floor.spread > SMALL_SHARE * size) | (comparison.error >= size)
        return np.where(masked, np.nan, signed)


def _structural_fault(expected: np.ndarray, got: Any, dtype: np.dtype[Any]) -> tuple[Wrong, str, str] | None:
    if got is None:
        return Wrong.MISSING, "an array", "None"
    if not isinstance(got, (np.ndarray, np.generic)):
        return Wrong.DTYPE, f"a NumPy array of {dtype}", type(got).__name__
    if got.shape != expected.shape:
        return Wrong.SHAPE, str(list(expected.shape)), str(list(got.shape))
    if got.dtype != dtype or not is_floating(np.asarray(got)):
        return Wrong.DTYPE, str(dtype), str(got.dtype)
    return None


class _Comparison:
    """One tensor beside what it must be."""

    def __init__(self, statement: Statement, got: np.ndarray, dtype: str) -> None:
        self.statement = statement
        self.got = got
        self.dtype = np.dtype(dtype)
        self.terms = max(len(statement.parts), 1)
        expected, info = statement.expected, limits(dtype)
        self.tiny = self.terms * float(getattr(info, SMALLEST.get(dtype, "smallest_normal")))
        with np.errstate(all="ignore"):
            error = np.abs(got - expected)
            error = np.where(_alike(got, expected, info), 0.0, error)
            if not statement.finite:  # how far a NaN or an infinity spreads is not laid down
                error = np.where(~np.isfinite(got) & ~np.isfinite(expected), 0.0, error)
            self.error = np.where(np.isnan(error), np.inf, error)
            self.rounding = self._one_rounding(self.dtype)
            self.roundings = np.where(self.error == 0.0, 0.0, self.error / self.rounding)

    def _one_rounding(self, dtype: np.dtype[Any]) -> np.ndarray:
        """Half a unit in the last place of every term of the sum, and of every partial sum."""
        return np.asarray(0.5 * float(limits(dtype).eps) * self.terms * self.statement.size + self.tiny)

    def result(
        self,
        arithmetics: Mapping[str, Arithmetic],
        algorithms: Mapping[str, Algorithm],
        hopeless: float,
        forgiving: bool,
    ) -> TensorCheck:
        within = self.roundings <= WHOLE_ROUNDINGS[self.dtype.name]
        if within.all():
            return self._check(None, self.roundings, bound=bool(self.error.any()))
        for count in (FEW_RUNS, MANY_RUNS):
            floor = self.statement.floor(count, arithmetics, algorithms)
            textbook = self.statement.floor(count, arithmetics) if algorithms and not forgiving else floor
            lost = ~within & self._lost(textbook)
            units = np.where(lost | (self.error == 0.0), 0.0, self._units(floor, ~lost, arithmetics))
            if units.max() <= SUFFICIENT or units.max() > hopeless:
                break
        wrong = units > THRESHOLD
        kind = None if not wrong.any() else Wrong(self.statement.key.role)
        if (~np.isfinite(self.got) & wrong).any():
            kind = Wrong.NONFINITE
        return self._check(kind, units, unverifiable=int(lost.sum()), wrong=wrong)

    def _lost(self, floor: Floor) -> np.ndarray:
        """Where nothing can be said."""
        if self.statement.finite:
            return floor.lost
        statement = self.statement
        return np.asarray(floor.lost | statement.undefined | ~np.isfinite(self.got) | ~np.isfinite(statement.expected))

    def _units(self, floor: Floor, verified: np.ndarray, arithmetics: Mapping[str, Arithmetic]) -> np.ndarray:
        classes = [arithmetics.get(equation.node.name, INSIDE) for equation, _ in self.statement.parts] or [INSIDE]
        coarsest = max(classes, key=[*ARITHMETICS.values()].index).operations(self.dtype)
        allowed = 0.0 if coarsest == self.dtype else self.rounding
        with np.errstate(all="ignore"):
            common = _lower_median(floor.spread[verified])
            units = np.maximum(self.error - allowed, 0.0) / (floor.spread + common + self._one_rounding(coarsest))
        return np.where(np.isnan(units), np.inf, units)

    def _check(
        self,
        kind: Wrong | None,
        units: np.ndarray,
        bound: bool = False,
        unverifiable: int = 0,
        wrong: np.ndarray | None = None,
    ) -> TensorCheck:
        key, expected = self.statement.key, self.statement.expected
        if units.size == 0:
            return TensorCheck(key, expected.shape, kind)
        index = tuple(int(i) for i in np.unravel_index(int(units.argmax()), units.shape))
        return TensorCheck(
            key,
            expected.shape,
            kind,
            float(units[index]),
            float(self.error[index]),
            index,
            float(expected[index]),
            float(self.got[index]),
            bound,
            unverifiable,
            Evidence(wrong, self.error, expected) if kind and wrong is not None else None,
        )


def _alike(got: np.ndarray, expected: np.ndarray, info: Any) -> np.ndarray:
    """Where both are the same number, both NaN, or infinite where the true number is beyond the dtype's range."""
    largest = float(info.max) * (1.0 - 0.5 * float(info.eps))
    beyond = np.isinf(got) & (np.abs(expected) >= largest) & (np.sign(got) == np.sign(expected))
    return np.asarray((got == expected) | (np.isnan(got) & np.isnan(expected)) | beyond)


def _lower_median(spread: np.ndarray) -> float:
    """The middle one of the numbers, of two the lower: a few that are large move it nowhere."""
    return float(np.partition(spread, (spread.size - 1) // 2)[(spread.size - 1) // 2]) if spread.size else 0.0
