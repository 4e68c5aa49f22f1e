"""What a planted fault is, and how one is made of the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradproof.model.adapter import Adapter
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.walk import Row

Array = np.ndarray[Any, Any]
Gradients = dict[str, Array]
Change = Callable[[Gradients, Array, Any], Gradients]
Backward = Callable[..., Gradients]


@dataclass(frozen=True)
class Fault:
    """One mistake.

    layer: the layer that must be named, None where the fault lies between the layers.
    mistake: what is done wrong, in a sentence. make: the adapter that does it.
    named: the hypothesis that must name it, None where it is of no named kind.
    """

    name: str
    layer: str | None
    mistake: str
    make: Callable[[], Adapter]
    named: str | None = None


def _faulty_row(layer: str, change: Change) -> Row:
    """The layer's pair, with its gradients changed by change(gradients, dout, cache)."""
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward
    return forward, lambda dout, cache: change(backward(dout, cache), dout, cache)


def row_fault(name: str, layer: str, mistake: str, change: Change, named: str | None = None) -> Fault:
    return pair_fault(name, layer, mistake, _faulty_row(layer, change), named)


def pair_fault(name: str, layer: str, mistake: str, row: Row, named: str | None = None) -> Fault:
    return Fault(name, layer, mistake, lambda: NumpyReference(rows={layer: row}), named)


def only(key: str, compute: Callable[[Gradients, Array, Any], Array]) -> Change:
    """Replace one gradient, where the layer has it."""
    return lambda grads, dout, cache: {**grads, key: compute(grads, dout, cache)} if key in grads else grads


def scaled(factor: float) -> Change:
    return lambda grads, dout, cache: {name: gradient * factor for name, gradient in grads.items()}


def swapped_where_alike(first: str, second: str) -> Change:
    """Exchange two gradients, where they have one shape."""

    def change(grads: Gradients, dout: Array, cache: Any) -> Gradients:
        alike = grads[first].shape == grads[second].shape
        return {**grads, first: grads[second], second: grads[first]} if alike else grads

    return change


def given(layer: str, backward: Backward) -> Row:
    """The layer with another backward function, of (dout, *arrays, **options) as forward got them."""
    forward = LAYERS[layer].forward

    def keeping(*arrays: Array, **others: Any) -> tuple[Array, Any]:
        return forward(*arrays, **others)[0], (arrays, others)

    return keeping, lambda dout, cache: backward(dout, *cache[0], **cache[1])
