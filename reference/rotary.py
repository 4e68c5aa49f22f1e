"""Rotary position embeddings: pairs of features turned by an angle that grows with the position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gradproof.model.layer import Layer, ShapeError
from gradproof.model.options import Axis, Choice, Option, Options, OptionValue, Real, Shape
from gradproof.reference.common import Array, Gradients


class Turns(NamedTuple):
    """By which angles the pairs of features were turned: shaped to broadcast against half of x."""

    cosine: Array
    sine: Array
    pairs: str


def rotary_forward(x: Array, *, axis: int, pairs: str, base: float) -> tuple[Array, Turns]:
    """Turn each pair of features (a, b) at position t by the angle u = t base^(-2 i / E) (Su et al. 2021).

    (a cos u - b sin u, a sin u + b cos u) for pair i = 0, 1, ... Shapes: x and out (..., E), E even, with the positions
    0, 1, ... along an axis. Pairs are features 2 i and 2 i + 1 ("interleaved"), or i and i + E / 2 ("half").
    """
    cosine, sine = _turns(x, axis, base)
    return _turned(x, cosine, sine, pairs), Turns(cosine, sine, pairs)


def rotary_backward(dout: Array, kept: Turns) -> Gradients:
    """The inverse of a rotation is its adjoint: turn back by the same angles."""
    return {"x": _turned(dout, kept.cosine, -kept.sine, kept.pairs)}


def _turns(x: Array, axis: int, base: float) -> tuple[Array, Array]:
    """The angles' cosines and sines, shaped to broadcast against half of x."""
    half = x.shape[-1] // 2
    shape = [1] * x.ndim
    shape[axis], shape[-1] = x.shape[axis], half
    frequencies = base ** (-np.arange(half) / half)
    angles = np.arange(x.shape[axis])[:, None] * frequencies
    # Made of ones of x's kind, so that the angles round as they do in a framework that computes them in x's dtype.
    rounding = np.ones_like(x, shape=shape) * angles.reshape(shape)
    return np.cos(rounding), np.sin(rounding)


def _turned(x: Array, cosine: Array, sine: Array, pairs: str) -> Array:
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if pairs == "interleaved" else (x[..., :half], x[..., half:])
    turned = [a * cosine - b * sine, a * sine + b * cosine]
    if pairs == "interleaved":
        return np.stack(turned, axis=-1).reshape(x.shape)
    return np.concatenate(turned, axis=-1)


def _rotary_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    (x,) = shapes
    if x[-1] % 2:
        raise ShapeError(f"turns pairs of features, so needs an even number of them; got shape {list(x)}")
    if 0 in x:
        raise ShapeError(f"cannot turn an input of shape {list(x)}: it has no elements")
    return x


@dataclass(frozen=True)
class PositionAxis(Axis):
    """Any axis but the last."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return super().contains(value, shape) and value % len(shape) != len(shape) - 1  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return f"an axis of an input of shape {list(shape)} other than its last"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return [-2, *range(len(shape) - 1)]


LAYERS: tuple[Layer, ...] = (
    Layer(
        "rotary",
        "layer",
        "attention",
        rotary_forward,
        rotary_backward,
        (
            Option("axis", PositionAxis(), -2),
            Option("pairs", Choice(("half", "interleaved")), "half"),
            Option("base", Real(1.0, 1e6, (10000.0, 100.0)), 10000.0),
        ),
        ranks=(2, 5),
        shapes=((3, 4), (5, 2), (2, 3, 6), (2, 3, 2, 4)),
        output_shape=_rotary_shape,
    ),
)
