"""The hand-written reference and the one table of layers.

Everything that depends on which layers exist derives from `LAYERS`.
"""

from __future__ import annotations

from gradproof.model.layer import Layer
from gradproof.reference import (
    activations,
    attention,
    classification,
    convolution,
    ctc,
    distances,
    dropout,
    elementwise,
    gated,
    indexing,
    linear,
    margins,
    merges,
    normalization,
    piecewise,
    pooling,
    recurrent,
    reductions,
    regression,
    resampling,
    rotary,
    shapes,
    softmax,
)
from gradproof.reference.precise import PRECISE
from gradproof.reference.walk import NumpyReference

FAMILIES = (
    activations,
    piecewise,
    elementwise,
    gated,
    softmax,
    linear,
    convolution,
    pooling,
    resampling,
    normalization,
    dropout,
    recurrent,
    attention,
    rotary,
    merges,
    shapes,
    indexing,
    reductions,
    regression,
    classification,
    margins,
    distances,
    ctc,
)

LAYERS: dict[str, Layer] = {layer.name: layer for family in FAMILIES for layer in family.LAYERS}

__all__ = ["LAYERS", "PRECISE", "NumpyReference"]
