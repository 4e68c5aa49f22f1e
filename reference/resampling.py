"""Padding, upsampling and pixel shuffling."""

from __future__ import annotations

from gradproof.layer import Layer

LAYERS: tuple[Layer, ...] = ()
