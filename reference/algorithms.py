"""Honest algorithms that lose digits which the textbook formula keeps.

Each has a noise floor of its own, by the same method. An error inside the floor of one of them, and not inside the
textbook's, is no mistake in the mathematics: it is a quality, which is named. Every algorithm here computes the same
function as the textbook's pair; a scaled or a missing term does not pass as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from gradproof.reference.activations import sigmoid_backward, silu_backward, softsign_forward, tanh_backward
from gradproof.reference.attention import (
    multi_head_attention_backward,
    multi_head_attention_forward,
    scaled_dot_product_attention_backward,
    scaled_dot_product_attention_forward,
)
from gradproof.reference.classification import (
    bce_with_logits_backward,
    bce_with_logits_forward,
    cross_entropy_backward,
    cross_entropy_forward,
    sigmoid_focal_backward,
    sigmoid_focal_forward,
)
from gradproof.reference.common import (
    Array,
    Gradients,
    log_one_plus_exp,
    magnitude,
    one_sided,
    positive_part,
    reduce_loss,
    spread_cotangent,
)
from gradproof.reference.linear import linear_backward, linear_forward
from gradproof.reference.margins import multilabel_soft_margin_backward, multilabel_soft_margin_forward
from gradproof.reference.normalization import (
    Axes,
    along_channels,
    batch_norm_backward,
    batch_norm_forward,
    channel_sums,
    group_norm_backward,
    group_norm_forward,
    instance_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
    local_response_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from gradproof.reference.piecewise import (
    SELU_ALPHA,
    SELU_SCALE,
    celu_backward,
    celu_forward,
    elu_backward,
    elu_forward,
    selu_backward,
    selu_forward,
)
from gradproof.reference.pooling import gather, lp_pool_backward, lp_pool_forward, scatter, sliding
from gradproof.reference.recurrent import (
    GRU,
    LSTM,
    TANH,
    Cell,
    gru_backward,
    lstm_backward,
    rnn_tanh_backward,
    unrolled,
)
from gradproof.reference.reductions import (
    kept,
    located,
    reduce_norm_backward,
    reduce_norm_forward,
    reduce_var_backward,
    reduce_var_forward,
    squeezed,
)
from gradproof.reference.regression import huber_forward
from gradproof.reference.softmax import (
    log_softmax_backward,
    logsumexp_backward,
    logsumexp_forward,
    softmax_backward,
)
from gradproof.reference.walk import Row


@dataclass(frozen=True)
class Algorithm:
    """Another way to compute a layer.

    name: the formula in a few words. row: its forward and backward functions, None for the textbook's.
    in_order: whether sums are taken term after term, so that the rounding of every partial sum counts.
    one_sided: whether it rounds a constant that may be larger than the result, so that errors lean to one side.
    """

    name: str
    row: Row | None = None
    in_order: bool = False
    one_sided: bool = False


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


def logsumexp_keeping_out(x: Array, *, axis: tuple[int, ...], keepdims: bool) -> tuple[Array, Any]:
    """dx = dout exp(x - out), from the stored out."""
    out, (_, *rest) = logsumexp_forward(x, axis=axis, keepdims=keepdims)
    return out, (np.exp(_less_logsumexp(x, axis)), *rest)


def cross_entropy_from_sum(x: Array, target: Array, weight: Array | None = None, **options: Any) -> tuple[Array, Any]:
    """The logarithms of the probabilities are x - log(sum exp(x)), as most fused kernels have them."""
    out, (log_probabilities, *rest) = cross_entropy_forward(x, target, weight, **options)
    again = _less_logsumexp(x, -1)
    moved = again - log_probabilities  # what rounding at the size of the largest x makes of them
    return out + _moved_loss(moved, rest, out), (again, *rest)


def _moved_loss(moved: Array, rest: list[Any], out: Array) -> Array:
    coefficients, _, divisor, *_, reduction = rest
    loss = -(coefficients * moved).sum(axis=-1)
    return loss if reduction == "none" else loss.sum() / (divisor if reduction == "mean" else 1.0)


# Attention.


def rows_of_output(dout: Array, v: Array, probabilities: Array) -> Array:
    """sum_s dP P = sum_v dO O, with O = P v (Dao et al. 2022)."""
    return (dout * (probabilities @ v)).sum(axis=-1, keepdims=True)


# Normalization: z and r = 1 / sqrt(v + eps) in other ways.


def by_moments(x: Array, over: Axes, eps: float) -> tuple[Array, Array]:
    """z and r with v = mean(x^2) - mean(x)^2, not below 0."""
    mean = x.mean(axis=over, keepdims=True)
    variance = positive_part((x * x).mean(axis=over, keepdims=True) - mean * mean)
    reciprocal = 1.0 / np.sqrt(variance + eps)
    return (x - mean) * reciprocal, reciprocal


def by_folding(x: Array, over: Axes, eps: float) -> tuple[Array, Array]:
    """z = x r - mean(x) r, one multiplication and one addition for every x, with moments taken from the first x on."""
    first = x[tuple(slice(0, 1) if axis in over or axis - x.ndim in over else slice(None) for axis in range(x.ndim))]
    from_first = x - first
    offset = from_first.mean(axis=over, keepdims=True)
    centered = from_first - offset
    reciprocal = 1.0 / np.sqrt((centered * centered).mean(axis=over, keepdims=True) + eps)
    return x * reciprocal - (first + offset) * reciprocal, reciprocal


def batch_norm_by_folding(x: Array, *, eps: float, **given: Array) -> tuple[Array, Any]:
    """out = x s + t with s = r weight and t = bias - m s, in evaluation; in training as every normalization."""
    out, cache = batch_norm_forward(x, **given, eps=eps, normalize=by_folding)
    if "running_mean" not in given:
        return out, cache
    scale = 1.0 / np.sqrt(given["running_var"] + eps) * given.get("weight", 1.0)
    shift = given.get("bias", 0.0) - given["running_mean"] * scale
    return x * along_channels(scale, x.ndim) + along_channels(shift, x.ndim), cache


def through_square(g: Array, normalized: Array, reciprocal: Array, over: Axes) -> Array:
    """dx = g r + 2 c dv / n, with c = z / r and dv = -1/2 r^3 sum(g c).

    For large x, r^3 leaves the range long before dx does.
    """
    centred = normalized / reciprocal
    count = math.prod(centred.shape[axis] for axis in over)
    dvariance = -0.5 * reciprocal**3 * (g * centred).sum(axis=over, keepdims=True)
    return g * reciprocal + centred * (2.0 / count * dvariance)


def through_variance(g: Array, normalized: Array, reciprocal: Array, over: Axes) -> Array:
    """The same less its mean, for the mean of x is subtracted beforehand."""
    dcentred = through_square(g, normalized, reciprocal, over)
    return dcentred - dcentred.mean(axis=over, keepdims=True)


def _normalizations(
    forward: Callable[..., tuple[Array, Any]], backward: Callable[..., Any], folded: Row | None = None
) -> tuple[Algorithm, ...]:
    return (
        Algorithm(FOLDED, folded or (partial(forward, normalize=by_folding), backward)),
        Algorithm(MOMENTS, (partial(forward, normalize=by_moments), backward), in_order=True),
        Algorithm(VARIANCE, (forward, partial(backward, step=through_variance))),
    )


def reduce_var_by_moments(x: Array, *, axes: tuple[int, ...], ddof: int, keepdims: bool) -> tuple[Array, Any]:
    """(sum x^2 - n mean(x)^2) / (n - ddof)."""
    out, cache = reduce_var_forward(x, axes=axes, ddof=ddof, keepdims=keepdims)
    count = math.prod(x.shape[axis] for axis in axes)
    mean = x.mean(axis=axes, keepdims=True)
    total = (x * x).sum(axis=axes, keepdims=True) - count * mean * mean
    return positive_part(total / (count - ddof)).reshape(out.shape), cache


# The direction's length as it stands in its derivative, whose terms leave the range long before the gradient does.


def weight_norm_by_rsqrt(x: Array, direction: Array, magnitude: Array, bias: Array | None = None) -> tuple[Array, Any]:
    """weight = magnitude direction r, r = 1 / sqrt(s), s = direction . direction."""
    square = (direction * direction).sum(axis=1, keepdims=True)
    reciprocal = 1.0 / np.sqrt(square)
    out, linear = linear_forward(x, magnitude[:, None] * (direction * reciprocal), bias)
    return out, (linear, direction, magnitude[:, None], reciprocal, square)


def weight_norm_by_rsqrt_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dr = dunit . direction, ds = -dr r / (2 s), ddirection = dunit r + 2 direction ds, dunit = dweight magnitude."""
    linear, direction, magnitude, reciprocal, square = cache
    gradients = linear_backward(dout, linear)
    dweight = gradients.pop("weight")
    dunit = dweight * magnitude
    dsquare = (dunit * direction).sum(axis=1, keepdims=True) * (-0.5 * reciprocal / square)
    ddirection = dunit * reciprocal + 2.0 * direction * dsquare
    dmagnitude = (dweight * (direction * reciprocal)).sum(axis=1)
    return gradients | {"direction": ddirection, "magnitude": dmagnitude}


# The norm by powers of x as it is, which leave the range long before the norm does.


def _root(sizes: Array, p: float, axis: Any) -> Array:
    """(sum sizes^p)^(1/p), NaN where powers vanish and sizes do not: all digits are lost, and an error has no bound.

    Where 1/p is rounded, the result errs by the logarithm of the sum times as much.
    """
    powers = (sizes**p).sum(axis=axis, keepdims=True)
    vanished = (powers == 0) & (sizes != 0).any(axis=axis, keepdims=True)
    root = np.sqrt(powers) if p == 2.0 else powers ** (np.ones_like(powers) / p)
    return np.where(vanished, np.nan, root)


def reduce_norm_by_powers(x: Array, *, p: float, axes: tuple[int, ...], keepdims: bool, **kinks: float) -> Any:
    """out = (sum |x|^p)^(1/p)."""
    if p in (1.0, math.inf):
        return reduce_norm_forward(x, p=p, axes=axes, keepdims=keepdims, **kinks)
    sizes = magnitude(x)
    root = _root(sizes, p, axes)
    return squeezed(root, located(x, axes), keepdims), (p, x * sizes ** (p - 2.0), (root, located(x, axes)))


def reduce_norm_by_powers_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = (dout / out^(p - 1)) x |x|^(p - 2), whose first factor may be subnormal."""
    p, slope, rest = cache
    if p in (1.0, math.inf):
        return reduce_norm_backward(dout, cache)
    root, where = rest
    return {"x": kept(dout, where) / np.where(root == 0, 1.0, root) ** (p - 1.0) * slope}


def lp_pool_by_powers(x: Array, *, p: int, kernel: int, stride: int, ceil_mode: bool) -> tuple[Array, Any]:
    """out = (sum of x^p over each window)^(1/p)."""
    windows = sliding(x.shape[2:], kernel, stride, ceil_mode=ceil_mode)
    met = gather(x, windows, 0.0)
    root = met.sum(axis=-1, keepdims=True) if p == 1 else _root(met, p, -1)
    return root[..., 0], (p, met, root, windows, x.shape)


def lp_pool_by_powers_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx_j = the sum over windows of (dout / out^(p - 1)) x_j^(p - 1), whose first factor may be subnormal."""
    p, met, root, windows, shape = cache
    shares = dout[..., None] / np.where(root == 0, 1.0, root) ** (p - 1) * met ** (p - 1)
    return {"x": scatter(np.where(root == 0, 0.0, shares) if p > 1 else shares, windows, shape)}


def lp_pool_of_scaled(x: Array, *, p: int, kernel: int, stride: int, ceil_mode: bool) -> tuple[Array, Any]:
    """out = s |x / s|, s the largest magnitude of a window."""
    out, cache = lp_pool_forward(x, p=p, kernel=kernel, stride=stride, ceil_mode=ceil_mode)
    peak = gather(magnitude(x), sliding(x.shape[2:], kernel, stride, ceil_mode=ceil_mode), 0.0).max(axis=-1)
    return out, (np.where(peak == 0, 1.0, peak), cache)


def lp_pool_of_scaled_backward(dout: Array, cache: tuple[Array, Any]) -> Gradients:
    """dx = (dout s) |x / s|' / s, whose first product loses digits where it is subnormal."""
    scale, own = cache
    return lp_pool_backward(dout * scale / scale, own)


# Local response normalization with d^(-beta - 1) by itself.


def local_response_norm_through_power(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = dout d^-beta - x sum(dout x d^(-beta - 1)) 2 alpha beta / size: the power vanishes before dx does."""
    x, divisor, shrink, (before, after), factor = cache
    power = shrink / divisor
    return {"x": dout * shrink - factor * x * channel_sums(dout * (x * power), after, before)}


# exp(x) - 1 in place of expm1.


def _below(x: Array) -> Array:
    return np.exp(-positive_part(-x)) - 1.0


def elu_by_exp(x: Array, *, alpha: float, at_zero: float = 0.0) -> tuple[Array, Any]:
    """alpha (exp(x) - 1) below 0."""
    return np.where(x.real < 0, alpha * _below(x), x), (x, alpha, at_zero)


def selu_by_exp(x: Array, *, at_zero: float = 0.0) -> tuple[Array, Any]:
    """scale alpha (exp(x) - 1) below 0."""
    return SELU_SCALE * np.where(x.real < 0, SELU_ALPHA * _below(x), x), (x, at_zero)


def celu_by_exp(x: Array, *, alpha: float) -> tuple[Array, Any]:
    """alpha (exp(x / alpha) - 1) below 0."""
    return np.where(x.real < 0, alpha * _below(x / alpha), x), (x, alpha)


# The derivative of expm1 from its value.


def _slope_from_value(x: Array) -> Array:
    """exp(x) = expm1(x) + 1, of which nothing is left far below 0."""
    return np.expm1(-positive_part(-x)) + 1.0


def elu_from_value(dout: Array, cache: tuple[Array, float, float]) -> Gradients:
    """f'(x) = alpha (expm1(x) + 1) below 0, 1 above."""
    x, alpha, at_zero = cache
    return {"x": dout * one_sided(x, alpha * _slope_from_value(x), 1.0, at_zero)}


def selu_from_value(dout: Array, cache: tuple[Array, float]) -> Gradients:
    """f'(x) = scale alpha (expm1(x) + 1) below 0, scale above."""
    x, at_zero = cache
    return {"x": dout * SELU_SCALE * one_sided(x, SELU_ALPHA * _slope_from_value(x), 1.0, at_zero)}


def celu_from_value(dout: Array, cache: tuple[Array, float]) -> Gradients:
    """f'(x) = expm1(x / alpha) + 1 below 0, 1 above."""
    x, alpha = cache
    return {"x": dout * np.where(x.real < 0, _slope_from_value(x / alpha), 1.0)}


# Derivatives of two terms, one by one, which cancel.


def softsign_of_quotient(x: Array) -> tuple[Array, Any]:
    """f(x) = x / b, b = 1 + |x|."""
    out, below = softsign_forward(x)
    return out, (magnitude(x), below)


def softsign_of_quotient_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """dx = g / b - g |x| / b^2: near 1 / |x| each, of which 1 / x^2 is left."""
    size, below = cache
    return {"x": dout / below - dout * (size / below / below)}


def huber_in_parts(x: Array, target: Array, *, delta: float, reduction: str) -> tuple[Array, Any]:
    """l = c^2 / 2 + delta (|e| - c), c = |e|, but delta where it is more."""
    out, (clipped, reduction) = huber_forward(x, target, delta=delta, reduction=reduction)
    return out, (clipped, delta, reduction)


def huber_in_parts_backward(dout: Array, cache: tuple[Array, float, str]) -> Gradients:
    """dx = (g c - g delta + g delta) sign(e), the derivatives by c and by |e|."""
    clipped, delta, reduction = cache
    g = spread_cotangent(dout, clipped.shape, reduction)
    dx = (g * (magnitude(clipped) - delta) + g * delta) * np.sign(clipped)
    return {"x": dx, "target": -dx}


# log cosh as a difference of logarithms.


def log_cosh_by_logaddexp(x: Array, target: Array, *, reduction: str) -> tuple[Array, Any]:
    """l = log(exp(e) + exp(-e)) - log(2), two numbers near 0.69 where e is near 0."""
    error = x - target
    both = np.logaddexp(error, -error)
    two = np.full_like(error, 2.0)  # an array, for frameworks round its logarithm as they round others
    return reduce_loss(both - np.log(two), reduction), (error, both, reduction)


def log_cosh_by_logaddexp_backward(dout: Array, cache: Any) -> Gradients:
    """dx = g (exp(e - a) - exp(-e - a)), a = log(exp(e) + exp(-e)); dtarget = -dx."""
    error, both, reduction = cache
    dx = spread_cotangent(dout, error.shape, reduction) * (np.exp(error - both) - np.exp(-error - both))
    return {"x": dx, "target": -dx}


# The hyperbolic tangent as a quotient.

TANH_IS_ONE = 20.0
"""From here on tanh(x) is 1 to within the rounding of float64."""


def _tanh_by_quotient(x: Array) -> Array:
    """a / b, two functions that are rounded each, as rational approximations of tanh have them."""
    small = np.clip(x, -TANH_IS_ONE, TANH_IS_ONE)
    return np.asanyarray(np.sinh(small) / np.cosh(small))


def tanh_by_quotient(x: Array) -> tuple[Array, Any]:
    """tanh(x) = a / b."""
    out = _tanh_by_quotient(x)
    return out, out


def _sigmoid_by_quotient(x: Array) -> Array:
    return 0.5 + 0.5 * _tanh_by_quotient(0.5 * x)


def recurrent_by_quotient(cell: Cell, **functions: Callable[[Array], Array]) -> Callable[..., tuple[Array, Any]]:
    """The forward function of a recurrent layer with other functions in its step, as tanh = a / b."""

    def forward(
        x: Array,
        h0: Array | None = None,
        c0: Array | None = None,
        *,
        layers: int,
        bidirectional: bool,
        returns: str,
        **parameters: Array,
    ) -> tuple[Array, Any]:
        own = replace(cell, step=partial(cell.step, tanh=_tanh_by_quotient, **functions))
        return unrolled(own, x, (h0, c0)[: cell.states], parameters, layers, bidirectional, returns)

    return forward


def tanhshrink_by_quotient(x: Array) -> tuple[Array, Any]:
    """out = x - a / b."""
    tanh = _tanh_by_quotient(x)
    return x - tanh, tanh


def tanhshrink_by_quotient_backward(dout: Array, tanh: Array) -> Gradients:
    """dx = dout (1 - (1 - tanh(x)^2)), from the derivatives of the difference's two terms."""
    return {"x": dout - dout * (1.0 - tanh * tanh)}


# The logistic function from the logarithm 1 + exp(x) of the loss, and the target's term by itself.


def bce_with_logits_in_terms(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = g q exp(x - log(1 + exp(x))) - g p target."""
    x, target, weight, pos_weight, reduction = cache
    g = spread_cotangent(dout, x.shape, reduction) * (1.0 if weight is None else weight)
    p = 1.0 if pos_weight is None else pos_weight
    dx = g * (1.0 + (p - 1.0) * target) * np.exp(x - log_one_plus_exp(x)) - g * p * target
    return bce_with_logits_backward(dout, cache) | {"x": dx}


def bce_with_logits_by_logarithms(
    x: Array, target: Array, weight: Array | None = None, pos_weight: Array | None = None, *, reduction: str
) -> tuple[Array, tuple[Any, ...]]:
    """l = weight ((1 - target) x + q log(1 + exp(-x))), two numbers near -x far below 0."""
    p = np.ones_like(x) if pos_weight is None else pos_weight
    out, (*_, reduction) = bce_with_logits_forward(x, target, weight, p, reduction=reduction)
    return out, (x, target, weight, pos_weight, reduction)


def bce_with_logits_by_logarithms_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dtarget = g (p log(1 + exp(-x)) - log(1 + exp(x))): near 0 and with p = 1 two numbers near 0.69."""
    x, _, weight, pos_weight, reduction = cache
    g = spread_cotangent(dout, x.shape, reduction) * (1.0 if weight is None else weight)
    p = 1.0 if pos_weight is None else pos_weight
    dtarget = g * p * log_one_plus_exp(-x) - g * log_one_plus_exp(x)
    return bce_with_logits_backward(dout, cache) | {"target": dtarget}


def multilabel_soft_margin_by_logarithms(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dtarget = g log(1 + exp(-x)) - g log(1 + exp(x)), g = dout weight / C."""
    x, _, factor, reduction = cache
    g = factor * spread_cotangent(dout, x.shape[:-1], reduction)[..., None]
    dtarget = g * log_one_plus_exp(-x) - g * log_one_plus_exp(x)
    return multilabel_soft_margin_backward(dout, cache) | {"target": dtarget}


def multilabel_soft_margin_in_terms(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = g exp(x - log(1 + exp(x))) - g target, g = dout weight / C."""
    x, target, factor, reduction = cache
    g = factor * spread_cotangent(dout, x.shape[:-1], reduction)[..., None]
    dx = g * np.exp(x - log_one_plus_exp(x)) - g * target
    return multilabel_soft_margin_backward(dout, cache) | {"x": dx}


# The focal loss with the derivatives of s(x) and s(-x) from their values.


def sigmoid_focal_from_values(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = g b (gamma u^(gamma - 1) c u' + u^gamma (s(x) - target)), u' from s (1 - s), which loses digits near 1.

    dtarget = g (b (gamma u^(gamma - 1) c (s(-x) - s(x)) - u^gamma x) + b' u^gamma c), a difference of rounded numbers.
    """
    x, _, decay, distance, wrong, entropy, _, balance, alpha, gamma, reduction = cache
    g, side = spread_cotangent(dout, x.shape, reduction), np.where(x < 0, -1.0, 1.0)
    u, large, small = wrong / (1.0 + decay), 1.0 / (1.0 + decay), decay / (1.0 + decay)
    slope = side * (distance * (large * (1.0 - large)) - (1.0 - distance) * (small * (1.0 - small)))
    steep = np.where(u == 0, 0.0, gamma * np.where(u == 0, 1.0, u) ** (gamma - 1.0))
    dx = g * balance * (steep * entropy * slope + u**gamma * (side * (distance - small)))
    dtarget = g * balance * (steep * entropy * side * (small - large) - u**gamma * x)
    if alpha >= 0.0:
        dtarget = dtarget + g * (2.0 * alpha - 1.0) * u**gamma * entropy
    return sigmoid_focal_backward(dout, cache) | {"x": dx, "target": dtarget}


# The logistic function by tanh.


def _logistic_by_tanh(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def sigmoid_by_tanh(x: Array) -> tuple[Array, Any]:
    """(1 + tanh(x / 2)) / 2, which rounds at 1."""
    out = _logistic_by_tanh(x)
    return out, out


def silu_by_tanh(x: Array) -> tuple[Array, Any]:
    """x (1 + tanh(x / 2)) / 2."""
    gate = _logistic_by_tanh(x)
    return x * gate, (x, gate)


FROM_SUM = "exp(x - logsumexp(x))"
MOMENTS = "mean(x^2) - mean(x)^2"
VARIANCE = "g r - c r^3 sum(g c) / n, c = x - m"
FOLDED = "x r - mean(x) r"
OUTPUT_ROWS = "row sums of dO * O"
EXP_LESS_ONE = "exp(x) - 1"
FROM_EXPM1 = "expm1(x) + 1"
OF_QUOTIENT = "1 / (1 + |x|) - |x| / (1 + |x|)^2"
IN_PARTS = "(e - delta) + delta"
LOGARITHMS = "log(1 + exp(-x)) and log(1 + exp(x)) one by one"
DIFFERENCE = "logaddexp(e, -e) - log(2)"
FROM_VALUES = "s (1 - s) of s(x) and s(-x)"
BY_RSQRT = "v / sqrt(v . v), derived term by term"
POWERS = "(sum |x|^p)^(1/p)"
RESCALED = "s |x / s|"
BY_POWER = "g x d^(-beta - 1)"
TANH_QUOTIENT = "a quotient for tanh(x)"
QUOTIENT = "x - tanh(x) with a quotient for tanh(x), 1 - (1 - tanh(x)^2)"
LOGITS = "g exp(x - log(1 + exp(x))) - g target"
BY_TANH = "(1 + tanh(x / 2)) / 2"

IN_ORDER = Algorithm("sums taken term after term", in_order=True)
"""What a loop does, for any layer: the rounding of every partial sum counts."""

ALGORITHMS: dict[str, tuple[Algorithm, ...]] = {
    "softmax": (Algorithm(FROM_SUM, (softmax_from_sum, softmax_backward)),),
    "log_softmax": (Algorithm(FROM_SUM, (log_softmax_from_sum, log_softmax_backward)),),
    "logsumexp": (Algorithm(FROM_SUM, (logsumexp_keeping_out, logsumexp_backward)),),
    "cross_entropy": (Algorithm(FROM_SUM, (cross_entropy_from_sum, cross_entropy_backward)),),
    "scaled_dot_product_attention": (
        Algorithm(
            OUTPUT_ROWS,
            (
                scaled_dot_product_attention_forward,
                partial(scaled_dot_product_attention_backward, rows=rows_of_output),
            ),
        ),
    ),
    "multi_head_attention": (
        Algorithm(
            OUTPUT_ROWS,
            (multi_head_attention_forward, partial(multi_head_attention_backward, rows=rows_of_output)),
        ),
    ),
    "layer_norm": _normalizations(layer_norm_forward, layer_norm_backward),
    "rms_norm": (Algorithm(VARIANCE, (rms_norm_forward, partial(rms_norm_backward, step=through_square))),),
    "batch_norm": _normalizations(
        batch_norm_forward, batch_norm_backward, (batch_norm_by_folding, batch_norm_backward)
    ),
    "group_norm": _normalizations(group_norm_forward, group_norm_backward),
    "instance_norm": _normalizations(instance_norm_forward, group_norm_backward),
    "reduce_var": (Algorithm(MOMENTS, (reduce_var_by_moments, reduce_var_backward), in_order=True),),
    "reduce_norm": (Algorithm(POWERS, (reduce_norm_by_powers, reduce_norm_by_powers_backward), one_sided=True),),
    "lp_pool": (
        Algorithm(POWERS, (lp_pool_by_powers, lp_pool_by_powers_backward), one_sided=True),
        Algorithm(RESCALED, (lp_pool_of_scaled, lp_pool_of_scaled_backward)),
    ),
    "local_response_norm": (Algorithm(BY_POWER, (local_response_norm_forward, local_response_norm_through_power)),),
    "sigmoid_focal": (Algorithm(FROM_VALUES, (sigmoid_focal_forward, sigmoid_focal_from_values)),),
    "weight_norm": (Algorithm(BY_RSQRT, (weight_norm_by_rsqrt, weight_norm_by_rsqrt_backward)),),
    "bce_with_logits": (
        Algorithm(LOGITS, (bce_with_logits_forward, bce_with_logits_in_terms)),
        Algorithm(LOGARITHMS, (bce_with_logits_by_logarithms, bce_with_logits_by_logarithms_backward)),
    ),
    "multilabel_soft_margin": (
        Algorithm(LOGITS, (multilabel_soft_margin_forward, multilabel_soft_margin_in_terms)),
        Algorithm(LOGARITHMS, (multilabel_soft_margin_forward, multilabel_soft_margin_by_logarithms)),
    ),
    "softsign": (Algorithm(OF_QUOTIENT, (softsign_of_quotient, softsign_of_quotient_backward)),),
    "huber": (Algorithm(IN_PARTS, (huber_in_parts, huber_in_parts_backward)),),
    "elu": (
        Algorithm(EXP_LESS_ONE, (elu_by_exp, elu_backward)),
        Algorithm(FROM_EXPM1, (elu_forward, elu_from_value)),
    ),
    "selu": (
        Algorithm(EXP_LESS_ONE, (selu_by_exp, selu_backward)),
        Algorithm(FROM_EXPM1, (selu_forward, selu_from_value)),
    ),
    "celu": (
        Algorithm(EXP_LESS_ONE, (celu_by_exp, celu_backward)),
        Algorithm(FROM_EXPM1, (celu_forward, celu_from_value)),
    ),
    "log_cosh": (Algorithm(DIFFERENCE, (log_cosh_by_logaddexp, log_cosh_by_logaddexp_backward), one_sided=True),),
    "tanh": (Algorithm(TANH_QUOTIENT, (tanh_by_quotient, tanh_backward)),),
    "rnn_tanh": (Algorithm(TANH_QUOTIENT, (recurrent_by_quotient(TANH), rnn_tanh_backward)),),
    "gru": (Algorithm(TANH_QUOTIENT, (recurrent_by_quotient(GRU, sigmoid=_sigmoid_by_quotient), gru_backward)),),
    "lstm": (Algorithm(TANH_QUOTIENT, (recurrent_by_quotient(LSTM, sigmoid=_sigmoid_by_quotient), lstm_backward)),),
    "tanhshrink": (Algorithm(QUOTIENT, (tanhshrink_by_quotient, tanhshrink_by_quotient_backward)),),
    "sigmoid": (Algorithm(BY_TANH, (sigmoid_by_tanh, sigmoid_backward)),),
    "silu": (Algorithm(BY_TANH, (silu_by_tanh, silu_backward)),),
}
"""Layer -> its other honest algorithms."""


def algorithms_of(layer: str) -> tuple[Algorithm, ...]:
    """The honest algorithms of a layer beside the textbook's."""
    return (*ALGORITHMS.get(layer, ()), IN_ORDER)
