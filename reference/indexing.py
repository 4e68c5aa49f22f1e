"""Layers that pick elements: by given indices, by position, or by rank.

Legend: N bags, L indices in a bag, R rows of a table, D its width, n the length of the axis concerned.
What is picked several times gets the sum of the cotangents; what is not picked gets 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from gradproof.model.layer import MASK, Argument, Domain, Layer, ShapeError, index_domain, same_shape
from gradproof.model.options import (
    MAX_RANK,
    Axis,
    Choice,
    Integer,
    Option,
    Options,
    OptionValue,
    Shape,
    Size,
    is_integer,
)
from gradproof.reference.common import Array, Gradients, tie_shares, unbroadcast
from gradproof.reference.merges import broadcast_partners, broadcast_shape

Places = tuple[Array, ...]
"""An index array per axis."""


class Picked(NamedTuple):
    """What an embedding keeps: indices (...) of rows of a weight (R, D)."""

    indices: Array
    weight_shape: Shape
    padding_idx: int


def embedding_forward(indices: Array, weight: Array, *, padding_idx: int) -> tuple[Array, Picked]:
    """out = the rows of the table that the indices name. Shapes: indices (...), weight (R, D), out (..., D)."""
    return weight[indices], Picked(indices, weight.shape, padding_idx)


def embedding_backward(dout: Array, kept: Picked) -> Gradients:
    """dweight_r = the sum of dout where r was picked; 0 for the row padding_idx, which is held constant."""
    trained = np.where((kept.indices == kept.padding_idx)[..., None], 0.0, dout)
    return {"weight": _summed_at(kept.indices, trained, kept.weight_shape)}


class Bags(NamedTuple):
    """What bags keep: indices (N, L), the rows that they name (N, L, D), and of each its share in the bag's sum.

    Shapes: shares (N, L, 1) or (N, L, D), factors too: these times the weights per sample, where it is weighted.
    """

    indices: Array
    rows: Array
    shares: Array
    factors: Array
    weight_shape: Shape
    weighted: bool


def embedding_bag_forward(
    indices: Array, weight: Array, per_sample_weights: Array | None = None, *, mode: str, padding_idx: int
) -> tuple[Array, Bags]:
    """out = the sum, mean or maximum of the rows in each bag but for those at padding_idx; 0 for a bag of these alone.

    Shapes: indices (N, L), weight (R, D), per_sample_weights (N, L) to multiply the rows by, out (N, D).
    """
    rows, counted = weight[indices], (indices != padding_idx)[..., None]
    if mode == "max":
        candidates = np.where(counted, rows.real, -np.inf)
        shares = np.where(counted, tie_shares(candidates == candidates.max(axis=1, keepdims=True), 1, 0.0), 0.0)
    else:
        share = 1.0 / np.maximum(counted.sum(axis=1, keepdims=True), 1) if mode == "mean" else 1.0
        shares = np.where(counted, share, 0.0)
    factors = shares if per_sample_weights is None else shares * per_sample_weights[..., None]
    kept = Bags(indices, rows, shares, factors, weight.shape, per_sample_weights is not None)
    return (factors * rows).sum(axis=1), kept


def embedding_bag_backward(dout: Array, kept: Bags) -> Gradients:
    """dweight_r = the sum of dout times the share of r, wherever it was picked, and times its own weight there.

    The share is 1 in a sum, one by the bag's length in a mean, and 1 for the largest alone (of equal ones the first).
    dper_sample_weights = dout times the share times the row, summed over D.
    """
    g = dout[:, None]
    gradients = {"weight": _summed_at(kept.indices, g * kept.factors, kept.weight_shape)}
    return gradients | ({"per_sample_weights": (g * kept.shares * kept.rows).sum(axis=-1)} if kept.weighted else {})


class Gathered(NamedTuple):
    """What a gather keeps; the indices and x_shape broadcast, but for the axis."""

    indices: Array
    x_shape: Shape
    axis: int


def gather_forward(x: Array, indices: Array, *, axis: int) -> tuple[Array, Gathered]:
    """out_i = x at indices_i along the axis. Shapes: x and indices broadcast, but for the axis; same rank."""
    return np.take_along_axis(x, indices, axis), Gathered(indices, x.shape, axis)


def gather_backward(dout: Array, kept: Gathered) -> Gradients:
    """dx_j = the sum of dout where j was picked."""
    places = _along(kept.indices, kept.x_shape, kept.axis)
    return {"x": _summed_at(places, dout, kept.x_shape)}


def scatter_add_forward(x: Array, indices: Array, source: Array, *, axis: int) -> tuple[Array, Places]:
    """out = x, and each element of the source added to it at its index along the axis.

    Shapes: x and out are equal, indices and source too, and these are no longer than x but for the axis.
    """
    places = _along(indices, indices.shape, axis)
    return x + _summed_at(places, source, x.shape), places


def scatter_add_backward(dout: Array, places: Places) -> Gradients:
    """dx = dout; dsource = dout where each element went."""
    return {"x": dout, "source": dout[places]}


def _along(indices: Array, shape: Shape, axis: int) -> Places:
    """The places that the indices name along the axis of an array; on the other axes, all of this shape."""
    places = list(np.indices(shape, sparse=True))
    places[axis] = indices
    return tuple(places)


def _summed_at(places: Array | Places, values: Array, shape: Shape) -> Array:
    """Zeros of the shape, with each of the values added where its place is."""
    summed = np.zeros_like(values, shape=shape)
    np.add.at(summed, places, values)
    return summed


class Chosen(NamedTuple):
    """What a choice keeps: where a was chosen."""

    chosen: Array
    a_shape: Shape
    b_shape: Shape


def where_forward(a: Array, b: Array, condition: Array) -> tuple[Array, Chosen]:
    """out = a where the condition is 1, b where it is 0. Shapes: all three broadcast to out."""
    chosen = condition == 1
    return np.where(chosen, a, b), Chosen(chosen, a.shape, b.shape)


def where_backward(dout: Array, kept: Chosen) -> Gradients:
    """da = dout where the condition is 1, db = dout where it is 0, each summed where it was broadcast."""
    da, db = np.where(kept.chosen, dout, 0.0), np.where(kept.chosen, 0.0, dout)
    return {"a": unbroadcast(da, kept.a_shape), "b": unbroadcast(db, kept.b_shape)}


class Taken(NamedTuple):
    """From which places along an axis of x the elements of out were taken."""

    places: Array
    x_shape: Shape
    axis: int


def slice_forward(x: Array, *, axis: int, start: int, stop: int, step: int) -> tuple[Array, Taken]:
    """out = every step-th element along the axis from start to stop (excluded), as in Python's x[start:stop:step]."""
    return _taken(x, np.arange(x.shape[axis])[start:stop:step], axis)


def split_forward(x: Array, *, axis: int, parts: int, index: int) -> tuple[Array, Taken]:
    """out = the part at that index of so many parts along the axis, n mod parts of which are longer by one, first."""
    return _taken(x, np.array_split(np.arange(x.shape[axis]), parts)[index], axis)


def _taken(x: Array, places: Array, axis: int) -> tuple[Array, Taken]:
    return np.take(x, places, axis), Taken(places, x.shape, axis)


def taken_backward(dout: Array, kept: Taken) -> Gradients:
    """dx = dout at the places that were taken, 0 elsewhere."""
    dx = np.zeros_like(dout, shape=kept.x_shape)
    dx.swapaxes(0, kept.axis)[kept.places] = dout.swapaxes(0, kept.axis)
    return {"x": dx}


def sort_forward(x: Array, *, axis: int, descending: bool) -> tuple[Array, Taken]:
    """out = x sorted along the axis, equal elements in their order."""
    return top_k_forward(x, k=x.shape[axis], axis=axis, largest=descending)


def top_k_forward(x: Array, *, k: int, axis: int, largest: bool) -> tuple[Array, Taken]:
    """out = the k largest along the axis, largest first, or the k smallest, smallest first; of equal ones, the first.

    Shapes: x (..., n, ...), out (..., k, ...).
    """
    order = _descending(x.real, axis) if largest else np.argsort(x.real, axis=axis, kind="stable")
    places = np.take(order, np.arange(k), axis)
    return np.take_along_axis(x, places, axis), Taken(places, x.shape, axis)


def _descending(x: Array, axis: int) -> Array:
    """The stable order from the largest to the smallest; NaN, as in frameworks, counts as the largest."""
    ascending = np.argsort(np.flip(x, axis), axis=axis, kind="stable")
    return x.shape[axis] - 1 - np.flip(ascending, axis)


def ranked_backward(dout: Array, kept: Taken) -> Gradients:
    """dx = dout where each element of out came from, 0 for elements that are not in out."""
    dx = np.zeros_like(dout, shape=kept.x_shape)
    np.put_along_axis(dx, kept.places, dout, kept.axis)
    return {"x": dx}


@dataclass(frozen=True)
class Position:
    """A place along an axis, counted from the front or, negative, from the back."""

    examples: tuple[int, ...]

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value)  # which are inside depends on the axis

    def describe(self, shape: Shape) -> str:
        return "an integer, counted from the front or, negative, from the back"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return self.examples


@dataclass(frozen=True)
class Step:
    """How far to go from one element to the next: forwards or, negative, backwards."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value) and value != 0

    def describe(self, shape: Shape) -> str:
        return "an integer other than 0"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return (1, 2, -1, -2)


def _embedding_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    rows, padding = int(options["rows"]), int(options["padding_idx"])  # type: ignore[arg-type]
    if padding >= rows:
        raise ShapeError(f"padding_idx is {padding}, and the table's last row is {rows - 1}")
    return (*shapes[0], int(options["width"]))  # type: ignore[arg-type]


def _embedding_bag_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    *_, width = _embedding_shape(shapes, options)
    bags, length = shapes[0]
    if length == 0:
        raise ShapeError(f"cannot take bags without indices, of shape {list(shapes[0])}")
    if options["weighted"] and options["mode"] != "sum":
        raise ShapeError(f"only a sum can be weighted, not mode={options['mode']!r}")
    if options["weighted"] and shapes[1] != shapes[0]:
        raise ShapeError(f"per_sample_weights must have the indices' shape {list(shapes[0])}, got {list(shapes[1])}")
    return (bags, width)


def _table(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    return {"weight": (int(options["rows"]), int(options["width"]))}  # type: ignore[arg-type]


def _rows_domain(shape: Shape, options: Options) -> Domain:
    return index_domain(int(options["rows"]))  # type: ignore[arg-type]


def _axis(options: Options, shape: Shape) -> int:
    return int(options["axis"]) % len(shape)  # type: ignore[arg-type]


def _resized(shape: Shape, options: Options, size: int) -> Shape:
    """The shape with another length of the axis."""
    axis = _axis(options, shape)
    return (*shape[:axis], size, *shape[axis + 1 :])


def _along_axis_domain(shape: Shape, options: Options) -> Domain:
    return index_domain(shape[_axis(options, shape)])


def _gather_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x, indices = shapes
    if len(indices) != len(x):
        raise ShapeError(f"its indices must have as many axes as its input of shape {list(x)}, got {list(indices)}")
    try:
        others = np.broadcast_shapes(_resized(x, options, 1), _resized(indices, options, 1))
    except ValueError:
        raise ShapeError(
            f"indices of shape {list(indices)} do not broadcast to an input of shape {list(x)} beside the axis "
            f"{options['axis']}"
        ) from None
    return _resized(others, options, indices[_axis(options, indices)])


def _gather_partners(shape: Shape, options: Options) -> tuple[Shape, ...]:
    """More and fewer indices than elements, the same for all along the other axes, and more than these."""
    size = shape[_axis(options, shape)]
    same_for_all = _resized((1,) * len(shape), options, 2)
    stretched = _resized(tuple(2 if each == 1 else each for each in shape), options, 2)
    resized = (_resized(shape, options, length) for length in (1, size + 2))
    return tuple(dict.fromkeys((shape, *resized, same_for_all, stretched)))


def _scatter_add_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x, indices, source = shapes
    if source != indices:
        raise ShapeError(f"its source must have the indices' shape {list(indices)}, got {list(source)}")
    axis = _axis(options, x)
    if len(indices) != len(x) or any(i != axis and indices[i] > x[i] for i in range(len(x))):
        raise ShapeError(
            f"indices of shape {list(indices)} must be no longer than an input of shape {list(x)}, but for axis {axis}"
        )
    return x


def _scattered(shape: Shape, options: Options) -> tuple[Shape, ...]:
    """Along the axis, at least as many elements as places, so that they meet; one less along the other long axes."""
    shorter = tuple(size - 1 if size > 2 else size for size in shape)
    return (_resized(shorter, options, max(shape[_axis(options, shape)], 3)),)


def _mask(shape: Shape, options: Options) -> Domain:
    return MASK


def _condition_shapes(shape: Shape, options: Options) -> tuple[Shape, ...]:
    """The first input's shape, one for all, and one per row."""
    return tuple(dict.fromkeys((shape, (), (*shape[:-1], 1)[: len(shape)])))


def _slice_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    start, stop, step = (int(options[each]) for each in ("start", "stop", "step"))  # type: ignore[arg-type]
    size = shapes[0][_axis(options, shapes[0])]
    if not (-size <= start < size and -size - 1 <= stop <= size):
        raise ShapeError(f"cannot slice from {start} to {stop} along an axis of length {size}")
    length = len(range(size)[start:stop:step])
    if length == 0:
        raise ShapeError(f"nothing lies from {start} to {stop} in steps of {step} along an axis of length {size}")
    return _resized(shapes[0], options, length)


def _split_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    parts, index = int(options["parts"]), int(options["index"])  # type: ignore[arg-type]
    size = shapes[0][_axis(options, shapes[0])]
    if not index < parts <= size:
        raise ShapeError(f"there is no part {index} of {parts} parts, none empty, of an axis of length {size}")
    return _resized(shapes[0], options, size // parts + (index < size % parts))


def _top_k_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    k, size = int(options["k"]), shapes[0][_axis(options, shapes[0])]  # type: ignore[arg-type]
    if k > size:
        raise ShapeError(f"there are no {k} elements along an axis of length {size}")
    return _resized(shapes[0], options, k)


AXIS = Option("axis", Axis(), -1)
TABLE = (Option("rows", Integer(1, (5, 1, 3)), structural=True), Option("width", Size(), structural=True))
PADDING = Option("padding_idx", Integer(-1, (-1, 0, 2)), -1)
"""-1 where no row is for padding."""

BAGS = (
    *TABLE,
    Option("mode", Choice(("mean", "sum", "max")), "mean"),
    PADDING,
    Option("weighted", Choice((False, True)), False, structural=True),
)
POSITIONS = (
    AXIS,
    Option("start", Position((0, 1, -1, -2)), 0),
    Option("stop", Position((1, 3, -1, -4))),
    Option("step", Step(), 1),
)
PARTS = (Option("parts", Integer(1, (1, 2, 3))), Option("index", Integer(0, (0, 1, 2))), AXIS)

LONG = ((2, 3), (5,), (3, 5), (1,), (3, 2, 3), (8,))
"""Shapes with something to choose from along most axes."""

of_indices = partial(Layer, kind="layer", family="indexing")

LAYERS = (
    of_indices(
        "embedding",
        forward=embedding_forward,
        backward=embedding_backward,
        options=(*TABLE, PADDING),
        arguments=(Argument("indices", _rows_domain),),
        ranks=(0, MAX_RANK - 1),
        shapes=((2, 3), (4,), (1,), (2, 1, 3), ()),
        output_shape=_embedding_shape,
        parameters=_table,
    ),
    of_indices(
        "embedding_bag",
        forward=embedding_bag_forward,
        backward=embedding_bag_backward,
        options=BAGS,
        arguments=(
            Argument("indices", _rows_domain),
            Argument("per_sample_weights", shapes=same_shape, when=lambda options: bool(options["weighted"])),
        ),
        ranks=(2, 2),
        shapes=((2, 3), (3, 5), (2, 1)),
        output_shape=_embedding_bag_shape,
        parameters=_table,
    ),
    of_indices(
        "gather",
        forward=gather_forward,
        backward=gather_backward,
        options=(AXIS,),
        arguments=(Argument("x"), Argument("indices", _along_axis_domain, _gather_partners)),
        ranks=(1, MAX_RANK),
        output_shape=_gather_shape,
    ),
    of_indices(
        "scatter_add",
        forward=scatter_add_forward,
        backward=scatter_add_backward,
        options=(AXIS,),
        arguments=(
            Argument("x"),
            Argument("indices", _along_axis_domain, _scattered),
            Argument("source", shapes=_scattered),
        ),
        ranks=(1, MAX_RANK),
        output_shape=_scatter_add_shape,
    ),
    of_indices(
        "where",
        forward=where_forward,
        backward=where_backward,
        arguments=(
            Argument("a"),
            Argument("b", shapes=broadcast_partners),
            Argument("condition", _mask, _condition_shapes),
        ),
        output_shape=broadcast_shape,
    ),
    of_indices(
        "slice",
        forward=slice_forward,
        backward=taken_backward,
        options=POSITIONS,
        ranks=(1, MAX_RANK),
        output_shape=_slice_shape,
    ),
    of_indices(
        "split",
        forward=split_forward,
        backward=taken_backward,
        options=PARTS,
        ranks=(1, MAX_RANK),
        shapes=LONG,
        output_shape=_split_shape,
    ),
    of_indices(
        "sort",
        forward=sort_forward,
        backward=ranked_backward,
        options=(AXIS, Option("descending", Choice((False, True)), False)),
        ranks=(1, MAX_RANK),
        shapes=LONG,
        by_order=True,
    ),
    of_indices(
        "top_k",
        forward=top_k_forward,
        backward=ranked_backward,
        options=(Option("k", Integer(1, (1, 2, 3))), AXIS, Option("largest", Choice((True, False)), True)),
        ranks=(1, MAX_RANK),
        shapes=LONG,
        output_shape=_top_k_shape,
        by_order=True,
    ),
)
