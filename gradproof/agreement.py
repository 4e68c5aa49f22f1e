"""Do two sets of tensors agree to within the rounding that the dtype explains?

The error of an element is counted in noise units: error / (floor of the element + mean floor of its
tensor + one rounding of its value + the smallest normal number).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradproof.dtypes import limits
from gradproof.layer import Shape
from gradproof.noise import Floor, NoiseSamples

THRESHOLD = 16.0
"""Noise units above which an element disagrees: one number for every dtype, depth and layer."""

SUFFICIENT = 8.0
"""Noise units up to which no more runs are needed; counted against one rounding alone, no run at all."""

FEW_RUNS, MANY_RUNS = 4, 64
"""Perturbed runs to begin with, and before anything is called wrong."""

ILL_CONDITIONED = 0.05
"""Where the mean floor of a tensor exceeds this share of its mean magnitude, first-order reasoning ends."""

LOOSE_THRESHOLD = 256.0
"""Noise units above which an element of an ill-conditioned tensor disagrees."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """All elements of a tensor that disagrees: which are wrong, by how much, and what was expected."""

    wrong: np.ndarray
    error: np.ndarray
    expected: np.ndarray


@dataclass(frozen=True)
class TensorCheck:
    """What was found for one tensor.

    key: "value:NODE" or "gradient:NAME". kind: None where it agrees, else what is wrong.
    max_error, index, expected, got: the element with the most noise units (None where nothing was compared).
    noise_units: the worst over all verified elements; an upper bound where the first test sufficed.
    unverifiable, ill_conditioned: numbers of elements. evidence: all elements, where values disagree.
    second_pass: it agrees after one backward pass, and what is told is of a second one on the same tape.
    """

    key: str
    shape: Shape
    kind: str | None
    noise_units: float = 0.0
    max_error: float | None = None
    index: tuple[int, ...] | None = None
    expected: Any = None
    got: Any = None
    unverifiable: int = 0
    ill_conditioned: int = 0
    evidence: Evidence | None = field(default=None, repr=False, compare=False)
    second_pass: bool = False

    @property
    def role(self) -> str:
        return self.key.partition(":")[0]

    @property
    def tensor(self) -> str:
        return self.key.partition(":")[2]

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=int))


def compare(
    expected: Mapping[str, np.ndarray], got: Mapping[str, Any], samples: NoiseSamples, dtype: str
) -> tuple[TensorCheck, ...]:
    """Check every expected tensor: present, of the right shape and dtype, finite, and agreeing; then no others."""
    checks = [_check(key, expected, got.get(key), samples, np.dtype(dtype)) for key in expected]
    unknown = [_unknown(key, got[key]) for key in got.keys() - expected.keys()]
    return (*checks, *sorted(unknown, key=lambda check: check.key))


def _unknown(key: str, got: Any) -> TensorCheck:
    shape = getattr(got, "shape", ())
    return TensorCheck(key, shape, "missing", float("inf"), expected="nothing of this name", got="not asked for")


def _check(
    key: str, every: Mapping[str, np.ndarray], got: Any, samples: NoiseSamples, dtype: np.dtype[Any]
) -> TensorCheck:
    expected = every[key]
    fault = _structural_fault(expected, got, dtype)
    if fault:
        kind, wanted, found = fault
        return TensorCheck(key, expected.shape, kind, float("inf"), expected=wanted, got=found)
    return _check_values(key, every, got.astype(np.float64), samples, dtype)


def _structural_fault(expected: np.ndarray, got: Any, dtype: np.dtype[Any]) -> tuple[str, str, str] | None:
    if got is None:
        return "missing", "an array", "None"
    if not isinstance(got, (np.ndarray, np.generic)):
        return "dtype", f"a NumPy array of {dtype}", type(got).__name__
    if got.shape != expected.shape:
        return "shape", str(list(expected.shape)), str(list(got.shape))
    if got.dtype != dtype:
        return "dtype", str(dtype), str(got.dtype)
    return None


def _floor(key: str, every: Mapping[str, np.ndarray], samples: NoiseSamples, count: int) -> Floor:
    """The floor of a tensor; where a value is beyond the dtype's range, its gradient says nothing either."""
    floor = samples.floor(key, every[key], count)
    value = key.replace("gradient:", "value:", 1)
    if value == key or value not in every:
        return floor
    lost = samples.floor(value, every[value], count).overflows
    return Floor(np.where(lost, 0.0, floor.spread), floor.overflows | lost)


def _check_values(
    key: str, every: Mapping[str, np.ndarray], got: np.ndarray, samples: NoiseSamples, dtype: np.dtype[Any]
) -> TensorCheck:
    expected = every[key]
    info = limits(dtype)
    with np.errstate(all="ignore"):
        error = np.abs(got - expected)
        rounding = 0.5 * float(info.eps) * np.abs(expected) + float(info.smallest_normal)
        units = error / rounding
    if units.size == 0 or units.max() <= SUFFICIENT:  # False where anything is NaN or infinite
        return _result(key, None, units, error, expected, got)
    for count in (FEW_RUNS, MANY_RUNS):
        floor = _floor(key, every, samples, count)
        if not samples.given_finite:  # 0 times infinity: how far a NaN spreads is not laid down
            floor = Floor(floor.spread, floor.overflows | ~np.isfinite(got))
        units, ill_conditioned = _noise_units(error, expected, floor, rounding)
        if units.max() <= SUFFICIENT:
            break
    wrong = units > (LOOSE_THRESHOLD if ill_conditioned else THRESHOLD)
    kind = None if not wrong.any() else "gradient" if key.startswith("gradient") else "value"
    if (~np.isfinite(got) & wrong).any():
        kind = "nonfinite"
    unverifiable = int(floor.overflows.sum())
    doubtful = (units.size - unverifiable) if ill_conditioned else 0
    return _result(key, kind, units, error, expected, got, unverifiable, doubtful, wrong)


def _noise_units(
    error: np.ndarray, expected: np.ndarray, floor: Floor, rounding: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Noise units per element (0 where unverifiable, infinite where only the adapter is not finite)."""
    verified = ~floor.overflows
    if not verified.any():
        return np.zeros(error.shape), False
    mean_floor = _mean(floor.spread[verified])
    magnitude = _mean(np.abs(expected[verified]))
    with np.errstate(all="ignore"):
        units = error / (floor.spread + mean_floor + rounding)
    units = np.where(np.isnan(units), np.inf, units)
    return np.where(verified, units, 0.0), mean_floor > ILL_CONDITIONED * magnitude > 0.0


def _mean(sizes: np.ndarray) -> float:
    """The mean of numbers of at least 0, whose sum may be beyond the range of float64."""
    peak = float(sizes.max())
    return peak * float((sizes / peak).mean()) if peak > 0.0 else 0.0


def _result(
    key: str,
    kind: str | None,
    units: np.ndarray,
    error: np.ndarray,
    expected: np.ndarray,
    got: np.ndarray,
    unverifiable: int = 0,
    ill_conditioned: int = 0,
    wrong: np.ndarray | None = None,
) -> TensorCheck:
    if units.size == 0:
        return TensorCheck(key, expected.shape, kind)
    index = tuple(int(i) for i in np.unravel_index(int(units.argmax()), units.shape))
    return TensorCheck(
        key,
        expected.shape,
        kind,
        float(units[index]),
        float(error[index]),
        index,
        float(expected[index]),
        float(got[index]),
        unverifiable,
        ill_conditioned,
        Evidence(wrong, error, expected) if kind and wrong is not None else None,
    )
