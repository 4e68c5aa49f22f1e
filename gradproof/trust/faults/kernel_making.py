"""What faults of kernels are made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradproof.reference import LAYERS
from gradproof.trust.faults.making import Array, Backward, Fault, Gradients, given, pair_fault


def gradients_of(layer: str, dout: Array, *arrays: Array, **others: Any) -> Gradients:
    pair = LAYERS[layer]
    return pair.backward(dout, pair.forward(*arrays, **others)[1])


def given_fault(name: str, layer: str, mistake: str, backward: Backward, named: str) -> Fault:
    return pair_fault(name, layer, mistake, given(layer, backward), named)


def to_eight_bits(array: Array) -> Array:
    """As bfloat16 has them."""
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.rint(mantissa * 256.0) / 256.0, exponent)
