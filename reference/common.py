"""What the families share.

Legend: x input, out output, dout cotangent of the output, dx cotangent of x; cache: what forward keeps.
Everything stays complex-safe: comparisons are made on `.real` alone, so that a complex step can pass.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Gradients = dict[str, Array]


def positive_part(x: Array) -> Array:
    """max(x, 0), which lets NaN through."""
    return np.where(x.real < 0, 0.0, x)


def magnitude(x: Array) -> Array:
    """|x| of a real x, in a form that a complex step can differentiate."""
    return np.where(x.real < 0, -x, x)


def clamp(x: Array, low: float, high: float) -> Array:
    """x, but not below `low` and not above `high`; NaN passes."""
    return np.where(x.real < low, low, np.where(x.real > high, high, x))


def one_sided(x: Array, left: Any, right: Any, weight: float) -> Array:
    """A derivative that is `left` below 0, `right` above, left + weight * (right - left) at 0, and none at NaN."""
    at_zero = np.where(np.isnan(x.real), np.nan, left + weight * (right - left))
    return np.where(x.real < 0, left, np.where(x.real > 0, right, at_zero))


def logistic(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow on either side: exp is only taken of -|x|."""
    decay = np.exp(-magnitude(x))
    return np.where(x.real < 0, decay, 1.0) / (1.0 + decay)


def log_one_plus_exp(x: Array) -> Array:
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))."""
    return positive_part(x) + np.log1p(np.exp(-magnitude(x)))


def unbroadcast(dout: Array, shape: tuple[int, ...]) -> Array:
    """Sum `dout` over the axes along which an array of `shape` was broadcast: the adjoint of broadcasting."""
    leading = dout.ndim - len(shape)
    summed = dout.sum(axis=tuple(range(leading)))
    stretched = tuple(axis for axis, size in enumerate(shape) if size == 1 and summed.shape[axis] != 1)
    return summed.sum(axis=stretched, keepdims=True)


def tie_shares(largest: Array, axis: int, weight: float) -> Array:
    """The share of the gradient that each of the largest elements along an axis takes.

    largest: where an element is one of them. weight: 0 gives it to the first, 1 to the last, else all share evenly.
    Where none is, because the largest is NaN, the shares are NaN.
    """
    if weight == 0.0:
        others = np.where(largest.any(axis, keepdims=True), 0.0, np.nan)
        return np.where(largest & (np.cumsum(largest, axis) == 1), 1.0, others)
    if weight == 1.0:
        return np.flip(tie_shares(np.flip(largest, axis), axis, 0.0), axis)
    return largest / largest.sum(axis=axis, keepdims=True)


def reduce_loss(loss: Array, reduction: str) -> Array:
    """The loss as it is ("none"), its mean over all elements, or its sum."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / loss.size if reduction == "mean" else total


def spread_cotangent(dout: Array, shape: tuple[int, ...], reduction: str) -> Array:
    """The cotangent of the unreduced loss: the adjoint of `reduce_loss`."""
    scaled = dout / math.prod(shape) if reduction == "mean" else dout
    return np.broadcast_to(scaled, shape)
