"""Convolutions (cross-correlations, as frameworks have them) and their transposes, over any number of spatial axes.

Legend: N batch, C channels in, F features (channels out), G groups, K the kernel's axes and S the spatial ones, p
padding, k an element of K. Columns: all that the windows see, (N, G, channels of a group * K, windows), so that a
convolution is one matrix product; `unfold` makes them, and `fold` is its adjoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gradproof.model.layer import Layer, ShapeError
from gradproof.model.options import Choice, Divisor, Integers, Option, Options, OptionValue, Shape, is_integer
from gradproof.reference.common import Array, Gradients
from gradproof.reference.windows import Amounts, narrowed, taps, widened, window_count

Extents = tuple[int, ...]
"""One integer per spatial axis."""

ALL = (slice(None), slice(None))
"""Of the batch and the channels."""


@dataclass(frozen=True)
class Windows:
    """Where a kernel lies on a padded array: `counts` windows along each spatial axis."""

    kernel: Extents
    counts: Extents
    stride: Extents
    dilation: Extents
    groups: int


def unfold(padded: Array, windows: Windows) -> Array:
    """What each window sees of (N, C, S), as columns."""
    places = taps(windows.kernel, windows.counts, windows.stride, windows.dilation)
    seen = np.stack([padded[(*ALL, *place)] for _, place in places], axis=2)
    samples, channels, *_ = seen.shape
    rows = channels // windows.groups * math.prod(windows.kernel)
    return seen.reshape(samples, windows.groups, rows, math.prod(windows.counts))


def fold(columns: Array, shape: Shape, windows: Windows) -> Array:
    """Add each window's column to where the window lies in (N, C, S) of this shape: the adjoint of `unfold`."""
    seen = columns.reshape(*shape[:2], math.prod(windows.kernel), *windows.counts)
    out = np.zeros_like(columns, shape=shape)
    places = taps(windows.kernel, windows.counts, windows.stride, windows.dilation)
    for i, (_, place) in enumerate(places):
        out[(*ALL, *place)] += seen[:, :, i]
    return out


class Convolved(NamedTuple):
    """What a convolution keeps: x with its border, (N, C, S + 2 p), weight (F, C / G, K), and where the kernel lay."""

    padded: Array
    weight: Array
    windows: Windows
    border: Amounts
    biased: bool


def convolution_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: Extents,
    padding: Extents,
    dilation: Extents,
    groups: int,
) -> tuple[Array, Convolved]:
    """out_f(s) = bias_f + sum over c in f's group and k of weight_fc(k) x_c(stride s + dilation k - p), x = 0 outside.

    Shapes: x (N, C, S), weight (F, C / G, K), bias (F), out (N, F, as many as windows fit).
    """
    kernel, border = weight.shape[2:], _both_sides(padding)
    padded = widened(x, border)
    geometry = zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    counts = tuple(window_count(size, k, s, 0, d) for size, k, s, d in geometry)
    windows = Windows(kernel, counts, stride, dilation, groups)
    out = (_by_group(weight, groups) @ unfold(padded, windows)).reshape(x.shape[0], weight.shape[0], *counts)
    return _plus(out, bias), Convolved(padded, weight, windows, border, bias is not None)


def convolution_backward(dout: Array, kept: Convolved) -> Gradients:
    """dx = fold(weight^T dout), dweight = sum over N of dout unfold(x)^T, dbias = sum of dout over N and S."""
    padded, weight, windows = kept.padded, kept.weight, kept.windows
    by_group = _as_columns(dout, windows)
    # The columns are by far the largest arrays: no name keeps one while the other is made.
    dweight = (by_group @ _transposed(unfold(padded, windows))).sum(axis=0).reshape(weight.shape)
    dpadded = fold(_transposed(_by_group(weight, windows.groups)) @ by_group, padded.shape, windows)
    return {"x": narrowed(dpadded, kept.border), "weight": dweight} | _bias_gradient(dout, kept.biased)


class TransposeConvolved(NamedTuple):
    """What a transposed convolution keeps: x (N, C, S), weight (C, F / G, K), and where the kernel lay."""

    x: Array
    weight: Array
    windows: Windows
    border: Amounts
    biased: bool


def transpose_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: Extents,
    padding: Extents,
    output_padding: Extents,
    dilation: Extents,
    groups: int,
) -> tuple[Array, TransposeConvolved]:
    """out_f(stride s + dilation k - p) += weight_cf(k) x_c(s) for all s, k and c in f's group, from bias_f.

    It is what the adjoint of a convolution does, with F and C swapped (Zeiler et al. 2010).
    Shapes: x (N, C, S), weight (C, F / G, K), bias (F), out (N, F, stride (S - 1) - 2 p + dilation (K - 1) +
    output_padding + 1).
    """
    kernel, counts, border = weight.shape[2:], x.shape[2:], _both_sides(padding)
    reach = map(_reach, counts, kernel, stride, dilation)
    sizes = (size + extra for size, extra in zip(reach, output_padding, strict=True))
    windows = Windows(kernel, counts, stride, dilation, groups)
    columns = _transposed(_by_group(weight, groups)) @ _as_columns(x, windows)
    out = narrowed(fold(columns, (x.shape[0], weight.shape[1] * groups, *sizes), windows), border)
    return _plus(out, bias), TransposeConvolved(x, weight, windows, border, bias is not None)


def transpose_backward(dout: Array, kept: TransposeConvolved) -> Gradients:
    """dx = weight unfold(dout), a convolution; dweight = sum over N of x unfold(dout)^T; dbias = sum of dout."""
    x, weight, windows = kept.x, kept.weight, kept.windows
    columns = unfold(widened(dout, kept.border), windows)
    dx = (_by_group(weight, windows.groups) @ columns).reshape(x.shape)
    dweight = (_as_columns(x, windows) @ _transposed(columns)).sum(axis=0).reshape(weight.shape)
    return {"x": dx, "weight": dweight} | _bias_gradient(dout, kept.biased)


def _both_sides(padding: Extents) -> Amounts:
    return tuple((each, each) for each in padding)


def _by_group(weight: Array, groups: int) -> Array:
    """The kernel as one matrix per group: its first axis times all others."""
    return weight.reshape(groups, weight.shape[0] // groups, math.prod(weight.shape[1:]))


def _as_columns(x: Array, windows: Windows) -> Array:
    """(N, C, S), an element for each window, as (N, G, C / G, windows)."""
    return x.reshape(x.shape[0], windows.groups, x.shape[1] // windows.groups, math.prod(windows.counts))


def _transposed(matrices: Array) -> Array:
    return np.swapaxes(matrices, -1, -2)


def _plus(out: Array, bias: Array | None) -> Array:
    return out if bias is None else out + bias.reshape(-1, *[1] * (out.ndim - 2))


def _bias_gradient(dout: Array, biased: bool) -> Gradients:
    return {"bias": dout.sum(axis=(0, *range(2, dout.ndim)))} if biased else {}


def _reach(count: int, kernel: int, stride: int, dilation: int) -> int:
    """How many elements so many windows reach over."""
    return stride * (count - 1) + dilation * (kernel - 1) + 1


@dataclass(frozen=True)
class Features:
    """How many channels a convolution makes. Those drawn are mostly multiples of its input's, so that groups divide."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value) and value >= 1  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return "an integer of at least 1"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        channels = max(shape[1], 1)
        return tuple(dict.fromkeys((channels, 2 * channels, 1)))


@dataclass(frozen=True)
class Kernel:
    """The kernel's extents along the spatial axes; the simplest one drawn fits an input without padding."""

    extents: Integers

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return self.extents.contains(value, shape)

    def describe(self, shape: Shape) -> str:
        return self.extents.describe(shape)

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return (tuple(max(min(2, size), 1) for size in shape[2:]), *self.extents.examples)


def _values(options: Options, *names: str) -> list[Any]:
    return [options[name] for name in names]


def _check_groups(x: Shape, options: Options) -> None:
    features, groups = _values(options, "features", "groups")
    if 0 in x[1:]:
        raise ShapeError(f"needs a channel and no empty spatial axis, got an input of shape {list(x)}")
    if features % groups:
        raise ShapeError(f"its {features} features cannot be divided into {groups} groups")


def _convolution_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x = shapes[0]
    _check_groups(x, options)
    features, *extents = _values(options, "features", "kernel", "stride", "padding", "dilation")
    return (x[0], features, *(window_count(*each) for each in zip(x[2:], *extents, strict=True)))


def _transpose_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x = shapes[0]
    _check_groups(x, options)
    features, *extents = _values(options, "features", "kernel", "stride", "padding", "output_padding", "dilation")
    return (x[0], features, *(_transpose_length(*each) for each in zip(x[2:], *extents, strict=True)))


def _transpose_length(size: int, kernel: int, stride: int, padding: int, extra: int, dilation: int) -> int:
    """Raises ShapeError for an output padding that another input could as well explain, and an empty output."""
    if extra >= max(stride, dilation):
        raise ShapeError(
            f"an output padding of {extra} must be smaller than the stride {stride} or dilation {dilation}"
        )
    length = _reach(size, kernel, stride, dilation) + extra - 2 * padding
    if length < 1:
        raise ShapeError(f"a padding of {padding} leaves an axis of length {length}; it must be at least 1")
    return length


def _parameters(outer: int, inner: int, options: Options) -> dict[str, Shape]:
    """The kernel's shape, `inner` shared out among the groups, and the bias'."""
    features, kernel, groups = _values(options, "features", "kernel", "groups")
    weight: dict[str, Shape] = {"weight": (outer, inner // groups, *kernel)}
    return weight | {"bias": (features,)} if options["use_bias"] else weight


def _convolution_parameters(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    (features,) = _values(options, "features")
    return _parameters(features, shapes[0][1], options)


def _transpose_parameters(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    (features,) = _values(options, "features")
    return _parameters(shapes[0][1], features, options)


def _options(axes: int, kernels: tuple[Extents, ...], *others: Option) -> tuple[Option, ...]:
    """Alike along all axes, and unlike where there are several."""
    ones, twos, mixed = (1,) * axes, (2,) * axes, (3, 1, 2)[:axes]
    return (
        Option("features", Features(), structural=True),
        Option("kernel", Kernel(Integers(axes, 1, kernels)), structural=True),
        Option("stride", Integers(axes, 1, (ones, twos, mixed)), ones),
        Option("padding", Integers(axes, 0, ((0,) * axes, ones, (2, 0, 1)[:axes])), (0,) * axes),
        *others,
        Option("dilation", Integers(axes, 1, (ones, (2, 1, 2)[:axes])), ones),
        Option("groups", Divisor(1), 1),
        Option("use_bias", Choice((True, False)), True, structural=True),
    )


KERNELS: dict[int, tuple[Extents, ...]] = {
    1: ((3,), (1,)),
    2: ((3, 3), (1, 1), (1, 3)),
    3: ((3, 1, 2), (1, 1, 1), (1, 2, 3)),
}
SHAPES: dict[int, tuple[Shape, ...]] = {
    1: ((2, 2, 6), (1, 4, 7), (2, 3, 1), (1, 1, 9), (3, 6, 2)),
    2: ((2, 2, 4, 3), (1, 4, 5, 5), (2, 3, 1, 4), (1, 1, 7, 6), (3, 2, 2, 1)),
    3: ((2, 2, 2, 3, 2), (1, 4, 3, 2, 3), (2, 1, 1, 3, 1), (1, 3, 2, 1, 4)),
}


def _output_padding(axes: int) -> Option:
    none = (0,) * axes
    return Option("output_padding", Integers(axes, 0, (none, (1, 0)[:axes], (1,) * axes)[: axes + 1]), none)


def _convolution(axes: int) -> Layer:
    return Layer(
        f"conv{axes}d",
        "layer",
        "convolution",
        convolution_forward,
        convolution_backward,
        _options(axes, KERNELS[axes]),
        ranks=(axes + 2, axes + 2),
        shapes=SHAPES[axes],
        output_shape=_convolution_shape,
        parameters=_convolution_parameters,
    )


def _transpose(axes: int) -> Layer:
    return Layer(
        f"conv_transpose{axes}d",
        "layer",
        "convolution",
        transpose_forward,
        transpose_backward,
        _options(axes, KERNELS[axes], _output_padding(axes)),
        ranks=(axes + 2, axes + 2),
        shapes=SHAPES[axes],
        output_shape=_transpose_shape,
        parameters=_transpose_parameters,
    )


LAYERS = (*(_convolution(axes) for axes in (1, 2, 3)), *(_transpose(axes) for axes in (1, 2)))
