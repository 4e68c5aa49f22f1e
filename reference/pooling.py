"""Pooling over windows: maximum, mean and p-norm, over sliding, adaptive or global ones.

Legend: B batch, C channels, S the spatial axes, n the windows along one of them, k the places in a window,
K the places in a window over all spatial axes. Shapes: x (B, C, S...), out (B, C, n...).
A window along an axis is held as two arrays (n, k): the index of each of its places, and whether that is inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from gradproof.model.layer import POSITIVE, REAL, Argument, Domain, Kink, Layer, ShapeError
from gradproof.model.options import MAX_RANK, Choice, Integer, Integers, Option, Options, OptionValue, Shape, is_integer
from gradproof.reference.common import Array, Gradients, magnitude, tie_shares
from gradproof.reference.windows import window_count

Windows = tuple[tuple[Array, Array], ...]
"""Along each spatial axis: the index of every place of every window, and whether it is inside."""

Extent = int | tuple[int, ...]
"""One number for the only spatial axis, or one for each."""


def each_axis(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def sliding(
    sizes: Shape, kernel: Extent, stride: Extent, padding: Extent = 0, dilation: Extent = 1, *, ceil_mode: bool
) -> Windows:
    """The windows of a kernel that slides. With `ceil_mode`, a last one may reach beyond the padding."""
    windows = []
    for size, k, s, p, d in zip(
        sizes, *map(partial(_repeated, sizes), (kernel, stride, padding, dilation)), strict=True
    ):
        starts = s * np.arange(sliding_count(size, k, s, p, d, ceil_mode)) - p
        places = starts[:, None] + d * np.arange(k)
        windows.append((places, (places >= 0) & (places < size)))
    return tuple(windows)


def _repeated(sizes: Shape, value: Extent) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * len(sizes)


def sliding_count(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows there are along an axis, the overhanging one included."""
    count = window_count(size, kernel, stride, padding, dilation)
    left_over = (size + 2 * padding - dilation * (kernel - 1) - 1) % stride
    return count + (ceil_mode and left_over > 0 and count * stride < size + padding)


def adaptive(sizes: Shape, counts: Sequence[int]) -> Windows:
    """Along each axis, window i of n covers the elements from floor(i S / n) to ceil((i + 1) S / n), exclusive."""
    windows = []
    for size, count in zip(sizes, counts, strict=True):
        i = np.arange(count)
        first, end = i * size // count, -(-(i + 1) * size // count)
        places = first[:, None] + np.arange((end - first).max())
        windows.append((places, places < end[:, None]))
    return tuple(windows)


def whole(sizes: Shape) -> Windows:
    """One window over everything."""
    return adaptive(sizes, (1,) * len(sizes))


def _grid(windows: Windows, sizes: Shape) -> tuple[tuple[Any, ...], Array]:
    """An index of x for every place, (n..., k...) over the spatial axes, and which places are inside, (n..., K)."""
    rank = len(windows)
    index: list[Any] = [...]
    inside = np.ones((1,) * (2 * rank), bool)
    for axis, ((places, within), size) in enumerate(zip(windows, sizes, strict=True)):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = places.shape
        index.append(np.clip(places, 0, size - 1).reshape(shape))
        inside = inside & within.reshape(shape)
    return tuple(index), inside.reshape(*inside.shape[:rank], -1)


def gather(x: Array, windows: Windows, outside: float) -> Array:
    """What each window meets, (B, C, n..., K); `outside` where a place is not inside."""
    index, inside = _grid(windows, x.shape[2:])
    met = x[index]
    return np.where(inside, met.reshape(*x.shape[:2], *inside.shape), outside)


def scatter(dmet: Array, windows: Windows, shape: Shape) -> Array:
    """The adjoint of `gather`: what arrives at each place (B, C, n..., K), added up where windows overlap."""
    index, inside = _grid(windows, shape[2:])
    spread = np.where(inside, dmet, 0.0).reshape(*shape[:2], *np.broadcast_shapes(*(each.shape for each in index[1:])))
    dx = np.zeros_like(dmet, shape=shape)
    np.add.at(dx, index, spread)
    return dx


class Largest(NamedTuple):
    """largest: where a place of a window holds its largest element, (B, C, n..., K). shape: of x. tie: who takes it."""

    largest: Array
    windows: Windows
    shape: Shape
    tie: float


def _max(x: Array, windows: Windows, tie: float) -> tuple[Array, Largest]:
    met = gather(x, windows, -math.inf)
    place = met.real.argmax(axis=-1)[..., None]
    out = np.take_along_axis(met, place, axis=-1)
    return out[..., 0], Largest(met.real == out.real, windows, x.shape, tie)


def max_pool_backward(dout: Array, kept: Largest) -> Gradients:
    """dx_j = sum of the dout of the windows in which x_j is largest. Ties: the first, the last, or shared evenly."""
    return {"x": scatter(dout[..., None] * tie_shares(kept.largest, -1, kept.tie), kept.windows, kept.shape)}


def max_pool_forward(
    x: Array, *, kernel: Extent, stride: Extent, padding: Extent, dilation: Extent, ceil_mode: bool, tie: float = 0.0
) -> tuple[Array, Largest]:
    """out = the largest element of each window; padding is never it."""
    return _max(x, sliding(x.shape[2:], kernel, stride, padding, dilation, ceil_mode=ceil_mode), tie)


def adaptive_max_pool_forward(x: Array, *, output_size: tuple[int, ...], tie: float = 0.0) -> tuple[Array, Largest]:
    """out = the largest element of each of `output_size` windows, spread evenly over S; they may overlap by one."""
    return _max(x, adaptive(x.shape[2:], output_size), tie)


def global_max_pool_forward(x: Array, *, keepdims: bool, tie: float = 0.0) -> tuple[Array, Largest]:
    """out = the largest element of each channel. Shapes: out (B, C), or with `keepdims` (B, C, 1...)."""
    out, kept = _max(x, whole(x.shape[2:]), tie)
    return (out if keepdims else out.reshape(x.shape[:2])), kept


def global_max_pool_backward(dout: Array, kept: Largest) -> Gradients:
    """dx_j = dout where x_j is the largest of its channel. Ties: the first, the last, or shared evenly."""
    spatial = len(kept.shape) - 2
    return max_pool_backward(dout.reshape(*dout.shape[:2], *(1,) * spatial), kept)


class Counted(NamedTuple):
    """divisor: how many places of each window count, (n...). shape: of x."""

    windows: Windows
    divisor: Array
    shape: Shape


def _mean(x: Array, windows: Windows, divisor: Array) -> tuple[Array, Counted]:
    return gather(x, windows, 0.0).sum(axis=-1) / divisor, Counted(windows, divisor, x.shape)


def avg_pool_backward(dout: Array, kept: Counted) -> Gradients:
    """dx_j = sum over the windows that x_j is in of dout / divisor."""
    share = (dout / kept.divisor)[..., None]
    places = math.prod(places.shape[1] for places, _ in kept.windows)
    return {"x": scatter(np.broadcast_to(share, (*dout.shape, places)), kept.windows, kept.shape)}


def _counts(windows: Windows) -> Array:
    """The number of places inside each window, (n...)."""
    counts: Array = reduce(np.multiply, np.ix_(*(inside.sum(axis=1) for _, inside in windows)))
    return counts


def avg_pool_forward(
    x: Array, *, kernel: Extent, stride: Extent, padding: Extent, ceil_mode: bool, count_include_pad: bool
) -> tuple[Array, Counted]:
    """out = the sum of each window / divisor: its places inside or, with `count_include_pad`, in the padding too.

    Places beyond the padding, where `ceil_mode` lets a window reach, are never counted.
    """
    sizes = x.shape[2:]
    windows = sliding(sizes, kernel, stride, padding, ceil_mode=ceil_mode)
    if not count_include_pad:
        return _mean(x, windows, _counts(windows))
    ends = [size + p for size, p in zip(sizes, _repeated(sizes, padding), strict=True)]
    padded = tuple((places, places < end) for (places, _), end in zip(windows, ends, strict=True))
    return _mean(x, windows, _counts(padded))


def adaptive_avg_pool_forward(x: Array, *, output_size: tuple[int, ...]) -> tuple[Array, Counted]:
    """out = the mean of each of `output_size` windows, spread evenly over S; they may overlap by one element."""
    windows = adaptive(x.shape[2:], output_size)
    return _mean(x, windows, _counts(windows))


def global_avg_pool_forward(x: Array, *, keepdims: bool) -> tuple[Array, Shape]:
    """out = the mean of each channel. Shapes: out (B, C), or with `keepdims` (B, C, 1...)."""
    return x.mean(axis=tuple(range(2, x.ndim)), keepdims=keepdims), x.shape


def global_avg_pool_backward(dout: Array, shape: Shape) -> Gradients:
    """dx = dout / the number of elements of a channel."""
    share = dout / math.prod(shape[2:])
    return {"x": np.broadcast_to(share.reshape(*shape[:2], *(1,) * (len(shape) - 2)), shape)}


class Slopes(NamedTuple):
    """slope: (x_j / out)^(p - 1) at every place of each window, (B, C, n..., K). shape: of x."""

    slope: Array
    windows: Windows
    shape: Shape


def lp_pool_forward(x: Array, *, p: int, kernel: int, stride: int, ceil_mode: bool) -> tuple[Array, Slopes]:
    """out = (sum of x^p over each window)^(1/p): the sum for p = 1, the norm for p = 2.

    An odd p of at least 3 takes positive numbers. The kernel and the stride hold for every spatial axis. What is
    largest in a window is taken out of the power first.
    """
    windows = sliding(x.shape[2:], kernel, stride, ceil_mode=ceil_mode)
    met = gather(x, windows, 0.0)
    if p == 1:
        return met.sum(axis=-1), Slopes(np.ones_like(met), windows, x.shape)
    peak = magnitude(met).real.max(axis=-1, keepdims=True)
    scaled = met / np.where(peak == 0, 1.0, peak)
    root = ((scaled**p).sum(axis=-1, keepdims=True)) ** (1.0 / p)
    slope = (scaled / np.where(peak == 0, 1.0, root)) ** (p - 1)
    return (peak * root)[..., 0], Slopes(slope, windows, x.shape)


def lp_pool_backward(dout: Array, kept: Slopes) -> Gradients:
    """dx_j = sum over the windows that x_j is in of dout (x_j / out)^(p - 1).

    Where a window holds nothing but zeros its norm has a kink, and the subgradient 0 is taken.
    """
    return {"x": scatter(dout[..., None] * kept.slope, kept.windows, kept.shape)}


def _sliding_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    """Refuses padding of more than half the kernel, and windows without a single element."""
    (x,) = shapes
    sizes = x[2:]
    kernel, stride, padding, dilation = (
        _repeated(sizes, options.get(name, default))  # type: ignore[arg-type]
        for name, default in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1))
    )
    for k, p in zip(kernel, padding, strict=True):
        if 2 * p > k:
            raise ShapeError(f"padding of {p} is more than half the kernel of {k}")
    windows = sliding(sizes, kernel, stride, padding, dilation, ceil_mode=bool(options["ceil_mode"]))
    for (_, inside), size in zip(windows, sizes, strict=True):
        if not inside.any(axis=1).all():
            raise ShapeError(f"a dilated window lies in the padding alone of an axis of {size}; its maximum is empty")
    return (*x[:2], *(len(places) for places, _ in windows))


def _adaptive_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    _nonempty(shapes)
    return (*shapes[0][:2], *each_axis(options["output_size"]))


def _global_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    _nonempty(shapes)
    x = shapes[0]
    return (*x[:2], *((1,) * (len(x) - 2) if options["keepdims"] else ()))


def _nonempty(shapes: Sequence[Shape]) -> None:
    if 0 in shapes[0][2:]:
        raise ShapeError(f"cannot pool an input of shape {list(shapes[0])}: its channels have no elements")


def _lp_domain(shape: Shape, options: Options) -> Domain:
    return POSITIVE if options["p"] == 3 else REAL


@dataclass(frozen=True)
class OutputSize:
    """A length of at least 1 for every spatial axis."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) == len(shape) - 2
            and all(is_integer(each) and each >= 1 for each in value)
        )

    def describe(self, shape: Shape) -> str:
        return f"an integer of at least 1 for each of {len(shape) - 2} spatial axes, of an input of shape {list(shape)}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        """One window, fewer than elements and mostly no divisor of their number, and more."""
        lengths = [(1, 2, 3, size + 1) for size in shape[2:]]
        uneven = [each for each in product(*lengths) if len(each) == 1 or len(set(each)) > 1]
        return list(dict.fromkeys([(1,) * len(lengths), *uneven]))


CEIL_MODE = Option("ceil_mode", Choice((False, True)), False)
KEEPDIMS = (Option("keepdims", Choice((False, True)), False),)
OUTPUT_SIZE = (Option("output_size", OutputSize()),)
COUNT_INCLUDE_PAD = Option("count_include_pad", Choice((True, False)), True)
KERNEL_1D = (
    Option("kernel", Integer(1, (2, 3, 1))),
    Option("stride", Integer(1, (2, 1, 3))),
    Option("padding", Integer(0, (0, 1)), 0),
)
KERNEL_2D = (
    Option("kernel", Integers(2, 1, ((2, 2), (1, 2), (3, 2)))),
    Option("stride", Integers(2, 1, ((2, 2), (1, 1), (2, 3)))),
    Option("padding", Integers(2, 0, ((0, 0), (0, 1), (1, 1))), (0, 0)),
)
DILATION_1D = Option("dilation", Integer(1, (1, 2)), 1)
DILATION_2D = Option("dilation", Integers(2, 1, ((1, 1), (2, 1), (1, 2))), (1, 1))
LP = (
    Option("p", Choice((2, 1, 3))),
    Option("kernel", Integer(1, (2, 3, 1))),
    Option("stride", Integer(1, (2, 1, 3))),
    CEIL_MODE,
)

SHAPES_1D: tuple[Shape, ...] = ((2, 3, 7), (1, 2, 8), (3, 1, 5), (2, 2, 3))
SHAPES_2D: tuple[Shape, ...] = ((1, 2, 4, 5), (2, 3, 3, 3), (2, 1, 5, 2), (1, 1, 2, 7))
SHAPES = (SHAPES_1D[0], SHAPES_2D[0], SHAPES_1D[2], SHAPES_2D[2])
TIE = Kink("tie", point=0.5, default=0.0, ties=True, shape=(1, 1, 2))
TIE_2D = Kink("tie", point=0.5, default=0.0, ties=True, shape=(1, 1, 1, 2))

pooling = partial(Layer, kind="layer", family="pooling")
max_pooling = partial(pooling, forward=max_pool_forward, backward=max_pool_backward, output_shape=_sliding_shape)
avg_pooling = partial(pooling, forward=avg_pool_forward, backward=avg_pool_backward, output_shape=_sliding_shape)

LAYERS: tuple[Layer, ...] = (
    max_pooling(
        "max_pool1d",
        options=(*KERNEL_1D, DILATION_1D, CEIL_MODE),
        ranks=(3, 3),
        shapes=SHAPES_1D,
        kinks=(TIE,),
    ),
    max_pooling(
        "max_pool2d",
        options=(*KERNEL_2D, DILATION_2D, CEIL_MODE),
        ranks=(4, 4),
        shapes=SHAPES_2D,
        kinks=(TIE_2D,),
    ),
    avg_pooling("avg_pool1d", options=(*KERNEL_1D, CEIL_MODE, COUNT_INCLUDE_PAD), ranks=(3, 3), shapes=SHAPES_1D),
    avg_pooling("avg_pool2d", options=(*KERNEL_2D, CEIL_MODE, COUNT_INCLUDE_PAD), ranks=(4, 4), shapes=SHAPES_2D),
    pooling(
        "lp_pool",
        forward=lp_pool_forward,
        backward=lp_pool_backward,
        options=LP,
        arguments=(Argument("x", _lp_domain),),
        ranks=(3, 4),
        shapes=SHAPES,
        output_shape=_sliding_shape,
    ),
    pooling(
        "adaptive_avg_pool",
        forward=adaptive_avg_pool_forward,
        backward=avg_pool_backward,
        options=OUTPUT_SIZE,
        ranks=(3, 4),
        shapes=SHAPES,
        output_shape=_adaptive_shape,
    ),
    pooling(
        "adaptive_max_pool",
        forward=adaptive_max_pool_forward,
        backward=max_pool_backward,
        options=OUTPUT_SIZE,
        ranks=(3, 4),
        shapes=SHAPES,
        output_shape=_adaptive_shape,
        kinks=(TIE,),
    ),
    pooling(
        "global_avg_pool",
        forward=global_avg_pool_forward,
        backward=global_avg_pool_backward,
        options=KEEPDIMS,
        ranks=(3, MAX_RANK),
        shapes=(*SHAPES, (2, 3, 1), (1, 2, 2, 1, 3)),
        output_shape=_global_shape,
    ),
    pooling(
        "global_max_pool",
        forward=global_max_pool_forward,
        backward=global_max_pool_backward,
        options=KEEPDIMS,
        ranks=(3, MAX_RANK),
        shapes=(*SHAPES, (2, 3, 1), (1, 2, 2, 1, 3)),
        output_shape=_global_shape,
        kinks=(TIE,),
    ),
)
