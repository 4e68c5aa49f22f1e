"""Layers that join several arrays: arithmetic with broadcasting, concatenation and stacking.

Broadcasting follows NumPy: shapes are aligned at the right, and size 1 stretches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from gradproof.model.layer import Argument, Layer, ShapeError, same_shape
from gradproof.model.options import MAX_RANK, Axis, Option, Options, OptionValue, Shape, is_integer
from gradproof.reference.common import Array, Gradients, unbroadcast


def add_forward(a: Array, b: Array) -> tuple[Array, tuple[Shape, Shape]]:
    """out = a + b. Shapes: a and b broadcast to out."""
    return a + b, (a.shape, b.shape)


def add_backward(dout: Array, cache: tuple[Shape, Shape]) -> Gradients:
    """da = dout, db = dout, each summed over the axes along which it was broadcast."""
    a_shape, b_shape = cache
    return {"a": unbroadcast(dout, a_shape), "b": unbroadcast(dout, b_shape)}


def subtract_forward(a: Array, b: Array) -> tuple[Array, tuple[Shape, Shape]]:
    """out = a - b. Shapes: a and b broadcast to out."""
    return a - b, (a.shape, b.shape)


def subtract_backward(dout: Array, cache: tuple[Shape, Shape]) -> Gradients:
    """da = dout, db = -dout, each summed over the axes along which it was broadcast."""
    a_shape, b_shape = cache
    return {"a": unbroadcast(dout, a_shape), "b": unbroadcast(-dout, b_shape)}


def multiply_forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    """out = a b, element by element. Shapes: a and b broadcast to out."""
    return a * b, (a, b)


def multiply_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """da = dout b, db = dout a, each summed over the axes along which it was broadcast."""
    a, b = cache
    return {"a": unbroadcast(dout * b, a.shape), "b": unbroadcast(dout * a, b.shape)}


class Quotient(NamedTuple):
    """What a division keeps: out = a / b, to which a and b broadcast."""

    a: Array
    b: Array
    out: Array


def divide_forward(a: Array, b: Array) -> tuple[Array, Quotient]:
    """out = a / b, element by element; infinite, or NaN for 0 / 0, where b is 0. Shapes: a and b broadcast to out."""
    out = a / b
    return out, Quotient(a, b, out)


def divide_backward(dout: Array, kept: Quotient) -> Gradients:
    """da = dout / b, db = -(dout / b) (a / b), each summed over the axes along which it was broadcast.

    b^2 stands nowhere: it may overflow or vanish where neither quotient does.
    """
    a, b = kept.a, kept.b
    share = dout / b
    return {"a": unbroadcast(share, a.shape), "b": unbroadcast(-share * kept.out, b.shape)}


def concatenate_forward(*xs: Array, axis: int) -> tuple[Array, tuple[list[int], int]]:
    """out = the arrays one after another along the axis. Shapes: equal but for that axis."""
    return np.concatenate(xs, axis=axis), ([x.shape[axis] for x in xs], axis)


def concatenate_backward(dout: Array, cache: tuple[list[int], int]) -> Gradients:
    """dx_i = the part of dout that x_i filled."""
    sizes, axis = cache
    parts = np.split(dout, np.cumsum(sizes)[:-1], axis=axis)
    return {f"x{i}": part for i, part in enumerate(parts)}


def stack_forward(*xs: Array, axis: int) -> tuple[Array, tuple[int, int]]:
    """out = the arrays side by side along a new axis. Shapes: all equal."""
    return np.stack(xs, axis=axis), (len(xs), axis)


def stack_backward(dout: Array, cache: tuple[int, int]) -> Gradients:
    """dx_i = slice i of dout."""
    count, axis = cache
    return {f"x{i}": np.take(dout, i, axis=axis) for i in range(count)}


@dataclass(frozen=True)
class NewAxis:
    """Where among the first input's axes a new one goes, counted from the front or, negative, from the back."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value) and -len(shape) - 1 <= value <= len(shape)  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return f"a place for a new axis in an input of shape {list(shape)}: {-len(shape) - 1} to {len(shape)}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return [0, -1, *range(1, len(shape) + 1), *range(-len(shape) - 1, -1)]


def broadcast_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise ShapeError(f"cannot broadcast shapes {' and '.join(str(list(shape)) for shape in shapes)}") from None


def broadcast_partners(shape: Shape, options: Options) -> tuple[Shape, ...]:
    """The shape itself, then every shape that broadcasts to it or, at a 1, beyond it."""
    smaller = set(product(*({size, 1} for size in shape)))
    tails = {partner[start:] for partner in smaller for start in range(len(shape))}
    wider = {tuple(3 if size == 1 else size for size in shape)} | ({(2, *shape)} if len(shape) < 3 else set())
    return (shape, *sorted((tails | wider) - {shape}))


def _concatenated_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    axis = int(options["axis"])  # type: ignore[arg-type]
    first, *others = (list(shape) for shape in shapes)
    for other in others:
        if len(other) != len(first) or other[:axis] + other[axis:][1:] != first[:axis] + first[axis:][1:]:
            raise ShapeError(f"cannot concatenate shapes {first} and {other} along axis {axis}")
    first[axis] = sum(shape[axis] for shape in shapes)
    return tuple(first)


def _concatenation_partners(shape: Shape, options: Options) -> tuple[Shape, ...]:
    axis = int(options["axis"]) % len(shape)  # type: ignore[arg-type]
    sizes = dict.fromkeys((shape[axis], 1, 2))
    return tuple((*shape[:axis], size, *shape[axis + 1 :]) for size in sizes)


def _stacked_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    axis = int(options["axis"])  # type: ignore[arg-type]
    first, *others = shapes
    for other in others:
        if other != first:
            raise ShapeError(f"cannot stack shapes {list(first)} and {list(other)}: they must be equal")
    place = axis % (len(first) + 1)
    return (*first[:place], len(shapes), *first[place:])


PAIR = (Argument("a"), Argument("b", shapes=broadcast_partners))
PARTS = (Argument("x", shapes=_concatenation_partners),)
AXIS = (Option("axis", Axis(), -1),)

LAYERS = (
    Layer("add", "layer", "merges", add_forward, add_backward, arguments=PAIR, output_shape=broadcast_shape),
    Layer(
        "subtract", "layer", "merges", subtract_forward, subtract_backward, arguments=PAIR, output_shape=broadcast_shape
    ),
    Layer(
        "multiply", "layer", "merges", multiply_forward, multiply_backward, arguments=PAIR, output_shape=broadcast_shape
    ),
    Layer("divide", "layer", "merges", divide_forward, divide_backward, arguments=PAIR, output_shape=broadcast_shape),
    Layer(
        "concatenate",
        "layer",
        "merges",
        concatenate_forward,
        concatenate_backward,
        AXIS,
        arguments=PARTS,
        variadic=True,
        ranks=(1, MAX_RANK),
        output_shape=_concatenated_shape,
    ),
    Layer(
        "stack",
        "layer",
        "merges",
        stack_forward,
        stack_backward,
        (Option("axis", NewAxis(), 0),),
        arguments=(Argument("x", shapes=same_shape),),
        variadic=True,
        output_shape=_stacked_shape,
    ),
)
