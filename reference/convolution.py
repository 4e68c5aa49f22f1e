"""Convolutions (cross-correlations, as frameworks have them) and their transposes."""

from __future__ import annotations

from gradproof.layer import Layer

LAYERS: tuple[Layer, ...] = ()
