"""Gated linear units, and the maximum of groups.

Legend: a the first and b the second half of x along the axis. Shapes: out as x, the axis half as long (maxout:
shorter by the number of pieces).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradproof.model.layer import Kink, Layer, ShapeError
from gradproof.model.options import MAX_RANK, Axis, Choice, Option, Options, OptionValue, Shape, Size
from gradproof.reference.activations import (
    gelu_backward,
    gelu_forward,
    gelu_tanh_backward,
    gelu_tanh_forward,
    silu_backward,
    silu_forward,
)
from gradproof.reference.common import Array, Gradients, logistic, tie_shares
from gradproof.reference.walk import Row


class Gated(NamedTuple):
    """What glu keeps: a, the gate sigmoid(b), and the axis of the halves."""

    a: Array
    gate: Array
    axis: int


def glu_forward(x: Array, *, axis: int) -> tuple[Array, Gated]:
    """out = a sigmoid(b) (Dauphin et al. 2017)."""
    a, b = np.split(x, 2, axis)
    gate = logistic(b)
    return a * gate, Gated(a, gate, axis)


def glu_backward(dout: Array, kept: Gated) -> Gradients:
    """da = dout s, db = da a (1 - s), with s = sigmoid(b), the gate."""
    a, s = kept.a, kept.gate
    da = dout * s
    db = da * a * (1.0 - s)
    return {"x": np.concatenate((da, db), kept.axis)}


class Unit(NamedTuple):
    """What out = f(a) b keeps: f(a), b, what f keeps of a, the backward function of f, and the axis."""

    active: Array
    b: Array
    of_a: Any
    backward: Callable[[Array, Any], Gradients]
    axis: int


def unit_forward(activation: Row, x: Array, axis: int) -> tuple[Array, Unit]:
    """out = f(a) b, f the activation of this pair of functions."""
    forward, backward = activation
    a, b = np.split(x, 2, axis)
    active, of_a = forward(a)
    return active * b, Unit(active, b, of_a, backward, axis)


def unit_backward(dout: Array, kept: Unit) -> Gradients:
    """da = dout b f'(a), db = dout f(a)."""
    da = kept.backward(dout * kept.b, kept.of_a)["x"]
    db = dout * kept.active
    return {"x": np.concatenate((da, db), kept.axis)}


def swiglu_forward(x: Array, *, axis: int) -> tuple[Array, Unit]:
    """out = silu(a) b (Shazeer 2020)."""
    return unit_forward((silu_forward, silu_backward), x, axis)


GELUS: dict[str, Row] = {
    "none": (gelu_forward, gelu_backward),
    "tanh": (gelu_tanh_forward, gelu_tanh_backward),
}


def geglu_forward(x: Array, *, axis: int, approximate: str) -> tuple[Array, Unit]:
    """out = gelu(a) b, gelu in its exact form or in its tanh form (Shazeer 2020)."""
    return unit_forward(GELUS[approximate], x, axis)


class Winners(NamedTuple):
    """What maxout keeps: each piece's share of its group's gradient, with the pieces along an axis of their own.

    within: that axis. shape: x's.
    """

    shares: Array
    within: int
    shape: Shape


def maxout_forward(x: Array, *, axis: int, pieces: int, at_tie: float = 0.0) -> tuple[Array, Winners]:
    """out_i = max over j < pieces of x_(i pieces + j), i and j along the axis (Goodfellow et al. 2013)."""
    place = axis % x.ndim
    within = place + 1
    grouped = x.reshape(*x.shape[:place], x.shape[place] // pieces, pieces, *x.shape[within:])
    winner = np.argmax(grouped.real, axis=within, keepdims=True)
    largest = np.take_along_axis(grouped, winner, within)
    shares = tie_shares(grouped.real == largest.real, within, at_tie)
    # NaN, which overflow leaves behind, equals nothing and must not pass for a share of 0.
    shares = np.where(np.isnan(largest), largest.real, shares)
    return np.squeeze(largest, within), Winners(shares, within, x.shape)


def maxout_backward(dout: Array, kept: Winners) -> Gradients:
    """dx = dout at the largest of each group, 0 elsewhere. Where several are largest, by default at the first."""
    return {"x": (kept.shares * np.expand_dims(dout, kept.within)).reshape(kept.shape)}


class HalvedAxis(Axis):
    """One axis of the first input; networks are drawn with those that have two halves."""

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        every: Sequence[Any] = super().choices(shape)
        return [axis for axis in every if shape and shape[axis] % 2 == 0] or [-1]


class Pieces(Size):
    """How many neighbours along an axis compete; networks are drawn with a divisor of some axis, the last one first."""

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        fitting = [pieces for size in reversed(shape) for pieces in (2, 3, 5) if size % pieces == 0]
        return list(dict.fromkeys((*fitting, 1)))


def _halved_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    return _divided(shapes[0], int(options["axis"]), 2)  # type: ignore[arg-type]


def _maxout_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    return _divided(shapes[0], int(options["axis"]), int(options["pieces"]))  # type: ignore[arg-type]


def _divided(shape: Shape, axis: int, parts: int) -> Shape:
    """The shape with this axis divided by `parts`."""
    if shape[axis] % parts:
        raise ShapeError(f"needs a multiple of {parts} elements along axis {axis}, got an input of shape {list(shape)}")
    place = axis % len(shape)
    return (*shape[:place], shape[place] // parts, *shape[place + 1 :])


HALVED = Option("axis", HalvedAxis(), -1)
APPROXIMATE = Option("approximate", Choice(("none", "tanh")), "none")
MAXOUT = (Option("axis", Axis(), -1), Option("pieces", Pieces()))
# On one axis, then on each axis of two or three.
SHAPES = ((2,), (6,), (3, 4), (4, 1), (2, 3, 4), (2, 6, 1, 2))

gated = partial(Layer, kind="activation", family="gated", ranks=(1, MAX_RANK), shapes=SHAPES)
halved = partial(gated, options=(HALVED,), output_shape=_halved_shape)

LAYERS = (
    halved("glu", forward=glu_forward, backward=glu_backward),
    halved("swiglu", forward=swiglu_forward, backward=unit_backward),
    halved("geglu", forward=geglu_forward, backward=unit_backward, options=(HALVED, APPROXIMATE)),
    gated(
        "maxout",
        forward=maxout_forward,
        backward=maxout_backward,
        options=MAXOUT,
        output_shape=_maxout_shape,
        kinks=(Kink("at_tie", point=0.0, default=0.0, ties=True),),
    ),
)
