"""Mistakes of kernels of embeddings and recurrent layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gradproof.reference import LAYERS
from gradproof.reference.recurrent import LSTM
from gradproof.reference.recurrent import _backward as walk_back
from gradproof.trust.faults.kernel_making import given_fault, gradients_of, to_eight_bits
from gradproof.trust.faults.making import Array, Backward, Gradients, row_fault


def _embedding_in_eight_bits(dout: Array, indices: Array, weight: Array, *, padding_idx: int) -> Gradients:
    table = np.zeros(weight.shape)
    for place in np.ndindex(indices.shape):
        row = int(indices[place])
        if row != padding_idx:
            table[row] = to_eight_bits(table[row] + dout[place])
    return {"weight": table}


def _states_before(layer: str, x: Array, first: dict[str, Array | None], **parameters: Any) -> list[list[Array]]:
    """The states before each step: those after all steps before it."""
    hidden = parameters["weight_hh_l0"].shape[1]
    before = [[np.zeros((1, x.shape[1], hidden)) if each is None else each for each in first.values()]]
    for at in range(1, len(x)):
        arrays = (x[:at], *first.values())
        before.append([LAYERS[layer].forward(*arrays, returns=state, **parameters)[0] for state in first])
    return before


def _detached(layer: str) -> Backward:
    """Each step by itself, the state before it held constant, in one layer and direction; elsewhere what is right."""

    def backward(
        dout: Array, x: Array, *, h0: Array | None = None, c0: Array | None = None, **others: Any
    ) -> Gradients:
        first = {"hidden": h0} | ({"cell": c0} if layer == "lstm" else {})
        given_states = {name: each for name, each in (("h0", h0), ("c0", c0)) if each is not None}
        if others["layers"] > 1 or others["bidirectional"] or others["returns"] != "sequence":
            return gradients_of(layer, dout, x, **given_states, **others)
        options = {name: each for name, each in others.items() if name != "returns"}
        before = _states_before(layer, x, first, **options)
        steps = [gradients_of(layer, dout[t : t + 1], x[t : t + 1], *before[t], **others) for t in range(len(x))]
        summed = {name: np.sum([step[name] for step in steps], axis=0) for name in steps[0] if name[0] in "wb"}
        starts = {name: np.zeros_like(each) for name, each in given_states.items()}
        return {"x": np.concatenate([step["x"] for step in steps])} | summed | starts

    return backward


def _cell_path_dropped(grads: Gradients, dout: Array, cache: Any) -> Gradients:
    def step_backward(dstates: Any, kept: Any) -> Any:
        dgiven, drecurrent, (dhidden, dcell) = LSTM.step_backward(dstates, kept)
        return dgiven, drecurrent, (dhidden, 0.0 * dcell)

    return walk_back(replace(LSTM, step_backward=step_backward), dout, cache)


TIME_FAULTS = (
    given_fault(
        "embedding_added_up_in_bfloat16",
        "embedding",
        "what repeated indices get is added up in bfloat16",
        _embedding_in_eight_bits,
        "rounded running sum",
    ),
    *(
        given_fault(
            f"{layer}_carry_dropped",
            layer,
            f"a step of {layer} hands nothing back to the one before it",
            _detached(layer),
            "carry missing",
        )
        for layer in ("rnn_tanh", "gru", "lstm")
    ),
    row_fault(
        "lstm_cell_path_dropped",
        "lstm",
        "the cell state's gradient is not handed back",
        _cell_path_dropped,
        "carry missing",
    ),
)
