"""Adapters that misbehave otherwise than in their numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gradproof.model.adapter import Forward
from gradproof.model.network import Network
from gradproof.reference import LAYERS, NumpyReference
from gradproof.trust.faults.making import Array, Fault, Gradients, pair_fault


def _input_mutated(x: Array, *, at_zero: float = 0.0) -> tuple[Array, Any]:
    """ReLU in place: the forward pass overwrites what others still need."""
    out, _ = LAYERS["relu"].forward(x, at_zero=at_zero)
    np.copyto(x, out)
    return out, (out, at_zero)


def _into_a_workspace() -> NumpyReference:
    """The reference, whose softsign computes its gradient in memory that it has for every shape."""
    workspaces: dict[tuple[Any, ...], Array] = {}

    def backward(dout: Array, cache: Any) -> Gradients:
        gradient = LAYERS["softsign"].backward(dout, cache)["x"]
        workspace = workspaces.setdefault((gradient.shape, gradient.dtype), gradient)
        np.copyto(workspace, gradient)
        return {"x": workspace}

    return NumpyReference(rows={"softsign": (LAYERS["softsign"].forward, backward)})


def _unsteady() -> Callable[[Gradients, str], Gradients]:
    generator = np.random.default_rng(0)
    return lambda gradients, name: {**gradients, name: gradients[name] * generator.uniform(1.0, 2.0)}


class _Misbehaving(NumpyReference):
    """The reference, whose gradients are spoilt on their way out wherever a layer takes part."""

    def __init__(self, layer: str, spoil: Callable[[Gradients, str], Mapping[str, Any]]) -> None:
        super().__init__()
        self._layer = layer
        self._spoil = spoil

    def backward(self, forward: Forward, cotangent: np.ndarray) -> dict[str, Any]:
        gradients = super().backward(forward, cotangent)
        for node in forward.tape[0].nodes:
            if node.layer.name == self._layer:
                gradients = dict(self._spoil(gradients, node.inputs[0]))
        return gradients


class _HandingOn(NumpyReference):
    """The reference, whose identity gives the very array that it was given."""

    def __init__(self) -> None:
        super().__init__(rows={"identity": (lambda x: (x, None), LAYERS["identity"].backward)})

    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward:
        forward = super().forward(network, values, dtype)
        handed_on = {node.name for node in network.nodes if node.layer.name == "identity"}
        outputs = {name: forward.live[name] if name in handed_on else out for name, out in forward.outputs.items()}
        return replace(forward, outputs=outputs)


def _raise(gradients: Gradients, name: str) -> Gradients:
    raise RuntimeError("the kernel is not implemented")


def _hang(gradients: Gradients, name: str) -> Gradients:
    while True:
        time.sleep(0.01)


def _out_of_memory(gradients: Gradients, name: str) -> Gradients:
    raise MemoryError("cannot allocate the gradients")


def _error_state_changed(gradients: Gradients, name: str) -> Gradients:
    np.seterr(under="raise" if np.geterr()["under"] == "ignore" else "ignore")
    return gradients


def _misbehaviour(name: str, mistake: str, spoil: Callable[[Gradients, str], Mapping[str, Any]]) -> Fault:
    return Fault(name, "tanh", mistake, lambda: _Misbehaving("tanh", spoil))


MISBEHAVIOUR = {
    "nonfinite": _misbehaviour("returns_nan", "a gradient is NaN", lambda g, name: {**g, name: g[name] * np.nan}),
    "missing": _misbehaviour("returns_none", "a gradient is None", lambda g, name: {**g, name: None}),
    "shape": _misbehaviour(
        "wrong_shape", "a gradient has an axis too many", lambda g, name: {**g, name: g[name][None]}
    ),
    "dtype": _misbehaviour(
        "wrong_dtype", "a gradient is in another dtype", lambda g, name: {**g, name: g[name].astype(np.float16)}
    ),
    "crash": _misbehaviour("raises", "the backward pass raises", _raise),
    "timeout": _misbehaviour("hangs", "the backward pass does not return", _hang),
    "memory": _misbehaviour("runs_out_of_memory", "the backward pass finds no memory", _out_of_memory),
    "global_state": _misbehaviour(
        "changes_the_error_state", "how NumPy treats underflow is left changed", _error_state_changed
    ),
    "view": Fault("hands_its_input_on", "identity", "the output is the very array that was given", _HandingOn),
    "nondeterministic": Fault(
        "never_the_same",
        "tanh",
        "two identical calls give different numbers",
        lambda: _Misbehaving("tanh", _unsteady()),
    ),
    "reused_buffer": Fault(
        "gradient_in_a_workspace",
        "softsign",
        "the gradient lies in a workspace, which the next call overwrites",
        _into_a_workspace,
    ),
    "mutated_input": pair_fault(
        "writes_to_its_input", "relu", "the input is overwritten", (_input_mutated, LAYERS["relu"].backward)
    ),
}
"""The kind of verdict that each must get -> the fault."""
