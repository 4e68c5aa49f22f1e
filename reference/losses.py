"""Losses. Each takes a prediction (x) and a target, and reduces: "none", "mean" over its elements, or "sum".

Legend: l the unreduced loss, g the cotangent of l, C classes, N the number of elements of l.
Each backward function gives the gradient with respect to the target too, where it is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import xlog1py, xlogy

from gradproof.layer import (
    MAX_RANK,
    REAL,
    UNIT,
    Argument,
    Choice,
    Domain,
    Kink,
    Layer,
    Option,
    Options,
    Shape,
    ShapeError,
    index_domain,
    normalized_shape,
)
from gradproof.reference.common import (
    Array,
    Gradients,
    log_one_plus_exp,
    logistic,
    magnitude,
    one_sided,
    reduce_loss,
    spread_cotangent,
)
from gradproof.reference.softmax import log_softmax_forward


def mse_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, tuple[Array, str]]:
    """l = (x - target)^2. Shapes: x, target and l are equal."""
    error = x - target
    return reduce_loss(error * error, reduction), (error, reduction)


def mse_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = 2 g (x - target), dtarget = -dx."""
    error, reduction = cache
    dx = 2.0 * spread_cotangent(dout, error.shape, reduction) * error
    return {"x": dx, "target": -dx}


def half_squared_error_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, tuple[Array, str]]:
    """l = (x - target)^2 / 2. Shapes: x, target and l are equal."""
    error = x - target
    return reduce_loss(0.5 * error * error, reduction), (error, reduction)


def half_squared_error_backward(dout: Array, cache: tuple[Array, str]) -> Gradients:
    """dx = g (x - target), dtarget = -dx."""
    error, reduction = cache
    dx = spread_cotangent(dout, error.shape, reduction) * error
    return {"x": dx, "target": -dx}


def mae_forward(
    x: Array, target: Array, *, reduction: str, at_target: float = 0.5
) -> tuple[Array, tuple[Array, str, float]]:
    """l = |x - target|. Shapes: x, target and l are equal."""
    error = x - target
    return reduce_loss(magnitude(error), reduction), (error, reduction, at_target)


def mae_backward(dout: Array, cache: tuple[Array, str, float]) -> Gradients:
    """dx = g sign(x - target), dtarget = -dx. Where x = target: any number from -g to g, by default 0."""
    error, reduction, at_target = cache
    dx = spread_cotangent(dout, error.shape, reduction) * one_sided(error, -1.0, 1.0, at_target)
    return {"x": dx, "target": -dx}


def bce_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, tuple[Array, Array, str]]:
    """l = -target log(x) - (1 - target) log(1 - x), with 0 log 0 = 0. Shapes: x, target and l are equal."""
    loss = -xlogy(target, x) - xlog1py(1.0 - target, -x)
    return reduce_loss(loss, reduction), (x, target, reduction)


def bce_backward(dout: Array, cache: tuple[Array, Array, str]) -> Gradients:
    """dx = g ((1 - target) / (1 - x) - target / x), with 0 / 0 = 0; dtarget = g (log(1 - x) - log(x))."""
    x, target, reduction = cache
    g = spread_cotangent(dout, x.shape, reduction)
    failure, success = 1.0 - target, target
    against = np.where(failure == 0, 0.0, failure / (1.0 - x))
    towards = np.where(success == 0, 0.0, success / x)
    return {"x": g * (against - towards), "target": g * (np.log1p(-x) - np.log(x))}


def bce_with_logits_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, tuple[Array, Array, str]]:
    """l = log(1 + exp(x)) - target x: bce of sigmoid(x). Shapes: x, target and l are equal."""
    return reduce_loss(log_one_plus_exp(x) - target * x, reduction), (x, target, reduction)


def bce_with_logits_backward(dout: Array, cache: tuple[Array, Array, str]) -> Gradients:
    """dx = g (sigmoid(x) - target), dtarget = -g x."""
    x, target, reduction = cache
    g = spread_cotangent(dout, x.shape, reduction)
    return {"x": g * (logistic(x) - target), "target": -g * x}


def cross_entropy_forward(x: Array, target: Array, *, targets: str, reduction: str) -> tuple[Array, tuple[Any, ...]]:
    """l = -sum_c t_c log softmax(x)_c, t the target probabilities, or 1 at the target class and 0 elsewhere.

    Shapes: x (..., C), l (...), target (...) of integers (targets "classes") or (..., C) ("probabilities").
    """
    log_probabilities, _ = log_softmax_forward(x, axis=-1)
    if targets == "classes":
        loss = -np.take_along_axis(log_probabilities, target[..., None], axis=-1)[..., 0]
    else:
        loss = -(target * log_probabilities).sum(axis=-1)
    return reduce_loss(loss, reduction), (log_probabilities, target, targets, reduction)


def cross_entropy_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx_c = g (softmax(x)_c sum_k t_k - t_c); dtarget_c = -g log softmax(x)_c where t are probabilities."""
    log_probabilities, target, targets, reduction = cache
    g = spread_cotangent(dout, log_probabilities.shape[:-1], reduction)[..., None]
    probabilities = np.exp(log_probabilities)
    if targets == "classes":
        chosen = np.arange(log_probabilities.shape[-1]) == target[..., None]
        return {"x": g * (probabilities - np.where(chosen, 1.0, 0.0))}
    dx = g * (probabilities * target.sum(axis=-1, keepdims=True) - target)
    return {"x": dx, "target": -g * log_probabilities}


def _elementwise_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x, target = shapes
    if target != x:
        raise ShapeError(f"its target must have the prediction's shape {list(x)}, got {list(target)}")
    return x if options["reduction"] == "none" else ()


def _cross_entropy_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x, target = normalized_shape(shapes, options), shapes[1]
    (expected,) = _cross_entropy_targets(x, options)
    if target != expected:
        raise ShapeError(
            f"a prediction of shape {list(x)} needs a target of shape {list(expected)}, got {list(target)}"
        )
    return x[:-1] if options["reduction"] == "none" else ()


def _cross_entropy_targets(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return (shape[:-1] if options["targets"] == "classes" else shape,)


def _cross_entropy_domain(shape: Shape, options: Options) -> Domain:
    return index_domain(shape[-1]) if options["targets"] == "classes" else UNIT


def _real(shape: Shape, options: Options) -> Domain:
    return REAL


def _unit(shape: Shape, options: Options) -> Domain:
    return UNIT


def _same(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return (shape,)


REDUCTION = (Option("reduction", Choice(("mean", "none", "sum")), "mean"),)
REAL_PAIR = (Argument("x"), Argument("target", _real, _same))
LOGIT_PAIR = (Argument("x"), Argument("target", _unit, _same))
UNIT_PAIR = (Argument("x", _unit), Argument("target", _unit, _same))
AT_TARGET = (Kink("at_target", point=0.0, default=0.5),)

LAYERS = (
    Layer("mse", "loss", "losses", mse_forward, mse_backward, REDUCTION, REAL_PAIR, output_shape=_elementwise_shape),
    Layer(
        "half_squared_error",
        "loss",
        "losses",
        half_squared_error_forward,
        half_squared_error_backward,
        REDUCTION,
        REAL_PAIR,
        output_shape=_elementwise_shape,
    ),
    Layer(
        "mae",
        "loss",
        "losses",
        mae_forward,
        mae_backward,
        REDUCTION,
        REAL_PAIR,
        output_shape=_elementwise_shape,
        kinks=AT_TARGET,
    ),
    Layer("bce", "loss", "losses", bce_forward, bce_backward, REDUCTION, UNIT_PAIR, output_shape=_elementwise_shape),
    Layer(
        "bce_with_logits",
        "loss",
        "losses",
        bce_with_logits_forward,
        bce_with_logits_backward,
        REDUCTION,
        LOGIT_PAIR,
        output_shape=_elementwise_shape,
    ),
    Layer(
        "cross_entropy",
        "loss",
        "losses",
        cross_entropy_forward,
        cross_entropy_backward,
        (Option("targets", Choice(("classes", "probabilities")), "classes"), *REDUCTION),
        (Argument("x"), Argument("target", _cross_entropy_domain, _cross_entropy_targets)),
        ranks=(1, MAX_RANK),
        output_shape=_cross_entropy_shape,
    ),
)
