"""Mistakes of layers that slide, pick, attend or go through time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gradproof.reference import LAYERS
from gradproof.reference.gated import Gated
from gradproof.reference.indexing import Gathered, Picked
from gradproof.reference.normalization import Standardized, along_channels
from gradproof.trust.faults.making import Array, Gradients, only, row_fault, swapped_where_alike


def _embedding_rows_assigned(grads: Gradients, dout: Array, kept: Picked) -> Array:
    weight = np.zeros(kept.weight_shape, dout.dtype)
    weight[kept.indices] = np.where((kept.indices == kept.padding_idx)[..., None], 0.0, dout)
    return weight


def _padding_trained(grads: Gradients, dout: Array, kept: Picked) -> Gradients:
    return LAYERS["embedding"].backward(dout, kept._replace(padding_idx=-1))


def _assigned(grads: Gradients, dout: Array, kept: Gathered) -> Gradients:
    dx = np.zeros(kept.x_shape, dout.dtype)
    np.put_along_axis(dx, kept.indices, dout, kept.axis)
    return {"x": dx}


def _gates_permuted(grads: Gradients, dout: Array, cache: Any) -> Gradients:
    """Every gradient that has one row per gate and unit: four gates, of which two are exchanged."""
    return {name: _exchanged(each) if "weight" in name or "bias" in name else each for name, each in grads.items()}


def _exchanged(gates: Array) -> Array:
    first, second, *others = np.split(gates, 4)
    return np.concatenate((second, first, *others))


def _batch_norm_first_term(grads: Gradients, dout: Array, kept: Standardized) -> Array:
    return kept.r * (dout if kept.weight is None else dout * along_channels(kept.weight, dout.ndim))


def _halves_exchanged(grads: Gradients, dout: Array, kept: Gated) -> Gradients:
    return {"x": np.concatenate(np.split(grads["x"], 2, kept.axis)[::-1], kept.axis)}


STRUCTURE_FAULTS = (
    row_fault(
        "conv1d_padding_off_by_one",
        "conv1d",
        "the input's gradient is one element off along the axis",
        only("x", lambda g, dout, c: np.roll(g["x"], 1, axis=-1)),
        named="shifted",
    ),
    row_fault(
        "conv1d_bias_of_first_sample",
        "conv1d",
        "the bias's gradient is not summed over the batch",
        only("bias", lambda g, dout, c: dout[:1].sum(axis=(0, 2))),
        named="bias not summed",
    ),
    row_fault(
        "conv2d_kernel_flipped",
        "conv2d",
        "the kernel's gradient is flipped along both axes",
        only("weight", lambda g, dout, c: g["weight"][..., ::-1, ::-1].copy()),
        named="flipped",
    ),
    row_fault(
        "conv2d_mean_over_places",
        "conv2d",
        "the kernel's gradient is divided by the number of windows",
        only("weight", lambda g, dout, c: g["weight"] / max(math.prod(dout.shape[2:]), 1)),
        named="factor 1/N too many",
    ),
    row_fault(
        "conv_transpose2d_kernel_transposed",
        "conv_transpose2d",
        "height and width of the kernel's gradient are exchanged",
        only("weight", lambda g, dout, c: np.swapaxes(g["weight"], 2, 3).reshape(g["weight"].shape)),
        named="transposed",
    ),
    row_fault(
        "batch_norm_first_term",
        "batch_norm",
        "only dout * weight / sigma is kept, as in evaluation",
        only("x", _batch_norm_first_term),
        named="normalisation term missing",
    ),
    row_fault(
        "dropout_mask_forgotten",
        "dropout",
        "the mask is not applied to the gradient",
        lambda g, dout, c: {**g, "x": dout},
        named="mask missing",
    ),
    row_fault(
        "prelu_weight_averaged",
        "prelu",
        "the slope's gradient is averaged, not summed",
        only("weight", lambda g, dout, c: g["weight"] / max(dout.size, 1)),
        named="factor 1/N too many",
    ),
    row_fault(
        "glu_halves_exchanged",
        "glu",
        "the gate's gradient stands in the place of the other half",
        _halves_exchanged,
        named="halves exchanged",
    ),
    row_fault(
        "lstm_gates_in_another_order",
        "lstm",
        "the rows of the first two gates are exchanged",
        _gates_permuted,
        named="gate order",
    ),
    row_fault(
        "attention_key_and_value_exchanged",
        "scaled_dot_product_attention",
        "the key's gradient is handed to the value, and the value's to the key",
        swapped_where_alike("k", "v"),
        named="arguments exchanged",
    ),
    row_fault(
        "attention_scale_missing",
        "scaled_dot_product_attention",
        "the query's gradient lacks the scale",
        lambda g, dout, c: {**g, "q": g["q"] / c.scale},
        named="attention scale missing",
    ),
    row_fault(
        "embedding_rows_assigned",
        "embedding",
        "the gradient of a row that is picked twice is that of the last pick",
        only("weight", _embedding_rows_assigned),
        named="assigned, not accumulated",
    ),
    row_fault(
        "embedding_padding_trained",
        "embedding",
        "the padding row gets a gradient",
        _padding_trained,
        named="mask missing",
    ),
    row_fault(
        "gather_assigned",
        "gather",
        "an element that is picked twice counts once",
        _assigned,
        named="assigned, not accumulated",
    ),
    row_fault(
        "cumsum_from_the_same_end",
        "cumsum",
        "the gradient is summed from the end that the values are summed from",
        lambda g, dout, c: {"x": LAYERS["cumsum"].forward(dout, axis=c[0], reverse=c[1])[0]},
        named="another option",
    ),
    row_fault(
        "where_exchanged",
        "where",
        "each side gets the other's gradient",
        swapped_where_alike("a", "b"),
        named="arguments exchanged",
    ),
    row_fault(
        "reduce_mean_as_sum",
        "reduce_mean",
        "the factor 1 / N is missing",
        lambda g, dout, c: {"x": g["x"] * (g["x"].size / max(dout.size, 1))},
        named="factor 1/N missing",
    ),
)
