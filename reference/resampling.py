"""Padding, upsampling and pixel shuffling.

Legend: N batch, C channels, S spatial axes, ... any leading axes; n the length of an axis of x, m that of out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradproof.model.layer import Layer, ShapeError
from gradproof.model.options import MAX_RANK, Choice, Option, Options, OptionValue, Real, Shape, is_integer
from gradproof.reference.common import Array, Gradients, magnitude, positive_part
from gradproof.reference.windows import Amounts, narrowed, widened


def upsample_forward(
    x: Array, *, size: int | tuple[int, ...], mode: str, align_corners: bool
) -> tuple[Array, tuple[Array, ...]]:
    """out = x read at position s(i) for element i of each spatial axis, between elements as `mode` says.

    s(i) = (i + 1/2) n / m - 1/2, as if elements were cells of equal width; with align_corners i (n - 1) / (m - 1).
    nearest: element floor(i n / m). nearest_exact: element floor(s + 1/2). linear: between the two next to s, the
    last one beyond the ends (bilinear over two axes). cubic: of the four next to s (Keys 1981, a = -3/4), the last
    one repeated beyond the ends. Shapes: x (N, C, S), out the same with each spatial axis `size` times as long, or
    of the lengths `size`.
    """
    matrices = tuple(
        _interpolation(n, m, mode, align_corners, x.real)
        for n, m in zip(x.shape[2:], _lengths(x.shape, size), strict=True)
    )
    for axis, matrix in enumerate(matrices, start=2):
        x = _along(axis, matrix, x)
    return x, matrices


def upsample_backward(dout: Array, matrices: tuple[Array, ...]) -> Gradients:
    """dx = the transposed matrix of each axis applied along it."""
    for axis, matrix in enumerate(matrices, start=2):
        dout = _along(axis, matrix.T, dout)
    return {"x": dout}


def _along(axis: int, matrix: Array, x: Array) -> Array:
    return np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T, -1, axis)


def _lengths(shape: Shape, size: int | tuple[int, ...]) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else tuple(size * each for each in shape[2:])


def _interpolation(n: int, m: int, mode: str, align_corners: bool, like: Array) -> Array:
    """How much each of n elements counts in each of m, (m, n).

    like: an array whose arithmetic to use, for the positions round as well as the numbers.
    """
    cells, elements = np.arange(m), np.arange(n)
    if mode == "nearest":
        return np.where((cells * n // m)[:, None] == elements, 1.0, 0.0)
    if mode == "nearest_exact":
        return np.where(((2 * cells + 1) * n // (2 * m))[:, None] == elements, 1.0, 0.0)
    zero = np.zeros_like(like, shape=())
    place = (zero + cells) * ((n - 1) / max(m - 1, 1)) if align_corners else (zero + cells + 0.5) * (n / m) - 0.5
    if mode == "linear":
        return positive_part(1.0 - magnitude(np.minimum(np.maximum(place, 0.0), n - 1.0)[:, None] - elements))
    around = np.floor(place)[:, None] + np.arange(-1, 3)
    held = np.minimum(np.maximum(around, 0), n - 1)[..., None] == elements
    return (np.where(held, _keys(magnitude(place[:, None] - around))[..., None], 0.0)).sum(axis=1)


def _keys(distance: Array) -> Array:
    """The kernel of cubic convolution: two cubics, up to 1 and from 1 to 2."""
    a = -0.75
    near = ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0
    far = ((a * distance - 5.0 * a) * distance + 8.0 * a) * distance - 4.0 * a
    return np.where(distance < 1.0, near, far)


def pixel_shuffle_forward(x: Array, *, factor: int) -> tuple[Array, int]:
    """out_c(r h + i, r w + j) = x_{c r^2 + i r + j}(h, w), r the factor (Shi et al. 2016).

    Shapes: x (..., C r^2, H, W), out (..., C, r H, r W).
    """
    *leading, channels, height, width = x.shape
    first = len(leading)
    split = x.reshape(*leading, channels // factor**2, factor, factor, height, width)
    woven = split.transpose(*range(first + 1), first + 3, first + 1, first + 4, first + 2)
    return woven.reshape(*leading, channels // factor**2, factor * height, factor * width).copy(), factor


def pixel_shuffle_backward(dout: Array, factor: int) -> Gradients:
    """dx_{c r^2 + i r + j}(h, w) = dout_c(r h + i, r w + j)."""
    *leading, channels, height, width = dout.shape
    first = len(leading)
    woven = dout.reshape(*leading, channels, height // factor, factor, width // factor, factor)
    split = woven.transpose(*range(first + 1), first + 2, first + 4, first + 1, first + 3)
    return {"x": split.reshape(*leading, channels * factor**2, height // factor, width // factor)}


def pad_forward(x: Array, *, amounts: tuple[int, ...], mode: str, value: float) -> tuple[Array, tuple[Any, ...]]:
    """out = x, with elements before and after along its last axes.

    They are `value` (constant), x mirrored at its first and last element, which are not repeated (reflect), its first
    and last element (replicate), or x over again (circular). amounts: before and after, of each axis in order.
    Shapes: x (..., S), out the same with the lengths of S plus their amounts.
    """
    sides = _sides(amounts)
    if mode == "constant":
        return widened(x, sides, value), (sides, None)
    first = x.ndim - len(sides)
    sources = [SOURCES[mode](np.arange(-a, n + b), n) for n, (a, b) in zip(x.shape[first:], sides, strict=True)]
    for axis, source in enumerate(sources, start=first):
        x = np.take(x, source, axis)
    return x, (sides, sources)


def pad_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = what lies inside of dout, plus each element outside where it was taken from."""
    sides, sources = cache
    if sources is None:
        return {"x": narrowed(dout, sides)}
    first = dout.ndim - len(sides)
    for axis, (before, after) in enumerate(sides, start=first):
        dout = _folded_back(dout, axis, before, after, sources[axis - first])
    return {"x": dout}


def _folded_back(dout: Array, axis: int, before: int, after: int, source: Array) -> Array:
    end = dout.shape[axis] - after
    across = (slice(None),) * axis
    inside = dout[(*across, slice(before, end))].copy()
    outside = np.r_[0:before, end : end + after]
    taken_from: Any = (*across, source[outside])
    np.add.at(inside, taken_from, np.take(dout, outside, axis))
    return inside


SOURCES: dict[str, Callable[[Array, int], Array]] = {
    "reflect": lambda places, n: n - 1 - abs(n - 1 - abs(places)),
    "replicate": lambda places, n: np.clip(places, 0, n - 1),
    "circular": lambda places, n: places % n,
}
"""Which of n elements stands at each place; those before the first are negative."""


def _sides(amounts: Sequence[int]) -> Amounts:
    return tuple(zip(amounts[::2], amounts[1::2], strict=True))


@dataclass(frozen=True)
class Lengths:
    """How many times longer the spatial axes become, or how long each of them."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        if isinstance(value, tuple):
            return len(value) == len(shape) - 2 and all(is_integer(each) and each >= 1 for each in value)
        return is_integer(value) and value >= 1  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return f"a factor of at least 1, or the new lengths of the {len(shape) - 2} spatial axes, at least 1 each"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return 2, 3, (5, 1, 2)[: len(shape) - 2], (4, 5, 3)[: len(shape) - 2], (1, 3, 2)[: len(shape) - 2]


@dataclass(frozen=True)
class ShuffleFactor:
    """A factor whose square divides the channels."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value) and value >= 1 and shape[-3] % value**2 == 0  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return f"a factor of at least 1 whose square divides {shape[-3]}, the channels of an input of {list(shape)}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return [each for each in (2, 3, 1) if self.contains(each, shape)]


@dataclass(frozen=True)
class Sides:
    """How many elements before and after, for each of the last one, two or three axes."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) in [2 * axes for axes in (1, 2, 3) if axes <= len(shape)]
            and all(is_integer(each) and each >= 0 for each in value)
        )

    def describe(self, shape: Shape) -> str:
        return f"2 integers of at least 0 for each of the last 1 to {min(3, len(shape))} axes"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        every = ((1, 1), (0, 2), (1, 0, 2, 1), (0, 1, 1, 2), (1, 0, 0, 1, 1, 1))
        return [each for each in every if len(each) <= 2 * len(shape)]


def _check_empty(x: Shape, axes: int) -> None:
    if 0 in x[len(x) - axes :]:
        raise ShapeError(f"has no element to take along the last {axes} axes of an input of shape {list(x)}")


def _upsample_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x, mode, size = shapes[0], options["mode"], options["size"]
    _check_empty(x, len(x) - 1)
    if options["align_corners"] and mode not in ("linear", "cubic"):
        raise ShapeError(f"align_corners is for the modes linear and cubic, got mode {mode!r}")
    if mode == "cubic" and len(x) != 4:
        raise ShapeError(f"the mode cubic needs two spatial axes, got an input of shape {list(x)}")
    return (*x[:2], *_lengths(x, size))  # type: ignore[arg-type]


def _shuffled_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    *leading, channels, height, width = shapes[0]
    factor: Any = options["factor"]
    return (*leading, channels // factor**2, factor * height, factor * width)


def _padded_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x, mode, amounts = shapes[0], options["mode"], options["amounts"]
    sides = _sides(amounts)  # type: ignore[arg-type]
    if mode != "constant":
        _check_border(x, str(mode), sides)
        if options["value"] != 0:
            raise ShapeError(f"value is for the mode constant, got mode {mode!r}")
    first = len(x) - len(sides)
    return (*x[:first], *(before + n + after for n, (before, after) in zip(x[first:], sides, strict=True)))


def _check_border(x: Shape, mode: str, sides: Amounts) -> None:
    _check_empty(x, len(sides))
    for n, side in zip(x[len(x) - len(sides) :], sides, strict=True):
        most = {"reflect": n - 1, "circular": n}.get(mode, max(side))
        if max(side) > most:
            raise ShapeError(f"the mode {mode} can add at most {most} elements to an axis of length {n}, got {side}")


UPSAMPLE = (
    Option("size", Lengths()),
    Option("mode", Choice(("nearest", "linear", "cubic", "nearest_exact")), "nearest"),
    Option("align_corners", Choice((False, True)), False),
)
PAD = (
    Option("amounts", Sides()),
    Option("mode", Choice(("constant", "reflect", "replicate", "circular")), "constant"),
    Option("value", Real(-1e3, 1e3, (0.0, -1.5)), 0.0),
)

LAYERS = (
    Layer(
        "upsample",
        "layer",
        "resampling",
        upsample_forward,
        upsample_backward,
        UPSAMPLE,
        ranks=(3, 5),
        shapes=((1, 2, 2, 3), (2, 1, 3), (1, 1, 4, 1), (1, 2, 5, 2), (1, 1, 2, 1, 3), (1, 3, 4)),
        output_shape=_upsample_shape,
    ),
    Layer(
        "pixel_shuffle",
        "layer",
        "resampling",
        pixel_shuffle_forward,
        pixel_shuffle_backward,
        (Option("factor", ShuffleFactor()),),
        ranks=(3, MAX_RANK),
        shapes=((1, 4, 2, 3), (2, 8, 1, 2), (9, 2, 1), (1, 9, 1, 2), (2, 1, 4, 2, 1)),
        output_shape=_shuffled_shape,
    ),
    Layer(
        "pad",
        "layer",
        "resampling",
        pad_forward,
        pad_backward,
        PAD,
        ranks=(1, MAX_RANK),
        shapes=((2, 3), (1, 2, 3, 2), (4,), (2, 1, 3), (1, 2, 2, 3, 2), (2, 3, 3)),
        output_shape=_padded_shape,
    ),
)
