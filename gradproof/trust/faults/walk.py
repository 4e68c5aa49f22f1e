"""Mistakes between the layers: in adding up what meets, and on the tape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gradproof.model.adapter import Forward
from gradproof.model.network import Network
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.walk import Row
from gradproof.trust.faults.making import Array, Fault, Gradients, pair_fault


class _WrongWalk(NumpyReference):
    """The reference, which adds up wrongly what several readers of a tensor send back."""

    def __init__(self, accumulate: Callable[[Array, Array], Array]) -> None:
        super().__init__()
        self._accumulate = accumulate

    def add_up(self, name: str, before: Array | None, arriving: Array) -> Array:
        return arriving if before is None else self._accumulate(before, arriving)


class _OverwrittenParameters(NumpyReference):
    """The reference, in whose backward pass every use of a parameter overwrites what an earlier one left."""

    def backward(self, forward: Forward, cotangent: Array) -> Gradients:
        self._parameters = forward.tape[0].parameters
        return super().backward(forward, cotangent)

    def add_up(self, name: str, before: Array | None, arriving: Array) -> Array:
        return super().add_up(name, None if name in self._parameters else before, arriving)


WALK_FAULTS = (
    Fault(
        "fan_out_path_dropped",
        None,
        "of the paths that meet, and of the uses of a shared parameter, only the last one counts",
        lambda: _WrongWalk(lambda before, arriving: arriving),
        named="path missing",
    ),
    Fault(
        "fan_out_path_doubled",
        None,
        "of the paths that meet, one counts twice",
        lambda: _WrongWalk(lambda before, arriving: before + 2.0 * arriving),
        named="path doubled",
    ),
    Fault(
        "shared_parameter_overwritten",
        None,
        "of the uses of a shared parameter only the last one counts; paths between layers add up",
        _OverwrittenParameters,
        named="path missing",
    ),
)


class _AddingTape(NumpyReference):
    """The reference with a tape that keeps its gradients: each backward pass adds to them, and nothing zeroes them."""

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        forward = super().forward(network, values, dtype)
        return Forward(forward.outputs, (forward, {}))

    def backward(self, forward: Forward, cotangent: Array) -> Gradients:
        tape, kept = forward.tape
        for name, gradient in super().backward(tape, cotangent).items():
            kept[name] = kept[name] + gradient if name in kept else gradient
        return dict(kept)


class _OneArena(NumpyReference):
    """The reference, which gives every value in an array that it has for nodes of that name and shape."""

    def __init__(self) -> None:
        super().__init__()
        self._arena: dict[tuple[Any, ...], Array] = {}

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        forward = super().forward(network, values, dtype)
        for name, out in forward.outputs.items():
            np.copyto(self._arena.setdefault((name, out.shape, out.dtype), out), out)
        return replace(
            forward, outputs={name: self._arena[name, a.shape, a.dtype] for name, a in forward.outputs.items()}
        )


def _overwriting_its_cache(layer: str) -> Row:
    """The backward function computes into an array that the forward pass has kept for it."""
    right, backward = LAYERS[layer].forward, LAYERS[layer].backward

    def keeping(x: Array) -> tuple[Array, Any]:
        return right(x.copy())  # what is overwritten is not the caller's

    def in_place(dout: Array, kept: Any) -> Gradients:
        gradients = backward(dout, kept)
        np.copyto(kept[0], gradients["x"])
        return gradients

    return keeping, in_place


def _cotangent_in_place(dout: Array, cache: Any) -> Gradients:
    """ReLU's backward pass, in place."""
    np.copyto(dout, LAYERS["relu"].backward(dout, cache)["x"])
    return {"x": dout}


TAPE_FAULTS = (
    Fault("tape_adds_up", None, "a second backward pass on the same tape adds to the first", _AddingTape),
    Fault("values_in_one_arena", None, "the values lie in memory that the next forward pass overwrites", _OneArena),
    pair_fault(
        "gelu_cache_overwritten",
        "gelu",
        "the backward pass computes in place, into what it needs the next time",
        _overwriting_its_cache("gelu"),
    ),
    pair_fault(
        "relu_cotangent_overwritten",
        "relu",
        "the backward pass computes in place, into the cotangent",
        (LAYERS["relu"].forward, _cotangent_in_place),
    ),
)
