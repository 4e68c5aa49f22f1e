"""Gated linear units, and the maximum of groups."""

from __future__ import annotations

from gradproof.layer import Layer

LAYERS: tuple[Layer, ...] = ()
