"""Dropout with a given mask."""

from __future__ import annotations

from gradproof.layer import Layer

LAYERS: tuple[Layer, ...] = ()
