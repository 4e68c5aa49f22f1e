"""Mistakes of kernels in reading the memory that they are given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gradproof.reference import LAYERS
from gradproof.reference.walk import Row
from gradproof.trust.faults.kernel_making import given_fault, gradients_of
from gradproof.trust.faults.making import Array, pair_fault


def _reading(layer: str, read: Callable[[Array], Array]) -> Row:
    """The layer, whose backward pass reads the cotangent in another way."""
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward
    return forward, lambda dout, cache: backward(read(dout), cache)


MEMORY_FAULTS = (
    pair_fault(
        "softplus_cotangent_read_by_columns",
        "softplus",
        "the cotangent is read in a row from memory in which it lies by columns",
        _reading("softplus", lambda dout: dout.T.reshape(dout.shape)),
        "cotangent read as contiguous",
    ),
    pair_fault(
        "softsign_cotangent_with_strides_of_columns",
        "softsign",
        "the cotangent is read with the strides of an input that lies by columns",
        _reading("softsign", lambda dout: dout.reshape(dout.shape[::-1]).T),
        "cotangent read with other strides",
    ),
    pair_fault(
        "sigmoid_cotangent_read_as_expanded",
        "sigmoid",
        "the cotangent's first row is taken for all rows",
        _reading("sigmoid", lambda dout: np.broadcast_to(dout[:1], dout.shape) if dout.ndim else dout),
        "cotangent's first element",
    ),
    given_fault(
        "softmax_output_overwritten",
        "softmax",
        "the cotangent was written where the output lay",
        lambda dout, x, *, axis: {"x": dout * (dout - (dout * dout).sum(axis=axis, keepdims=True))},
        "saved array overwritten",
    ),
    given_fault(
        "tanh_output_overwritten",
        "tanh",
        "1 - y^2 is computed of the cotangent, which lies where y did",
        lambda dout, x: {"x": dout * (1.0 - dout * dout)},
        "saved array overwritten",
    ),
    given_fault(
        "gelu_input_overwritten",
        "gelu",
        "the cotangent was written where the input lay",
        lambda dout, x: gradients_of("gelu", dout, dout),
        "saved array overwritten",
    ),
)
