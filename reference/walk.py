"""The hand-written side behind the adapter's interface: one walk forward, one walk back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gradproof.model.adapter import Forward
from gradproof.model.layer import Layer
from gradproof.model.network import Network, Node
from gradproof.model.options import Options

Row = tuple[Callable[..., tuple[np.ndarray, Any]], Callable[[np.ndarray, Any], dict[str, np.ndarray]]]
Conventions = Mapping[str, Mapping[str, float]]


class NumpyReference:
    """Hand-written forward and backward passes in NumPy.

    conventions: layer name -> kink name -> weight of the right-hand derivative there.
    rows: layer name -> (forward, backward) to use in place of the table's own.
    """

    name = "reference"

    def __init__(self, conventions: Conventions | None = None, rows: Mapping[str, Row] | None = None) -> None:
        self._conventions = conventions or {}
        self._rows = rows or {}

    def version(self) -> str:
        return f"NumPy {np.__version__}"

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool:
        """Whether NumPy and SciPy have the arithmetic: in float64 and float32, in nothing coarser."""
        return dtype in ("float64", "float32")

    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward:
        """Run the network in `dtype`. Subclasses of ndarray pass through, so that arithmetic can be observed."""
        with np.errstate(all="ignore"):
            return self._forward(network, values, np.dtype(dtype))

    def _forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: np.dtype[Any]) -> Forward:
        known = {name: _cast(value, dtype) for name, value in values.items()}
        caches: dict[str, Any] = {}
        outputs: dict[str, np.ndarray] = {}
        for node in network.nodes:
            out, caches[node.name] = self.run_node(node, known)
            known[node.name] = _cast(out, dtype)
            outputs[node.name] = known[node.name].copy()
        return Forward(outputs, (network, caches, known), known)

    def run_node(self, node: Node, known: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Any]:
        """One node's output and cache, from the arrays that it reads."""
        arrays, by_name = node.bind(known)
        forward, _ = self.row(node)
        weights = self._conventions.get(node.layer.name, {})
        return forward(*arrays, **by_name, **node.keywords, **weights)

    def backward(self, forward: Forward, cotangent: np.ndarray) -> dict[str, np.ndarray]:
        """Walk back, adding up what every reader of a tensor sends to it."""
        network, caches, known = forward.tape
        # A copy, for some layers hand on what arrives, and results must not be views of what was given.
        gradients: dict[str, np.ndarray] = {network.output: _cast(cotangent, known[network.output].dtype).copy()}
        with np.errstate(all="ignore"):
            for node in reversed(network.nodes):
                _, backward = self.row(node)
                local = backward(gradients[node.name], caches[node.name])
                for argument, source in node.sources:
                    if argument not in local:
                        continue
                    arriving = _cast(local[argument], known[source].dtype)
                    gradients[source] = self.add_up(source, gradients.get(source), arriving)
        return gradients

    def add_up(self, name: str, before: np.ndarray | None, arriving: np.ndarray) -> np.ndarray:
        """What the gradient of the tensor of this name becomes when one more reader sends its part."""
        return arriving if before is None else before + arriving

    def replacing(self, layer: str, row: Row) -> NumpyReference:
        """This reference with another pair for one layer."""
        return NumpyReference(self._conventions, {**self._rows, layer: row})

    def row(self, node: Node) -> Row:
        """The pair of functions that computes a node."""
        return self._rows.get(node.layer.name, (node.layer.forward, node.layer.backward))


def _cast(array: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """Floating arrays in `dtype`, integer ones as they are, subclasses cache."""
    array = np.asanyarray(array)
    return array.astype(dtype, copy=False) if array.dtype.kind not in "iub" else array
