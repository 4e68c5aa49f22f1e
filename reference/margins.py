"""Margin losses: nothing is lost where a prediction is right by a margin.

Legend: l the unreduced loss, g the cotangent of l, C classes, z what is missing to the margin, so that l = max(z, 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradproof.model.layer import LABEL, SIGN, Argument, Domain, Kink, Layer, ShapeError, index_domain, same_shape
from gradproof.model.options import MAX_RANK, Choice, Option, Options, Real, Shape
from gradproof.reference.common import (
    Array,
    Gradients,
    log_one_plus_exp,
    logistic,
    one_sided,
    positive_part,
    reduce_loss,
    spread_cotangent,
)
from gradproof.reference.losses import REDUCTION, WEIGHTED, real, unit, weighted


def active(missing: Array, at_zero: float) -> Array:
    """The derivative of max(z, 0): 0 below 0, 1 above, this weight at 0, and none where z is NaN."""
    return one_sided(missing, 0.0, 1.0, at_zero)


class Hinged(NamedTuple):
    """All of the shape of x but the reduction and the weight of the kink."""

    x: Array
    target: Array
    missing: Array
    reduction: str
    at_margin: float


def hinge_forward(x: Array, target: Array, *, reduction: str, at_margin: float = 0.0) -> tuple[Array, Hinged]:
    """l = max(1 - target x, 0), target -1 or 1 (Cortes and Vapnik 1995). Shapes: x, target and l are equal."""
    missing = 1.0 - target * x
    return reduce_loss(positive_part(missing), reduction), Hinged(x, target, missing, reduction, at_margin)


def hinge_backward(dout: Array, kept: Hinged) -> Gradients:
    """dx = -g target, dtarget = -g x where something is missing, 0 elsewhere. At target x = 1: any share of them."""
    x, target = kept.x, kept.target
    g = spread_cotangent(dout, x.shape, kept.reduction) * active(kept.missing, kept.at_margin)
    return {"x": -g * target, "target": -g * x}


class SquaredHinge(NamedTuple):
    """missing: what is missing to the margin where something is, 0 elsewhere, of the shape of x."""

    x: Array
    target: Array
    missing: Array
    reduction: str


def squared_hinge_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, SquaredHinge]:
    """l = max(1 - target x, 0)^2, target -1 or 1. Shapes: x, target and l are equal."""
    missing = positive_part(1.0 - target * x)
    return reduce_loss(missing * missing, reduction), SquaredHinge(x, target, missing, reduction)


def squared_hinge_backward(dout: Array, kept: SquaredHinge) -> Gradients:
    """dx = -2 g max(1 - target x, 0) target, dtarget = -2 g max(1 - target x, 0) x."""
    x, target = kept.x, kept.target
    g = 2.0 * spread_cotangent(dout, x.shape, kept.reduction) * kept.missing
    return {"x": -g * target, "target": -g * x}


class Labelled(NamedTuple):
    """The labels, and what is missing to the margin, of one shape."""

    target: Array
    missing: Array
    reduction: str
    at_margin: float


def hinge_embedding_forward(
    x: Array, target: Array, *, margin: float, reduction: str, at_margin: float = 0.0
) -> tuple[Array, Labelled]:
    """l = x where the label is 1, max(margin - x, 0) where it is -1. Shapes: x, target and l are equal."""
    missing = margin - x
    loss = np.where(target == 1, x, positive_part(missing))
    return reduce_loss(loss, reduction), Labelled(target, missing, reduction, at_margin)


def hinge_embedding_backward(dout: Array, kept: Labelled) -> Gradients:
    """dx = g where the label is 1; where it is -1, -g below the margin, 0 above, at it any number between."""
    g = spread_cotangent(dout, kept.missing.shape, kept.reduction)
    return {"x": g * np.where(kept.target == 1, 1.0, -active(kept.missing, 1.0 - kept.at_margin))}


class SoftMargin(NamedTuple):
    """against: -target x."""

    target: Array
    against: Array
    reduction: str


def soft_margin_forward(x: Array, target: Array, *, reduction: str) -> tuple[Array, SoftMargin]:
    """l = log(1 + exp(-target x)), target -1 or 1, and constant. Shapes: x, target and l are equal."""
    against = -target * x
    return reduce_loss(log_one_plus_exp(against), reduction), SoftMargin(target, against, reduction)


def soft_margin_backward(dout: Array, kept: SoftMargin) -> Gradients:
    """dx = -g target / (1 + exp(target x))."""
    g = spread_cotangent(dout, kept.target.shape, kept.reduction)
    return {"x": -g * kept.target * logistic(kept.against)}


class Rivals(NamedTuple):
    """chosen: whether a class is the target; missing: of each class, both (..., C). factor: weight_t / C."""

    chosen: Array
    missing: Array
    factor: Array | float
    p: int
    reduction: str
    at_margin: float


def multi_margin_forward(
    x: Array,
    target: Array,
    weight: Array | None = None,
    *,
    p: int,
    margin: float,
    reduction: str,
    at_margin: float = 0.0,
) -> tuple[Array, Rivals]:
    """l = sum over k != t of weight_t max(margin - x_t + x_k, 0)^p / C, t the target class (Weston and Watkins 1999).

    Shapes: x (..., C), target and l (...), weight (C,).
    """
    chosen = np.arange(x.shape[-1]) == target[..., None]
    own = np.take_along_axis(x, target[..., None], axis=-1)
    missing = margin - own + x
    factor = (1.0 if weight is None else weight[target][..., None]) / x.shape[-1]
    lost = np.where(chosen, 0.0, positive_part(missing))
    loss = (factor * (lost if p == 1 else lost * lost)).sum(axis=-1)
    return reduce_loss(loss, reduction), Rivals(chosen, missing, factor, p, reduction, at_margin)


def multi_margin_backward(dout: Array, kept: Rivals) -> Gradients:
    """dx_k = g weight_t p max(z_k, 0)^(p - 1) / C; dx_t is minus the sum of all those. p = 1, z_k = 0: any share."""
    z = kept.missing
    g = spread_cotangent(dout, z.shape[:-1], kept.reduction)[..., None]
    slope = active(z, kept.at_margin) if kept.p == 1 else 2.0 * positive_part(z)
    others = np.where(kept.chosen, 0.0, g * kept.factor * slope)
    return {"x": np.where(kept.chosen, -others.sum(axis=-1, keepdims=True), others)}


class Pairs(NamedTuple):
    """Of every class listed in the target and every class k, (..., C, C).

    is_entry: whether k is the listed one. pairs: whether k is no target class. missing: z of the two.
    """

    is_entry: Array
    pairs: Array
    missing: Array
    reduction: str
    at_margin: float


def multilabel_margin_forward(
    x: Array, target: Array, *, reduction: str, at_margin: float = 0.0
) -> tuple[Array, Pairs]:
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
    return reduce_loss(loss, reduction), Pairs(is_entry, pairs, missing, reduction, at_margin)


def multilabel_margin_backward(dout: Array, kept: Pairs) -> Gradients:
    """Every pair (j, k) with z > 0 adds g / C to dx_k and takes it from dx_j; at z = 0 any share of it."""
    z = kept.missing
    g = spread_cotangent(dout, z.shape[:-2], kept.reduction)[..., None, None]
    others = np.where(kept.pairs, g * active(z, kept.at_margin) / z.shape[-1], 0.0)
    own = np.where(kept.is_entry, others.sum(axis=-1, keepdims=True), 0.0)
    return {"x": (others - own).sum(axis=-2)}


class Labels(NamedTuple):
    """x and target (..., C). factor: weight / C, for every class or one for all."""

    x: Array
    target: Array
    factor: Array | float
    reduction: str


def multilabel_soft_margin_forward(
    x: Array, target: Array, weight: Array | None = None, *, reduction: str
) -> tuple[Array, Labels]:
    """l = sum_c weight_c (log(1 + exp(x_c)) - target_c x_c) / C: the mean of each class's bce_with_logits.

    Shapes: x and target (..., C), l (...), weight (C,).
    """
    factor = (1.0 if weight is None else weight) / x.shape[-1]
    loss = (factor * (log_one_plus_exp(x) - target * x)).sum(axis=-1)
    return reduce_loss(loss, reduction), Labels(x, target, factor, reduction)


def multilabel_soft_margin_backward(dout: Array, kept: Labels) -> Gradients:
    """dx_c = g weight_c (sigmoid(x_c) - target_c) / C, dtarget_c = -g weight_c x_c / C."""
    x = kept.x
    weighted_g = kept.factor * spread_cotangent(dout, x.shape[:-1], kept.reduction)[..., None]
    return {"x": weighted_g * (logistic(x) - kept.target), "target": -weighted_g * x}


def margin_ranking_forward(
    x1: Array, x2: Array, target: Array, *, margin: float, reduction: str, at_margin: float = 0.0
) -> tuple[Array, Labelled]:
    """l = max(margin - target (x1 - x2), 0), target a label: 1 ranks x1 higher, -1 lower. Shapes: all are equal."""
    missing = margin - target * (x1 - x2)
    return reduce_loss(positive_part(missing), reduction), Labelled(target, missing, reduction, at_margin)


def margin_ranking_backward(dout: Array, kept: Labelled) -> Gradients:
    """dx1 = -g target where something is missing, 0 elsewhere, dx2 = -dx1. At z = 0: any share of it."""
    g = spread_cotangent(dout, kept.missing.shape, kept.reduction)
    dx1 = -g * kept.target * active(kept.missing, kept.at_margin)
    return {"x1": dx1, "x2": -dx1}


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


def _sign(shape: Shape, options: Options) -> Domain:
    return SIGN


def _constant_sign(shape: Shape, options: Options) -> Domain:
    return Domain("sign", constant=True)


def label(shape: Shape, options: Options) -> Domain:
    return LABEL


def _class(shape: Shape, options: Options) -> Domain:
    return index_domain(shape[-1])


def _class_list(shape: Shape, options: Options) -> Domain:
    return Domain("index", shape[-1], extra=(-1,))


def _class_weight(shape: Shape, options: Options) -> Domain:
    return Domain("positive", constant=True)


def one_per_row(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return (shape[:-1],)


def _one_per_class(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return (shape[-1:],)


def _no_margin(shape: Shape, options: Options) -> bool:
    return not options["margin"]


def _rivals_without_margin(shape: Shape, options: Options) -> bool:
    return options["p"] == 1 and not options["margin"] and shape[-1] > 1


def _row_of_three(shape: Shape, options: Options) -> bool:
    return shape == (3,)


ANY_MARGIN = Real(-1e3, 1e3, (0.0, 1.0, 0.5))
ONE_MARGIN = Option("margin", Real(-1e3, 1e3, (1.0, 0.5, 0.0)), 1.0)

WEIGHT = Argument("weight", _class_weight, _one_per_class, when=weighted)
SIGNED = (Argument("x"), Argument("target", _sign, same_shape))
CONSTANTLY_SIGNED = (Argument("x"), Argument("target", _constant_sign, same_shape))
LABELLED = (Argument("x"), Argument("target", label, same_shape))
CLASSIFIED = (Argument("x"), Argument("target", _class, one_per_row), WEIGHT)
LISTED = (Argument("x"), Argument("target", _class_list, same_shape))
MULTILABELLED = (Argument("x"), Argument("target", unit, same_shape), WEIGHT)
RANKED = (Argument("x1"), Argument("x2", real, same_shape), Argument("target", label, same_shape))

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


def row_loss(
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
    row_loss(
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
    row_loss(
        "multilabel_margin",
        multilabel_margin_forward,
        multilabel_margin_backward,
        LISTED,
        ranks=(1, 2),
        shapes=CLASSES,
        kinks=(Kink("at_margin", point={"x": [1.0, 0.0, 0.0]}, default=0.0, shape=(3,), when=_row_of_three),),
    ),
    row_loss(
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
)
