"""Convolution, pooling and resampling."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

from gradproof.adapters.base import Row
from gradproof.model.dtypes import limits


def _each(x: Any, value: Any) -> tuple[int, ...]:
    """One number for every spatial axis of x."""
    return value if isinstance(value, tuple) else (value,) * (x.ndim - 2)


def _reach(
    x: Any, kernel: Any, stride: Any, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> list[tuple[int, int]]:
    """The padding before and after every spatial axis, with the overhang that `ceil_mode` asks for."""
    pairs = []
    settings = (_each(x, each) for each in (kernel, stride, padding, dilation))
    for size, k, s, p, d in zip(x.shape[2:], *settings, strict=True):
        span = size + 2 * p - d * (k - 1) - 1
        count = span // s + 1
        count += ceil_mode and span % s > 0 and count * s < size + p
        pairs.append((p, p + max(0, (count - 1) * s - span)))
    return pairs


def channels_last(pool: Row, x: Any, *arguments: Any, **options: Any) -> Any:
    return jnp.moveaxis(pool(jnp.moveaxis(x, 1, -1), *arguments, **options), -1, 1)


def _taps(x: Any, kernel: Any, stride: Any, dilation: Any, reach: Any, outside: float) -> Any:
    """What each window meets, along a new last axis; for windows that flax cannot slide."""
    padded = jnp.pad(x, [(0, 0), (0, 0), *reach], constant_values=outside)
    kernel, stride, dilation = (_each(x, each) for each in (kernel, stride, dilation))
    sizes = zip(padded.shape[2:], kernel, dilation, strict=True)
    ends = [size - d * (k - 1) for size, k, d in sizes]
    met = []
    for tap in np.ndindex(*kernel):
        steps = zip(tap, stride, dilation, ends, strict=True)
        met.append(padded[(..., *(slice(t * d, t * d + end, s) for t, s, d, end in steps))])
    return jnp.stack(met, axis=-1)


def max_pool(x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Any:
    """flax has no dilation, and JAX no derivative of a dilated `reduce_window`: there the first largest is taken."""
    reach = _reach(x, kernel, stride, padding, dilation, ceil_mode)
    if set(_each(x, dilation)) == {1}:
        return channels_last(flax.linen.max_pool, x, _each(x, kernel), _each(x, stride), reach)
    met = _taps(x, kernel, stride, dilation, reach, -jnp.inf)
    return jnp.take_along_axis(met, met.argmax(axis=-1, keepdims=True), axis=-1)[..., 0]


def avg_pool(x: Any, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool) -> Any:
    """flax counts the overhang of `ceil_mode` as padding; the divisor leaves it out."""
    kernel, stride, padding = (_each(x, each) for each in (kernel, stride, padding))
    reach = _reach(x, kernel, stride, padding, 1, ceil_mode)
    pooled = channels_last(flax.linen.avg_pool, x, kernel, stride, reach, count_include_pad=count_include_pad)
    pooled = pooled.astype(x.dtype)  # without the padding, flax divides by an array of JAX's default dtype
    if not count_include_pad or all(low == high for low, high in reach):
        return pooled
    counted = np.ones([size + 2 * p for size, p in zip(x.shape[2:], padding, strict=True)])
    overhang = [(0, high - low) for low, high in reach]
    share = _taps(np.pad(counted, overhang)[None, None], kernel, stride, 1, [(0, 0)] * len(kernel), 0.0).mean(axis=-1)
    return pooled / share.astype(x.dtype)


def lp_pool(x: Any, p: int, kernel: int, stride: int, ceil_mode: bool) -> Any:
    met = _taps(x, kernel, stride, 1, _reach(x, kernel, stride, ceil_mode=ceil_mode), 0.0)
    if p == 1:
        return met.sum(axis=-1)
    peak = jax.lax.stop_gradient(jnp.abs(met).max(axis=-1))
    empty = peak == 0
    # The reciprocal of a subnormal number, which XLA may multiply by, is infinite.
    scale = jnp.where(empty, 1.0, jnp.maximum(peak, 4.0 * float(limits(x.dtype).smallest_normal)))
    total = jnp.where(empty, 1.0, ((met / scale[..., None]) ** p).sum(axis=-1))
    return jnp.where(empty, 0.0, scale * total ** (1.0 / p))


def adaptive_pool(reduce: Row) -> Row:
    """Window i of n covers the elements from floor(i size / n) to ceil((i + 1) size / n), exclusive."""

    def pool(x: Any, output_size: tuple[int, ...]) -> Any:
        sides = [
            [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
            for size, count in zip(x.shape[2:], output_size, strict=True)
        ]
        over = tuple(range(2, x.ndim))
        pooled = [reduce(x[(..., *window)], axis=over) for window in itertools.product(*sides)]
        return jnp.stack(pooled, axis=-1).reshape(*x.shape[:2], *output_size)

    return pool


def global_pool(reduce: Row) -> Row:
    return lambda x, keepdims: reduce(x, axis=tuple(range(2, x.ndim)), keepdims=keepdims)


def convolution(x: Any, weight: Any, bias: Any = None, *, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    """Padded beforehand: compiling the gradient of a padded and strided convolution can abort the process."""
    padded = jnp.pad(x, [(0, 0), (0, 0), *((each, each) for each in padding)])
    none = [(0, 0)] * len(padding)
    out = jax.lax.conv_general_dilated(padded, weight, stride, none, rhs_dilation=dilation, feature_group_count=groups)
    return out if bias is None else out + bias.reshape(-1, *[1] * len(stride))


def convolution_transpose(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    groups: int,
) -> Any:
    """`jax.lax.conv_transpose` has no groups, so that with groups each makes a share of the features by itself."""
    axes = len(stride)
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    sides = [(r - p, r - p + extra) for r, p, extra in zip(reach, padding, output_padding, strict=True)]
    layout = jax.lax.ConvDimensionNumbers(*[tuple(range(axes + 2))] * 3)
    parts = [
        jax.lax.conv_transpose(each, kernel, stride, sides, dilation, layout, transpose_kernel=True)
        for each, kernel in zip(jnp.split(x, groups, 1), jnp.split(weight, groups, 0), strict=True)
    ]
    out = jnp.concatenate(parts, axis=1)
    return out if bias is None else out + bias.reshape(-1, *[1] * axes)


def upsample(x: Any, *, size: int | tuple[int, ...], mode: str, align_corners: bool) -> Any:
    lengths = size if isinstance(size, tuple) else tuple(size * n for n in x.shape[2:])
    axes, shape = range(2, x.ndim), (*x.shape[:2], *lengths)
    if mode == "nearest":
        for axis, m in zip(axes, lengths, strict=True):
            x = jnp.take(x, jnp.arange(m) * x.shape[axis] // m, axis=axis)
        return x
    method = {"nearest_exact": "nearest", "cubic": "cubic-pytorch"}.get(mode, mode)
    if not align_corners:
        return jax.image.resize(x, shape, method, antialias=False)
    # The corners of one element are at the same place: what becomes of one is everywhere, and to one goes the first.
    pairs = list(zip(x.shape[2:], lengths, strict=True))
    scale = jnp.array([1.0 if m == 1 else m if n == 1 else (m - 1) / (n - 1) for n, m in pairs])
    shift = jnp.array([0.0 if n == 1 else 0.5 for n, _ in pairs]) * (1.0 - scale)
    return jax.image.scale_and_translate(x, shape, axes, scale, shift, method, antialias=False)


def pixel_shuffle(x: Any, factor: int) -> Any:
    *leading, channels, height, width = x.shape
    split = x.reshape(*leading, channels // factor**2, factor, factor, height, width)
    woven = jnp.moveaxis(split, (-4, -3), (-3, -1))
    return woven.reshape(*leading, channels // factor**2, factor * height, factor * width)


def pad(x: Any, *, amounts: tuple[int, ...], mode: str, value: float) -> Any:
    sides = [(0, 0)] * (x.ndim - len(amounts) // 2) + list(zip(amounts[::2], amounts[1::2], strict=True))
    if mode == "constant":
        return jnp.pad(x, sides, constant_values=value)
    return jnp.pad(x, sides, {"replicate": "edge", "circular": "wrap"}.get(mode, mode))
