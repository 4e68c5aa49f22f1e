"""Losses of classes and probabilities. Each takes a prediction (x) and a target, and reduces: "none", "mean" or "sum".

Legend: l the unreduced loss, g the cotangent of l, s the sigmoid, C classes, N the number of elements of l.
Each backward function gives the gradient with respect to the target too, where it is differentiable. Weights are
data: nothing is differentiated with respect to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import xlog1py, xlogy

from gradproof.model.layer import REAL, UNIT, Argument, Domain, ShapeError, index_domain, normalized_shape, same_shape
from gradproof.model.options import (
    MAX_RANK,
    Choice,
    Option,
    Options,
    OptionValue,
    Real,
    Shape,
    TrailingAxes,
    is_integer,
)
from gradproof.reference.common import (
    Array,
    Gradients,
    log_one_plus_exp,
    logistic,
    magnitude,
    reduce_loss,
    spread_cotangent,
)
from gradproof.reference.losses import LOGIT_PAIR, UNIT_PAIR, WEIGHTED, constant_unit, loss, weighted
from gradproof.reference.softmax import log_softmax_forward

IGNORED = -100
"""The usual class number of targets that do not count."""


class BceTerms(NamedTuple):
    """What bce keeps; all arrays have one shape."""

    x: Array
    target: Array
    weight: Array | None
    reduction: str


def bce_forward(x: Array, target: Array, weight: Array | None = None, *, reduction: str) -> tuple[Array, BceTerms]:
    """l = weight (-target log(x) - (1 - target) log(1 - x)), with 0 log 0 = 0. Shapes: all are equal."""
    value = -xlogy(target, x) - xlog1py(1.0 - target, -x)
    return reduce_loss(_weighed(value, weight), reduction), BceTerms(x, target, weight, reduction)


def bce_backward(dout: Array, kept: BceTerms) -> Gradients:
    """dx = g weight ((1 - target) / (1 - x) - target / x), with 0 / 0 = 0; dtarget = g weight (log(1 - x) - log(x))."""
    x, target, weight = kept.x, kept.target, kept.weight
    g = spread_cotangent(dout, x.shape, kept.reduction)
    failure, success = 1.0 - target, target
    against = np.where(failure == 0, 0.0, failure / (1.0 - x))
    towards = np.where(success == 0, 0.0, success / x)
    slopes = {"x": against - towards, "target": np.log1p(-x) - np.log(x)}
    return {name: g * _weighed(slope, weight) for name, slope in slopes.items()}


def _weighed(value: Array, weight: Array | None) -> Array:
    """weight * value; what has no weight does not count, be it infinite."""
    return value if weight is None else np.where(weight == 0, 0.0, weight * value)


class LogitTerms(NamedTuple):
    """What bce_with_logits keeps; x, target and weight have one shape, pos_weight is as long as their last axis."""

    x: Array
    target: Array
    weight: Array | None
    pos_weight: Array | None
    reduction: str


def bce_with_logits_forward(
    x: Array, target: Array, weight: Array | None = None, pos_weight: Array | None = None, *, reduction: str
) -> tuple[Array, LogitTerms]:
    """l = weight (log(1 + exp(x)) - target x): bce of s(x); with pos_weight p: (1 - target) x + q log(1 + exp(-x)).

    q = 1 + (p - 1) target. Shapes: x, target, weight and l are equal, pos_weight is as long as the last axis.
    """
    if pos_weight is None:
        value = log_one_plus_exp(x) - target * x
    else:
        value = (1.0 - target) * x + (1.0 + (pos_weight - 1.0) * target) * log_one_plus_exp(-x)
    value = value if weight is None else weight * value
    return reduce_loss(value, reduction), LogitTerms(x, target, weight, pos_weight, reduction)


def bce_with_logits_backward(dout: Array, kept: LogitTerms) -> Gradients:
    """dx = g weight (s(x) - target), dtarget = -g weight x.

    With pos_weight p and q = 1 + (p - 1) target: dx = g weight (q s(x) - p target),
    dtarget = g weight ((p - 1) log(1 + exp(-x)) - x).
    """
    x, target, weight, p = kept.x, kept.target, kept.weight, kept.pos_weight
    g = spread_cotangent(dout, x.shape, kept.reduction)
    g = g if weight is None else g * weight
    if p is None:
        return {"x": g * (logistic(x) - target), "target": -g * x}
    q = 1.0 + (p - 1.0) * target
    return {"x": g * (q * logistic(x) - p * target), "target": g * ((p - 1.0) * log_one_plus_exp(-x) - x)}


class CrossEntropyTerms(NamedTuple):
    """What cross_entropy keeps.

    log_probabilities, coefficients: log softmax(x) and q, (..., C). counted: where the target is not ignored, (...).
    divisor: what "mean" divides by. weight: (C). targets, label_smoothing, reduction: as they were asked for.
    """

    log_probabilities: Array
    coefficients: Array
    counted: Array
    divisor: Any
    weight: Array | None
    targets: str
    label_smoothing: float
    reduction: str


def cross_entropy_forward(
    x: Array,
    target: Array,
    weight: Array | None = None,
    *,
    targets: str,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Array, CrossEntropyTerms]:
    """l = -sum_c q_c log softmax(x)_c, q_c = weight_c ((1 - a) t_c + a / C), a the smoothing (Szegedy et al. 2016).

    t: the target probabilities, or 1 at the target class and 0 elsewhere; l = 0 where that class is ignored.
    "mean" divides by N, but with target classes by the sum of the weights of those that are not ignored, so that it
    is NaN where none is left. Shapes: x (..., C), l (...), weight (C), target (...) of integers (targets "classes")
    or (..., C) ("probabilities").
    """
    log_probabilities, _ = log_softmax_forward(x, axis=-1)
    classes = x.shape[-1]
    if targets == "classes":
        chosen, counted = _chosen(target, classes, ignore_index)
        divisor = _total_weight(chosen, weight, reduction)
    else:
        chosen, counted, divisor = target, np.ones(x.shape[:-1], bool), x[..., 0].size
    smoothed = (1.0 - label_smoothing) * chosen + label_smoothing / classes if label_smoothing else chosen
    coefficients = np.where(counted[..., None], smoothed if weight is None else weight * smoothed, 0.0)
    value = -np.where(coefficients == 0, 0.0, coefficients * log_probabilities).sum(axis=-1)
    kept = CrossEntropyTerms(
        log_probabilities, coefficients, counted, divisor, weight, targets, label_smoothing, reduction
    )
    return _reduced_by(value, divisor, reduction), kept


def cross_entropy_backward(dout: Array, kept: CrossEntropyTerms) -> Gradients:
    """dx_c = g (softmax(x)_c sum_k q_k - q_c), 0 where the target is ignored.

    Where t are probabilities: dtarget_c = -g weight_c (1 - a) log softmax(x)_c.
    """
    log_probabilities, q, counted, weight = kept.log_probabilities, kept.coefficients, kept.counted, kept.weight
    g = _spread_by(dout, kept.divisor, counted.shape, kept.reduction)[..., None]
    total = q.sum(axis=-1, keepdims=True)
    dx = np.where(counted[..., None], g * (np.exp(log_probabilities) * total - q), 0.0)
    if kept.targets == "classes":
        return {"x": dx}
    dtarget = -(1.0 - kept.label_smoothing) * g * log_probabilities
    return {"x": dx, "target": dtarget if weight is None else weight * dtarget}


class NllTerms(NamedTuple):
    """What nll keeps: the weight of each target class and 0 elsewhere, (..., C), and which targets count, (...).

    divisor: what "mean" divides by.
    """

    coefficients: Array
    counted: Array
    divisor: Any
    reduction: str


def nll_forward(
    x: Array, target: Array, weight: Array | None = None, *, ignore_index: int, reduction: str
) -> tuple[Array, NllTerms]:
    """l = -weight_t x_t, t the target class and x logarithms of probabilities; 0 where that class is ignored.

    "mean" divides by the sum of the weights of the targets that are not ignored, so that it is NaN where none is left.
    Shapes: x (..., C), weight (C), target and l (...), target of integers.
    """
    chosen, counted = _chosen(target, x.shape[-1], ignore_index)
    divisor = _total_weight(chosen, weight, reduction)
    coefficients = chosen if weight is None else weight * chosen
    value = -np.where(coefficients == 0, 0.0, coefficients * x).sum(axis=-1)
    return _reduced_by(value, divisor, reduction), NllTerms(coefficients, counted, divisor, reduction)


def nll_backward(dout: Array, kept: NllTerms) -> Gradients:
    """dx_c = -g weight_t where c = t, else 0; 0 where the target is ignored."""
    counted = kept.counted
    g = _spread_by(dout, kept.divisor, counted.shape, kept.reduction)[..., None]
    return {"x": np.where(counted[..., None], -g * kept.coefficients, 0.0)}


def _chosen(target: Array, classes: int, ignore_index: int) -> tuple[Array, Array]:
    """1 at each target class and 0 elsewhere, (..., C), all 0 where it is ignored; and which targets are not."""
    counted = target != ignore_index
    return np.where(counted[..., None] & (np.arange(classes) == target[..., None]), 1.0, 0.0), counted


def _total_weight(chosen: Array, weight: Array | None, reduction: str) -> Any:
    """What "mean" divides by: the target classes' weights, summed; NaN in place of 0, by which nothing is divided."""
    if reduction != "mean":
        return 1
    total = (chosen if weight is None else weight * chosen).sum()
    return np.where(total == 0, np.nan, total)


def _reduced_by(value: Array, divisor: Any, reduction: str) -> Array:
    return value.sum() / divisor if reduction == "mean" else reduce_loss(value, reduction)


def _spread_by(dout: Array, divisor: Any, shape: Shape, reduction: str) -> Array:
    """The adjoint of `_reduced_by`."""
    return np.broadcast_to(dout / divisor if reduction == "mean" else dout, shape)


class DivergenceTerms(NamedTuple):
    """What kl_div keeps; probability: t, of the target. The loss is scale times that reduced in the way of kind."""

    x: Array
    target: Array
    probability: Array
    log_target: bool
    scale: float
    kind: str


def kl_div_forward(x: Array, target: Array, *, log_target: bool, reduction: str) -> tuple[Array, DivergenceTerms]:
    """l = t (log(t) - x), x the logarithm of a probability, t the target or, if log_target, exp(target); 0 log 0 = 0.

    "batchmean" divides the sum by the length of the first axis. Shapes: x, target and l are equal.
    """
    probability = np.exp(target) if log_target else target
    value = probability * (target - x) if log_target else xlogy(target, target) - target * x
    scale, kind = (1.0 / x.shape[0], "sum") if reduction == "batchmean" else (1.0, reduction)
    return scale * reduce_loss(value, kind), DivergenceTerms(x, target, probability, log_target, scale, kind)


def kl_div_backward(dout: Array, kept: DivergenceTerms) -> Gradients:
    """dx = -g t; dtarget = g (log(t) - x + 1), or g t (target - x + 1) if log_target."""
    x, target, t = kept.x, kept.target, kept.probability
    g = spread_cotangent(kept.scale * dout, x.shape, kept.kind)
    if kept.log_target:
        return {"x": -g * t, "target": g * t * (target - x + 1.0)}
    return {"x": -g * t, "target": g * (np.log(target) - x + 1.0)}


class FocalTerms(NamedTuple):
    """What sigmoid_focal keeps, by the letters of its formula: decay h, distance n, wrong u (1 + h), entropy c.

    focus is u^gamma, and balance b, which is 1.0 where alpha is negative; all arrays have the shape of x.
    """

    x: Array
    target: Array
    decay: Array
    distance: Array
    wrong: Array
    entropy: Array
    focus: Array
    balance: Array | float
    alpha: float
    gamma: float
    reduction: str


def sigmoid_focal_forward(
    x: Array, target: Array, *, alpha: float, gamma: float, reduction: str
) -> tuple[Array, FocalTerms]:
    """l = b u^gamma c, u the probability of being wrong and c = bce_with_logits (Lin et al. 2017).

    u = (1 - target) s(x) + target s(-x). b = alpha target + (1 - alpha) (1 - target), or 1 where alpha is negative.
    With h = exp(-|x|) and n the target's distance from the side that x is on, nothing cancels or overflows:
    u = (n + h (1 - n)) / (1 + h), c = log(1 + h) + n |x|. Shapes: x, target and l are equal.
    """
    size = magnitude(x)
    decay = np.exp(-size)
    distance = np.where(x.real < 0, target, 1.0 - target)
    wrong = distance + decay * (1.0 - distance)
    entropy = np.log1p(decay) + distance * size
    certain = distance == 0  # log(wrong) is -|x| there, even where exp(-|x|) underflows
    log_wrong = np.where(certain, -size, np.log(np.where(certain, 1.0, wrong)))
    focus = np.exp(gamma * (log_wrong - np.log1p(decay)))
    balance = alpha * target + (1.0 - alpha) * (1.0 - target) if alpha >= 0.0 else 1.0
    kept = FocalTerms(x, target, decay, distance, wrong, entropy, focus, balance, alpha, gamma, reduction)
    return reduce_loss(balance * focus * entropy, reduction), kept


def sigmoid_focal_backward(dout: Array, kept: FocalTerms) -> Gradients:
    """dx = g b u^gamma (gamma (c / u) s(x) s(-x) (1 - 2 target) + s(x) - target).

    dtarget = g u^gamma (b' c + b (gamma (c / u) (s(-x) - s(x)) - x)), b' = 2 alpha - 1, or 0. c / u
    stays finite: it goes to 1 where the target is certain and u goes to 0.
    """
    x, target, decay, balance = kept.x, kept.target, kept.decay, kept.balance
    g = spread_cotangent(dout, x.shape, kept.reduction)
    side = np.where(x < 0, -1.0, 1.0)
    share = decay / (1.0 + decay)
    empty = kept.wrong == 0
    ratio = np.where(empty, 1.0, kept.entropy / np.where(empty, 1.0, kept.wrong)) * (1.0 + decay)
    steepness = kept.gamma * ratio
    by_x = balance * (steepness * (share / (1.0 + decay)) * (1.0 - 2.0 * target) + side * (kept.distance - share))
    by_target = balance * (steepness * -side * ((1.0 - decay) / (1.0 + decay)) - x)
    if kept.alpha >= 0.0:
        by_target = by_target + (2.0 * kept.alpha - 1.0) * kept.entropy
    return {"x": g * kept.focus * by_x, "target": g * kept.focus * by_target}


class DiceTerms(NamedTuple):
    """What dice keeps: x and target (..., D), and the fraction that is 1 - l with its denominator (...)."""

    x: Array
    target: Array
    fraction: Array
    denominator: Array
    squared: bool
    reduction: str


def dice_forward(
    x: Array, target: Array, *, axes: int, smooth: float, squared: bool, reduction: str
) -> tuple[Array, DiceTerms]:
    """l = 1 - (2 sum x target + smooth) / (sum x + sum target + smooth), soft dice (Sudre et al. 2017).

    The sums are over the trailing axes. squared: of x^2 and target^2 in the denominator (Milletari et al. 2016).
    Shapes: x and target (..., D), l (...), D the trailing axes.
    """
    over = tuple(range(-axes, 0))
    sizes = x * x + target * target if squared else x + target
    denominator = sizes.sum(axis=over) + smooth
    fraction = (2.0 * (x * target).sum(axis=over) + smooth) / denominator
    return reduce_loss(1.0 - fraction, reduction), DiceTerms(x, target, fraction, denominator, squared, reduction)


def dice_backward(dout: Array, kept: DiceTerms) -> Gradients:
    """dx = g (r - 2 target) / d, r the fraction and d its denominator; squared: g (2 r x - 2 target) / d.

    dtarget is the same with x and target exchanged.
    """
    x, target, fraction, denominator = kept.x, kept.target, kept.fraction, kept.denominator
    widened = (*fraction.shape, *[1] * (x.ndim - fraction.ndim))
    g = (spread_cotangent(dout, fraction.shape, kept.reduction) / denominator).reshape(widened)
    r = fraction.reshape(widened)

    def slope(own: Array, other: Array) -> Array:
        return g * ((2.0 * r * own if kept.squared else r) - 2.0 * other)

    return {"x": slope(x, target), "target": slope(target, x)}


@dataclass(frozen=True)
class ClassNumber:
    """The number of a class, or an integer that is none."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value)

    def describe(self, shape: Shape) -> str:
        return "an integer"

    def choices(self, shape: Shape) -> tuple[OptionValue, ...]:
        """Of several classes, the first may be the one that is ignored."""
        return (IGNORED, 0, -1) if shape[-1] > 1 else (IGNORED, -1)


def _class_numbers(shape: Shape, options: Options) -> Domain:
    classes, ignored = shape[-1], int(options["ignore_index"])  # type: ignore[arg-type]
    return index_domain(classes) if 0 <= ignored < classes else Domain("index", classes, extra=(ignored,))


def _one_per_row(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return (shape[:-1],)


def _one_per_class(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return (shape[-1:],)


def _rows(shape: Shape, options: Options) -> Shape:
    return normalized_shape((shape,), options)[:-1]


def _cross_entropy_rows(shape: Shape, options: Options) -> Shape:
    if options["targets"] == "probabilities" and options["ignore_index"] != IGNORED:
        raise ShapeError(
            f"ignore_index={options['ignore_index']} is for targets that are classes; "
            f"with targets='probabilities' leave it at {IGNORED}"
        )
    return _rows(shape, options)


def _cross_entropy_targets(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return _one_per_row(shape, options) if options["targets"] == "classes" else (shape,)


def _cross_entropy_domain(shape: Shape, options: Options) -> Domain:
    return _class_numbers(shape, options) if options["targets"] == "classes" else UNIT


def _log_or_not(shape: Shape, options: Options) -> Domain:
    return REAL if options["log_target"] else UNIT


def _constant_positive(shape: Shape, options: Options) -> Domain:
    return Domain("positive", constant=True)


def _positives_weighted(options: Options) -> bool:
    return bool(options["pos_weighted"])


def _batches(shape: Shape, options: Options) -> Shape:
    return shape[: -int(options["axes"])]  # type: ignore[arg-type]


WEIGHT = Argument("weight", constant_unit, same_shape, weighted)
POS_WEIGHT = Argument("pos_weight", _constant_positive, _one_per_class, _positives_weighted)
CLASS_WEIGHT = Argument("weight", constant_unit, _one_per_class, weighted)

POS_WEIGHTED = Option("pos_weighted", Choice((False, True)), False, structural=True)
IGNORE_INDEX = Option("ignore_index", ClassNumber(), IGNORED)
CROSS_ENTROPY_OPTIONS = (
    Option("targets", Choice(("classes", "probabilities")), "classes"),
    WEIGHTED,
    Option("label_smoothing", Real(0.0, 1.0, (0.0, 0.1, 0.5)), 0.0),
    IGNORE_INDEX,
)
FOCAL_OPTIONS = (
    Option("alpha", Real(-1.0, 1.0, (0.25, -1.0, 0.75)), 0.25),
    Option("gamma", Real(0.0, 10.0, (2.0, 0.0, 1.0, 3.5)), 2.0),
)
DICE_OPTIONS = (
    Option("axes", TrailingAxes(), 1),
    Option("smooth", Real(1e-12, 1e3, (1.0, 1e-5, 0.1)), 1.0),
    Option("squared", Choice((False, True)), False),
)

LAYERS = (
    loss("bce", "classification", bce_forward, bce_backward, (*UNIT_PAIR, WEIGHT), (WEIGHTED,)),
    loss(
        "bce_with_logits",
        "classification",
        bce_with_logits_forward,
        bce_with_logits_backward,
        (*LOGIT_PAIR, WEIGHT, POS_WEIGHT),
        (WEIGHTED, POS_WEIGHTED),
    ),
    loss(
        "cross_entropy",
        "classification",
        cross_entropy_forward,
        cross_entropy_backward,
        (Argument("x"), Argument("target", _cross_entropy_domain, _cross_entropy_targets), CLASS_WEIGHT),
        CROSS_ENTROPY_OPTIONS,
        unreduced=_cross_entropy_rows,
        ranks=(1, MAX_RANK),
    ),
    loss(
        "nll",
        "classification",
        nll_forward,
        nll_backward,
        (Argument("x"), Argument("target", _class_numbers, _one_per_row), CLASS_WEIGHT),
        (WEIGHTED, IGNORE_INDEX),
        unreduced=_rows,
        ranks=(1, MAX_RANK),
    ),
    loss(
        "kl_div",
        "classification",
        kl_div_forward,
        kl_div_backward,
        (Argument("x"), Argument("target", _log_or_not, same_shape)),
        (Option("log_target", Choice((False, True)), False),),
        reduction=Option("reduction", Choice(("mean", "none", "sum", "batchmean")), "mean"),
        ranks=(1, MAX_RANK),
    ),
    loss(
        "sigmoid_focal",
        "classification",
        sigmoid_focal_forward,
        sigmoid_focal_backward,
        LOGIT_PAIR,
        FOCAL_OPTIONS,
    ),
    loss(
        "dice",
        "classification",
        dice_forward,
        dice_backward,
        UNIT_PAIR,
        DICE_OPTIONS,
        unreduced=_batches,
        ranks=(1, MAX_RANK),
    ),
)
