"""Layers that move elements without changing them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradproof.layer import MAX_RANK, Layer, NewShape, Option, Options, Shape
from gradproof.reference.common import Array, Gradients


def reshape_forward(x: Array, *, shape: Shape) -> tuple[Array, Shape]:
    """out = the elements of x in row-major order, in another shape of the same size."""
    return x.reshape(shape).copy(), x.shape


def reshape_backward(dout: Array, x_shape: Shape) -> Gradients:
    """dx = the elements of dout in row-major order, in x's shape."""
    return {"x": dout.reshape(x_shape)}


def flatten_forward(x: Array) -> tuple[Array, Shape]:
    """out = x with all axes after the first made one. Shapes: x (B, ...), out (B, product of ...)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).copy(), x.shape


def flatten_backward(dout: Array, x_shape: Shape) -> Gradients:
    """dx = dout in x's shape."""
    return {"x": dout.reshape(x_shape)}


def _reshaped(shapes: Sequence[Shape], options: Options) -> Shape:
    shape = options["shape"]
    assert isinstance(shape, tuple)
    return shape


def _flattened(shapes: Sequence[Shape], options: Options) -> Shape:
    return (shapes[0][0], math.prod(shapes[0][1:]))


LAYERS = (
    Layer(
        "reshape",
        "layer",
        "shapes",
        reshape_forward,
        reshape_backward,
        (Option("shape", NewShape()),),
        output_shape=_reshaped,
    ),
    Layer(
        "flatten", "layer", "shapes", flatten_forward, flatten_backward, ranks=(1, MAX_RANK), output_shape=_flattened
    ),
)
