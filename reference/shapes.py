"""Layers that move or repeat elements without changing them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradproof.model.layer import Layer
from gradproof.model.options import MAX_RANK, NewShape, Option, Options, OptionValue, Shape, is_integer
from gradproof.reference.common import Array, Gradients, unbroadcast


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


def transpose_forward(x: Array, *, axes: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """out = x with its axes in another order: axis i of out is axis axes[i] of x."""
    order = tuple(axis % x.ndim for axis in axes)
    return x.transpose(order).copy(), order


def transpose_backward(dout: Array, order: tuple[int, ...]) -> Gradients:
    """dx = dout with its axes back in their places: the inverse permutation."""
    return {"x": dout.transpose(tuple(np.argsort(order)))}


def broadcast_forward(x: Array, *, shape: Shape) -> tuple[Array, Shape]:
    """out = x repeated along new leading axes and along axes of size 1."""
    return np.broadcast_to(x, shape).copy(), x.shape


def broadcast_backward(dout: Array, x_shape: Shape) -> Gradients:
    """dx = dout summed over the axes along which x was repeated."""
    return {"x": unbroadcast(dout, x_shape)}


@dataclass(frozen=True)
class Permutation:
    """Every axis of the first input once, in some order, each counted from the front or, negative, from the back."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        rank = len(shape)
        if not isinstance(value, tuple) or not all(is_integer(axis) and -rank <= axis < rank for axis in value):
            return False
        return sorted(axis % rank for axis in value) == list(range(rank))

    def describe(self, shape: Shape) -> str:
        return f"every axis of an input of shape {list(shape)} once, in some order"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        """Reversed; the first axis last and the last first; the last two swapped; as it was; with negative numbers."""
        every = tuple(range(len(shape)))
        orders = (every[::-1], every[1:] + every[:1], every[-1:] + every[:-1], every[:-2] + every[:-3:-1], every)
        return list(dict.fromkeys((*orders, tuple(axis - len(shape) for axis in every[1:] + every[:1]))))


@dataclass(frozen=True)
class LargerShape:
    """A shape to which the first input broadcasts."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        if not isinstance(value, tuple) or not all(is_integer(size) and size >= 0 for size in value):
            return False
        aligned = zip(value[::-1], shape[::-1], strict=False)
        return len(value) >= len(shape) and all(own in (1, size) for size, own in aligned)

    def describe(self, shape: Shape) -> str:
        return f"a shape to which an input of shape {list(shape)} broadcasts"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        """Along a new axis, along every axis of size 1, both; a new axis of size 1, two new axes; as it was."""
        wide = tuple(3 if size == 1 else size for size in shape)
        return list(dict.fromkeys(((2, *shape), wide, (2, *wide), (1, *shape), (3, 1, *shape), shape)))


def _reshaped(shapes: Sequence[Shape], options: Options) -> Shape:
    shape = options["shape"]
    assert isinstance(shape, tuple)
    return shape


def _transposed(shapes: Sequence[Shape], options: Options) -> Shape:
    axes = options["axes"]
    assert isinstance(axes, tuple)
    return tuple(shapes[0][axis] for axis in axes)


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
    Layer(
        "transpose",
        "layer",
        "shapes",
        transpose_forward,
        transpose_backward,
        (Option("axes", Permutation()),),
        ranks=(1, MAX_RANK),
        output_shape=_transposed,
    ),
    Layer(
        "broadcast",
        "layer",
        "shapes",
        broadcast_forward,
        broadcast_backward,
        (Option("shape", LargerShape()),),
        shapes=((2, 3), (1, 3), (2, 1), (1,), (2, 1, 5)),
        output_shape=_reshaped,
    ),
)
