"""The walk for frameworks that differentiate functions.

A zero "tap" is added to every node's output; the gradient with respect to a tap is the node's cotangent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradproof.adapters.base import TableAdapter, is_floating
from gradproof.model.adapter import Forward
from gradproof.model.network import Network, Node

Arrays = Mapping[str, Any]


class FunctionalAdapter(TableAdapter):
    """A subclass gives the table, how one node runs, and the framework's vjp."""

    @abstractmethod
    def run_node(self, node: Node, known: Arrays, tap: Any) -> Any:
        """The node's output plus the tap."""

    @abstractmethod
    def vjp(self, network: Network, floating: Arrays, constant: Arrays, taps: Arrays) -> tuple[Arrays, Any]:
        """Run self.walk(network, floating, taps, constant).

        Returns all outputs as NumPy arrays, and the pullback from the output's cotangent to `floating` and `taps`.
        """

    @abstractmethod
    def pull_back(self, pullback: Any, cotangent: np.ndarray) -> tuple[Arrays, Arrays]:
        """Apply the pullback; the gradients come as NumPy arrays."""

    def walk(self, network: Network, floating: Arrays, taps: Arrays, constant: Arrays) -> tuple[Any, Arrays]:
        """The network's output, and every node's."""
        known = {**floating, **constant}
        for node in network.nodes:
            known[node.name] = self.run_node(node, known, taps[node.name])
        return known[network.output], {node.name: known[node.name] for node in network.nodes}

    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward:
        cast = {name: value.astype(dtype) if is_floating(value) else value for name, value in values.items()}
        floating = {name: value for name, value in cast.items() if name in network.differentiable}
        constant = {name: value for name, value in cast.items() if name not in floating}
        taps = {node.name: np.zeros(network.shapes[node.name], dtype) for node in network.nodes}
        return Forward(*self.vjp(network, floating, constant, taps))

    def backward(self, forward: Forward, cotangent: np.ndarray) -> dict[str, np.ndarray]:
        values, taps = self.pull_back(forward.tape, cotangent)
        return {**values, **taps}
