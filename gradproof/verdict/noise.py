"""The noise floor: how far rounding in a dtype can move each number of the reference.

The unchanged reference is run on arrays that perturb every elementary operation as the dtype's rounding
could (Monte Carlo arithmetic, Parker 1997; random rounding, Vignes 1993). The spread is the floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtr

from gradproof.model.dtypes import is_floating, limits

FLOAT64 = np.dtype("float64")

# These give a result that the dtype holds without rounding, so it stays as it is.
EXACT_UFUNCS = frozenset(
    [np.negative, np.positive, np.absolute, np.fabs, np.sign, np.maximum, np.minimum, np.fmax, np.fmin]
    + [np.floor, np.ceil, np.trunc, np.rint, np.conjugate, np.copysign]
)
EXACT_FUNCTIONS = frozenset(
    [np.where, np.concatenate, np.stack, np.split, np.array_split, np.reshape, np.transpose, np.moveaxis, np.swapaxes]
    + [np.broadcast_to, np.expand_dims, np.squeeze, np.take_along_axis, np.put_along_axis, np.pad, np.flip, np.roll]
    + [np.repeat, np.tile, np.sort, np.max, np.min, np.amax, np.amin, np.zeros_like, np.ones_like, np.full_like]
    + [np.empty_like, np.atleast_1d, np.atleast_2d, np.diagonal, np.copy, np.ravel, np.take, np.select, np.choose]
    + [
        np.argsort,
        np.argmax,
        np.argmin,
        np.lexsort,
        np.searchsorted,
        np.lib.stride_tricks.sliding_window_view,
        np.flipud,
        np.fliplr,
    ]
    + [np.rot90, np.rollaxis, np.vstack, np.hstack, np.tril, np.triu, np.nonzero, np.isclose, np.array_equal]
)
# Sums round as they go, so the terms are perturbed as well as the total.
SUMMING_METHODS = frozenset(["reduce", "accumulate", "reduceat"])
# Frameworks compute the normal distribution function as (1 + erf) / 2, which rounds at 1, not at the result.
ROUNDED_AT_ONE = frozenset([ndtr])


POOL = 4096
"""Random numbers made at once; small arrays would spend most of their time asking for a few."""


class Rounding:
    """One sample of the rounding errors that a dtype's arithmetic may make.

    dtype: the arithmetic's dtype. generator: where the errors come from.
    to_grid: round at random up or down to the dtype's own numbers, which keeps exact results exact and lets
        neighbours collide; otherwise shift by a relative error of up to half a unit in the last place.
    in_order: let every partial sum round, as where terms are added one after the other.
    """

    def __init__(
        self, dtype: np.dtype[Any], generator: np.random.Generator, to_grid: bool, in_order: bool = False
    ) -> None:
        info = limits(dtype)
        self.dtype = dtype
        self.in_order = in_order
        self.generator = generator
        self.to_grid = to_grid and dtype != FLOAT64
        self.largest = float(info.max)
        self.smallest_normal = float(info.smallest_normal)
        self.smallest = float(info.smallest_subnormal)
        # A float64 result is rounded already: a shift of half a unit would be rounded away again. On the way to a
        # grid, a quarter keeps every shift below half a step, so that a number on the grid stays where it is.
        self.unit = float(info.eps) * (1.0 if dtype == FLOAT64 else 0.25 if self.to_grid else 0.5)
        self._errors = np.empty(0)

    def __call__(self, exact: np.ndarray, at_one: bool = False) -> np.ndarray:
        """The array with rounding errors; NaN where the dtype overflows."""
        errors = self._take(exact.size).reshape(exact.shape)
        with np.errstate(all="ignore"):  # what leaves the range is NaN in the end
            return self._rounded(exact, errors, at_one)

    def _rounded(self, exact: np.ndarray, errors: np.ndarray, at_one: bool) -> np.ndarray:
        rounded = exact + errors * (1.0 if at_one else exact)
        if self.to_grid:
            beyond = 1.0 if at_one else 0.0
            rounded = (beyond + rounded).astype(self.dtype).astype(FLOAT64) - beyond
        size = np.abs(exact)
        ordinary = (size >= self.smallest_normal) & (size <= self.largest)
        return np.asarray(rounded) if ordinary.all() else self._at_the_ends(exact, size, rounded)

    def _at_the_ends(self, exact: np.ndarray, size: np.ndarray, rounded: np.ndarray) -> np.ndarray:
        """Zero stays zero, numbers below the smallest normal one are flushed to zero or rounded, overflow is NaN."""
        small = np.where(size < self.smallest_normal, self._subnormal(self.flushed(exact)), rounded)
        return np.where(size <= self.largest, small, np.nan)

    def _subnormal(self, small: np.ndarray) -> np.ndarray:
        """Small numbers rounded to multiples of the smallest one, or shifted by as much; zero stays zero."""
        steps = small / self.smallest
        shift = self._take(small.size).reshape(small.shape) / self.unit
        shifted = np.floor(steps + 0.5 + 0.5 * shift) if self.to_grid else steps + 0.5 * shift
        return np.where(small == 0.0, 0.0, shifted * self.smallest)

    def flushed(self, exact: np.ndarray) -> np.ndarray:
        """The array with numbers below the smallest normal one zero by chance, as on hardware that flushes them."""
        small = (exact != 0.0) & (np.abs(exact) < self.smallest_normal)
        if not small.any():
            return exact
        kept = self._take(exact.size).reshape(exact.shape) > 0.0
        return np.where(small & ~kept, 0.0, exact)

    def _take(self, count: int) -> np.ndarray:
        """Relative errors, uniform within a unit."""
        if self._errors.size < count:
            self._errors = self.unit * self.generator.uniform(-1.0, 1.0, max(POOL, count))
        taken, self._errors = self._errors[:count], self._errors[count:]
        return taken


class Noisy(np.ndarray):
    """A float64 array whose arithmetic makes the errors of a `Rounding`; results are Noisy again."""

    rounding: Rounding

    def __array_finalize__(self, source: Any) -> None:
        self.rounding = getattr(source, "rounding", None)  # type: ignore[assignment]

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        rounding = _rounding_of(inputs)
        if method == "at":
            return _add_in_place(ufunc, inputs, rounding)
        summing = method in SUMMING_METHODS or ufunc is np.matmul
        exact = ufunc in EXACT_UFUNCS
        operands = [_plain(each, rounding if summing and not exact else None) for each in inputs]
        result = getattr(ufunc, method)(*operands, **options)
        if ufunc is np.matmul or (ufunc is np.add and method == "reduce"):
            result = _in_any_order(getattr(ufunc, method), operands, options, result, rounding.largest)
            if rounding.in_order:
                result = result + _partial_roundings(ufunc, operands, options, rounding)
        rounded = _wrap(result, rounding, exact, at_one=ufunc in ROUNDED_AT_ONE)
        if out is None:
            return rounded
        out[0][...] = rounded
        return out[0]

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        rounding = _rounding_of(_leaves(args))
        exact = function in EXACT_FUNCTIONS
        plain = _map_arrays(args, lambda array: _plain(array, None if exact else rounding))
        return _wrap(function(*plain, **kwargs), rounding, exact)


def _in_any_order(
    summed: Callable[..., Any], operands: Sequence[Any], options: Any, result: Any, largest: float
) -> Any:
    """The sums; NaN where some order of the terms leaves the range, which is looked at where numbers are that large."""
    sizes = [np.abs(each) for each in operands]
    peaks = [float(each.max(initial=0.0)) for each in sizes]
    if math.prod(peaks) * max(each.size for each in sizes) <= largest:
        return result
    return _on_the_way(result, summed(*sizes, **options), largest)


def _on_the_way(total: Any, of_magnitudes: Any, largest: float) -> Any:
    """The totals; NaN where the terms can be added in an order that leaves the range on the way.

    The largest partial sum of all orders is that of the positive terms, or of the negative ones: half of the sum of
    the magnitudes and the magnitude of the total.
    """
    with np.errstate(all="ignore"):
        return np.where(of_magnitudes + np.abs(total) > 2.0 * largest, np.nan, total)


def _partial_roundings(ufunc: np.ufunc, operands: Sequence[Any], options: Any, rounding: Rounding) -> Any:
    """What the rounding of the partial sums does to a sum, or to a product of matrices."""
    if ufunc is np.matmul:
        a, b = (np.asarray(each, FLOAT64) for each in operands)
        a = a[None, :] if operands[0].ndim == 1 else a
        b = b[:, None] if operands[1].ndim == 1 else b
        partial = np.cumsum(a[..., :, :, None] * b[..., None, :, :], axis=-2)
        moved = (rounding(partial) - partial).sum(axis=-2)
        moved = moved[..., 0, :] if operands[0].ndim == 1 else moved
        return moved[..., 0] if operands[1].ndim == 1 else moved
    (array,) = operands
    axis = options.get("axis", 0)
    axes = tuple(range(array.ndim)) if axis is None else tuple(np.atleast_1d(axis))
    kept = np.moveaxis(array, axes, tuple(range(len(axes))))
    partial = np.cumsum(kept.reshape(-1, *kept.shape[len(axes) :]), axis=0)
    moved = (rounding(partial) - partial).sum(axis=0)
    return np.expand_dims(moved, tuple(a % array.ndim for a in axes)) if options.get("keepdims") else moved


def _add_in_place(ufunc: np.ufunc, inputs: Any, rounding: Rounding) -> None:
    """`ufunc.at`: what is added rounds, and so does what it is added to."""
    target, index, *operands = (_plain(each, None) for each in inputs)
    sizes = np.abs(target)
    ufunc.at(sizes, index, *(np.abs(each) for each in operands))
    ufunc.at(target, index, *(rounding(each) for each in operands))
    target[...] = rounding(_on_the_way(target, sizes, rounding.largest))


def _leaves(args: Any) -> list[Any]:
    return [leaf for each in args for leaf in _leaves(each)] if isinstance(args, (tuple, list)) else [args]


def _map_arrays(args: Any, change: Callable[[Any], Any]) -> Any:
    return type(args)(_map_arrays(each, change) for each in args) if isinstance(args, (tuple, list)) else change(args)


def _rounding_of(arrays: Any) -> Rounding:
    return next(each.rounding for each in arrays if isinstance(each, Noisy) and each.rounding is not None)


def _plain(value: Any, rounding: Rounding | None) -> Any:
    if not isinstance(value, Noisy):
        return value
    array = value.view(np.ndarray)
    return rounding(array) if rounding is not None and is_floating(array) else array


def _wrap(result: Any, rounding: Rounding, exact: bool, at_one: bool = False) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(_wrap(each, rounding, exact, at_one) for each in result)
    if not is_floating(result):
        return result
    return observe(np.asarray(result) if exact else rounding(np.asarray(result), at_one), rounding)


def observe(array: np.ndarray, rounding: Rounding) -> Noisy:
    """The array, its numbers as they are, in arithmetic that makes the errors of `rounding`."""
    noisy = array.astype(FLOAT64).view(Noisy)
    noisy.rounding = rounding
    return noisy


def rounded_inside(cache: Any, rounding: Rounding) -> Any:
    """What a forward function kept, its floating arrays rounded; what the dtype holds, as an input, stays as it is."""
    if isinstance(cache, (tuple, list)):
        parts = (rounded_inside(each, rounding) for each in cache)
        return cache._make(parts) if hasattr(cache, "_make") else type(cache)(parts)
    if not is_floating(cache):
        return cache
    array = np.asarray(cache)
    held = array.astype(rounding.dtype).astype(FLOAT64) == array
    rounded = np.where(held, array, rounding(array))
    return observe(rounded, cache.rounding) if isinstance(cache, Noisy) else rounded
