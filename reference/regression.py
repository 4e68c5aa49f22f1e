"""Losses of numbers. Each takes a prediction (x) and a target, and reduces: "none", "mean" over elements, or "sum".

Legend: e = x - target, l the unreduced loss, g the cotangent of l. Shapes: x, target and l are equal.
Each backward function gives the gradient with respect to the target too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from gradproof.model.layer import POSITIVE, REAL, Argument, Domain, Kink, same_shape
from gradproof.model.options import Choice, Option, Options, Real, Shape
from gradproof.reference.common import (
    Array,
    Gradients,
    clamp,
    magnitude,
    one_sided,
    reduce_loss,
    spread_cotangent,
    unbroadcast,
)
from gradproof.reference.losses import REAL_PAIR, loss, positive, real

LOG_TWO_PI = math.log(2.0 * math.pi)


def mse_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, tuple[Array, str]]:
    """l = e^2."""
    e = x - target
    return reduce_loss(e * e, reduction), (e, reduction)


def mse_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = 2 g e, dtarget = -dx."""
    e, reduction = cache
    g = spread_cotangent(dout, e.shape, reduction)
    dx = 2.0 * g * e
    return {"x": dx, "target": -dx}


def half_squared_error_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, tuple[Array, str]]:
    """l = e^2 / 2."""
    e = x - target
    return reduce_loss(0.5 * e * e, reduction), (e, reduction)


def half_squared_error_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = g e, dtarget = -dx."""
    e, reduction = cache
    g = spread_cotangent(dout, e.shape, reduction)
    dx = g * e
    return {"x": dx, "target": -dx}


class Error(NamedTuple):
    """e, and the weight of the kink where it is 0."""

    e: Array
    reduction: str
    at_target: float


def mae_forward(x: Array, target: Array, *, reduction: str, at_target: float = 0.5) -> tuple[Array, Error]:
    """l = |e|."""
    e = x - target
    return reduce_loss(magnitude(e), reduction), Error(e, reduction, at_target)


def mae_backward(dout: Array, kept: Error) -> Gradients:
    """dx = g sign(e), dtarget = -dx. Where x = target: any number from -g to g, by default 0."""
    g = spread_cotangent(dout, kept.e.shape, kept.reduction)
    dx = g * one_sided(kept.e, -1.0, 1.0, kept.at_target)
    return {"x": dx, "target": -dx}


def huber_forward(x: Array, target: Array, *, delta: float, reduction: str) -> tuple[Array, tuple[Array, str]]:
    """l = e^2 / 2 where |e| <= delta, delta (|e| - delta / 2) beyond: c (e - c / 2), c = e clipped (Huber 1964)."""
    e = x - target
    c = clamp(e, -delta, delta)
    return reduce_loss(c * (e - 0.5 * c), reduction), (c, reduction)


def huber_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = g c: g e where |e| <= delta, g delta sign(e) beyond; dtarget = -dx."""
    c, reduction = cache
    g = spread_cotangent(dout, c.shape, reduction)
    dx = g * c
    return {"x": dx, "target": -dx}


def smooth_l1_forward(
    x: Array, target: Array, *, beta: float, reduction: str, at_target: float = 0.5
) -> tuple[Array, tuple[Array, str]]:
    """l = e^2 / (2 beta) where |e| < beta, |e| - beta / 2 beyond (Girshick 2015); |e| for beta = 0."""
    e = x - target
    clipped = clamp(e, -beta, beta)
    slope = clipped / beta if beta else one_sided(e, -1.0, 1.0, at_target)
    return reduce_loss(slope * (e - 0.5 * clipped), reduction), (slope, reduction)


def smooth_l1_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = g slope: g e / beta where |e| < beta, g sign(e) beyond; dtarget = -dx.

    Where beta = 0 and x = target: any number from -g to g, by default 0.
    """
    slope, reduction = cache
    g = spread_cotangent(dout, slope.shape, reduction)
    dx = g * slope
    return {"x": dx, "target": -dx}


def log_cosh_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, tuple[Array, str]]:
    """l = log(cosh(e)) = log1p(2 sinh(e / 2)^2) = |e| + log1p(exp(-2 |e|)) - log(2).

    The first form keeps its digits near 0, the second does not overflow.
    """
    e = x - target
    size = magnitude(e)
    near = size.real < 1.0
    half = np.sinh(0.5 * np.where(near, e, 0.0))
    far = size + np.log1p(np.exp(-2.0 * size)) - math.log(2.0)
    return reduce_loss(np.where(near, np.log1p(2.0 * half * half), far), reduction), (e, reduction)


def log_cosh_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = g tanh(e), dtarget = -dx."""
    e, reduction = cache
    g = spread_cotangent(dout, e.shape, reduction)
    dx = g * np.tanh(e)
    return {"x": dx, "target": -dx}


class Rates(NamedTuple):
    """The rate and its logarithm, of the shape of x, beside what forward was given."""

    x: Array
    target: Array
    rate: Array
    log_rate: Array
    log_input: bool
    full: bool
    eps: float
    reduction: str


def poisson_nll_forward(
    x: Array, target: Array, *, log_input: bool, full: bool, eps: float, reduction: str
) -> tuple[Array, Rates]:
    """l = exp(x) - target x, x the logarithm of the rate; x - target log(x + eps) where x is the rate itself.

    full: where target > 1, Stirling's target log(target) - target + log(2 pi target) / 2 is added (l jumps there).
    """
    rate = np.exp(x) if log_input else x
    log_rate = x if log_input else np.log(x + eps)
    value = rate - target * log_rate
    if full:
        counts = np.where(target.real > 1.0, target, 1.0)
        stirling = counts * np.log(counts) - counts + 0.5 * (LOG_TWO_PI + np.log(counts))
        value = value + np.where(target.real > 1.0, stirling, 0.0)
    return reduce_loss(value, reduction), Rates(x, target, rate, log_rate, log_input, full, eps, reduction)


def poisson_nll_backward(dout: Array, kept: Rates) -> Gradients:
    """dx = g (exp(x) - target), or g (1 - target / (x + eps)); dtarget = -g log(rate).

    full: plus g (log(target) + 1 / (2 target)) where target > 1.
    """
    x, target = kept.x, kept.target
    g = spread_cotangent(dout, x.shape, kept.reduction)
    dx = g * (kept.rate - target if kept.log_input else 1.0 - target / (x + kept.eps))
    dtarget = -kept.log_rate
    if kept.full:
        counts = np.where(target > 1.0, target, 1.0)
        dtarget = dtarget + np.where(target > 1.0, np.log(counts) + 0.5 / counts, 0.0)
    return {"x": dx, "target": g * dtarget}


class Scaled(NamedTuple):
    """scaled: e / v, shaped as x; v as it is broadcast against it; shape: of var."""

    scaled: Array
    v: Array
    shape: Shape
    reduction: str


def gaussian_nll_forward(
    x: Array, target: Array, var: Array, *, full: bool, eps: float, reduction: str
) -> tuple[Array, Scaled]:
    """l = (log(v) + e^2 / v) / 2, v = max(var, eps), plus log(2 pi) / 2 if full (Nix and Weigend 1994).

    Shapes: var as x, or with a last axis of length 1, or without the last axis.
    """
    e = x - target
    widened = var if var.ndim == x.ndim else var[..., None]
    v = np.where(widened.real < eps, eps, widened)
    scaled = e / v
    value = 0.5 * (np.log(v) + e * scaled)
    kept = Scaled(scaled, v, var.shape, reduction)
    return reduce_loss(value + 0.5 * LOG_TWO_PI if full else value, reduction), kept


def gaussian_nll_backward(dout: Array, kept: Scaled) -> Gradients:
    """dx = g e / v, dtarget = -dx, dvar = g (1 / v - (e / v)^2) / 2, summed where var was broadcast.

    By definition dvar passes the clamp: below eps it is that of v, which pushes the variance up again, not 0.
    """
    scaled, v = kept.scaled, kept.v
    g = spread_cotangent(dout, scaled.shape, kept.reduction)
    dv = 0.5 * g * (1.0 / v - scaled * scaled)
    dvar = unbroadcast(dv, v.shape).reshape(kept.shape)
    return {"x": g * scaled, "target": -g * scaled, "var": dvar}


def _rate(shape: Shape, options: Options) -> Domain:
    return REAL if options["log_input"] else POSITIVE


def _variances(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return tuple(dict.fromkeys((shape, (*shape[:-1], 1), shape[:-1]))) if shape else (shape,)


AT_TARGET = (Kink("at_target", point=0.0, default=0.5),)
DELTA = Option("delta", Real(1e-3, 1e3, (1.0, 0.5, 3.0)), 1.0)
BETA = Option("beta", Real(0.0, 1e3, (1.0, 0.0, 0.5, 3.0)), 1.0)
FULL = Option("full", Choice((False, True)), False)
POISSON_OPTIONS = (
    Option("log_input", Choice((True, False)), True),
    FULL,
    Option("eps", Real(0.0, 1.0, (1e-8, 1e-3, 0.5)), 1e-8),
)
POISSON_PAIR = (Argument("x", _rate), Argument("target", real, same_shape))
GAUSSIAN_OPTIONS = (FULL, Option("eps", Real(1e-12, 1.0, (1e-6, 1e-3, 0.05)), 1e-6))
GAUSSIAN_TRIPLE = (*REAL_PAIR, Argument("var", positive, _variances))

LAYERS = (
    loss("mse", "regression", mse_forward, mse_backward, REAL_PAIR),
    loss("half_squared_error", "regression", half_squared_error_forward, half_squared_error_backward, REAL_PAIR),
    loss("mae", "regression", mae_forward, mae_backward, REAL_PAIR, kinks=AT_TARGET),
    loss("huber", "regression", huber_forward, huber_backward, REAL_PAIR, (DELTA,)),
    loss("smooth_l1", "regression", smooth_l1_forward, smooth_l1_backward, REAL_PAIR, (BETA,), kinks=AT_TARGET),
    loss("log_cosh", "regression", log_cosh_forward, log_cosh_backward, REAL_PAIR),
    loss("poisson_nll", "regression", poisson_nll_forward, poisson_nll_backward, POISSON_PAIR, POISSON_OPTIONS),
    loss("gaussian_nll", "regression", gaussian_nll_forward, gaussian_nll_backward, GAUSSIAN_TRIPLE, GAUSSIAN_OPTIONS),
)
