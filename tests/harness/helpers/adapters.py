"""Stand-in adapters: the reference, with one thing changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gradproof.model.adapter import Forward
from gradproof.model.network import Network
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.walk import Row

Array = np.ndarray[Any, Any]


def row_with(layer: str, change: Callable[[dict[str, Array], Array], dict[str, Any]]) -> Row:
    """The layer's pair of functions, whose backward function gives change(gradients, cotangent)."""
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward
    return forward, lambda dout, cache: change(backward(dout, cache), dout)


def reference_with(layer: str, change: Callable[[dict[str, Array], Array], dict[str, Any]]) -> NumpyReference:
    """The reference, in which one layer gives change(gradients, cotangent)."""
    return NumpyReference(rows={layer: row_with(layer, change)})


def spoilt(*layers: str, factor: float = 1.5) -> NumpyReference:
    """The reference, with every gradient of these layers too large."""

    def scaled(gradients: dict[str, Array], dout: Array) -> dict[str, Array]:
        return {name: factor * gradient for name, gradient in gradients.items()}

    return NumpyReference(rows={layer: row_with(layer, scaled) for layer in layers})


class OnlyOneLayer(NumpyReference):
    """Raises for networks of more than one node."""

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        if len(network.nodes) > 1:
            raise NotImplementedError("one layer\n  at a time")
        return super().forward(network, values, dtype)
