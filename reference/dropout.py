"""Dropout with a given mask: what is random in it is an input."""

from __future__ import annotations

from collections.abc import Sequence

from gradproof.model.layer import MASK, Argument, Domain, Layer, ShapeError, same_shape
from gradproof.model.options import Option, Options, Real, Shape
from gradproof.reference.common import Array, Gradients


def dropout_forward(x: Array, mask: Array, *, p: float) -> tuple[Array, Array]:
    """out = x mask / (1 - p), mask 1 where x is kept and 0 where it is dropped (Srivastava et al. 2014).

    Shapes: x, mask and out are equal. The scale keeps the mean of x where elements are dropped with probability p.
    """
    scale = mask / (1.0 - p)
    return x * scale, scale


def dropout_backward(dout: Array, scale: Array) -> Gradients:
    """dx = dout mask / (1 - p)."""
    return {"x": dout * scale}


def _mask(shape: Shape, options: Options) -> Domain:
    return MASK


def _output_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x, mask = shapes
    if mask != x:
        raise ShapeError(f"its mask must have the shape of x, {list(x)}, got {list(mask)}")
    return x


LAYERS: tuple[Layer, ...] = (
    Layer(
        "dropout",
        "layer",
        "dropout",
        dropout_forward,
        dropout_backward,
        (Option("p", Real(0.0, 0.999, (0.5, 0.1, 0.9, 0.0)), 0.5),),
        (Argument("x"), Argument("mask", _mask, same_shape)),
        output_shape=_output_shape,
    ),
)
