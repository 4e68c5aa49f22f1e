"""Losses of numbers. Each takes a prediction (x) and a target, and reduces: "none", "mean" over elements, or "sum".

Legend: e = x - target, l the unreduced loss, g the cotangent of l. Shapes: x, target and l are equal.
Each backward function gives the gradient with respect to the target too.
"""

from __future__ import annotations

import math
from typing import Any

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
    error = x - target
    return reduce_loss(error * error, reduction), (error, reduction)


def mse_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = 2 g e, dtarget = -dx."""
    error, reduction = cache
    dx = 2.0 * spread_cotangent(dout, error.shape, reduction) * error
    return {"x": dx, "target": -dx}


def half_squared_error_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, tuple[Array, str]]:
    """l = e^2 / 2."""
    error = x - target
    return reduce_loss(0.5 * error * error, reduction), (error, reduction)


def half_squared_error_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = g e, dtarget = -dx."""
    error, reduction = cache
    dx = spread_cotangent(dout, error.shape, reduction) * error
    return {"x": dx, "target": -dx}


def mae_forward(
    x: Array, target: Array, *, reduction: str, at_target: float = 0.5
) -> tuple[Array, tuple[Array, str, float]]:
    """l = |e|."""
    error = x - target
    return reduce_loss(magnitude(error), reduction), (error, reduction, at_target)


def mae_backward(dout: Array, cache: tuple[Array, str, float]) -> Gradients:
    """dx = g sign(e), dtarget = -dx. Where x = target: any number from -g to g, by default 0."""
    error, reduction, at_target = cache
    dx = spread_cotangent(dout, error.shape, reduction) * one_sided(error, -1.0, 1.0, at_target)
    return {"x": dx, "target": -dx}


def huber_forward(x: Array, target: Array, *, delta: float, reduction: str) -> tuple[Array, tuple[Array, str]]:
    """l = e^2 / 2 where |e| <= delta, delta (|e| - delta / 2) beyond: c (e - c / 2), c = e clipped (Huber 1964)."""
    error = x - target
    clipped = clamp(error, -delta, delta)
    return reduce_loss(clipped * (error - 0.5 * clipped), reduction), (clipped, reduction)


def huber_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = g e where |e| <= delta, g delta sign(e) beyond; dtarget = -dx."""
    clipped, reduction = cache
    dx = spread_cotangent(dout, clipped.shape, reduction) * clipped
    return {"x": dx, "target": -dx}


def smooth_l1_forward(
    x: Array, target: Array, *, beta: float, reduction: str, at_target: float = 0.5
) -> tuple[Array, tuple[Array, str]]:
    """l = e^2 / (2 beta) where |e| < beta, |e| - beta / 2 beyond (Girshick 2015); |e| for beta = 0."""
    error = x - target
    clipped = clamp(error, -beta, beta)
    slope = clipped / beta if beta else one_sided(error, -1.0, 1.0, at_target)
    return reduce_loss(slope * (error - 0.5 * clipped), reduction), (slope, reduction)


def smooth_l1_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = g e / beta where |e| < beta, g sign(e) beyond; dtarget = -dx.

    Where beta = 0 and x = target: any number from -g to g, by default 0.
    """
    slope, reduction = cache
    dx = spread_cotangent(dout, slope.shape, reduction) * slope
    return {"x": dx, "target": -dx}


def log_cosh_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, tuple[Array, str]]:
    """l = log(cosh(e)) = log1p(2 sinh(e / 2)^2) = |e| + log1p(exp(-2 |e|)) - log(2).

    The first form keeps its digits near 0, the second does not overflow.
    """
    error = x - target
    size = magnitude(error)
    near = size.real < 1.0
    half = np.sinh(0.5 * np.where(near, error, 0.0))
    far = size + np.log1p(np.exp(-2.0 * size)) - math.log(2.0)
    return reduce_loss(np.where(near, np.log1p(2.0 * half * half), far), reduction), (error, reduction)


def log_cosh_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = g tanh(e), dtarget = -dx."""
    error, reduction = cache
    dx = spread_cotangent(dout, error.shape, reduction) * np.tanh(error)
    return {"x": dx, "target": -dx}


def poisson_nll_forward(
    x: Array, target: Array, *, log_input: bool, full: bool, eps: float, reduction: str
) -> tuple[Array, tuple[Any, ...]]:
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
    cache = (x, target, rate, log_rate, log_input, full, eps, reduction)
    return reduce_loss(value, reduction), cache


def poisson_nll_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = g (exp(x) - target), or g (1 - target / (x + eps)); dtarget = -g log(rate).

    full: plus g (log(target) + 1 / (2 target)) where target > 1.
    """
    x, target, rate, log_rate, log_input, full, eps, reduction = cache
    g = spread_cotangent(dout, x.shape, reduction)
    dx = g * (rate - target if log_input else 1.0 - target / (x + eps))
    dtarget = -log_rate
    if full:
        counts = np.where(target > 1.0, target, 1.0)
        dtarget = dtarget + np.where(target > 1.0, np.log(counts) + 0.5 / counts, 0.0)
    return {"x": dx, "target": g * dtarget}


def gaussian_nll_forward(
    x: Array, target: Array, var: Array, *, full: bool, eps: float, reduction: str
) -> tuple[Array, tuple[Any, ...]]:
    """l = (log(v) + e^2 / v) / 2, v = max(var, eps), plus log(2 pi) / 2 if full (Nix and Weigend 1994).

    Shapes: var as x, or with a last axis of length 1, or without the last axis.
    """
    error = x - target
    widened = var if var.ndim == x.ndim else var[..., None]
    variance = np.where(widened.real < eps, eps, widened)
    scaled = error / variance
    value = 0.5 * (np.log(variance) + error * scaled)
    cache = (scaled, variance, var.shape, reduction)
    return reduce_loss(value + 0.5 * LOG_TWO_PI if full else value, reduction), cache


def gaussian_nll_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = g e / v, dtarget = -dx, dvar = g (1 / v - (e / v)^2) / 2, summed where var was broadcast.

    By definition dvar passes the clamp: below eps it is that of v, which pushes the variance up again, not 0.
    """
    scaled, variance, shape, reduction = cache
    g = spread_cotangent(dout, scaled.shape, reduction)
    dvariance = 0.5 * g * (1.0 / variance - scaled * scaled)
    dvar = unbroadcast(dvariance, variance.shape).reshape(shape)
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
