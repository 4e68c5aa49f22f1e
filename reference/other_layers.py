"""Layers in other honest ways than the textbook's; see `algorithms.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradproof.model.options import Shape
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
    LocalResponse,
    Standardized,
    along_channels,
    batch_norm_forward,
    channel_sums,
)
from gradproof.reference.piecewise import (
    SELU_ALPHA,
    SELU_SCALE,
    Exponential,
)
from gradproof.reference.pooling import Slopes, Windows, gather, lp_pool_backward, lp_pool_forward, scatter, sliding
from gradproof.reference.recurrent import (
    Cell,
    unrolled,
)
from gradproof.reference.reductions import (
    Norm,
    Variance,
    Where,
    deviations,
    expanded,
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
    r = 1.0 / np.sqrt(variance + eps)
    return (x - mean) * r, r


def by_folding(x: Array, over: Axes, eps: float) -> tuple[Array, Array]:
    """z = x r - mean(x) r, one multiplication and one addition for every x, with moments taken from the first x on."""
    first = x[tuple(slice(0, 1) if axis in over or axis - x.ndim in over else slice(None) for axis in range(x.ndim))]
    from_first = x - first
    offset = from_first.mean(axis=over, keepdims=True)
    centered = from_first - offset
    r = 1.0 / np.sqrt((centered * centered).mean(axis=over, keepdims=True) + eps)
    return x * r - (first + offset) * r, r


def batch_norm_by_folding(x: Array, *, eps: float, **given: Array) -> tuple[Array, Standardized]:
    """out = x s + t with s = r weight and t = bias - m s, in evaluation; in training as every normalization."""
    out, kept = batch_norm_forward(x, **given, eps=eps, normalize=by_folding)
    if "running_mean" not in given:
        return out, kept
    s = 1.0 / np.sqrt(given["running_var"] + eps) * given.get("weight", 1.0)
    t = given.get("bias", 0.0) - given["running_mean"] * s
    return x * along_channels(s, x.ndim) + along_channels(t, x.ndim), kept


def through_square(g: Array, z: Array, r: Array, over: Axes) -> Array:
    """dx = g r + 2 c dv / n, with c = z / r and dv = -1/2 r^3 sum(g c).

    For large x, r^3 leaves the range long before dx does.
    """
    c = z / r
    n = math.prod(c.shape[axis] for axis in over)
    dv = -0.5 * r**3 * (g * c).sum(axis=over, keepdims=True)
    return g * r + c * (2.0 / n * dv)


def through_variance(g: Array, z: Array, r: Array, over: Axes) -> Array:
    """The same less its mean, for the mean of x is subtracted beforehand."""
    dcentred = through_square(g, z, r, over)
    return dcentred - dcentred.mean(axis=over, keepdims=True)


def reduce_var_by_moments(x: Array, *, axes: tuple[int, ...], ddof: int, keepdims: bool) -> tuple[Array, Variance]:
    """(sum x^2 - n mean(x)^2) / (n - ddof)."""
    out, kept = reduce_var_forward(x, axes=axes, ddof=ddof, keepdims=keepdims)
    n = math.prod(x.shape[axis] for axis in axes)
    mean = x.mean(axis=axes, keepdims=True)
    total = (x * x).sum(axis=axes, keepdims=True) - n * mean * mean
    return positive_part(total / (n - ddof)).reshape(out.shape), kept


# The direction's length as it stands in its derivative, whose terms leave the range long before the gradient does.


class Deviations(NamedTuple):
    """x - m, shaped as x; out, shaped as the mean; the divisor n - ddof."""

    centred: Array
    out: Array
    divisor: int
    where: Where


def reduce_std_dividing_first(
    x: Array, *, axes: tuple[int, ...], ddof: int, keepdims: bool
) -> tuple[Array, Deviations]:
    """out = sqrt(sum of (x - m)^2 / (n - ddof)), as the textbook's."""
    out, kept = reduce_std_forward(x, axes=axes, ddof=ddof, keepdims=keepdims)
    return out, Deviations(deviations(x, axes), expanded(out, kept.where), kept.divisor, kept.where)


def reduce_std_dividing_first_backward(dout: Array, kept: Deviations) -> Gradients:
    """dx = (dout / ((n - ddof) out)) (x - m), whose first factor may be subnormal."""
    out = np.where(kept.out == 0, 1.0, kept.out)
    return {"x": expanded(dout, kept.where) / (kept.divisor * out) * kept.centred}


class ByLength(NamedTuple):
    """linear: what the linear layer keeps; direction (O, I), magnitude, r = 1 / sqrt(s) and s (O, 1)."""

    linear: Any
    direction: Array
    magnitude: Array
    r: Array
    s: Array


def weight_norm_by_rsqrt(
    x: Array, direction: Array, magnitude: Array, bias: Array | None = None
) -> tuple[Array, ByLength]:
    """weight = magnitude direction r, r = 1 / sqrt(s), s = direction . direction."""
    s = (direction * direction).sum(axis=1, keepdims=True)
    r = 1.0 / np.sqrt(s)
    out, linear = linear_forward(x, magnitude[:, None] * (direction * r), bias)
    return out, ByLength(linear, direction, magnitude[:, None], r, s)


def weight_norm_by_rsqrt_backward(dout: Array, kept: ByLength) -> Gradients:
    """dr = dunit . direction, ds = -dr r / (2 s), ddirection = dunit r + 2 direction ds, dunit = dweight magnitude."""
    direction, r = kept.direction, kept.r
    gradients = linear_backward(dout, kept.linear)
    dweight = gradients.pop("weight")
    dunit = dweight * kept.magnitude
    ds = (dunit * direction).sum(axis=1, keepdims=True) * (-0.5 * r / kept.s)
    ddirection = dunit * r + 2.0 * direction * ds
    dmagnitude = (dweight * (direction * r)).sum(axis=1)
    return gradients | {"direction": ddirection, "magnitude": dmagnitude}


# The norm by powers of x as it is, which leave the range long before the norm does.


def root_of_powers(sizes: Array, p: float, axis: Any) -> Array:
    """(sum sizes^p)^(1/p), NaN where powers vanish and sizes do not: all digits are lost, and an error has no bound.

    Where 1/p is rounded, the result errs by the logarithm of the sum times as much.
    """
    powers = (sizes**p).sum(axis=axis, keepdims=True)
    vanished = (powers == 0) & (sizes != 0).any(axis=axis, keepdims=True)
    root = np.sqrt(powers) if p == 2.0 else powers ** (np.ones_like(powers) / p)
    return np.where(vanished, np.nan, root)


def reduce_norm_by_powers(
    x: Array, *, p: float, axes: tuple[int, ...], keepdims: bool, **kinks: float
) -> tuple[Array, Norm]:
    """out = (sum |x|^p)^(1/p)."""
    if p in (1.0, math.inf):
        return reduce_norm_forward(x, p=p, axes=axes, keepdims=keepdims, **kinks)
    sizes = magnitude(x)
    root, where = root_of_powers(sizes, p, axes), located(x, axes)
    return squeezed(root, where, keepdims), Norm(p, x * sizes ** (p - 2.0), where, root)


def reduce_norm_by_powers_backward(dout: Array, kept: Norm) -> Gradients:
    """dx = (dout / out^(p - 1)) x |x|^(p - 2), whose first factor may be subnormal."""
    if kept.root is None:
        return reduce_norm_backward(dout, kept)
    out = np.where(kept.root == 0, 1.0, kept.root)
    return {"x": expanded(dout, kept.where) / out ** (kept.p - 1.0) * kept.slope}


class Powers(NamedTuple):
    """met: what each window meets, (B, C, n..., K). root: the output, (B, C, n..., 1). shape: of x."""

    p: int
    met: Array
    root: Array
    windows: Windows
    shape: Shape


def lp_pool_by_powers(x: Array, *, p: int, kernel: int, stride: int, ceil_mode: bool) -> tuple[Array, Powers]:
    """out = (sum of x^p over each window)^(1/p)."""
    windows = sliding(x.shape[2:], kernel, stride, ceil_mode=ceil_mode)
    met = gather(x, windows, 0.0)
    root = met.sum(axis=-1, keepdims=True) if p == 1 else root_of_powers(met, p, -1)
    return root[..., 0], Powers(p, met, root, windows, x.shape)


def lp_pool_by_powers_backward(dout: Array, kept: Powers) -> Gradients:
    """dx_j = the sum over windows of (dout / out^(p - 1)) x_j^(p - 1), whose first factor may be subnormal."""
    p, out = kept.p, np.where(kept.root == 0, 1.0, kept.root)
    shares = dout[..., None] / out ** (p - 1) * kept.met ** (p - 1)
    return {"x": scatter(np.where(kept.root == 0, 0.0, shares) if p > 1 else shares, kept.windows, kept.shape)}


def lp_pool_of_scaled(
    x: Array, *, p: int, kernel: int, stride: int, ceil_mode: bool
) -> tuple[Array, tuple[Array, Slopes]]:
    """out = s |x / s|, s the largest magnitude of a window."""
    out, kept = lp_pool_forward(x, p=p, kernel=kernel, stride=stride, ceil_mode=ceil_mode)
    peak = gather(magnitude(x), sliding(x.shape[2:], kernel, stride, ceil_mode=ceil_mode), 0.0).max(axis=-1)
    return out, (np.where(peak == 0, 1.0, peak), kept)


def lp_pool_of_scaled_backward(dout: Array, cache: tuple[Array, Slopes]) -> Gradients:
    """dx = (dout s) |x / s|' / s, whose first product loses digits where it is subnormal."""
    scale, own = cache
    return lp_pool_backward(dout * scale / scale, own)


# Local response normalization with d^(-beta - 1) by itself.


def local_response_norm_through_power(dout: Array, kept: LocalResponse) -> Gradients:
    """dx = dout d^-beta - x sum(dout x d^(-beta - 1)) 2 alpha beta / size: the power vanishes before dx does."""
    x, shrink = kept.x, kept.shrink
    power = shrink / kept.d
    dsums = 0.5 * kept.factor * (dout * (x * power))
    return {"x": dout * shrink - 2.0 * x * channel_sums(dsums, kept.after, kept.before)}


# exp(x) - 1 in place of expm1.


def _below(x: Array) -> Array:
    return np.exp(-positive_part(-x)) - 1.0


def elu_by_exp(x: Array, *, alpha: float, at_zero: float = 0.0) -> tuple[Array, Exponential]:
    """alpha (exp(x) - 1) below 0."""
    return np.where(x.real < 0, alpha * _below(x), x), Exponential(x, alpha, at_zero)


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


def elu_from_value(dout: Array, kept: Exponential) -> Gradients:
    """f'(x) = alpha (expm1(x) + 1) below 0, 1 above."""
    x = kept.x
    return {"x": dout * one_sided(x, kept.alpha * _slope_from_value(x), 1.0, kept.at_zero)}


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
