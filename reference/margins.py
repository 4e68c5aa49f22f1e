"""Margin losses: nothing is lost where a prediction is right by a margin.

Legend: l the unreduced loss, g the cotangent of l, C classes, z what is missing to the margin, so that l = max(z, 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from gradproof.model.layer import (
    LABEL,
    REAL,
    SIGN,
    UNIT,
    Argument,
    Domain,
    Kink,
    Layer,
    ShapeError,
    index_domain,
    same_shape,
)
from gradproof.model.options import MAX_RANK, Choice, Option, Options, Real, Shape
from gradproof.reference.common import (
    Array,
    Gradients,
    log_one_plus_exp,
    logistic,
    magnitude,
    one_sided,
    positive_part,
    reduce_loss,
    spread_cotangent,
)

COSINE_EPS = 9.999999960041972e-13
"""Added to each squared length in `cosine_embedding`, so that zero vectors have a cosine: torch's float32 1e-12."""


def active(missing: Array, at_zero: float) -> Array:
    """The derivative of max(z, 0): 0 below 0, 1 above, this weight at 0, and none where z is NaN."""
    return one_sided(missing, 0.0, 1.0, at_zero)


def hinge_forward(x: Array, target: Array, *, reduction: str, at_margin: float = 0.0) -> tuple[Array, tuple[Any, ...]]:
    """l = max(1 - target x, 0), target -1 or 1 (Cortes and Vapnik 1995). Shapes: x, target and l are equal."""
    missing = 1.0 - target * x
    return reduce_loss(positive_part(missing), reduction), (x, target, missing, reduction, at_margin)


def hinge_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = -g target, dtarget = -g x where something is missing, 0 elsewhere. At target x = 1: any share of them."""
    x, target, missing, reduction, at_margin = cache
    g = spread_cotangent(dout, x.shape, reduction) * active(missing, at_margin)
    return {"x": -g * target, "target": -g * x}


def squared_hinge_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, tuple[Any, ...]]:
    """l = max(1 - target x, 0)^2, target -1 or 1. Shapes: x, target and l are equal."""
    missing = positive_part(1.0 - target * x)
    return reduce_loss(missing * missing, reduction), (x, target, missing, reduction)


def squared_hinge_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = -2 g max(1 - target x, 0) target, dtarget = -2 g max(1 - target x, 0) x."""
    x, target, missing, reduction = cache
    g = 2.0 * spread_cotangent(dout, x.shape, reduction) * missing
    return {"x": -g * target, "target": -g * x}


def hinge_embedding_forward(
    x: Array, target: Array, *, margin: float, reduction: str, at_margin: float = 0.0
) -> tuple[Array, tuple[Any, ...]]:
    """l = x where the label is 1, max(margin - x, 0) where it is -1. Shapes: x, target and l are equal."""
    missing = margin - x
    loss = np.where(target == 1, x, positive_part(missing))
    return reduce_loss(loss, reduction), (target, missing, reduction, at_margin)


def hinge_embedding_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = g where the label is 1; where it is -1, -g below the margin, 0 above, at it any number between."""
    target, missing, reduction, at_margin = cache
    g = spread_cotangent(dout, missing.shape, reduction)
    return {"x": g * np.where(target == 1, 1.0, -active(missing, 1.0 - at_margin))}


def soft_margin_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, tuple[Any, ...]]:
    """l = log(1 + exp(-target x)), target -1 or 1, and constant. Shapes: x, target and l are equal."""
    against = -target * x
    return reduce_loss(log_one_plus_exp(against), reduction), (target, against, reduction)


def soft_margin_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx = -g target / (1 + exp(target x))."""
    target, against, reduction = cache
    return {"x": -spread_cotangent(dout, target.shape, reduction) * target * logistic(against)}


def multi_margin_forward(
    x: Array,
    target: Array,
    weight: Array | None = None,
    *,
    p: int,
    margin: float,
    reduction: str,
    at_margin: float = 0.0,
) -> tuple[Array, tuple[Any, ...]]:
    """l = sum over k != t of weight_t max(margin - x_t + x_k, 0)^p / C, t the target class (Weston and Watkins 1999).

    Shapes: x (..., C), target and l (...), weight (C,).
    """
    chosen = np.arange(x.shape[-1]) == target[..., None]
    own = np.take_along_axis(x, target[..., None], axis=-1)
    missing = margin - own + x
    factor = (1.0 if weight is None else weight[target][..., None]) / x.shape[-1]
    lost = np.where(chosen, 0.0, positive_part(missing))
    loss = (factor * (lost if p == 1 else lost * lost)).sum(axis=-1)
    return reduce_loss(loss, reduction), (chosen, missing, factor, p, reduction, at_margin)


def multi_margin_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx_k = g weight_t p max(z_k, 0)^(p - 1) / C; dx_t is minus the sum of all those. p = 1, z_k = 0: any share."""
    chosen, missing, factor, p, reduction, at_margin = cache
    g = spread_cotangent(dout, missing.shape[:-1], reduction)[..., None]
    slope = active(missing, at_margin) if p == 1 else 2.0 * positive_part(missing)
    others = np.where(chosen, 0.0, g * factor * slope)
    return {"x": np.where(chosen, -others.sum(axis=-1, keepdims=True), others)}


def multilabel_margin_forward(
    x: Array, target: Array, *, reduction: str, at_margin: float = 0.0
) -> tuple[Array, tuple[Any, ...]]:
    """l = sum of max(1 - x_j + x_k, 0) / C over every target class j and every class k that is none.

    Shapes: x and target (..., C), l (...). A row of the target lists classes, up to the first -1 if there is one;
    a class that stands there twice counts twice.
    """
    listed = np.cumprod(target >= 0, axis=-1) > 0
    is_entry = listed[..., None] & (target[..., None] == np.arange(x.shape[-1]))
    other = ~is_entry.any(axis=-2, keepdims=True)
    own = np.take_along_axis(x, np.where(listed, target, 0), axis=-1)[..., None]
    pairs = listed[..., None] & other
    missing = 1.0 - own + x[..., None, :]
    loss = np.where(pairs, positive_part(missing), 0.0).sum(axis=(-2, -1)) / x.shape[-1]
    return reduce_loss(loss, reduction), (is_entry, pairs, missing, reduction, at_margin)


def multilabel_margin_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """Every pair (j, k) with z > 0 adds g / C to dx_k and takes it from dx_j; at z = 0 any share of it."""
    is_entry, pairs, missing, reduction, at_margin = cache
    g = spread_cotangent(dout, missing.shape[:-2], reduction)[..., None, None]
    others = np.where(pairs, g * active(missing, at_margin) / missing.shape[-1], 0.0)
    own = np.where(is_entry, others.sum(axis=-1, keepdims=True), 0.0)
    return {"x": (others - own).sum(axis=-2)}


def multilabel_soft_margin_forward(
    x: Array, target: Array, weight: Array | None = None, *, reduction: str
) -> tuple[Array, tuple[Any, ...]]:
    """l = sum_c weight_c (log(1 + exp(x_c)) - target_c x_c) / C: the mean of each class's bce_with_logits.

    Shapes: x and target (..., C), l (...), weight (C,).
    """
    factor = (1.0 if weight is None else weight) / x.shape[-1]
    loss = (factor * (log_one_plus_exp(x) - target * x)).sum(axis=-1)
    return reduce_loss(loss, reduction), (x, target, factor, reduction)


def multilabel_soft_margin_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx_c = g weight_c (sigmoid(x_c) - target_c) / C, dtarget_c = -g weight_c x_c / C."""
    x, target, factor, reduction = cache
    g = factor * spread_cotangent(dout, x.shape[:-1], reduction)[..., None]
    return {"x": g * (logistic(x) - target), "target": -g * x}


def margin_ranking_forward(
    x1: Array, x2: Array, target: Array, *, margin: float, reduction: str, at_margin: float = 0.0
) -> tuple[Array, tuple[Any, ...]]:
    """l = max(margin - target (x1 - x2), 0), target a label: 1 ranks x1 higher, -1 lower. Shapes: all are equal."""
    missing = margin - target * (x1 - x2)
    return reduce_loss(positive_part(missing), reduction), (target, missing, reduction, at_margin)


def margin_ranking_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx1 = -g target where something is missing, 0 elsewhere, dx2 = -dx1. At z = 0: any share of it."""
    target, missing, reduction, at_margin = cache
    dx1 = -spread_cotangent(dout, missing.shape, reduction) * target * active(missing, at_margin)
    return {"x1": dx1, "x2": -dx1}


def _length(x: Array) -> Array:
    """sqrt(x . x + COSINE_EPS) along the last axis, scaled so that no square overflows."""
    scale = np.maximum(magnitude(x).real.max(axis=-1, keepdims=True), 1.0)
    share, floor = x / scale, math.sqrt(COSINE_EPS) / scale
    return scale * np.sqrt((share * share).sum(axis=-1, keepdims=True) + floor * floor)


def cosine_embedding_forward(
    x1: Array, x2: Array, target: Array, *, margin: float, reduction: str, at_margin: float = 1.0
) -> tuple[Array, tuple[Any, ...]]:
    """l = 1 - cos where the label is 1, max(cos - margin, 0) where it is -1, cos = x1 . x2 / (|x1| |x2|).

    Shapes: x1 and x2 (..., D), target and l (...). |x| = sqrt(x . x + 1e-12).
    """
    length1, length2 = _length(x1), _length(x2)
    unit1, unit2 = x1 / length1, x2 / length2
    cosine = (unit1 * unit2).sum(axis=-1)
    loss = np.where(target == 1, 1.0 - cosine, positive_part(cosine - margin))
    slope = np.where(target == 1, -1.0, active(cosine - margin, at_margin))
    return reduce_loss(loss, reduction), (length1, length2, unit1, unit2, cosine, slope, reduction)


def cosine_embedding_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dcos = -g where the label is 1; where it is -1, g above cos = margin, 0 below, and at it any share of g.

    dx1 = dcos (x2 / |x2| - cos x1 / |x1|) / |x1|, and dx2 with both exchanged.
    """
    length1, length2, unit1, unit2, cosine, slope, reduction = cache
    dcosine = (spread_cotangent(dout, cosine.shape, reduction) * slope)[..., None]
    cosine = cosine[..., None]
    return {
        "x1": dcosine * (unit2 - cosine * unit1) / length1,
        "x2": dcosine * (unit1 - cosine * unit2) / length2,
    }


def _distance(a: Array, b: Array, p: float, eps: float) -> tuple[Array, Array]:
    """(sum_i |a_i - b_i + eps|^p)^(1 / p) along the last axis, which is kept, and its derivative for a.

    The derivative is sign(a_i - b_i + eps) (|a_i - b_i + eps| / distance)^(p - 1), 0 where the distance is.
    """
    apart = a - b + eps
    size = magnitude(apart)
    largest = size.real.max(axis=-1, keepdims=True)
    scale = np.where(largest > 0, largest, 1.0)
    relative = ((size / scale) ** p).sum(axis=-1, keepdims=True) ** (1.0 / p)
    share = size / np.where(largest > 0, scale * relative, 1.0)
    return scale * relative, one_sided(apart, -1.0, 1.0, 0.5) * share ** (p - 1.0)


def triplet_margin_forward(
    anchor: Array,
    positive: Array,
    negative: Array,
    *,
    p: float,
    margin: float,
    eps: float,
    swap: bool,
    reduction: str,
    at_margin: float = 1.0,
) -> tuple[Array, tuple[Any, ...]]:
    """l = max(margin + d(anchor, positive) - d(anchor, negative), 0), d(a, b) = |a - b + eps|_p.

    Shapes: anchor, positive and negative (..., D), l (...). With swap, the smaller of d(anchor, negative) and
    d(positive, negative) is subtracted (Balntas et al. 2016).
    """
    to_positive, at_positive = _distance(anchor, positive, p, eps)
    to_negative, at_negative = _distance(anchor, negative, p, eps)
    at_swapped = np.zeros_like(at_negative)
    if swap:
        swapped, at_swapped = _distance(positive, negative, p, eps)
        swapped_share = one_sided(swapped - to_negative, 1.0, 0.0, 0.5)
        at_negative, at_swapped = (1.0 - swapped_share) * at_negative, swapped_share * at_swapped
        to_negative = np.where(swapped.real < to_negative.real, swapped, to_negative)
    missing = margin + to_positive - to_negative
    slopes = (at_positive, at_negative, at_swapped)
    return reduce_loss(positive_part(missing)[..., 0], reduction), (slopes, missing, reduction, at_margin)


def triplet_margin_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """With d' the derivative of d for its first point (minus that for its second), where nothing is missing 0, else:

    danchor = g (d'(a, p) - d'(a, n)), dpositive = -g d'(a, p), dnegative = g d'(a, n); or, where d(p, n) is smaller,
    danchor = g d'(a, p), dpositive = -g (d'(a, p) + d'(p, n)), dnegative = g d'(p, n). Half of each where they tie.
    At z = 0 any share of it.
    """
    (at_positive, at_negative, at_swapped), missing, reduction, at_margin = cache
    g = spread_cotangent(dout, missing.shape[:-1], reduction)[..., None] * active(missing, at_margin)
    return {
        "anchor": g * (at_positive - at_negative),
        "positive": -g * (at_positive + at_swapped),
        "negative": g * (at_negative + at_swapped),
    }


def _output_shape(arguments: tuple[Argument, ...], per_row: bool, shapes: Sequence[Shape], options: Options) -> Shape:
    """The unreduced loss has one number per number or per row of the first argument; the others must fit it."""
    first = shapes[0]
    if per_row and first[-1] == 0:
        raise ShapeError(f"needs rows of at least 1 number, got an input of shape {list(first)}")
    given = [each for each in arguments if each.when is None or each.when(options)]
    for argument, shape in zip(given[1:], shapes[1:], strict=True):
        (expected,) = argument.shapes(first, options)
        if shape != expected:
            raise ShapeError(
                f"beside an input of shape {list(first)} its {argument.name} must have shape {list(expected)}, "
                f"got {list(shape)}"
            )
    if options["reduction"] != "none":
        return ()
    return first[:-1] if per_row else first


def _real(shape: Shape, options: Options) -> Domain:
    return REAL


def _unit(shape: Shape, options: Options) -> Domain:
    return UNIT


def _sign(shape: Shape, options: Options) -> Domain:
    return SIGN


def _constant_sign(shape: Shape, options: Options) -> Domain:
    return Domain("sign", constant=True)


def _label(shape: Shape, options: Options) -> Domain:
    return LABEL


def _class(shape: Shape, options: Options) -> Domain:
    return index_domain(shape[-1])


def _class_list(shape: Shape, options: Options) -> Domain:
    return Domain("index", shape[-1], extra=(-1,))


def _class_weight(shape: Shape, options: Options) -> Domain:
    return Domain("positive", constant=True)


def _one_per_row(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return (shape[:-1],)


def _one_per_class(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return (shape[-1:],)


def _no_margin(shape: Shape, options: Options) -> bool:
    return not options["margin"]


def _rivals_without_margin(shape: Shape, options: Options) -> bool:
    return options["p"] == 1 and not options["margin"] and shape[-1] > 1


def _row_of_three(shape: Shape, options: Options) -> bool:
    return shape == (3,)


def _orthogonal(shape: Shape, options: Options) -> bool:
    return shape == (4,) and not options["margin"]


def _one_apart(shape: Shape, options: Options) -> bool:
    """Where the negative is exactly the margin further away than the positive, in every binary dtype."""
    wanted = {"p": 1.0, "margin": 1.0, "eps": 0.125, "swap": False}
    return shape == (3,) and all(options[name] == value for name, value in wanted.items())


def _weighted(options: Options) -> bool:
    return bool(options["weighted"])


REDUCTION = Option("reduction", Choice(("mean", "none", "sum")), "mean")
WEIGHTED = Option("weighted", Choice((False, True)), False, structural=True)
ANY_MARGIN = Real(-1e3, 1e3, (0.0, 1.0, 0.5))
ONE_MARGIN = Option("margin", Real(-1e3, 1e3, (1.0, 0.5, 0.0)), 1.0)

WEIGHT = Argument("weight", _class_weight, _one_per_class, when=_weighted)
SIGNED = (Argument("x"), Argument("target", _sign, same_shape))
CONSTANTLY_SIGNED = (Argument("x"), Argument("target", _constant_sign, same_shape))
LABELLED = (Argument("x"), Argument("target", _label, same_shape))
CLASSIFIED = (Argument("x"), Argument("target", _class, _one_per_row), WEIGHT)
LISTED = (Argument("x"), Argument("target", _class_list, same_shape))
MULTILABELLED = (Argument("x"), Argument("target", _unit, same_shape), WEIGHT)
RANKED = (Argument("x1"), Argument("x2", _real, same_shape), Argument("target", _label, same_shape))
PAIRED = (Argument("x1"), Argument("x2", _real, same_shape), Argument("target", _label, _one_per_row))
TRIPLET = (Argument("anchor"), Argument("positive", _real, same_shape), Argument("negative", _real, same_shape))

ORTHOGONAL = {"x1": [32.0] * 4, "x2": [1.0, 1.0, -1.0, -1.0]}
"""Whose lengths are powers of 2, so that nothing is rounded, in whatever order it is computed."""

APART = {"anchor": [0.0] * 3, "positive": [-0.875] * 3, "negative": [1.125, 1.125, 2.125]}

CLASSES: tuple[Shape, ...] = ((2, 3), (3,), (3, 2), (1, 5), (2, 1))
VECTORS: tuple[Shape, ...] = ((2, 3), (3,), (4, 1), (2, 1, 5))


def _loss(
    name: str, forward: Any, backward: Any, arguments: tuple[Argument, ...], *options: Option, **others: Any
) -> Layer:
    """A loss of every number."""
    output_shape = partial(_output_shape, arguments, False)
    return Layer(
        name,
        "loss",
        "margins",
        forward,
        backward,
        (*options, REDUCTION),
        arguments,
        output_shape=output_shape,
        **others,
    )


def _row_loss(
    name: str, forward: Any, backward: Any, arguments: tuple[Argument, ...], *options: Option, **others: Any
) -> Layer:
    """A loss of every row."""
    output_shape = partial(_output_shape, arguments, True)
    return Layer(
        name,
        "loss",
        "margins",
        forward,
        backward,
        (*options, REDUCTION),
        arguments,
        output_shape=output_shape,
        **others,
    )


LAYERS = (
    _loss("hinge", hinge_forward, hinge_backward, SIGNED, kinks=(Kink("at_margin", point=-1.0, default=0.0),)),
    _loss("squared_hinge", squared_hinge_forward, squared_hinge_backward, SIGNED),
    _loss(
        "hinge_embedding",
        hinge_embedding_forward,
        hinge_embedding_backward,
        LABELLED,
        ONE_MARGIN,
        kinks=(Kink("at_margin", point="margin", default=0.0),),
    ),
    _loss("soft_margin", soft_margin_forward, soft_margin_backward, CONSTANTLY_SIGNED),
    _row_loss(
        "multi_margin",
        multi_margin_forward,
        multi_margin_backward,
        CLASSIFIED,
        Option("p", Choice((1, 2)), 1),
        ONE_MARGIN,
        WEIGHTED,
        ranks=(1, 2),
        shapes=CLASSES,
        kinks=(Kink("at_margin", point=1.0, default=0.0, when=_rivals_without_margin),),
    ),
    _row_loss(
        "multilabel_margin",
        multilabel_margin_forward,
        multilabel_margin_backward,
        LISTED,
        ranks=(1, 2),
        shapes=CLASSES,
        kinks=(Kink("at_margin", point={"x": [1.0, 0.0, 0.0]}, default=0.0, shape=(3,), when=_row_of_three),),
    ),
    _row_loss(
        "multilabel_soft_margin",
        multilabel_soft_margin_forward,
        multilabel_soft_margin_backward,
        MULTILABELLED,
        WEIGHTED,
        ranks=(1, MAX_RANK),
        shapes=VECTORS,
    ),
    _loss(
        "margin_ranking",
        margin_ranking_forward,
        margin_ranking_backward,
        RANKED,
        Option("margin", ANY_MARGIN, 0.0),
        kinks=(Kink("at_margin", point=1.0, default=0.0, when=_no_margin),),
    ),
    _row_loss(
        "cosine_embedding",
        cosine_embedding_forward,
        cosine_embedding_backward,
        PAIRED,
        Option("margin", Real(-1.0, 1.0, (0.0, 0.5, -0.25)), 0.0),
        ranks=(1, 2),
        shapes=((2, 3), (3,), (4, 1), (3, 2)),
        kinks=(Kink("at_margin", point=ORTHOGONAL, default=1.0, shape=(4,), when=_orthogonal),),
    ),
    _row_loss(
        "triplet_margin",
        triplet_margin_forward,
        triplet_margin_backward,
        TRIPLET,
        Option("p", Real(1.0, 100.0, (2.0, 1.0, 3.0)), 2.0),
        Option("margin", Real(1e-6, 1e3, (1.0, 0.25, 10.0)), 1.0),
        Option("eps", Real(0.0, 1.0, (1e-6, 0.125)), 1e-6),
        Option("swap", Choice((False, True)), False),
        ranks=(1, 3),
        shapes=VECTORS,
        kinks=(Kink("at_margin", point=APART, default=1.0, shape=(3,), when=_one_apart),),
    ),
)
