"""The walk for frameworks that record a tape: run the network, keep every node's output, ask for all gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradproof.adapters.base import TableAdapter
from gradproof.model.adapter import Forward
from gradproof.model.network import Network


class TapeAdapter(TableAdapter):
    """A subclass gives the table and the four conversions below."""

    @abstractmethod
    def tensor(self, value: np.ndarray, dtype: str) -> Any:
        """A framework tensor that owns its memory; floating ones in `dtype` and recorded on the tape."""

    @abstractmethod
    def array(self, tensor: Any) -> np.ndarray:
        """The tensor's numbers as a NumPy array."""

    @abstractmethod
    def alias(self, tensor: Any) -> Any:
        """The same numbers as another tensor on the tape."""

    @abstractmethod
    def gradients(self, output: Any, cotangent: np.ndarray, tensors: Sequence[Any]) -> Sequence[Any]:
        """The gradient of sum(cotangent * output) for each tensor, None where the framework gives none."""

    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward:
        known = {name: self.tensor(value, dtype) for name, value in values.items()}
        live: dict[str, np.ndarray] = {}
        outputs: dict[str, np.ndarray] = {}
        for node in network.nodes:
            out = self.call(node, known)
            # A function that hands its input back would merge the gradients of two names.
            passed_on = any(out is known[source] for source in node.inputs)
            known[node.name] = self.alias(out) if passed_on else out
            live[node.name] = self.array(known[node.name])
            outputs[node.name] = live[node.name].copy()
        return Forward(outputs, (network, known), live)

    def backward(self, forward: Forward, cotangent: np.ndarray) -> dict[str, np.ndarray]:
        network, known = forward.tape
        names = network.differentiable
        gradients = self.gradients(known[network.output], cotangent, [known[name] for name in names])
        return {
            name: self.array(gradient) for name, gradient in zip(names, gradients, strict=True) if gradient is not None
        }
