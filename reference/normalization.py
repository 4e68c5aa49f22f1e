"""Normalisation layers.

Legend: D the trailing axes that are normalised together, ... the leading ones, n the number of elements of D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradproof.layer import Choice, Layer, Option, Options, Real, Shape, TrailingAxes, normalized_shape
from gradproof.reference.common import Array, Gradients, unbroadcast


def layer_norm_forward(
    x: Array, weight: Array | None = None, bias: Array | None = None, *, axes: int, eps: float
) -> tuple[Array, tuple[Any, ...]]:
    """out = (x - m) r * weight + bias, m the mean over D, r = 1 / sqrt(variance over D + eps) (Ba et al. 2016).

    Shapes: x and out (..., D), weight and bias (D). The variance is the biased one (divided by n).
    """
    over = tuple(range(-axes, 0))
    centred = x - x.mean(axis=over, keepdims=True)
    reciprocal = 1.0 / np.sqrt((centred * centred).mean(axis=over, keepdims=True) + eps)
    normalized = centred * reciprocal
    cache = (normalized, reciprocal, weight, over)
    return (normalized if weight is None else normalized * weight + bias), cache


def layer_norm_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = r (g - mean(g) - z mean(g z)), g = dout * weight, z = (x - m) r; dweight = sum dout z; dbias = sum dout.

    The means are over D, the sums over the leading axes.
    """
    normalized, reciprocal, weight, over = cache
    g = dout if weight is None else dout * weight
    mean_g = g.mean(axis=over, keepdims=True)
    mean_gz = (g * normalized).mean(axis=over, keepdims=True)
    gradients = {"x": reciprocal * (g - mean_g - normalized * mean_gz)}
    if weight is not None:
        gradients |= {"weight": unbroadcast(dout * normalized, weight.shape), "bias": unbroadcast(dout, weight.shape)}
    return gradients


def _parameters(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    normalized = shapes[0][-int(options["axes"]) :]  # type: ignore[arg-type]
    return {"weight": normalized, "bias": normalized} if options["affine"] else {}


OPTIONS = (
    Option("axes", TrailingAxes(), 1),
    Option("eps", Real(0.0, 1.0, (1e-5, 1e-3, 0.1)), 1e-5),
    Option("affine", Choice((True, False)), True, structural=True),
)

LAYERS = (
    Layer(
        "layer_norm",
        "layer",
        "normalization",
        layer_norm_forward,
        layer_norm_backward,
        OPTIONS,
        output_shape=normalized_shape,
        parameters=_parameters,
    ),
)
