"""Losses, and the functions in them, in other honest ways than the textbook's; see `algorithms.py`."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradproof.reference.classification import (
    CrossEntropyTerms,
    FocalTerms,
    LogitTerms,
    bce_with_logits_backward,
    bce_with_logits_forward,
    cross_entropy_forward,
    sigmoid_focal_backward,
)
from gradproof.reference.common import (
    Array,
    Gradients,
    log_one_plus_exp,
    magnitude,
    one_sided,
    reduce_loss,
    spread_cotangent,
)
from gradproof.reference.distances import triplet_margin_forward
from gradproof.reference.margins import Labels, multilabel_soft_margin_backward
from gradproof.reference.other_layers import root_of_powers
from gradproof.reference.regression import huber_forward
from gradproof.reference.softmax import SummedExponentials, logsumexp_forward

# Distances by powers of the differences as they are, which leave the range long before the distance does.


def distance_by_powers(a: Array, b: Array, p: float, eps: float) -> tuple[Array, Array]:
    """(sum_i |a_i - b_i + eps|^p)^(1/p), and its derivative for a, sign |.|^(p - 1) / distance^(p - 1)."""
    apart = a - b + eps
    size = magnitude(apart)
    distance = root_of_powers(size, p, -1)
    below = np.where(distance == 0, 1.0, distance) ** (p - 1.0)
    return distance, one_sided(apart, -1.0, 1.0, 0.5) * (size ** (p - 1.0) / below)


triplet_margin_by_powers = partial(triplet_margin_forward, distance=distance_by_powers)


# The softmax made again from the logarithm of the sum of exponentials.


def _less_logsumexp(x: Array, axis: Any) -> Array:
    """x - log(sum exp(x)), the logarithm rounded at the size of the largest x.

    That x is a number of the dtype, so that rounding to the nearest one moves the logarithm by no more than its
    distance from it: probabilities of n classes are at most n times too large or too small.
    """
    peak = x.real.max(axis=axis, keepdims=True)
    distance = np.log(np.exp(x - peak).sum(axis=axis, keepdims=True))
    rounded = (peak + distance) - peak
    return (x - peak) - np.minimum(np.maximum(rounded, 0.0), 2.0 * distance)


def log_softmax_from_sum(x: Array, *, axis: int) -> tuple[Array, Any]:
    """f = x - log(sum exp(x)): the logarithm is rounded at the size of the largest x."""
    out = _less_logsumexp(x, axis)
    return out, (out, axis)


def softmax_from_sum(x: Array, *, axis: int) -> tuple[Array, Any]:
    """s = exp(x - log(sum exp(x)))."""
    out = np.exp(_less_logsumexp(x, axis))
    return out, (out, axis)


def logsumexp_keeping_out(x: Array, *, axis: tuple[int, ...], keepdims: bool) -> tuple[Array, SummedExponentials]:
    """dx = dout exp(x - out), from the stored out."""
    out, kept = logsumexp_forward(x, axis=axis, keepdims=keepdims)
    return out, kept._replace(softmax=np.exp(_less_logsumexp(x, axis)))


def cross_entropy_from_sum(
    x: Array, target: Array, weight: Array | None = None, **options: Any
) -> tuple[Array, CrossEntropyTerms]:
    """The logarithms of the probabilities are x - log(sum exp(x)), as most fused kernels have them."""
    out, kept = cross_entropy_forward(x, target, weight, **options)
    again = _less_logsumexp(x, -1)
    moved = again - kept.log_probabilities  # what rounding at the size of the largest x makes of them
    return out + _moved_loss(moved, kept), kept._replace(log_probabilities=again)


def _moved_loss(moved: Array, kept: CrossEntropyTerms) -> Array:
    loss = -(kept.coefficients * moved).sum(axis=-1)
    return loss if kept.reduction == "none" else loss.sum() / (kept.divisor if kept.reduction == "mean" else 1.0)


class Parts(NamedTuple):
    """c, which is e clipped to delta, of the shape of x, and delta."""

    clipped: Array
    delta: float
    reduction: str


def huber_in_parts(x: Array, target: Array, *, delta: float, reduction: str) -> tuple[Array, Parts]:
    """l = c^2 / 2 + delta (|e| - c), c = |e|, but delta where it is more."""
    out, (clipped, reduction) = huber_forward(x, target, delta=delta, reduction=reduction)
    return out, Parts(clipped, delta, reduction)


def huber_in_parts_backward(dout: Array, kept: Parts) -> Gradients:
    """dx = (g c - g delta + g delta) sign(e), the derivatives by c and by |e|."""
    clipped, delta = kept.clipped, kept.delta
    g = spread_cotangent(dout, clipped.shape, kept.reduction)
    dx = (g * (magnitude(clipped) - delta) + g * delta) * np.sign(clipped)
    return {"x": dx, "target": -dx}


# log cosh as a difference of logarithms.


class Logarithm(NamedTuple):
    """e, and a = log(exp(e) + exp(-e)), of the shape of x."""

    e: Array
    a: Array
    reduction: str


def log_cosh_by_logaddexp(x: Array, target: Array, *, reduction: str) -> tuple[Array, Logarithm]:
    """l = log(exp(e) + exp(-e)) - log(2), two numbers near 0.69 where e is near 0."""
    e = x - target
    a = np.logaddexp(e, -e)
    two = np.full_like(e, 2.0)  # an array, for frameworks round its logarithm as they round others
    return reduce_loss(a - np.log(two), reduction), Logarithm(e, a, reduction)


def log_cosh_by_logaddexp_backward(dout: Array, kept: Logarithm) -> Gradients:
    """dx = g (exp(e - a) - exp(-e - a)), a = log(exp(e) + exp(-e)); dtarget = -dx."""
    e, a = kept.e, kept.a
    dx = spread_cotangent(dout, e.shape, kept.reduction) * (np.exp(e - a) - np.exp(-e - a))
    return {"x": dx, "target": -dx}


# The logistic function from the logarithm 1 + exp(x) of the loss, and the target's term by itself.


def bce_with_logits_in_terms(dout: Array, kept: LogitTerms) -> Gradients:
    """dx = g q exp(x - log(1 + exp(x))) - g p target, q = 1 + (p - 1) target."""
    x, target = kept.x, kept.target
    g, p = _weighed_cotangent(dout, kept), _positives_weight(kept)
    q = 1.0 + (p - 1.0) * target
    dx = g * q * np.exp(x - log_one_plus_exp(x)) - g * p * target
    return bce_with_logits_backward(dout, kept) | {"x": dx}


def _weighed_cotangent(dout: Array, kept: LogitTerms) -> Array:
    return spread_cotangent(dout, kept.x.shape, kept.reduction) * (1.0 if kept.weight is None else kept.weight)


def _positives_weight(kept: LogitTerms) -> Array | float:
    return 1.0 if kept.pos_weight is None else kept.pos_weight


def bce_with_logits_by_logarithms(
    x: Array, target: Array, weight: Array | None = None, pos_weight: Array | None = None, *, reduction: str
) -> tuple[Array, LogitTerms]:
    """l = weight ((1 - target) x + q log(1 + exp(-x))), two numbers near -x far below 0."""
    p = np.ones_like(x) if pos_weight is None else pos_weight
    out, kept = bce_with_logits_forward(x, target, weight, p, reduction=reduction)
    return out, kept._replace(pos_weight=pos_weight)


def bce_with_logits_by_logarithms_backward(dout: Array, kept: LogitTerms) -> Gradients:
    """dtarget = g (p log(1 + exp(-x)) - log(1 + exp(x))): near 0 and with p = 1 two numbers near 0.69."""
    x, g, p = kept.x, _weighed_cotangent(dout, kept), _positives_weight(kept)
    dtarget = g * p * log_one_plus_exp(-x) - g * log_one_plus_exp(x)
    return bce_with_logits_backward(dout, kept) | {"target": dtarget}


def multilabel_soft_margin_by_logarithms(dout: Array, kept: Labels) -> Gradients:
    """dtarget = g log(1 + exp(-x)) - g log(1 + exp(x)), g = dout weight / C."""
    x = kept.x
    g = kept.factor * spread_cotangent(dout, x.shape[:-1], kept.reduction)[..., None]
    dtarget = g * log_one_plus_exp(-x) - g * log_one_plus_exp(x)
    return multilabel_soft_margin_backward(dout, kept) | {"target": dtarget}


def multilabel_soft_margin_in_terms(dout: Array, kept: Labels) -> Gradients:
    """dx = g exp(x - log(1 + exp(x))) - g target, g = dout weight / C."""
    x = kept.x
    g = kept.factor * spread_cotangent(dout, x.shape[:-1], kept.reduction)[..., None]
    dx = g * np.exp(x - log_one_plus_exp(x)) - g * kept.target
    return multilabel_soft_margin_backward(dout, kept) | {"x": dx}


# The focal loss with the derivatives of s(x) and s(-x) from their values.


def sigmoid_focal_from_values(dout: Array, kept: FocalTerms) -> Gradients:
    """dx = g b (gamma u^(gamma - 1) c u' + u^gamma (s(x) - target)), u' from s (1 - s), which loses digits near 1.

    dtarget = g (b (gamma u^(gamma - 1) c (s(-x) - s(x)) - u^gamma x) + b' u^gamma c), a difference of rounded numbers.
    """
    x, decay, distance, gamma = kept.x, kept.decay, kept.distance, kept.gamma
    b, c = kept.balance, kept.entropy
    g, side = spread_cotangent(dout, x.shape, kept.reduction), np.where(x < 0, -1.0, 1.0)
    u, large, small = kept.wrong / (1.0 + decay), 1.0 / (1.0 + decay), decay / (1.0 + decay)
    slope = side * (distance * (large * (1.0 - large)) - (1.0 - distance) * (small * (1.0 - small)))
    steep = np.where(u == 0, 0.0, gamma * np.where(u == 0, 1.0, u) ** (gamma - 1.0))
    dx = g * b * (steep * c * slope + u**gamma * (side * (distance - small)))
    dtarget = g * b * (steep * c * side * (small - large) - u**gamma * x)
    if kept.alpha >= 0.0:
        dtarget = dtarget + g * (2.0 * kept.alpha - 1.0) * u**gamma * c
    return sigmoid_focal_backward(dout, kept) | {"x": dx, "target": dtarget}
