"""Softmax and what belongs to it. Shapes: x, out, dout and dx all have the same shape, but for logsumexp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradproof.model.layer import UNIT, Layer, normalized_shape
from gradproof.model.options import MAX_RANK, Axes, Axis, Choice, Option, Options, Shape
from gradproof.reference.common import Array, Gradients


def softmax_forward(x: Array, *, axis: int) -> tuple[Array, tuple[Array, int]]:
    """s_i = exp(x_i) / sum_j exp(x_j); the maximum, which cancels, is subtracted first."""
    weights = np.exp(x - x.real.max(axis=axis, keepdims=True))
    out = weights / weights.sum(axis=axis, keepdims=True)
    return out, (out, axis)


def softmax_backward(dout: Array, cache: tuple[Array, int]) -> Gradients:
    """dx_i = s_i (dout_i - sum_j dout_j s_j), from ds_j / dx_i = s_j ((i = j) - s_i)."""
    out, axis = cache
    return {"x": out * (dout - (dout * out).sum(axis=axis, keepdims=True))}


def log_softmax_forward(x: Array, *, axis: int) -> tuple[Array, tuple[Array, int]]:
    """f_i = x_i - log(sum_j exp(x_j)); the maximum, which cancels, is subtracted first."""
    shifted = x - x.real.max(axis=axis, keepdims=True)
    out = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    return out, (out, axis)


def log_softmax_backward(dout: Array, cache: tuple[Array, int]) -> Gradients:
    """dx_i = dout_i - s_i sum_j dout_j, with s = exp(f)."""
    out, axis = cache
    return {"x": dout - np.exp(out) * dout.sum(axis=axis, keepdims=True)}


def softmin_forward(x: Array, *, axis: int) -> tuple[Array, tuple[Array, int]]:
    """s_i = exp(-x_i) / sum_j exp(-x_j)."""
    return softmax_forward(-x, axis=axis)


def softmin_backward(dout: Array, cache: tuple[Array, int]) -> Gradients:
    """dx_i = -s_i (dout_i - sum_j dout_j s_j)."""
    return {"x": -softmax_backward(dout, cache)["x"]}


class SummedExponentials(NamedTuple):
    """What logsumexp keeps: the softmax over the axes, which has the shape of x."""

    softmax: Array
    axis: tuple[int, ...]
    keepdims: bool


def logsumexp_forward(x: Array, *, axis: tuple[int, ...], keepdims: bool) -> tuple[Array, SummedExponentials]:
    """out = log(sum_j exp(x_j)), over one or more axes; the maximum is taken out of the sum first.

    Shapes: out as x, the axes dropped or, with keepdims, of length 1.
    """
    peak = x.real.max(axis=axis, keepdims=True)
    weights = np.exp(x - peak)
    total = weights.sum(axis=axis, keepdims=True)
    out = peak + np.log(total)
    kept = SummedExponentials(weights / total, axis, keepdims)
    return (out if keepdims else np.squeeze(out, axis)), kept


def logsumexp_backward(dout: Array, kept: SummedExponentials) -> Gradients:
    """dx_i = dout s_i, with s the softmax over the axes."""
    return {"x": kept.softmax * (dout if kept.keepdims else np.expand_dims(dout, kept.axis))}


def _reduced_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    shape = normalized_shape(shapes, options)
    axes: Any = options["axis"]
    reduced = {axis % len(shape) for axis in axes}
    if options["keepdims"]:
        return tuple(1 if axis in reduced else size for axis, size in enumerate(shape))
    return tuple(size for axis, size in enumerate(shape) if axis not in reduced)


AXIS = Option("axis", Axis(), -1)
AXES = Option("axis", Axes(), (-1,))
KEEPDIMS = Option("keepdims", Choice((False, True)), False)

normalized = partial(
    Layer, kind="activation", family="softmax", options=(AXIS,), ranks=(1, MAX_RANK), output_shape=normalized_shape
)

LAYERS = (
    normalized("softmax", forward=softmax_forward, backward=softmax_backward, codomain=UNIT),
    normalized("log_softmax", forward=log_softmax_forward, backward=log_softmax_backward),
    normalized("softmin", forward=softmin_forward, backward=softmin_backward, codomain=UNIT),
    normalized(
        "logsumexp",
        forward=logsumexp_forward,
        backward=logsumexp_backward,
        options=(AXES, KEEPDIMS),
        output_shape=_reduced_shape,
    ),
)
