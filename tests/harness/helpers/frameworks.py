"""The built-in adapters, each where its framework is installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.util import find_spec

import pytest

from gradproof.model.adapter import Adapter

FRAMEWORKS = {"reference": (), "torch": ("torch",), "jax": ("jax", "optax", "platformdirs")}
"""Name of a built-in adapter -> what it needs."""


def load(name: str) -> Adapter:
    """The adapter of this name; the test is skipped where what it needs is not installed."""
    if not all(map(find_spec, FRAMEWORKS[name])):
        pytest.skip(f"{name} is not installed: pip install 'gradproof[{name}]'")
    (entry,) = entry_points(group="gradproof.adapters", name=name)
    adapter: Adapter = entry.load()()
    return adapter
