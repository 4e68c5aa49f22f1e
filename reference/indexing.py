"""Layers that pick elements by index."""

from __future__ import annotations

from gradproof.layer import Layer

LAYERS: tuple[Layer, ...] = ()
