"""Mistakes in the walk back through time, which is made here of single steps of the layer itself.

Legend: T time steps, N batch, H hidden features. A run is one layer in one direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np

from gradproof.reference.common import logistic
from gradproof.verdict.hypotheses.suspect import Array, Arrays, Gradients, Guess, Suspect

STATES = {"rnn_tanh": {"hidden": "h0"}, "gru": {"hidden": "h0"}, "lstm": {"hidden": "h0", "cell": "c0"}}
"""Layer -> what it hands from step to step, by the names of `returns` -> the argument for the first of them."""

States = dict[str, Array]
"""Name of the state -> (N, H)."""


@dataclass(frozen=True)
class Run:
    """One run: what it read, (T, N, ...), the states before each step, and its parameters, without their suffix."""

    x: Array
    before: list[States]
    weights: Gradients


HandBack = Callable[[Run, int, str, Array, Array], Any]
"""(run, step, state, its cotangent after the step, and before it) -> what of the latter is handed back."""


def _step(suspect: Suspect, run: Run, at: int, returns: str) -> tuple[Array, Any]:
    """One step of the layer: (1, N, H) of the state that it returns, and the cache."""
    weights = {f"{name}_l0": each for name, each in run.weights.items()}
    states = [each[None] for each in run.before[at].values()]
    keywords = {"layers": 1, "bidirectional": False, "returns": returns}
    found: tuple[Array, Any] = suspect.node.layer.forward(run.x[at][None], *states, **keywords, **weights)
    return found


def _run(suspect: Suspect, x: Array, first: States, weights: Gradients) -> tuple[Array, Run]:
    """The run, and its outputs (T, N, H)."""
    run = Run(x, [first], weights)
    for at in range(len(x)):
        run.before.append({state: _step(suspect, run, at, state)[0][0] for state in first})
    return np.stack([states["hidden"] for states in run.before[1:]]), run


def _back(
    suspect: Suspect, run: Run, douts: Array, after: States, hand_back: HandBack, counted: slice
) -> tuple[Gradients, States]:
    """The gradients of x and the weights, which sum the counted steps, and the cotangents of the first states."""
    steps: list[Gradients] = []
    for at in reversed(range(len(run.x))):
        after = {**after, "hidden": after["hidden"] + douts[at]}
        parts = [
            suspect.node.layer.backward(dstate[None], _step(suspect, run, at, state)[1])
            for state, dstate in after.items()
        ]
        step = {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}
        starts = STATES[suspect.name]
        after = {state: hand_back(run, at, state, after[state], step.pop(starts[state])[0]) for state in after}
        steps.insert(0, step)
    dx = np.concatenate([step.pop("x") for step in steps])
    summed = {name: np.sum([step[name] for step in steps[counted]], axis=0) for name in steps[0]}
    return {"x": dx} | summed, after


def _turned(x: Array, direction: int) -> Array:
    """The second direction reads time from its end."""
    return x[::-1] if direction else x


def walked_back(suspect: Suspect, hand_back: HandBack, counted: slice, arrays: Arrays, dout: Array) -> Gradients:
    """Up through the layers and back, with what a step hands back and which steps count changed."""
    keywords, starts = suspect.keywords, STATES[suspect.name]
    ends = ("", "_reverse") if keywords["bidirectional"] else ("",)
    suffixes = [[f"_l{layer}{end}" for end in ends] for layer in range(keywords["layers"])]
    shape = (len(ends) * len(suffixes), arrays["x"].shape[1], arrays["weight_hh_l0"].shape[1])
    firsts = {state: arrays.get(start, np.zeros(shape)) for state, start in starts.items()}
    dlast = {state: dout if keywords["returns"] == state else np.zeros(shape) for state in starts}

    x = arrays["x"]
    runs: list[Run] = []
    for layer in suffixes:
        outs = []
        for direction, suffix in enumerate(layer):
            first = {state: each[len(runs)] for state, each in firsts.items()}
            out, run = _run(suspect, _turned(x, direction), first, _weights_of(suffix, arrays))
            outs.append(_turned(out, direction))
            runs.append(run)
        x = np.concatenate(outs, axis=-1)

    dx: Array = dout if keywords["returns"] == "sequence" else np.zeros(x.shape)
    gradients: Gradients = {}
    dfirsts: dict[int, States] = {}
    for number in reversed(range(len(suffixes))):
        douts, dx = np.split(dx, len(ends), axis=-1), np.zeros(())
        for direction, suffix in enumerate(suffixes[number]):
            at = number * len(ends) + direction
            after = {state: each[at] for state, each in dlast.items()}
            turned = _turned(douts[direction], direction)
            found, dfirsts[at] = _back(suspect, runs[at], turned, after, hand_back, counted)
            dx = dx + _turned(found.pop("x"), direction)
            gradients |= {f"{name.removesuffix('_l0')}{suffix}": each for name, each in found.items()}
    stacked = {start: np.stack([dfirsts[at][state] for at in range(len(runs))]) for state, start in starts.items()}
    return {"x": dx} | gradients | stacked


def _weights_of(suffix: str, arrays: Arrays) -> Gradients:
    return {
        name.removesuffix(suffix): each
        for name, each in arrays.items()
        if name.startswith(("weight", "bias")) and name.partition("_l")[2] == suffix.removeprefix("_l")
    }


def _all(run: Run, at: int, state: str, after: Array, before: Array) -> Array:
    return before


def _none(run: Run, at: int, state: str, after: Array, before: Array, of: tuple[str, ...]) -> Array:
    """Nothing of these states."""
    return np.zeros_like(before) if state in of else before


def _past_the_gates(run: Run, at: int, after: Array) -> Array:
    """What gru's update gate z lets through: z times the cotangent of h' = (1 - z) n + z h."""
    hidden, weights = run.before[at]["hidden"], run.weights
    given = run.x[at] @ weights["weight_ih"].T + weights.get("bias_ih", 0.0)
    recurrent = hidden @ weights["weight_hh"].T + weights.get("bias_hh", 0.0)
    _, update, _ = np.split(given + recurrent, 3, axis=-1)
    return after * logistic(update)


def _without_update_gate(run: Run, at: int, state: str, after: Array, before: Array) -> Array:
    return before - _past_the_gates(run, at, after)


def _update_gate_alone(run: Run, at: int, state: str, after: Array, before: Array) -> Array:
    return _past_the_gates(run, at, after)


HIDDEN: dict[str, HandBack] = {"what each step hands back to the state before it": partial(_none, of=("hidden",))}
CARRIES: dict[str, dict[str, HandBack]] = {
    "rnn_tanh": HIDDEN,
    "gru": {
        **HIDDEN,
        "what the update gate hands back to the state before it": _without_update_gate,
        "what weight_hh hands back to the state before it": _update_gate_alone,
    },
    "lstm": {
        "what each step hands back to the hidden state before it": partial(_none, of=("hidden",)),
        "what each step hands back to the cell state before it": partial(_none, of=("cell",)),
        "what each step hands back to the states before it": partial(_none, of=("hidden", "cell")),
    },
}
"""Layer -> what is left out -> what is handed back then."""


def carry_missing(suspect: Suspect) -> Iterator[Guess]:
    for detail, hand_back in CARRIES.get(suspect.name, {}).items():
        yield suspect.computed(partial(walked_back, suspect, hand_back, slice(None)), detail)


def one_step(suspect: Suspect) -> Iterator[Guess]:
    """The parameters' gradients of one time step alone: assigned, where a loop should add."""
    for step, which in ((slice(0, 1), "first"), (slice(-1, None), "last")) if suspect.name in STATES else ():
        yield suspect.computed(partial(walked_back, suspect, _all, step), which)


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
