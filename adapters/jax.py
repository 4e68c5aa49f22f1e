"""JAX grad, each layer jitted by itself so that networks share compilations.

JAX compiles once per layer, options, shapes and dtype; the compilations are kept in a per-user cache
directory between processes. GRADPROOF_JAX_CACHE names another directory, or "off".
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import platformdirs
from jax.scipy.special import xlog1py, xlogy

from gradproof.adapters.base import Composed, Row
from gradproof.adapters.functional import Arrays, FunctionalAdapter
from gradproof.model.adapter import JAX_CACHE_VARIABLE, JAX_JIT_VARIABLE, AdapterError
from gradproof.model.dtypes import limits
from gradproof.model.network import Network, Node
from gradproof.model.options import Options

JITS = ("layer", "network")
KEPT = 4
"""Whole networks whose programs are kept, so that several numbers can be tried on one."""

REDUCTIONS: dict[str, Row] = {"none": lambda loss: loss, "mean": jnp.mean, "sum": jnp.sum}


def _reduced(loss: Row) -> Row:
    """optax's losses are unreduced."""
    return lambda *arrays, reduction, **others: REDUCTIONS[reduction](loss(*arrays, **others))


def _layer_norm(x: Any, weight: Any = None, bias: Any = None, *, axes: int, eps: float) -> Any:
    # "stable" is the two-pass variance of the definition; the default "fast" one cancels.
    over = tuple(range(-axes, 0))
    normalized = jax.nn.standardize(x, over, epsilon=eps, algorithm="stable")  # type: ignore[call-arg]
    return normalized if weight is None else normalized * weight + bias


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


def _channels_last(pool: Row, x: Any, *arguments: Any, **options: Any) -> Any:
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


def _max_pool(x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Any:
    """flax has no dilation, and JAX no derivative of a dilated `reduce_window`: there the first largest is taken."""
    reach = _reach(x, kernel, stride, padding, dilation, ceil_mode)
    if set(_each(x, dilation)) == {1}:
        return _channels_last(flax.linen.max_pool, x, _each(x, kernel), _each(x, stride), reach)
    met = _taps(x, kernel, stride, dilation, reach, -jnp.inf)
    return jnp.take_along_axis(met, met.argmax(axis=-1, keepdims=True), axis=-1)[..., 0]


def _avg_pool(x: Any, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool) -> Any:
    """flax counts the overhang of `ceil_mode` as padding; the divisor leaves it out."""
    kernel, stride, padding = (_each(x, each) for each in (kernel, stride, padding))
    reach = _reach(x, kernel, stride, padding, 1, ceil_mode)
    pooled = _channels_last(flax.linen.avg_pool, x, kernel, stride, reach, count_include_pad=count_include_pad)
    pooled = pooled.astype(x.dtype)  # without the padding, flax divides by an array of JAX's default dtype
    if not count_include_pad or all(low == high for low, high in reach):
        return pooled
    counted = np.ones([size + 2 * p for size, p in zip(x.shape[2:], padding, strict=True)])
    overhang = [(0, high - low) for low, high in reach]
    share = _taps(np.pad(counted, overhang)[None, None], kernel, stride, 1, [(0, 0)] * len(kernel), 0.0).mean(axis=-1)
    return pooled / share.astype(x.dtype)


def _lp_pool(x: Any, p: int, kernel: int, stride: int, ceil_mode: bool) -> Any:
    met = _taps(x, kernel, stride, 1, _reach(x, kernel, stride, ceil_mode=ceil_mode), 0.0)
    if p == 1:
        return met.sum(axis=-1)
    peak = jax.lax.stop_gradient(jnp.abs(met).max(axis=-1))
    empty = peak == 0
    # The reciprocal of a subnormal number, which XLA may multiply by, is infinite.
    scale = jnp.where(empty, 1.0, jnp.maximum(peak, 4.0 * float(limits(x.dtype).smallest_normal)))
    total = jnp.where(empty, 1.0, ((met / scale[..., None]) ** p).sum(axis=-1))
    return jnp.where(empty, 0.0, scale * total ** (1.0 / p))


def _adaptive_pool(reduce: Row) -> Row:
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


def _global_pool(reduce: Row) -> Row:
    return lambda x, keepdims: reduce(x, axis=tuple(range(2, x.ndim)), keepdims=keepdims)


def _flax_norm(norm: Callable[..., Any], x: Any, weight: Any, bias: Any, eps: float, **options: Any) -> Any:
    """flax's fast variance E[x^2] - E[x]^2 cancels; without it, it is the definition's."""
    scale = {"use_scale": weight is not None, "use_bias": bias is not None}
    module = norm(epsilon=eps, use_fast_variance=False, **scale, **options)
    given = {name: each for name, each in (("scale", weight), ("bias", bias)) if each is not None}
    return _channels_last(lambda moved: module.apply({"params": given}, moved), x)


def _rms_norm(x: Any, weight: Any = None, *, axes: int, eps: float) -> Any:
    over = tuple(range(-axes, 0))
    module = flax.linen.RMSNorm(
        epsilon=eps, use_scale=weight is not None, reduction_axes=over, feature_axes=over, use_fast_variance=False
    )
    return module.apply({"params": {} if weight is None else {"scale": weight}}, x)


def _batch_norm(
    x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None, *, eps: float
) -> Any:
    running = running_mean is not None
    module = flax.linen.BatchNorm(
        use_running_average=running,
        axis=1,
        epsilon=eps,
        use_scale=weight is not None,
        use_bias=bias is not None,
        use_fast_variance=False,
    )
    initial = (jnp.zeros(x.shape[1], x.dtype), jnp.ones(x.shape[1], x.dtype))
    mean, variance = (running_mean, running_var) if running else initial
    parameters = {} if weight is None else {"scale": weight, "bias": bias}
    variables = {"params": parameters, "batch_stats": {"mean": mean, "var": variance}}
    return module.apply(variables, x, mutable=["batch_stats"])[0]


def _group_norm(x: Any, weight: Any = None, bias: Any = None, *, groups: int, eps: float) -> Any:
    return _flax_norm(flax.linen.GroupNorm, x, weight, bias, eps, num_groups=groups)


def _instance_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float) -> Any:
    return _flax_norm(flax.linen.InstanceNorm, x, weight, bias, eps)


def _local_response_norm(x: Any, size: int, alpha: float, beta: float, k: float) -> Any:
    window = (1, size, *(1,) * (x.ndim - 2))
    reach = [(0, 0), (size // 2, (size - 1) // 2), *[(0, 0)] * (x.ndim - 2)]
    total = jax.lax.reduce_window(x * x, 0.0, jax.lax.add, window, (1,) * x.ndim, reach)
    return x * (k + alpha / size * total) ** -beta


def _weight_norm(x: Any, direction: Any, magnitude: Any, bias: Any = None) -> Any:
    """flax adds epsilon to the squared norm by default; the definition adds nothing."""
    module = flax.linen.WeightNorm(flax.linen.Dense(len(magnitude), use_bias=bias is not None), epsilon=0.0)
    dense = {"kernel": direction.T} | ({} if bias is None else {"bias": bias})
    return module.apply({"params": {"layer_instance": dense, "layer_instance/kernel/scale": magnitude}}, x)


def _bce(x: Any, target: Any, weight: Any = None) -> Any:
    # Where there is no weight, an infinite loss must not count: 0 times infinity is NaN, in derivatives too.
    x = x if weight is None else jnp.where(weight == 0, 0.5, x)
    loss = -xlogy(target, x) - xlog1py(1.0 - target, -x)
    return loss if weight is None else weight * loss


def _bce_with_logits(x: Any, target: Any, weight: Any = None, pos_weight: Any = None) -> Any:
    if pos_weight is None:
        loss = optax.sigmoid_binary_cross_entropy(x, target)
    else:  # optax has no such weights; this is its formula with them
        loss = -pos_weight * target * jax.nn.log_sigmoid(x) - (1.0 - target) * jax.nn.log_sigmoid(-x)
    return loss if weight is None else weight * loss


def _smooth_l1(x: Any, target: Any, beta: float) -> Any:
    size = jnp.abs(x - target)
    return jnp.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta) if beta else size


def _poisson_nll(x: Any, target: Any, *, log_input: bool, full: bool, eps: float) -> Any:
    loss = jnp.exp(x) - target * x if log_input else x - target * jnp.log(x + eps)
    if not full:
        return loss
    counts = jnp.where(target > 1.0, target, 1.0)
    stirling = counts * jnp.log(counts) - counts + 0.5 * jnp.log(2.0 * jnp.pi * counts)
    return loss + jnp.where(target > 1.0, stirling, 0.0)


def _gaussian_nll(x: Any, target: Any, var: Any, *, full: bool, eps: float) -> Any:
    var = var if var.ndim == x.ndim else var[..., None]
    var = var + jax.lax.stop_gradient(jnp.maximum(var, eps) - var)  # gradients pass the clamp
    error = x - target
    loss = 0.5 * (jnp.log(var) + error * (error / var))
    return loss + 0.5 * jnp.log(2.0 * jnp.pi) if full else loss


def _cross_entropy(
    x: Any,
    target: Any,
    weight: Any = None,
    *,
    targets: str,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Any:
    classes = x.shape[-1]
    weights = 1.0 if weight is None else weight
    if targets == "probabilities":
        labels = optax.smooth_labels(target, label_smoothing) if label_smoothing else target
        return REDUCTIONS[reduction](optax.softmax_cross_entropy(x, weights * labels))
    if weight is None and not label_smoothing:
        kept = jnp.where(target == ignore_index, 0, target)
        loss = optax.softmax_cross_entropy_with_integer_labels(x, kept)
    else:
        labels = optax.smooth_labels(jax.nn.one_hot(target, classes, dtype=x.dtype), label_smoothing)
        loss = optax.softmax_cross_entropy(x, weights * labels)
    return _reduced_by_weight(loss, target, weight, ignore_index, reduction)


def _nll(x: Any, target: Any, weight: Any = None, *, ignore_index: int, reduction: str) -> Any:
    labels = jax.nn.one_hot(target, x.shape[-1], dtype=x.dtype)
    loss = -(labels * x if weight is None else weight * labels * x).sum(axis=-1)
    return _reduced_by_weight(loss, target, weight, ignore_index, reduction)


def _reduced_by_weight(loss: Any, target: Any, weight: Any, ignore_index: int, reduction: str) -> Any:
    """optax knows neither ignored classes nor means over weights. The mean of nothing is NaN, its gradient 0."""
    kept = target != ignore_index
    loss = jnp.where(kept, loss, 0.0)
    if reduction != "mean":
        return REDUCTIONS[reduction](loss)
    total = jnp.where(kept, 1.0 if weight is None else weight[jnp.where(kept, target, 0)], 0.0).sum()
    return jnp.where(total == 0, jnp.nan, loss.sum() / jnp.where(total == 0, 1.0, total)).astype(loss.dtype)


def _kl_div(x: Any, target: Any, *, log_target: bool, reduction: str) -> Any:
    """optax sums over an axis: here over one of length 1."""
    divergence = optax.losses.kl_divergence_with_log_targets if log_target else optax.kl_divergence
    loss = divergence(x[..., None], target[..., None])
    return loss.sum() / len(x) if reduction == "batchmean" else REDUCTIONS[reduction](loss)


def _sigmoid_focal(x: Any, target: Any, *, alpha: float, gamma: float) -> Any:
    """optax's, but for the target's gradient, which lacks a term where the target is 0 or 1: see docs/findings.md."""
    fixed, of_target = jax.lax.stop_gradient(x), jax.lax.stop_gradient(target)
    wrong = (1.0 - target) * jax.nn.sigmoid(fixed) + target * jax.nn.sigmoid(-fixed)
    balance = alpha * target + (1.0 - alpha) * (1.0 - target) if alpha >= 0.0 else 1.0
    entropy = of_target * jax.nn.softplus(-fixed) + (1.0 - of_target) * jax.nn.softplus(fixed)
    entropy = entropy - fixed * (target - of_target)  # 0, but for its derivative, which is exact so
    formula = balance * (wrong**gamma if gamma else 1.0) * entropy
    loss = optax.sigmoid_focal_loss(x, of_target, alpha=alpha if alpha >= 0.0 else None, gamma=gamma)
    return loss + formula - jax.lax.stop_gradient(formula)


def _dice(x: Any, target: Any, *, axes: int, smooth: float, squared: bool) -> Any:
    """`optax.losses.dice_loss` takes the softmax or sigmoid of x itself."""
    over = tuple(range(-axes, 0))
    sizes = x * x + target * target if squared else x + target
    return 1.0 - (2.0 * (x * target).sum(over) + smooth) / (sizes.sum(over) + smooth)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    out = x @ weight.T
    return out if bias is None else out + bias


def _bilinear(x1: Any, x2: Any, weight: Any, bias: Any = None) -> Any:
    # As one einsum, JAX may begin with the outer product of x1 and x2, which overflows first.
    out = jnp.einsum("...oj,...j->...o", jnp.einsum("...i,oij->...oj", x1, weight), x2)
    return out if bias is None else out + bias


def _embedding(indices: Any, weight: Any, *, padding_idx: int) -> Any:
    if padding_idx >= 0:  # flax has no row that is not trained
        weight = weight.at[padding_idx].set(jax.lax.stop_gradient(weight[padding_idx]))
    batch = indices.reshape(indices.shape or (1,))  # flax fails on a single index into a single row
    rows: Any = flax.linen.Embed(*weight.shape).apply({"params": {"embedding": weight}}, batch)
    return rows.reshape(*indices.shape, weight.shape[1])


def _embedding_bag(indices: Any, weight: Any, per_sample_weights: Any = None, *, mode: str, padding_idx: int) -> Any:
    rows, kept = jnp.take(weight, indices, axis=0), (indices != padding_idx)[..., None]
    if mode == "max":
        first = jnp.argmax(jnp.where(kept, rows, -jnp.inf), axis=1, keepdims=True)
        largest = jnp.take_along_axis(rows, first, axis=1)[:, 0]
        return jnp.where(kept.any(axis=1), largest, 0.0)
    weighted = rows if per_sample_weights is None else rows * per_sample_weights[..., None]
    total = jnp.sum(weighted, axis=1, where=kept)
    return total / jnp.maximum(kept.sum(axis=1), 1) if mode == "mean" else total


def _scatter_add(x: Any, indices: Any, source: Any, *, axis: int) -> Any:
    places = list(jnp.indices(indices.shape, sparse=True))
    places[axis] = indices
    return x.at[tuple(places)].add(source)


def _slice(x: Any, *, axis: int, start: int, stop: int, step: int) -> Any:
    return jnp.moveaxis(jnp.moveaxis(x, axis, 0)[start:stop:step], 0, axis)


def _sort(x: Any, *, axis: int, descending: bool) -> Any:
    # Descending, `jnp.sort` is the ascending one reversed, equal elements too; flipping x brings them back in order.
    return jnp.sort(jnp.flip(x, axis) if descending else x, axis, descending=descending)


def _top_k(x: Any, *, k: int, axis: int, largest: bool) -> Any:
    if not largest:  # of -x, where NaN would come first
        first = jax.lax.slice_in_dim(jnp.argsort(x, axis=axis), 0, k, axis=axis)
        return jnp.take_along_axis(x, first, axis=axis)
    # XLA counts -0.0 as smaller than 0.0; without its sign, zero ties with zero.
    unsigned = x - jax.lax.stop_gradient(jnp.where(x == 0.0, x, 0.0))
    return jax.lax.top_k(unsigned, k, axis=axis)[0]


def _hardtanh(x: Any, min_val: float, max_val: float) -> Any:
    """`jax.nn.hard_tanh` has no bounds to choose; this is its formula with them."""
    return jnp.where(x > max_val, max_val, jnp.where(x < min_val, min_val, x))


def _softshrink(x: Any, lambd: float) -> Any:
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, 0.0))


def _swiglu(x: Any, axis: int) -> Any:
    a, b = jnp.split(x, 2, axis)
    return jax.nn.silu(a) * b


def _geglu(x: Any, axis: int, approximate: str) -> Any:
    a, b = jnp.split(x, 2, axis)
    return jax.nn.gelu(a, approximate=approximate == "tanh") * b


def _maxout(x: Any, axis: int, pieces: int) -> Any:
    place = axis % x.ndim
    return x.reshape(*x.shape[:place], -1, pieces, *x.shape[place + 1 :]).max(place + 1)


def _prelu(x: Any, weight: Any) -> Any:
    """flax has one slope for all; with one per channel, this is its formula."""
    if weight.size == 1:
        return flax.linen.PReLU().apply({"params": {"negative_slope": weight.reshape(())}}, x)
    return jnp.where(x >= 0, x, weight.reshape(-1, *[1] * (x.ndim - 2)) * x)


def _convolution(
    x: Any, weight: Any, bias: Any = None, *, stride: Any, padding: Any, dilation: Any, groups: int
) -> Any:
    """Padded beforehand: compiling the gradient of a padded and strided convolution can abort the process."""
    padded = jnp.pad(x, [(0, 0), (0, 0), *((each, each) for each in padding)])
    none = [(0, 0)] * len(padding)
    out = jax.lax.conv_general_dilated(padded, weight, stride, none, rhs_dilation=dilation, feature_group_count=groups)
    return out if bias is None else out + bias.reshape(-1, *[1] * len(stride))


def _hinge_embedding(x: Any, target: Any, *, margin: float) -> Any:
    return jnp.where(target == 1, x, jnp.maximum(margin - x, 0.0))


def _soft_margin(x: Any, target: Any) -> Any:
    return jax.nn.softplus(-target * x)


def _multi_margin(x: Any, target: Any, weight: Any = None, *, p: int, margin: float) -> Any:
    own = jnp.take_along_axis(x, target[..., None], axis=-1)
    missing = jnp.where(jnp.arange(x.shape[-1]) == target[..., None], 0.0, jax.nn.relu(margin - own + x))
    factor = 1.0 if weight is None else weight[target][..., None]
    return jnp.mean(factor * missing**p, axis=-1)


def _multilabel_margin(x: Any, target: Any) -> Any:
    listed = jnp.cumprod(target >= 0, axis=-1).astype(bool)
    is_entry = listed[..., None] & (target[..., None] == jnp.arange(x.shape[-1]))
    own = jnp.take_along_axis(x, jnp.where(listed, target, 0), axis=-1)[..., None]
    pairs = listed[..., None] & ~is_entry.any(axis=-2, keepdims=True)
    missing = jnp.where(pairs, jax.nn.relu(1.0 - own + x[..., None, :]), 0.0)
    return missing.sum(axis=(-2, -1)) / x.shape[-1]


def _multilabel_soft_margin(x: Any, target: Any, weight: Any = None) -> Any:
    loss = jax.nn.softplus(x) - target * x
    return jnp.mean(loss if weight is None else weight * loss, axis=-1)


def _margin_ranking(x1: Any, x2: Any, target: Any, *, margin: float) -> Any:
    return jnp.maximum(margin - target * (x1 - x2), 0.0)


def _active_hinge(missing: Any) -> Any:
    """max(z, 0) with the derivative 1 at 0."""
    return jnp.where(missing < 0.0, 0.0, missing)


COSINE_FLOOR = 9.999999980020986e-07
"""Its square, added to each squared length, is torch's float32 1e-12."""


def _cosine_embedding(x1: Any, x2: Any, target: Any, *, margin: float) -> Any:
    def direction(x: Any) -> Any:
        """x over its length, in which no square overflows."""
        scale = jax.lax.stop_gradient(jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), 1.0))
        # XLA multiplies by the reciprocal, which is 0 for the largest numbers, but not for a quarter of them.
        share, floor = (0.25 * x) / (0.25 * scale), COSINE_FLOOR / scale
        return share / jnp.sqrt((share * share).sum(axis=-1, keepdims=True) + floor * floor)

    cosine = (direction(x1) * direction(x2)).sum(axis=-1)
    return jnp.where(target == 1, 1.0 - cosine, _active_hinge(cosine - margin))


def _triplet_margin(
    anchor: Any, positive: Any, negative: Any, *, p: float, margin: float, eps: float, swap: bool
) -> Any:
    """optax's triplet_margin_loss has eps inside the root and no absolute value under an odd power."""

    def distance(a: Any, b: Any) -> Any:
        apart = a - b + eps
        peak = jax.lax.stop_gradient(jnp.abs(apart).max(axis=-1, keepdims=True))
        some = peak > 0.0  # the derivative of the norm of nothing is 0 by choice; JAX makes it NaN
        tiny = jnp.finfo(apart.dtype).tiny  # type: ignore[no-untyped-call]
        scale = jnp.maximum(peak, tiny)  # JAX takes powers as they are, and they overflow
        lengths = scale[..., 0] * jnp.linalg.norm(jnp.where(some, apart / scale, 1.0), ord=p, axis=-1)
        return jnp.where(some[..., 0], lengths, 0.0)

    to_negative = distance(anchor, negative)
    if swap:
        to_negative = jnp.minimum(to_negative, distance(positive, negative))
    return _active_hinge(margin + distance(anchor, positive) - to_negative)


LOG_OF_ZERO = -1e30
"""optax's own -1e5 loses every path that is less likely than exp(-1e5)."""


def _ctc(
    logits: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    *,
    blank: int,
    zero_infinity: bool,
    reduction: str,
) -> Any:
    """optax has the batch first, marks of what is padding, and a large loss where there is no path at all."""
    logit_paddings, label_paddings = (
        (jnp.arange(size) >= lengths[:, None]).astype(logits.dtype)
        for size, lengths in ((logits.shape[0], input_lengths), (targets.shape[1], target_lengths))
    )
    batch_first = jnp.swapaxes(logits, 0, 1)
    loss = optax.ctc_loss(batch_first, logit_paddings, targets, label_paddings, blank_id=blank, log_epsilon=LOG_OF_ZERO)
    repeats = (targets[:, 1:] == targets[:, :-1]) & (jnp.arange(1, targets.shape[1]) < target_lengths[:, None])
    feasible = target_lengths + repeats.sum(axis=1) <= input_lengths
    loss = jnp.where(feasible, loss, 0.0 if zero_infinity else jnp.inf).astype(logits.dtype)
    return REDUCTIONS[reduction](loss / jnp.maximum(target_lengths, 1) if reduction == "mean" else loss)


def _convolution_transpose(
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


def _upsample(x: Any, *, size: int | tuple[int, ...], mode: str, align_corners: bool) -> Any:
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


def _pixel_shuffle(x: Any, factor: int) -> Any:
    *leading, channels, height, width = x.shape
    split = x.reshape(*leading, channels // factor**2, factor, factor, height, width)
    woven = jnp.moveaxis(split, (-4, -3), (-3, -1))
    return woven.reshape(*leading, channels // factor**2, factor * height, factor * width)


def _pad(x: Any, *, amounts: tuple[int, ...], mode: str, value: float) -> Any:
    sides = [(0, 0)] * (x.ndim - len(amounts) // 2) + list(zip(amounts[::2], amounts[1::2], strict=True))
    if mode == "constant":
        return jnp.pad(x, sides, constant_values=value)
    return jnp.pad(x, sides, {"replicate": "edge", "circular": "wrap"}.get(mode, mode))


Weights = Mapping[str, Any]


def _flax_gates(weights: Weights, names: str, biased: str) -> dict[str, Any]:
    """flax keeps a map per gate ("ii", "hf", ...), with one bias where two would be added; "i" or "h" has it."""
    split = {name: jnp.split(each, len(names)) for name, each in weights.items()}
    gates: dict[str, Any] = {}
    for at, name in enumerate(names):
        gates[f"i{name}"] = {"kernel": split["weight_ih"][at].T}
        gates[f"h{name}"] = {"kernel": split["weight_hh"][at].T}
        gates[f"{biased}{name}"]["bias"] = split["bias_ih"][at] + split["bias_hh"][at]
    return gates


def _flax_lstm(weights: Weights) -> dict[str, Any]:
    return _flax_gates(weights, "ifgo", "h")


def _flax_gru(weights: Weights) -> dict[str, Any]:
    """The new gate keeps both biases, for the reset gate stands between them."""
    gates = _flax_gates(weights, "rzn", "i")
    for part in "ih":
        gates[f"{part}n"]["bias"] = jnp.split(weights[f"bias_{part}h"], 3)[2]
    return gates


def _flax_rnn_tanh(weights: Weights) -> dict[str, Any]:
    bias = weights["bias_ih"] + weights["bias_hh"]
    return {"i": {"kernel": weights["weight_ih"].T, "bias": bias}, "h": {"kernel": weights["weight_hh"].T}}


def _recurrent(cell: Any, flax_parameters: Callable[[Weights], dict[str, Any]]) -> Row:
    """A row that runs flax's cell over time, once per layer and direction; flax has neither stacks nor no biases."""
    carries_cell = cell is flax.linen.OptimizedLSTMCell

    def row(
        x: Any, h0: Any = None, c0: Any = None, *, layers: int, bidirectional: bool, returns: str, **parameters: Any
    ) -> Any:
        ends = [f"_l{layer}{end}" for layer in range(layers) for end in ("", "_reverse")[: 1 + bidirectional]]
        features = parameters["weight_hh_l0"].shape[1]
        nothing = jnp.zeros((len(ends), x.shape[1], features), x.dtype)
        h0, c0 = (nothing if each is None else each for each in (h0, c0))
        unbiased = jnp.zeros(parameters["weight_hh_l0"].shape[:1], x.dtype)
        outs, last = [], []
        for at, end in enumerate(ends):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weights = {name: parameters.get(f"{name}{end}", unbiased) for name in names}
            run: Any = flax.linen.RNN(cell(features), time_major=True, return_carry=True, keep_order=True)
            first = (c0[at], h0[at]) if carries_cell else h0[at]
            tree = {"params": {"cell": flax_parameters(weights)}}
            carry, out = run.apply(tree, x, initial_carry=first, reverse=end.endswith("_reverse"))
            outs.append(out)
            last.append((carry[1], carry[0]) if carries_cell else (carry,))
            if len(outs) == 1 + bidirectional:
                x, outs = jnp.concatenate(outs, axis=-1), []
        if returns == "sequence":
            return x
        return jnp.stack([states[("hidden", "cell").index(returns)] for states in last])

    return row


def _some_allowed(attend: Row) -> Row:
    """flax and jax.nn attend to all keys alike where a query is allowed none; the layer gives 0 there."""

    def attend_or_zero(query: Any, key: Any, value: Any, *, mask: Any = None, **options: Any) -> Any:
        out = attend(query, key, value, mask=mask, **options)
        return out if mask is None else jnp.where(jnp.moveaxis(mask.any(-1), -2, -1)[..., None], out, 0.0)

    return attend_or_zero


def _combined(mask: Any, causal: bool, queries: int, keys: int) -> Any:
    earlier = jnp.tri(queries, keys, dtype=bool) if causal else None
    if mask is None:
        return earlier
    return mask.astype(bool) if earlier is None else mask.astype(bool) & earlier


def _attention(
    q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None, *, causal: bool, scale: float | str, groups: int
) -> Any:
    """jax.nn's where it takes the values (as wide as keys) and keeps the digits (it is float32 inside), else flax's."""
    rank, factor = q.ndim, None if isinstance(scale, str) else scale
    allowed = _combined(mask, causal, q.shape[-2], k.shape[-2])
    masks = {name: None if m is None else _four_axes(m, rank) for name, m in (("mask", allowed), ("bias", bias))}
    query, key, value = (jnp.swapaxes(_four_axes(each, rank), 1, 2) for each in (q, k, v))
    if q.dtype != jnp.float32 or k.shape != v.shape:
        key, value = (jnp.repeat(each, groups, axis=2) for each in (key, value))
        query = query if factor is None else query * (factor * q.shape[-1] ** 0.5)
        out = _some_allowed(flax.linen.dot_product_attention)(query, key, value, **masks)
    elif mask is None:
        out = jax.nn.dot_product_attention(query, key, value, masks["bias"], scale=factor, is_causal=causal)
    else:
        out = _some_allowed(jax.nn.dot_product_attention)(query, key, value, **masks, scale=factor)
    return jnp.swapaxes(out, 1, 2).reshape(*q.shape[:-1], v.shape[-1])


def _four_axes(x: Any, rank: int) -> Any:
    """(batch, heads, ...) from an array that broadcasts to one of this rank; without an axis of heads, there is one."""
    batch = x.reshape(*[1] * (rank - x.ndim), *x.shape)
    return batch if rank == 4 else batch.reshape(*([1] if rank == 2 else batch.shape[:1]), 1, *batch.shape[-2:])


def _multi_head_attention(
    query: Any,
    key: Any = None,
    value: Any = None,
    mask: Any = None,
    bias: Any = None,
    padding: Any = None,
    *,
    heads: int,
    causal: bool,
    in_proj_weight: Any = None,
    in_proj_bias: Any = None,
    out_proj_weight: Any,
    out_proj_bias: Any = None,
    **apart: Any,
) -> Any:
    """flax wants the batch first, a weight per head, and has no bias for the scores but in the function it calls."""
    features, batched = query.shape[-1], query.ndim == 3
    key = query if key is None else key
    value = key if value is None else value
    names = ("query", "key", "value")
    weights = [apart[f"{name[0]}_proj_weight"] for name in names] if apart else jnp.split(in_proj_weight, 3)
    tree = {name: {"kernel": w.T.reshape(-1, heads, features // heads)} for name, w in zip(names, weights, strict=True)}
    tree["out"] = {"kernel": out_proj_weight.T.reshape(heads, -1, features)}
    if in_proj_bias is not None:
        for name, each in zip(names, jnp.split(in_proj_bias, 3), strict=True):
            tree[name]["bias"] = each.reshape(heads, -1)
        tree["out"]["bias"] = out_proj_bias
    allowed = _per_head(_combined(_per_head(mask, heads), causal, query.shape[0], key.shape[0]), heads)
    if padding is not None:
        seen = padding.reshape(-1, 1, 1, key.shape[0]).astype(bool)
        allowed = seen if allowed is None else seen & allowed
    attend = partial(_some_allowed(flax.linen.dot_product_attention), bias=_per_head(bias, heads))
    module: Any = flax.linen.MultiHeadDotProductAttention(heads, use_bias=in_proj_bias is not None, attention_fn=attend)
    sources = [jnp.swapaxes(each, 0, 1) if batched else each[None] for each in (query, key, value)]
    with warnings.catch_warnings():
        # flax suspects that square values were meant as a mask.
        warnings.simplefilter("ignore", DeprecationWarning)
        out = module.apply({"params": tree}, *sources, mask=allowed)
    return jnp.swapaxes(out, 0, 1) if batched else out[0]


def _per_head(mask: Any, heads: int) -> Any:
    """(batch heads, queries, keys) to (batch, heads, queries, keys); (queries, keys) to (1, 1, queries, keys)."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask.reshape(-1, heads if mask.ndim == 3 else 1, *mask.shape[-2:])


def _rotary(x: Any, *, axis: int, pairs: str, base: float) -> Any:
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=x.dtype) / half)
    angles = jnp.outer(jnp.arange(x.shape[axis], dtype=x.dtype), frequencies)
    shape = [1] * x.ndim
    shape[axis], shape[-1] = angles.shape
    cosine, sine = jnp.cos(angles).reshape(shape), jnp.sin(angles).reshape(shape)
    a, b = (x[..., 0::2], x[..., 1::2]) if pairs == "interleaved" else jnp.split(x, 2, axis=-1)
    turned = (a * cosine - b * sine, a * sine + b * cosine)
    return jnp.stack(turned, -1).reshape(x.shape) if pairs == "interleaved" else jnp.concatenate(turned, -1)


ROWS: dict[str, Row] = {
    # activations, piecewise, elementwise
    "identity": jax.nn.identity,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": lambda x, beta: jax.nn.softplus(beta * x) / beta,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": Composed(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "mish": jax.nn.mish,
    "softsign": jax.nn.soft_sign,
    "squareplus": jax.nn.squareplus,
    "tanhshrink": Composed(lambda x: x - jnp.tanh(x)),
    "log_sigmoid": jax.nn.log_sigmoid,
    "relu6": jax.nn.relu6,
    "hardtanh": Composed(_hardtanh),
    "hardsigmoid": jax.nn.hard_sigmoid,
    "hardswish": jax.nn.hard_swish,
    "softshrink": Composed(_softshrink),
    "hardshrink": Composed(lambda x, lambd: jnp.where(jnp.abs(x) > lambd, x, 0.0)),
    "threshold": Composed(lambda x, threshold, value: jnp.where(x > threshold, x, value)),
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "prelu": _prelu,
    "rrelu": lambda x, lower, upper: jax.nn.leaky_relu(x, (lower + upper) / 2.0),
    "sparse_plus": jax.nn.sparse_plus,
    "sparse_sigmoid": jax.nn.sparse_sigmoid,
    "abs": jnp.abs,
    "clip": lambda x, low, high: jnp.clip(x, low, high),
    "exp": jnp.exp,
    "log": jnp.log,
    "sqrt": jnp.sqrt,
    "rsqrt": jax.lax.rsqrt,
    "square": jnp.square,
    "reciprocal": jnp.reciprocal,
    "power": lambda x, exponent: jnp.power(x, exponent),
    "sin": jnp.sin,
    "cos": jnp.cos,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    # gated, softmax
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "softmin": Composed(lambda x, axis: jax.nn.softmax(-x, axis)),
    "logsumexp": jax.nn.logsumexp,
    "glu": jax.nn.glu,
    "swiglu": Composed(_swiglu),
    "geglu": Composed(_geglu),
    "maxout": Composed(_maxout),
    # linear, indexing
    "linear": Composed(_linear),
    "bilinear": Composed(_bilinear),
    "matmul": jnp.matmul,
    "einsum": lambda a, b, equation: jnp.einsum(equation, a, b),
    "embedding": _embedding,
    "embedding_bag": Composed(_embedding_bag),
    "gather": lambda x, indices, axis: jnp.take_along_axis(x, indices, axis),
    "scatter_add": _scatter_add,
    "where": lambda a, b, condition: jnp.where(condition == 1, a, b),
    "slice": _slice,
    "split": lambda x, axis, parts, index: jnp.array_split(x, parts, axis=axis)[index],
    "sort": _sort,
    "top_k": _top_k,
    # convolution, resampling
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose1d": _convolution_transpose,
    "conv_transpose2d": _convolution_transpose,
    "upsample": _upsample,
    "pixel_shuffle": Composed(_pixel_shuffle),
    "pad": _pad,
    # pooling, normalization, dropout
    "max_pool1d": _max_pool,
    "max_pool2d": _max_pool,
    "avg_pool1d": _avg_pool,
    "avg_pool2d": _avg_pool,
    "lp_pool": Composed(_lp_pool),
    "adaptive_avg_pool": Composed(_adaptive_pool(jnp.mean)),
    "adaptive_max_pool": Composed(_adaptive_pool(jnp.max)),
    "global_avg_pool": _global_pool(jnp.mean),
    "global_max_pool": _global_pool(jnp.max),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "local_response_norm": Composed(_local_response_norm),
    "weight_norm": _weight_norm,
    "dropout": Composed(lambda x, mask, p: x * mask.astype(x.dtype) / (1.0 - p)),
    # recurrent, attention
    "rnn_tanh": _recurrent(flax.linen.SimpleCell, _flax_rnn_tanh),
    "gru": _recurrent(flax.linen.GRUCell, _flax_gru),
    "lstm": _recurrent(flax.linen.OptimizedLSTMCell, _flax_lstm),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention": _multi_head_attention,
    "rotary": Composed(_rotary),
    # merges, shapes, reductions
    "add": jnp.add,
    "subtract": jnp.subtract,
    "multiply": jnp.multiply,
    "divide": jnp.divide,
    "concatenate": lambda *xs, axis: jnp.concatenate(xs, axis=axis),
    "reshape": jnp.reshape,
    "flatten": lambda x: jnp.reshape(x, (x.shape[0], -1)),
    "stack": lambda *xs, axis: jnp.stack(xs, axis=axis),
    "transpose": jnp.transpose,
    "broadcast": jnp.broadcast_to,
    "reduce_sum": lambda x, axes, keepdims: jnp.sum(x, axes, keepdims=keepdims),
    "reduce_mean": lambda x, axes, keepdims: jnp.mean(x, axes, keepdims=keepdims),
    "reduce_max": lambda x, axes, keepdims: jnp.max(x, axes, keepdims=keepdims),
    "reduce_min": lambda x, axes, keepdims: jnp.min(x, axes, keepdims=keepdims),
    "reduce_prod": lambda x, axes, keepdims: jnp.prod(x, axes, keepdims=keepdims),
    "reduce_var": lambda x, axes, ddof, keepdims: jnp.var(x, axes, ddof=ddof, keepdims=keepdims),
    "reduce_std": lambda x, axes, ddof, keepdims: jnp.std(x, axes, ddof=ddof, keepdims=keepdims),
    "reduce_norm": lambda x, p, axes, keepdims: jnp.linalg.vector_norm(x, ord=p, axis=axes, keepdims=keepdims),
    "cumsum": lambda x, axis, reverse: jax.lax.cumsum(x, axis % x.ndim, reverse=reverse),
    # losses
    "mse": _reduced(optax.squared_error),
    "half_squared_error": _reduced(optax.l2_loss),
    "mae": Composed(_reduced(lambda x, target: jnp.abs(x - target))),
    "huber": _reduced(optax.huber_loss),
    "smooth_l1": Composed(_reduced(_smooth_l1)),
    "log_cosh": _reduced(optax.log_cosh),
    "poisson_nll": Composed(_reduced(_poisson_nll)),
    "gaussian_nll": Composed(_reduced(_gaussian_nll)),
    "bce": Composed(_reduced(_bce)),
    "bce_with_logits": _reduced(_bce_with_logits),
    "cross_entropy": _cross_entropy,
    "nll": Composed(_nll),
    "kl_div": _kl_div,
    "sigmoid_focal": _reduced(_sigmoid_focal),
    "dice": Composed(_reduced(_dice)),
    # margins, ctc
    "hinge": _reduced(optax.hinge_loss),
    "squared_hinge": Composed(_reduced(lambda x, target: optax.hinge_loss(x, target) ** 2)),
    "hinge_embedding": Composed(_reduced(_hinge_embedding)),
    "soft_margin": Composed(_reduced(_soft_margin)),
    "multi_margin": Composed(_reduced(_multi_margin)),
    "multilabel_margin": Composed(_reduced(_multilabel_margin)),
    "multilabel_soft_margin": Composed(_reduced(_multilabel_soft_margin)),
    "margin_ranking": Composed(_reduced(_margin_ranking)),
    "cosine_embedding": Composed(_reduced(_cosine_embedding)),
    "triplet_margin": Composed(_reduced(_triplet_margin)),
    "ctc": _ctc,
}


class JaxAdapter(FunctionalAdapter):
    """Gradients as `jax.vjp` gives them.

    jit: "layer" compiles each layer by itself and lets JAX differentiate their composition; "network" compiles
        the whole network, forward and backward in one program, anew for every network. Where it is not given,
        the environment variable GRADPROOF_JAX_JIT says it, else "layer".
    """

    name = "jax"
    rows = ROWS

    def __init__(self, jit: str | None = None) -> None:
        self._jit = jit or os.environ.get(JAX_JIT_VARIABLE, JITS[0])
        if self._jit not in JITS:
            raise AdapterError(f"jit {self._jit!r}: valid: {', '.join(JITS)}")
        self.fused = self._jit == "network"
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "highest")
        directory = os.environ.get(JAX_CACHE_VARIABLE) or platformdirs.user_cache_dir("gradproof/jax")
        if directory != "off":
            jax.config.update("jax_compilation_cache_dir", directory)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def version(self) -> str:
        return f"{jax.__version__} with optax {optax.__version__} and flax {flax.__version__}"

    def run_node(self, node: Node, known: Arrays, tap: Any) -> Any:
        arrays, by_name = node.bind(known)
        if self._jit == "network":
            return self.rows[node.layer.name](*arrays, **by_name, **node.keywords) + tap
        return _compiled(self.rows[node.layer.name], tuple(node.keywords.items()))(tap, arrays, by_name)

    def vjp(self, network: Network, floating: Arrays, constant: Arrays, taps: Arrays) -> tuple[Arrays, Any]:
        if self._jit == "network":
            run = partial(_whole(self, network), floating, taps, constant)
            # The program takes the cotangent too, which comes later: whatever it is, the outputs are the same.
            outputs, _ = run(np.zeros_like(taps[network.output]))
            return jax.device_get(outputs), lambda cotangent: run(cotangent)[1]
        function = partial(self.walk, network, constant=constant)
        output, pullback, outputs = jax.vjp(function, floating, taps, has_aux=True)
        return jax.device_get(outputs), lambda cotangent: pullback(jnp.array(cotangent, output.dtype))

    def pull_back(self, pullback: Any, cotangent: np.ndarray) -> tuple[Arrays, Arrays]:
        gradients: tuple[Arrays, Arrays] = jax.device_get(pullback(cotangent))
        return gradients


@cache
def _compiled(row: Row, keywords: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """One compiled function per row and options, shared by every network."""
    options: Options = dict(keywords)

    def run(tap: Any, arrays: list[Any], by_name: Mapping[str, Any]) -> Any:
        return row(*arrays, **by_name, **options) + tap

    return jax.jit(run)


@lru_cache(maxsize=KEPT)
def _whole(adapter: JaxAdapter, network: Network) -> Callable[..., Any]:
    """All outputs and all gradients of a network in one compiled function; numbers of any dtype share it."""

    def run(floating: Arrays, taps: Arrays, constant: Arrays, cotangent: Any) -> tuple[Arrays, Any]:
        function = partial(adapter.walk, network, constant=constant)
        output, pullback, outputs = jax.vjp(function, floating, taps, has_aux=True)
        return outputs, pullback(jnp.asarray(cotangent, output.dtype))

    return jax.jit(run)
