"""Reductions over any of the axes, and cumulative sums.

Legend: A the axes reduced over; slice: the elements that become one, those that differ along A alone; n their number.
Shapes: out is x without the axes A, or with size 1 in their place (keepdims).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from gradproof.model.layer import Kink, Layer, ShapeError
from gradproof.model.options import MAX_RANK, Axes, Axis, Choice, Option, Options, Shape
from gradproof.reference.common import Array, Gradients, magnitude, one_sided, tie_shares


class Where(NamedTuple):
    """The shape of x, and A in ascending order."""

    shape: Shape
    axes: tuple[int, ...]


def located(x: Array, axes: tuple[int, ...]) -> Where:
    return Where(x.shape, tuple(sorted(axis % x.ndim for axis in axes)))


def count(where: Where) -> int:
    """n."""
    return math.prod(where.shape[axis] for axis in where.axes)


def expanded(dout: Array, where: Where) -> Array:
    """dout with size 1 in the place of the axes A, so that it broadcasts against x."""
    return dout.reshape([1 if axis in where.axes else size for axis, size in enumerate(where.shape)])


def squeezed(out: Array, where: Where, keepdims: bool) -> Array:
    """out as the caller wants it: with size 1 in the place of the axes A, or without them."""
    return expanded(out, where) if keepdims else out.reshape(_without(where))


def gathered(x: Array, where: Where) -> Array:
    """x with the axes A last and made one. Shapes: out (..., n)."""
    return x.transpose(_axes_last(where)).reshape(*_without(where), count(where))


def scattered(slices: Array, where: Where) -> Array:
    """The inverse of `gathered`."""
    apart = slices.reshape(*_without(where), *(where.shape[axis] for axis in where.axes))
    return apart.transpose(tuple(np.argsort(_axes_last(where))))


def _without(where: Where) -> Shape:
    return tuple(size for axis, size in enumerate(where.shape) if axis not in where.axes)


def _axes_last(where: Where) -> tuple[int, ...]:
    return (*(axis for axis in range(len(where.shape)) if axis not in where.axes), *where.axes)


def reduce_sum_forward(x: Array, *, axes: tuple[int, ...], keepdims: bool) -> tuple[Array, Where]:
    """out = sum of a slice; 0 where it has no elements."""
    return x.sum(axis=axes, keepdims=keepdims), located(x, axes)


def reduce_sum_backward(dout: Array, where: Where) -> Gradients:
    """dx = dout, for every element of the slice."""
    return {"x": np.broadcast_to(expanded(dout, where), where.shape)}


def reduce_mean_forward(x: Array, *, axes: tuple[int, ...], keepdims: bool) -> tuple[Array, Where]:
    """out = sum of a slice / n."""
    where = located(x, axes)
    return x.sum(axis=axes, keepdims=keepdims) / count(where), where


def reduce_mean_backward(dout: Array, where: Where) -> Gradients:
    """dx = dout / n, for every element of the slice."""
    return {"x": np.broadcast_to(expanded(dout, where) / count(where), where.shape)}


class Largest(NamedTuple):
    """largest: which elements of a slice are, (..., n); at_tie: who of several takes the gradient."""

    largest: Array
    where: Where
    at_tie: float


def reduce_max_forward(
    x: Array, *, axes: tuple[int, ...], keepdims: bool, at_tie: float = 0.5
) -> tuple[Array, Largest]:
    """out = the largest of a slice."""
    where = located(x, axes)
    slices = gathered(x, where)
    largest = np.take_along_axis(slices, np.argmax(slices.real, axis=-1, keepdims=True), axis=-1)
    return squeezed(largest, where, keepdims), Largest(slices.real == largest.real, where, at_tie)


def reduce_max_backward(dout: Array, kept: Largest) -> Gradients:
    """dx = dout for the largest of the slice, 0 for the others.

    Where several are largest: any shares that add up to 1. With the weight 0 the first of them takes it all, with 1
    the last; by default all take as much.
    """
    where = kept.where
    return {"x": expanded(dout, where) * scattered(tie_shares(kept.largest, -1, kept.at_tie), where)}


def reduce_min_forward(
    x: Array, *, axes: tuple[int, ...], keepdims: bool, at_tie: float = 0.5
) -> tuple[Array, Largest]:
    """out = the smallest of a slice: min x = -max(-x), whose derivative is that of max at -x.

    A weight counts from the other end, as it does from left to right: with 0 the last of several smallest takes it
    all, with 1 the first.
    """
    negated, kept = reduce_max_forward(-x, axes=axes, keepdims=keepdims, at_tie=1.0 - at_tie)
    return -negated, kept


def reduce_prod_forward(
    x: Array, *, axes: tuple[int, ...], keepdims: bool
) -> tuple[Array, tuple[list[tuple[Array, int]], Where]]:
    """out = product of a slice: of neighbours first, then of neighbouring products, up to the last one.

    Kept: the factors of every level, in pairs, and how many there were before a 1 completed the last pair.
    """
    where = located(x, axes)
    factors, levels = gathered(x, where), []
    while factors.shape[-1] > 1:
        size = factors.shape[-1]
        if size % 2:
            factors = np.concatenate([factors, np.ones_like(factors[..., :1])], axis=-1)
        levels.append((factors.reshape(*factors.shape[:-1], -1, 2), size))
        factors = factors[..., 0::2] * factors[..., 1::2]
    return squeezed(factors.copy(), where, keepdims), (levels, where)


def reduce_prod_backward(dout: Array, cache: tuple[list[tuple[Array, int]], Where]) -> Gradients:
    """dx_i = dout times the product of all others, which is not out / x_i where x_i = 0.

    From the last level down, each factor of a pair gets what the pair got, times the other factor.
    """
    levels, where = cache
    dfactors = dout.reshape(*_without(where), 1)
    for pairs, size in reversed(levels):
        both = dfactors[..., None] * np.flip(pairs, axis=-1)
        dfactors = both.reshape(*both.shape[:-2], -1)[..., :size]
    return {"x": scattered(dfactors, where)}


def deviations(x: Array, axes: tuple[int, ...]) -> Array:
    """x - m, m the mean of its slice and what rounding took from it: 0 where all of a slice are equal.

    That is measured on a mean of its own, so that the noise floor still holds the rounding of a mean.
    """
    lost = (x - x.mean(axis=axes, keepdims=True)).mean(axis=axes, keepdims=True)
    return x - (x.mean(axis=axes, keepdims=True) + lost)


class Variance(NamedTuple):
    """centred: x - m. divisor: n - ddof."""

    centred: Array
    divisor: int
    where: Where


def reduce_var_forward(x: Array, *, axes: tuple[int, ...], ddof: int, keepdims: bool) -> tuple[Array, Variance]:
    """out = sum of (x - m)^2 over a slice / (n - ddof), m its mean."""
    where = located(x, axes)
    centred = deviations(x, axes)
    divisor = count(where) - ddof
    return (centred * centred).sum(axis=axes, keepdims=keepdims) / divisor, Variance(centred, divisor, where)


def reduce_var_backward(dout: Array, kept: Variance) -> Gradients:
    """dx = dout 2 (x - m) / (n - ddof); that m depends on x adds nothing, for the deviations from it sum to 0."""
    return {"x": expanded(dout, kept.where) * (2.0 / kept.divisor) * kept.centred}


def scaled(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """(x / s, s), s the largest magnitude of the slice: powers of the quotient neither overflow nor vanish.

    A slice of zeros is divided by 1.
    """
    peak = magnitude(x).real.max(axis=axes, keepdims=True)
    peak = np.where(peak == 0, 1.0, peak)
    return x / peak, peak


class Deviation(NamedTuple):
    """z = (x - m) / s, shaped as x; root: out / s, shaped as s; divisor: n - ddof."""

    z: Array
    root: Array
    divisor: int
    where: Where


def reduce_std_forward(x: Array, *, axes: tuple[int, ...], ddof: int, keepdims: bool) -> tuple[Array, Deviation]:
    """out = sqrt(sum of (x - m)^2 over a slice / (n - ddof)), m its mean; squares are taken of z = (x - m) / s."""
    where = located(x, axes)
    divisor = count(where) - ddof
    z, s = scaled(deviations(x, axes), axes)
    root = np.sqrt((z * z).sum(axis=axes, keepdims=True) / divisor)
    return squeezed(s * root, where, keepdims), Deviation(z, root, divisor, where)


def reduce_std_backward(dout: Array, kept: Deviation) -> Gradients:
    """dx = dout z / ((n - ddof) (out / s)): dout (x - m) / ((n - ddof) out), for s is in both.

    Where all of a slice are equal: by choice 0, which is a subgradient.
    """
    root = np.where(kept.root == 0, 1.0, kept.root)
    return {"x": expanded(dout, kept.where) * kept.z / (kept.divisor * root)}


class Norm(NamedTuple):
    """slope: sign(x) for p = 1 and inf, else z |z|^(p - 2), shaped as x.

    root: for other p the norm of z, shaped as s. largest: for p = inf what the maximum of |x| keeps.
    """

    p: float
    slope: Array
    where: Where
    root: Array | None = None
    largest: Largest | None = None


def reduce_norm_forward(
    x: Array,
    *,
    p: float,
    axes: tuple[int, ...],
    keepdims: bool,
    at_zero: float = 0.5,
    at_zero_slice: float = 0.5,
    at_tie: float = 0.5,
) -> tuple[Array, Norm]:
    """out = (sum of |x|^p over a slice)^(1/p), or the largest |x| for p = inf; powers are taken of z = x / s."""
    where = located(x, axes)
    if p == math.inf:
        out, largest = reduce_max_forward(magnitude(x), axes=axes, keepdims=keepdims, at_tie=at_tie)
        return out, Norm(p, one_sided(x, -1.0, 1.0, at_zero_slice), where, largest=largest)
    if p == 1.0:
        return magnitude(x).sum(axis=axes, keepdims=keepdims), Norm(p, one_sided(x, -1.0, 1.0, at_zero), where)
    z, s = scaled(x, axes)
    sizes = magnitude(z)
    powers = (z * z if p == 2.0 else sizes**p).sum(axis=axes, keepdims=True)
    root = np.sqrt(powers) if p == 2.0 else powers ** (1.0 / p)
    slope = z if p == 2.0 else z * sizes ** (p - 2.0)
    return squeezed(s * root, where, keepdims), Norm(p, slope, where, root)


def reduce_norm_backward(dout: Array, kept: Norm) -> Gradients:
    """dx = dout sign(x) (|x| / out)^(p - 1) = dout slope / (out / s)^(p - 1); for p = 1, dout sign(x), and for p = inf
    dout sign(x) for the largest |x|, and 0 for the others.

    Where out = 0, for p above 1: by choice 0, the middle of the subgradients (those whose dual norm is at most 1),
    or, for p = inf, (2 w - 1) / n. For p = 1 any number from -1 to 1 where x = 0. Several largest share as in max.
    """
    p, slope = kept.p, kept.slope
    if kept.largest is not None:
        return {"x": slope * reduce_max_backward(dout, kept.largest)["x"]}
    if kept.root is None:
        return {"x": slope * expanded(dout, kept.where)}
    root = np.where(kept.root == 0, 1.0, kept.root)
    return {"x": expanded(dout, kept.where) * slope / (root if p == 2.0 else root ** (p - 1.0))}


def cumsum_forward(x: Array, *, axis: int, reverse: bool) -> tuple[Array, tuple[int, bool]]:
    """out_i = x_1 + ... + x_i along the axis, or x_i + ... + x_n (reverse). Shapes: x and out are equal."""
    if reverse:
        return np.flip(np.add.accumulate(np.flip(x, axis), axis=axis), axis), (axis, reverse)
    return np.add.accumulate(x, axis=axis), (axis, reverse)


def cumsum_backward(dout: Array, cache: tuple[int, bool]) -> Gradients:
    """dx_j = the sum of dout_i over every i in which x_j is counted: the cumulative sum from the other end."""
    axis, reverse = cache
    dx, _ = cumsum_forward(dout, axis=axis, reverse=not reverse)
    return {"x": dx}


def _reduced_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    shape = shapes[0]
    axes = _positive_axes(shape, options)
    return tuple(
        1 if axis in axes else size for axis, size in enumerate(shape) if options["keepdims"] or axis not in axes
    )


def _shape_of_some(shapes: Sequence[Shape], options: Options) -> Shape:
    """For reductions that need an element."""
    if 0 in (shapes[0][axis] for axis in _positive_axes(shapes[0], options)):
        raise ShapeError(f"an input of shape {list(shapes[0])} has no elements to reduce over axes {options['axes']}")
    return _reduced_shape(shapes, options)


def _shape_of_spread(shapes: Sequence[Shape], options: Options) -> Shape:
    """For reductions that divide by n - ddof."""
    shape = _shape_of_some(shapes, options)
    n = count(Where(shapes[0], _positive_axes(shapes[0], options)))
    if int(options["ddof"]) >= n:  # type: ignore[arg-type]
        raise ShapeError(f"ddof={options['ddof']} needs more elements than the {n} over axes {options['axes']}")
    return shape


def _positive_axes(shape: Shape, options: Options) -> tuple[int, ...]:
    axes = options["axes"]
    assert isinstance(axes, tuple)
    return tuple(axis % len(shape) for axis in axes)


def _absolute(shape: Shape, options: Options) -> bool:
    return options["p"] == 1.0


def _single_absolute(shape: Shape, options: Options) -> bool:
    """A slice of one element: of several zeros, each has a share of the one kink."""
    return options["p"] == math.inf and count(Where(shape, _positive_axes(shape, options))) == 1


AXES = Option("axes", Axes(), (-1,))
KEEPDIMS = Option("keepdims", Choice((False, True)), False)
DDOF = Option("ddof", Choice((0, 1)), 0)
P = Option("p", Choice((2.0, 1.0, 3.0, math.inf)), 2.0)
TIES = (Kink("at_tie", point=0.0, default=0.5, ties=True),)
NORM_KINKS = (
    Kink("at_zero", point=0.0, default=0.5, when=_absolute),
    Kink("at_zero_slice", point=0.0, default=0.5, shape=(2, 1), when=_single_absolute),
    Kink("at_tie", point=1.0, default=0.5, ties=True),
)

reduction = partial(
    Layer, kind="layer", family="reductions", options=(AXES, KEEPDIMS), ranks=(1, MAX_RANK), output_shape=_shape_of_some
)

LAYERS = (
    reduction("reduce_sum", forward=reduce_sum_forward, backward=reduce_sum_backward, output_shape=_reduced_shape),
    reduction("reduce_mean", forward=reduce_mean_forward, backward=reduce_mean_backward),
    reduction("reduce_max", forward=reduce_max_forward, backward=reduce_max_backward, kinks=TIES),
    reduction("reduce_min", forward=reduce_min_forward, backward=reduce_max_backward, kinks=TIES),
    reduction("reduce_prod", forward=reduce_prod_forward, backward=reduce_prod_backward),
    reduction(
        "reduce_var",
        forward=reduce_var_forward,
        backward=reduce_var_backward,
        options=(AXES, DDOF, KEEPDIMS),
        output_shape=_shape_of_spread,
    ),
    reduction(
        "reduce_std",
        forward=reduce_std_forward,
        backward=reduce_std_backward,
        options=(AXES, DDOF, KEEPDIMS),
        output_shape=_shape_of_spread,
    ),
    reduction(
        "reduce_norm",
        forward=reduce_norm_forward,
        backward=reduce_norm_backward,
        options=(P, AXES, KEEPDIMS),
        kinks=NORM_KINKS,
    ),
    Layer(
        "cumsum",
        "layer",
        "reductions",
        cumsum_forward,
        cumsum_backward,
        (Option("axis", Axis(), -1), Option("reverse", Choice((False, True)), False)),
        ranks=(1, MAX_RANK),
    ),
)
