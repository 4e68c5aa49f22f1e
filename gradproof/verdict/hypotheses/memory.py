"""Memory that is read in another order than it lies in, or after something else was written to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import permutations

import numpy as np

from gradproof.verdict.hypotheses.suspect import Array, Arrays, Gradients, Guess, Suspect, subsets

MOST_AXES = 5
"""Axes up to which every order of them is tried."""


def _orders(dout: Array) -> Iterator[tuple[tuple[int, ...], str]]:
    """Every other order of the axes, and how it is order: those of length 1 make no difference."""
    long = tuple(axis for axis, size in enumerate(dout.shape) if size > 1)
    short = tuple(axis for axis, size in enumerate(dout.shape) if size <= 1)
    for axes in permutations(long) if len(long) <= MOST_AXES else ():
        if axes != long:
            yield (*short, *axes), ", ".join(map(str, axes))


def read_as_contiguous(suspect: Suspect) -> Iterator[Guess]:
    """The elements in the order of the memory, where the axes lie in it in another order or a larger array around."""
    dout = suspect.dout
    for axes, order in _orders(dout):
        detail = f"its axes lie there in the order {order}"
        yield Guess(dout=dout.transpose(axes).reshape(dout.shape), detail=detail)
    for name, larger in suspect.around.items():
        for start in _starts(larger.reshape(-1), dout):
            detail = f"it is a part of the gradient of {name}"
            yield Guess(dout=larger.reshape(-1)[start : start + dout.size].reshape(dout.shape), detail=detail)


def _starts(memory: Array, dout: Array) -> Iterator[int]:
    """Where the cotangent may begin in this memory, with as many elements behind."""
    if dout.size:
        for start in np.flatnonzero(memory == dout.reshape(-1)[0]):
            if start + dout.size <= memory.size:
                yield int(start)


def read_with_other_strides(suspect: Suspect) -> Iterator[Guess]:
    """Contiguous memory, read with the strides of an array whose axes lie in another order."""
    dout = suspect.dout
    for axes, order in _orders(dout):
        shape = tuple(dout.shape[axis] for axis in axes)
        detail = f"the axes of which lie in the order {order}"
        yield Guess(dout=dout.reshape(shape).transpose(np.argsort(axes)), detail=detail)


FROM_OUTPUT: Mapping[str, Callable[..., Array]] = {
    "tanh": lambda dout, out: dout * (1.0 - out * out),
    "sigmoid": lambda dout, out: dout * out * (1.0 - out),
    "exp": lambda dout, out: dout * out,
    "softmax": lambda dout, out, axis: out * (dout - (dout * out).sum(axis=axis, keepdims=True)),
    "log_softmax": lambda dout, out, axis: dout - np.exp(out) * dout.sum(axis=axis, keepdims=True),
}
"""(dout, out) -> dx, as it is commonly computed from the stored output."""


def overwritten(suspect: Suspect) -> Iterator[Guess]:
    """The output, or some of the arrays that were given, hold the cotangent or zeros when backward reads them."""
    for what, written in (("the cotangent", suspect.dout), ("zeros", np.zeros_like(suspect.dout))):
        if suspect.name in FROM_OUTPUT:
            from_output = partial(FROM_OUTPUT[suspect.name], out=written, **suspect.keywords)
            yield suspect.computed(partial(_from_written, from_output), f"the output by {what}")
        for names in subsets(name for name, each in suspect.arrays.items() if _may_hold(each, written)):
            yield suspect.kept(dict.fromkeys(names, written), f"{' and '.join(names)} by {what}")


def _from_written(from_output: Callable[[Array], Array], arrays: Arrays, dout: Array) -> Gradients:
    return {"x": from_output(dout)}


def _may_hold(array: Array, written: Array) -> bool:
    return array.dtype.kind == "f" and array.shape == written.shape
