"""Sums that are not taken, or not whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from gradproof.verdict.hypotheses.general import axes_named
from gradproof.verdict.hypotheses.suspect import Array, Backward, Change, Gradients, Guess, Suspect, subsets

# Sums that are not taken.


def bias_not_summed(suspect: Suspect) -> Iterator[Guess]:
    """A bias whose gradient is the sum of dout over some axes: of these, only some are summed over."""
    for name, bias in suspect.gradients.items():
        if "bias" in name:
            for axes in subsets(range(suspect.dout.ndim)):
                total = suspect.dout.sum(axis=axes)
                if total.shape == bias.shape and np.allclose(total, bias):
                    yield from _partly_summed(suspect, name, axes)


def _partly_summed(suspect: Suspect, name: str, axes: tuple[int, ...]) -> Iterator[Guess]:
    for summed in subsets(axes, least=0):
        rest = tuple(axis for axis in axes if axis not in summed)
        if rest:
            for taken in (None, 0, -1):
                yield suspect.changed(_picked(name, summed, rest, taken), axes_named(rest))


def _picked(name: str, summed: tuple[int, ...], rest: tuple[int, ...], taken: int | None) -> Change:
    return lambda g, dout, cache: {name: _part(dout.sum(axis=summed, keepdims=True), summed, rest, taken)}


def _part(partly: Array, summed: tuple[int, ...], rest: tuple[int, ...], taken: int | None) -> Array:
    """The sum without the axes summed over, and of the rest all elements (taken None), the first or the last."""
    index = tuple(
        0 if axis in summed else taken if axis in rest and taken is not None else slice(None)
        for axis in range(partly.ndim)
    )
    return partly[index]


def broadcast_not_summed(suspect: Suspect) -> Iterator[Guess]:
    """Operands stretched to the output's shape beforehand, whose gradients nobody sums; or one element for the sum."""
    shape, right = suspect.out.shape, suspect.node.layer.forward
    stretched = {n: a for n, a in suspect.arrays.items() if a.shape != shape and _fits(a.shape, shape)}
    if not stretched or not all(_fits(each.shape, shape) for each in suspect.arrays.values()):
        return

    def forward(*arrays: Array, **others: Any) -> tuple[Array, Any]:
        return right(*(np.broadcast_to(each, shape) for each in arrays), **others)

    def reduced(dout: Array, cache: Any, at: int) -> Gradients:
        full = suspect.node.layer.backward(dout, cache)
        return {name: _one_of(each, suspect.gradients[name].shape, at) for name, each in full.items()}

    yield Guess(forward=forward)
    yield Guess(lambda dout, cache: reduced(dout, cache, 0), forward)
    yield Guess(lambda dout, cache: reduced(dout, cache, -1), forward)


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, wanted) == wanted
    except ValueError:
        return False


def _one_of(full: Array, shape: tuple[int, ...], at: int) -> Array:
    """The first or last element along every axis that was stretched."""
    leading = full.ndim - len(shape)
    picked = full[(at,) * leading]
    stretched = [axis for axis, size in enumerate(shape) if size == 1]
    for axis in stretched:
        picked = np.take(picked, [at], axis=axis)
    return picked


BLOCKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Rows that a kernel may sum at a time."""


def one_block(suspect: Suspect) -> Iterator[Guess]:
    """Of the parameters' sums over rows, the part of the last block, or of the first, that nobody adds to the others'.

    Rows are those of the first axis, or of all axes but the last.
    """
    if suspect.node.layer.family == "recurrent":  # whose rows reach the weights over later ones
        return
    shape = suspect.dout.shape
    for leading in dict.fromkeys((1, len(shape) - 1)) if len(shape) > 1 else ():
        rows = math.prod(shape[:leading])
        for start, stop in _blocks(rows):
            which = "last" if start else "first"
            yield _of_rows(suspect, leading, start, stop, f"the {which} {stop - start} of {rows} rows")


def _blocks(rows: int) -> Iterator[tuple[int, int]]:
    """The first and the last of several blocks of each size."""
    within = [block for block in BLOCKS if block < rows]
    yield from dict.fromkeys(each for block in within for each in ((0, block), ((rows - 1) // block * block, rows)))


def _of_rows(suspect: Suspect, leading: int, start: int, stop: int, detail: str) -> Guess:
    """The parameters' gradients from some of the rows alone."""
    backward, slots = suspect.node.layer.backward, [slot for slot, _ in suspect.node.parameters]
    shape = suspect.dout.shape[:leading]
    chosen = np.zeros(shape, bool)
    chosen.reshape(-1)[start:stop] = True
    chosen = chosen.reshape(*shape, *(1,) * (suspect.dout.ndim - leading))

    def of_rows(dout: Array, cache: Any) -> Gradients:
        part = backward(np.where(chosen, dout, 0.0), cache)
        return {slot: part[slot] for slot in slots if slot in part}

    return Guess(of_rows, detail=detail)


def assigned(suspect: Suspect) -> Iterator[Guess]:
    """What is picked twice counts once: the last time, or the first."""
    if suspect.name not in ("embedding", "gather"):
        return
    indices, backward = suspect.arrays["indices"], suspect.node.layer.backward
    for later in (True, False):
        if suspect.name == "embedding":
            counts = _only_pick(indices.reshape(-1), 0, later).reshape(*indices.shape, 1)
        else:
            counts = _only_pick(indices, suspect.keywords["axis"], later)
        yield Guess(partial(_counting, backward, counts))


def _counting(backward: Backward, counts: Array, dout: Array, cache: Any) -> Gradients:
    return backward(np.where(counts, dout, 0.0), cache)


def _only_pick(indices: Array, axis: int, last: bool) -> Array:
    """Where no other pick of the same index comes later (or earlier) along the axis."""
    along = np.moveaxis(indices, axis, -1)
    same = along[..., :, None] == along[..., None, :]
    others = np.triu(np.ones(same.shape[-2:], bool), 1)
    return np.moveaxis(~(same & (others if last else others.T)).any(axis=-1), -1, axis)
