"""Softmax and its logarithm along one axis. Shapes: x, out, dout and dx all have the same shape."""

from __future__ import annotations

import numpy as np

from gradproof.layer import UNIT, Axis, Layer, Option, normalized_shape
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


AXIS = Option("axis", Axis(), -1)

LAYERS = (
    Layer(
        "softmax",
        "activation",
        "softmax",
        softmax_forward,
        softmax_backward,
        (AXIS,),
        output_shape=normalized_shape,
        codomain=UNIT,
    ),
    Layer(
        "log_softmax",
        "activation",
        "softmax",
        log_softmax_forward,
        log_softmax_backward,
        (AXIS,),
        output_shape=normalized_shape,
    ),
)
