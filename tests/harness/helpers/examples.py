"""Running an adapter on a worked example, and comparing with the numbers that are stated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import Adapter
from gradproof.model.network import Network

Arrays = Mapping[str, np.ndarray]


def run(adapter: Adapter, network: Network, values: Arrays) -> tuple[Arrays, Arrays]:
    """Node outputs and gradients in float64."""
    forward = adapter.forward(network, values, "float64")
    return forward.outputs, adapter.backward(forward, np.ones(network.shapes[network.output]))


def outputs_of(adapter: Adapter, network: Network, values: Arrays) -> Arrays:
    """Node outputs in float64."""
    return adapter.forward(network, values, "float64").outputs


def missed(stated: Arrays, got: Arrays, tolerance: float) -> set[str]:
    """The names whose stated numbers are not met."""
    return {
        name
        for name, numbers in stated.items()
        if got[name].shape != numbers.shape or not (np.abs(got[name] - numbers) <= tolerance).all()
    }


def close(expected: float | list[Any] | np.ndarray) -> Any:
    """Equal to within the last digits of float64."""
    return pytest.approx(np.asarray(expected) if isinstance(expected, list) else expected, rel=0, abs=1e-15)


def forgotten_derivative(dout: np.ndarray, out: np.ndarray) -> dict[str, np.ndarray]:
    """A backward pass that hands on what arrives."""
    return {"x": dout}
