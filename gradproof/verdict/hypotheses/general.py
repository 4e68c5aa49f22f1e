"""Mistakes that any layer may have: of the whole gradient, of the cotangent, of options, at kinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, permutations, product
from typing import Any

import numpy as np

from gradproof.model.tensors import gradient_of
from gradproof.verdict.hypotheses.suspect import Array, Change, Gradients, Guess, Suspect, subsets

# The whole gradient: sign, size, order.


def opposite(suspect: Suspect) -> Iterator[Guess]:
    yield suspect.each(np.negative)


def magnitude(suspect: Suspect) -> Iterator[Guess]:
    yield suspect.each(np.abs)


def zero(suspect: Suspect) -> Iterator[Guess]:
    yield suspect.each(np.zeros_like)


def two(suspect: Suspect) -> Iterator[Guess]:
    yield suspect.each(lambda g: 2.0 * g, "twice")
    yield suspect.each(lambda g: 0.5 * g, "half")


def sizes(suspect: Suspect) -> dict[int, list[str]]:
    """The numbers above 1 that a reduction may divide by -> what they count."""
    x, dout = suspect.first, suspect.dout
    kernel = suspect.node.keywords.get("kernel")
    weight = suspect.arrays.get("weight")
    if kernel is None and suspect.node.layer.family == "convolution" and weight is not None:
        kernel = weight.shape[2:]
    counts = {
        "the elements": x.size,
        "the elements of the output": dout.size,
        "the batch": x.shape[0] if x.ndim else 1,
        "the elements of one sample": math.prod(x.shape[1:]),
        "the features": x.shape[-1] if x.ndim else 1,
        "the rows": math.prod(dout.shape[:-1]),
        "the output's features": dout.shape[-1] if dout.ndim else 1,
        "the spatial size": math.prod(x.shape[2:]),
        "the output's spatial size": math.prod(dout.shape[2:]),
        "the batch times the output's spatial size": dout.size // max(dout.shape[1], 1) if dout.ndim > 2 else 1,
        "the kernel's size": 1 if kernel is None else math.prod(np.atleast_1d(kernel).tolist()),
        "the elements that become one": x.size // max(dout.size, 1),
    }
    for name, gradient in suspect.gradients.items():
        counts[f"the elements that {name} is broadcast to"] = dout.size // max(gradient.size, 1)
    found: dict[int, list[str]] = {}
    for what, count in counts.items():
        if count > 1:
            found.setdefault(count, []).append(what)
    return found


def _counted(what: list[str]) -> str:
    return " or ".join(what[:2])


def times_n(suspect: Suspect) -> Iterator[Guess]:
    for count, what in sizes(suspect).items():
        yield suspect.each(partial(np.multiply, float(count)), f"N = {count}, {_counted(what)}")


def over_n(suspect: Suspect) -> Iterator[Guess]:
    for count, what in sizes(suspect).items():
        yield suspect.each(partial(np.multiply, 1.0 / count), f"N = {count}, {_counted(what)}")


def _ranks(suspect: Suspect) -> range:
    return range(2, 1 + max((g.ndim for g in suspect.gradients.values()), default=0))


def _of_rank(rank: int, transform: Callable[[Array], Array]) -> Change:
    """Transform the gradients with so many axes, and leave the others out."""
    return lambda g, dout, cache: {name: transform(each) for name, each in g.items() if each.ndim == rank}


def _permuted(suspect: Suspect, swaps: bool) -> Iterator[Guess]:
    """Axes in another order, in the shape that this gives and in the right one; swaps: of two axes alone."""
    for rank in _ranks(suspect):
        for axes in permutations(range(rank)):
            moved = [axis for i, axis in enumerate(axes) if i != axis]
            if moved and (len(moved) == 2) == swaps:
                detail = f"axes {', '.join(map(str, moved))}" if rank > 2 else ""
                yield suspect.changed(_of_rank(rank, partial(np.transpose, axes=axes)), detail)
                yield suspect.changed(_of_rank(rank, partial(_transposed_in_shape, axes=axes)), detail)


def _transposed_in_shape(gradient: Array, axes: tuple[int, ...]) -> Array:
    return gradient.transpose(axes).reshape(gradient.shape)


def transposed(suspect: Suspect) -> Iterator[Guess]:
    return _permuted(suspect, swaps=True)


def laid_out(suspect: Suspect) -> Iterator[Guess]:
    yield from _permuted(suspect, swaps=False)
    yield suspect.each(lambda g: g.reshape(-1, order="F").reshape(g.shape))
    yield suspect.each(lambda g: g.reshape(-1).reshape(g.shape, order="F"))
    yield suspect.changed(
        lambda g, dout, cache: {
            name: dout.reshape(each.shape, order="F")
            for name, each in g.items()
            if each.size == dout.size and each.shape != dout.shape and max(_long_axes(each), _long_axes(dout)) > 1
        }
    )


def _long_axes(array: Array) -> int:
    """How many axes have more than one element: with one alone, no order of axes matters."""
    return sum(size > 1 for size in array.shape)


def _axes(suspect: Suspect) -> Iterator[tuple[int, int]]:
    """(rank, axis) of every gradient's axes."""
    return ((rank, axis) for rank in (1, *_ranks(suspect)) for axis in range(rank))


def flipped(suspect: Suspect) -> Iterator[Guess]:
    for rank in (1, *_ranks(suspect)):
        for axes in subsets(range(rank)):
            yield suspect.changed(_of_rank(rank, partial(np.flip, axis=axes)), axes_named(axes))


def shifted(suspect: Suspect) -> Iterator[Guess]:
    for (rank, axis), step in product(_axes(suspect), (1, -1)):
        yield suspect.changed(_of_rank(rank, partial(np.roll, shift=step, axis=axis)), f"axis {axis}")
        if any(g.ndim == rank and g.shape[axis] > 1 for g in suspect.gradients.values()):
            yield suspect.changed(_of_rank(rank, partial(_moved, step=step, axis=axis)), f"axis {axis}")


def _moved(gradient: Array, step: int, axis: int) -> Array:
    """Shifted by one along the axis, with zeros where nothing comes from."""
    rolled = np.moveaxis(np.roll(gradient, step, axis).copy(), axis, 0)
    rolled[0 if step > 0 else -1] = 0.0
    return np.moveaxis(rolled, 0, axis)


def halves(suspect: Suspect) -> Iterator[Guess]:
    for rank, axis in _axes(suspect):
        yield suspect.changed(_of_rank(rank, partial(_halves_exchanged, axis=axis)), f"axis {axis}")


def _halves_exchanged(gradient: Array, axis: int) -> Array:
    length = gradient.shape[axis]
    return gradient if length % 2 else np.roll(gradient, length // 2, axis)


def exchanged(suspect: Suspect) -> Iterator[Guess]:
    shapes = {name: g.shape for name, g in suspect.gradients.items()}
    for a, b in combinations(shapes, 2):
        if shapes[a] == shapes[b]:
            yield replace(suspect.changed(_exchange(a, b), f"{a} and {b}"), whole=True)


def _exchange(first: str, second: str) -> Change:
    return lambda g, dout, cache: {first: g[second], second: g[first]}


# The cotangent.


def ones(suspect: Suspect) -> Iterator[Guess]:
    yield Guess(dout=np.ones_like(suspect.dout))


def first_element(suspect: Suspect) -> Iterator[Guess]:
    """The first along some axes, as a kernel reads it that takes the cotangent for an expanded one."""
    dout = suspect.dout
    long = [axis for axis, size in enumerate(dout.shape) if size > 1]
    for axes in reversed(list(subsets(long))) if dout.size else ():
        first = dout[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(dout.ndim))]
        detail = "everywhere" if len(axes) == len(long) else f"along {axes_named(axes)}"
        yield Guess(dout=np.broadcast_to(first, dout.shape).copy(), detail=detail)


def axes_named(axes: Sequence[int]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(map(str, axes))}"


# A part that is missing.


def only_part(suspect: Suspect) -> Iterator[Guess]:
    """Elements in a row along one axis are there, as where a kernel runs over too few blocks; the rest is zero."""
    for argument, source in suspect.node.sources:
        right, got = suspect.gradients.get(argument), suspect.got.get(gradient_of(source))
        if right is None or not isinstance(got, np.ndarray) or got.shape != right.shape:
            continue
        for axis, length in enumerate(right.shape):
            for start, stop in _parts(right, got, axis):
                detail = f"in {stop - start} of the {length} places along axis {axis}, from {start} on"
                yield suspect.changed(partial(_without_rest, argument=argument, axis=axis, part=(start, stop)), detail)


def _parts(right: Array, got: Array, axis: int) -> Iterator[tuple[int, int]]:
    """Where along the axis the part may begin and end: what is zero in both may belong to it or not."""
    others = tuple(each for each in range(right.ndim) if each != axis)
    there = np.flatnonzero((got != 0.0).any(axis=others))
    missing = np.setdiff1d(np.flatnonzero((right != 0.0).any(axis=others)), there)
    if there.size and missing.size:
        first, last = int(there[0]), int(there[-1])
        starts = (first, 1 + int(missing[missing < first].max(initial=-1)))
        stops = (last + 1, int(missing[missing > last].min(initial=right.shape[axis])))
        yield from dict.fromkeys(product(starts, stops))


def _without_rest(g: Gradients, dout: Array, cache: Any, argument: str, axis: int, part: tuple[int, int]) -> Gradients:
    places = np.arange(g[argument].shape[axis]).reshape(-1, *(1,) * (g[argument].ndim - 1 - axis))
    return {argument: np.where((part[0] <= places) & (places < part[1]), g[argument], 0.0)}


# Options.

NAMED_OPTIONS = ("reduction", "ddof", "eps", "approximate")
"""Options that a hypothesis of its own is about."""


def option_changed(suspect: Suspect, name: str) -> Iterator[Guess]:
    """The guesses that the option of this name has another value."""
    for option in suspect.node.layer.options:
        if option.name != name or option.structural:
            continue
        given = suspect.node.keywords[name]
        neutral = (0.0, 1.0) if isinstance(given, float) else ()
        choices = (*option.domain.choices(suspect.first.shape), *neutral)
        for value in dict.fromkeys(each for each in choices if each != given):
            yield from suspect.called(f"{name}={value!r}", **{name: value})


def reduction(suspect: Suspect) -> Iterator[Guess]:
    return option_changed(suspect, "reduction")


def other_option(suspect: Suspect) -> Iterator[Guess]:
    for option in suspect.node.layer.options:
        if option.name not in NAMED_OPTIONS:
            yield from option_changed(suspect, option.name)


# Kinks.


def _kinks(suspect: Suspect, ties: bool) -> Iterator[Guess]:
    for kink in suspect.node.layer.kinks:
        if kink.ties == ties:
            for weight, which in ((0.0, "left"), (0.5, "mean"), (1.0, "right")):
                side = {"left": "first", "mean": "all alike", "right": "last"}[which] if ties else which
                yield from suspect.called(side if ties else f"{side} derivative at {kink.place}", **{kink.name: weight})


def ties(suspect: Suspect) -> Iterator[Guess]:
    return _kinks(suspect, ties=True)


def subgradient(suspect: Suspect) -> Iterator[Guess]:
    return _kinks(suspect, ties=False)
