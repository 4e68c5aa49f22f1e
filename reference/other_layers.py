"""Layers in other honest ways than the textbook's; see `algorithms.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gradproof.reference.activations import softsign_forward
from gradproof.reference.common import (
    Array,
    Gradients,
    magnitude,
    one_sided,
    positive_part,
)
from gradproof.reference.linear import linear_backward, linear_forward
from gradproof.reference.normalization import (
    Axes,
    along_channels,
    batch_norm_forward,
    channel_sums,
)
from gradproof.reference.piecewise import (
    SELU_ALPHA,
    SELU_SCALE,
)
from gradproof.reference.pooling import gather, lp_pool_backward, lp_pool_forward, scatter, sliding
from gradproof.reference.recurrent import (
    Cell,
    unrolled,
)
from gradproof.reference.reductions import (
    deviations,
    kept,
    located,
    reduce_norm_backward,
    reduce_norm_forward,
    reduce_std_forward,
    reduce_var_forward,
    squeezed,
)

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


def reduce_var_by_moments(x: Array, *, axes: tuple[int, ...], ddof: int, keepdims: bool) -> tuple[Array, Any]:
    """(sum x^2 - n mean(x)^2) / (n - ddof)."""
    out, cache = reduce_var_forward(x, axes=axes, ddof=ddof, keepdims=keepdims)
    count = math.prod(x.shape[axis] for axis in axes)
    mean = x.mean(axis=axes, keepdims=True)
    total = (x * x).sum(axis=axes, keepdims=True) - count * mean * mean
    return positive_part(total / (count - ddof)).reshape(out.shape), cache


# The direction's length as it stands in its derivative, whose terms leave the range long before the gradient does.


def reduce_std_dividing_first(x: Array, *, axes: tuple[int, ...], ddof: int, keepdims: bool) -> tuple[Array, Any]:
    """out = sqrt(sum of (x - m)^2 / (n - ddof)), as the textbook's."""
    out, (*_, divisor, where) = reduce_std_forward(x, axes=axes, ddof=ddof, keepdims=keepdims)
    return out, (deviations(x, axes), kept(out, where), divisor, where)


def reduce_std_dividing_first_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = (dout / ((n - ddof) out)) (x - m), whose first factor may be subnormal."""
    centred, std, divisor, where = cache
    return {"x": kept(dout, where) / (divisor * np.where(std == 0, 1.0, std)) * centred}


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


def sigmoid_by_quotient(x: Array) -> Array:
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
