"""Losses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import xlog1py, xlogy

from gradproof.adapters.base import Row

REDUCTIONS: dict[str, Row] = {"none": lambda loss: loss, "mean": jnp.mean, "sum": jnp.sum}


def reduced(loss: Row) -> Row:
    """optax's losses are unreduced."""
    return lambda *arrays, reduction, **others: REDUCTIONS[reduction](loss(*arrays, **others))


def bce(x: Any, target: Any, weight: Any = None) -> Any:
    # Where there is no weight, an infinite loss must not count: 0 times infinity is NaN, in derivatives too.
    x = x if weight is None else jnp.where(weight == 0, 0.5, x)
    loss = -xlogy(target, x) - xlog1py(1.0 - target, -x)
    return loss if weight is None else weight * loss


def bce_with_logits(x: Any, target: Any, weight: Any = None, pos_weight: Any = None) -> Any:
    if pos_weight is None:
        loss = optax.sigmoid_binary_cross_entropy(x, target)
    else:  # optax has no such weights; this is its formula with them
        loss = -pos_weight * target * jax.nn.log_sigmoid(x) - (1.0 - target) * jax.nn.log_sigmoid(-x)
    return loss if weight is None else weight * loss


def smooth_l1(x: Any, target: Any, beta: float) -> Any:
    size = jnp.abs(x - target)
    return jnp.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta) if beta else size


def poisson_nll(x: Any, target: Any, *, log_input: bool, full: bool, eps: float) -> Any:
    loss = jnp.exp(x) - target * x if log_input else x - target * jnp.log(x + eps)
    if not full:
        return loss
    counts = jnp.where(target > 1.0, target, 1.0)
    stirling = counts * jnp.log(counts) - counts + 0.5 * jnp.log(2.0 * jnp.pi * counts)
    return loss + jnp.where(target > 1.0, stirling, 0.0)


def gaussian_nll(x: Any, target: Any, var: Any, *, full: bool, eps: float) -> Any:
    var = var if var.ndim == x.ndim else var[..., None]
    var = var + jax.lax.stop_gradient(jnp.maximum(var, eps) - var)  # gradients pass the clamp
    error = x - target
    loss = 0.5 * (jnp.log(var) + error * (error / var))
    return loss + 0.5 * jnp.log(2.0 * jnp.pi) if full else loss


def cross_entropy(
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


def nll(x: Any, target: Any, weight: Any = None, *, ignore_index: int, reduction: str) -> Any:
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


def kl_div(x: Any, target: Any, *, log_target: bool, reduction: str) -> Any:
    """optax sums over an axis: here over one of length 1."""
    divergence = optax.losses.kl_divergence_with_log_targets if log_target else optax.kl_divergence
    loss = divergence(x[..., None], target[..., None])
    return loss.sum() / len(x) if reduction == "batchmean" else REDUCTIONS[reduction](loss)


def sigmoid_focal(x: Any, target: Any, *, alpha: float, gamma: float) -> Any:
    """optax's, but for the target's gradient, which lacks a term where the target is 0 or 1: see docs/findings.md."""
    fixed, of_target = jax.lax.stop_gradient(x), jax.lax.stop_gradient(target)
    wrong = (1.0 - target) * jax.nn.sigmoid(fixed) + target * jax.nn.sigmoid(-fixed)
    balance = alpha * target + (1.0 - alpha) * (1.0 - target) if alpha >= 0.0 else 1.0
    entropy = of_target * jax.nn.softplus(-fixed) + (1.0 - of_target) * jax.nn.softplus(fixed)
    entropy = entropy - fixed * (target - of_target)  # 0, but for its derivative, which is exact so
    formula = balance * (wrong**gamma if gamma else 1.0) * entropy
    loss = optax.sigmoid_focal_loss(x, of_target, alpha=alpha if alpha >= 0.0 else None, gamma=gamma)
    return loss + formula - jax.lax.stop_gradient(formula)


def dice(x: Any, target: Any, *, axes: int, smooth: float, squared: bool) -> Any:
    """`optax.losses.dice_loss` takes the softmax or sigmoid of x itself."""
    over = tuple(range(-axes, 0))
    sizes = x * x + target * target if squared else x + target
    return 1.0 - (2.0 * (x * target).sum(over) + smooth) / (sizes.sum(over) + smooth)


def hinge_embedding(x: Any, target: Any, *, margin: float) -> Any:
    return jnp.where(target == 1, x, jnp.maximum(margin - x, 0.0))


def soft_margin(x: Any, target: Any) -> Any:
    return jax.nn.softplus(-target * x)


def multi_margin(x: Any, target: Any, weight: Any = None, *, p: int, margin: float) -> Any:
    own = jnp.take_along_axis(x, target[..., None], axis=-1)
    missing = jnp.where(jnp.arange(x.shape[-1]) == target[..., None], 0.0, jax.nn.relu(margin - own + x))
    factor = 1.0 if weight is None else weight[target][..., None]
    return jnp.mean(factor * missing**p, axis=-1)


def multilabel_margin(x: Any, target: Any) -> Any:
    listed = jnp.cumprod(target >= 0, axis=-1).astype(bool)
    is_entry = listed[..., None] & (target[..., None] == jnp.arange(x.shape[-1]))
    own = jnp.take_along_axis(x, jnp.where(listed, target, 0), axis=-1)[..., None]
    pairs = listed[..., None] & ~is_entry.any(axis=-2, keepdims=True)
    missing = jnp.where(pairs, jax.nn.relu(1.0 - own + x[..., None, :]), 0.0)
    return missing.sum(axis=(-2, -1)) / x.shape[-1]


def multilabel_soft_margin(x: Any, target: Any, weight: Any = None) -> Any:
    loss = jax.nn.softplus(x) - target * x
    return jnp.mean(loss if weight is None else weight * loss, axis=-1)


def margin_ranking(x1: Any, x2: Any, target: Any, *, margin: float) -> Any:
    return jnp.maximum(margin - target * (x1 - x2), 0.0)


def _active_hinge(missing: Any) -> Any:
    """max(z, 0) with the derivative 1 at 0."""
    return jnp.where(missing < 0.0, 0.0, missing)


COSINE_FLOOR = 9.999999980020986e-07
"""Its square, added to each squared length, is torch's float32 1e-12."""


def cosine_embedding(x1: Any, x2: Any, target: Any, *, margin: float) -> Any:
    def direction(x: Any) -> Any:
        """x over its length, in which no square overflows."""
        scale = jax.lax.stop_gradient(jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), 1.0))
        # XLA multiplies by the reciprocal, which is 0 for the largest numbers, but not for a quarter of them.
        share, floor = (0.25 * x) / (0.25 * scale), COSINE_FLOOR / scale
        return share / jnp.sqrt((share * share).sum(axis=-1, keepdims=True) + floor * floor)

    cosine = (direction(x1) * direction(x2)).sum(axis=-1)
    return jnp.where(target == 1, 1.0 - cosine, _active_hinge(cosine - margin))


def triplet_margin(
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


def ctc(
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
