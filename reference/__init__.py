"""The hand-written reference and the one table of layers.

Everything that depends on which layers exist derives from `LAYERS`.
"""

from __future__ import annotations

from gradproof.layer import Layer
from gradproof.reference import (
    activations,
    elementwise,
    linear,
    losses,
    merges,
    normalization,
    piecewise,
    shapes,
    softmax,
)
from gradproof.reference.walk import NumpyReference

FAMILIES = (activations, piecewise, elementwise, linear, merges, shapes, softmax, normalization, losses)

LAYERS: dict[str, Layer] = {layer.name: layer for family in FAMILIES for layer in family.LAYERS}

__all__ = ["LAYERS", "NumpyReference"]
