"""Margin losses of distances: between two vectors, or from one to two others.

Legend: as in `margins.py`: l the unreduced loss, g the cotangent of l, z what is missing to the margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gradproof.model.layer import Argument, Kink, same_shape
from gradproof.model.options import Choice, Option, Options, Real, Shape
from gradproof.reference.common import (
    Array,
    Gradients,
    magnitude,
    one_sided,
    positive_part,
    reduce_loss,
    spread_cotangent,
)
from gradproof.reference.losses import real
from gradproof.reference.margins import VECTORS, active, label, one_per_row, row_loss

COSINE_EPS = 9.999999960041972e-13
"""Added to each squared length in `cosine_embedding`, so that zero vectors have a cosine: torch's float32 1e-12."""


def _length(x: Array) -> Array:
    """sqrt(x . x + COSINE_EPS) along the last axis, scaled so that no square overflows."""
    scale = np.maximum(magnitude(x).real.max(axis=-1, keepdims=True), 1.0)
    share, floor = x / scale, math.sqrt(COSINE_EPS) / scale
    return scale * np.sqrt((share * share).sum(axis=-1, keepdims=True) + floor * floor)


class Directions(NamedTuple):
    """The lengths of x1 and x2, (..., 1), their directions x / |x|, (..., D), their cosine and dl / dcos, (...)."""

    length1: Array
    length2: Array
    unit1: Array
    unit2: Array
    cosine: Array
    slope: Array
    reduction: str


def cosine_embedding_forward(
    x1: Array, x2: Array, target: Array, *, margin: float, reduction: str, at_margin: float = 1.0
) -> tuple[Array, Directions]:
    """l = 1 - cos where the label is 1, max(cos - margin, 0) where it is -1, cos = x1 . x2 / (|x1| |x2|).

    Shapes: x1 and x2 (..., D), target and l (...). |x| = sqrt(x . x + 1e-12).
    """
    length1, length2 = _length(x1), _length(x2)
    unit1, unit2 = x1 / length1, x2 / length2
    cosine = (unit1 * unit2).sum(axis=-1)
    loss = np.where(target == 1, 1.0 - cosine, positive_part(cosine - margin))
    slope = np.where(target == 1, -1.0, active(cosine - margin, at_margin))
    return reduce_loss(loss, reduction), Directions(length1, length2, unit1, unit2, cosine, slope, reduction)


def cosine_embedding_backward(dout: Array, kept: Directions) -> Gradients:
    """dcos = -g where the label is 1; where it is -1, g above cos = margin, 0 below, and at it any share of g.

    dx1 = dcos (x2 / |x2| - cos x1 / |x1|) / |x1|, and dx2 with both exchanged.
    """
    unit1, unit2, cosine = kept.unit1, kept.unit2, kept.cosine[..., None]
    dcosine = (spread_cotangent(dout, kept.cosine.shape, kept.reduction) * kept.slope)[..., None]
    return {
        "x1": dcosine * (unit2 - cosine * unit1) / kept.length1,
        "x2": dcosine * (unit1 - cosine * unit2) / kept.length2,
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


Distance = Callable[[Array, Array, float, float], tuple[Array, Array]]


class Slopes(NamedTuple):
    """The derivatives of the distances for their first points, (..., D), weighted where they tie; missing: (..., 1).

    positive: of d(anchor, positive). negative: of d(anchor, negative). swapped: of d(positive, negative).
    """

    positive: Array
    negative: Array
    swapped: Array
    missing: Array
    reduction: str
    at_margin: float


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
    distance: Distance = _distance,
) -> tuple[Array, Slopes]:
    """l = max(margin + d(anchor, positive) - d(anchor, negative), 0), d(a, b) = |a - b + eps|_p.

    Shapes: anchor, positive and negative (..., D), l (...). With swap, the smaller of d(anchor, negative) and
    d(positive, negative) is subtracted (Balntas et al. 2016). distance: what gives d, and its derivative for a, in
    another way.
    """
    to_positive, at_positive = distance(anchor, positive, p, eps)
    to_negative, at_negative = distance(anchor, negative, p, eps)
    at_swapped = np.zeros_like(at_negative)
    if swap:
        swapped, at_swapped = distance(positive, negative, p, eps)
        swapped_share = one_sided(swapped - to_negative, 1.0, 0.0, 0.5)
        at_negative, at_swapped = (1.0 - swapped_share) * at_negative, swapped_share * at_swapped
        to_negative = np.where(swapped.real < to_negative.real, swapped, to_negative)
    missing = margin + to_positive - to_negative
    kept = Slopes(at_positive, at_negative, at_swapped, missing, reduction, at_margin)
    return reduce_loss(positive_part(missing)[..., 0], reduction), kept


def triplet_margin_backward(dout: Array, kept: Slopes) -> Gradients:
    """With d' the derivative of d for its first point (minus that for its second), where nothing is missing 0, else:

    danchor = g (d'(a, p) - d'(a, n)), dpositive = -g d'(a, p), dnegative = g d'(a, n); or, where d(p, n) is smaller,
    danchor = g d'(a, p), dpositive = -g (d'(a, p) + d'(p, n)), dnegative = g d'(p, n). Half of each where they tie.
    At z = 0 any share of it.
    """
    z = kept.missing
    g = spread_cotangent(dout, z.shape[:-1], kept.reduction)[..., None] * active(z, kept.at_margin)
    return {
        "anchor": g * (kept.positive - kept.negative),
        "positive": -g * (kept.positive + kept.swapped),
        "negative": g * (kept.negative + kept.swapped),
    }


def _orthogonal(shape: Shape, options: Options) -> bool:
    return shape == (4,) and not options["margin"]


def _one_apart(shape: Shape, options: Options) -> bool:
    """Where the negative is exactly the margin further away than the positive, in every binary dtype."""
    wanted = {"p": 1.0, "margin": 1.0, "eps": 0.125, "swap": False}
    return shape == (3,) and all(options[name] == value for name, value in wanted.items())


PAIRED = (Argument("x1"), Argument("x2", real, same_shape), Argument("target", label, one_per_row))
TRIPLET = (Argument("anchor"), Argument("positive", real, same_shape), Argument("negative", real, same_shape))

ORTHOGONAL = {"x1": [32.0] * 4, "x2": [1.0, 1.0, -1.0, -1.0]}
"""Whose lengths are powers of 2, so that nothing is rounded, in whatever order it is computed."""

APART = {"anchor": [0.0] * 3, "positive": [-0.875] * 3, "negative": [1.125, 1.125, 2.125]}

LAYERS = (
    row_loss(
        "cosine_embedding",
        cosine_embedding_forward,
        cosine_embedding_backward,
        PAIRED,
        Option("margin", Real(-1.0, 1.0, (0.0, 0.5, -0.25)), 0.0),
        ranks=(1, 2),
        shapes=((2, 3), (3,), (4, 1), (3, 2)),
        kinks=(Kink("at_margin", point=ORTHOGONAL, default=1.0, shape=(4,), when=_orthogonal),),
    ),
    row_loss(
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
