"""Mistakes in the walk back through time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np

from gradproof.hypotheses.suspect import Array, Gradients, Guess, Suspect, replaced

# Time.


def one_step(suspect: Suspect) -> Iterator[Guess]:
    """The weights' gradients of one time step alone, of the first or of the last: assigned, where a loop should add."""
    if suspect.node.layer.family != "recurrent":
        return
    backward = suspect.node.layer.backward
    for step, which in ((0, "first"), (-1, "last")):

        def alone(dout: Array, cache: tuple[Any, ...], step: int = step) -> Gradients:
            weights = backward(dout, replaced(cache, 0, [_at_step(each, step, False) for each in cache[0]]))
            biases = backward(dout, replaced(cache, 0, [_at_step(each, step, True) for each in cache[0]]))
            of_biases = {
                name: biases[name.replace("bias", "weight")][:, 0] for name in biases if name.startswith("bias")
            }
            return {name: each for name, each in weights.items() if name.startswith("weight")} | of_biases

        yield Guess(alone, detail=which)


def _at_step(cache: tuple[Any, ...], step: int, ones: bool) -> tuple[Any, ...]:
    """What a run kept, its inputs and states 0 but at one step; ones: 1 there, so that the weights' are the biases'."""
    x, before, kept, weights = cache
    at = np.zeros((len(x), 1, 1))
    at[step] = 1.0
    if ones:
        return np.broadcast_to(at, (*x.shape[:2], 1)), np.broadcast_to(at, (*x.shape[:2], 1)), kept, weights
    return x * at, before * at, kept, weights


GATES = {"lstm": 4, "gru": 3}


def gate_order(suspect: Suspect) -> Iterator[Guess]:
    """The gates' blocks in another order, in the gradients alone or in the weights as they are read."""
    count = GATES.get(suspect.name, 0)
    right, backward = suspect.node.layer.forward, suspect.node.layer.backward
    for order in permutations(range(count)):
        if order == tuple(range(count)):
            continue
        back = tuple(order.index(i) for i in range(count))
        detail = "".join("ifgo"[i] if count == 4 else "rzn"[i] for i in order)

        def forward(*arrays: Array, order: tuple[int, ...] = order, **others: Any) -> tuple[Array, Any]:
            return right(*arrays, **{name: _reordered(name, each, order) for name, each in others.items()})

        def read(dout: Array, cache: Any, back: tuple[int, ...] = back) -> Gradients:
            return {name: _reordered(name, each, back) for name, each in backward(dout, cache).items()}

        def written(g: Gradients, dout: Array, cache: Any, order: tuple[int, ...] = order) -> Gradients:
            return {name: _reordered(name, each, order) for name, each in g.items()}

        yield suspect.changed(written, detail)
        yield Guess(read, forward, detail=detail)


def _reordered(name: str, gates: Any, order: tuple[int, ...]) -> Any:
    if not name.startswith(("weight", "bias")):
        return gates
    blocks = np.split(gates, len(order))
    return np.concatenate([blocks[i] for i in order])
