"""Mistakes in kernels: backward functions as they are fused by hand, of what the forward pass was given."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gradproof.reference import LAYERS
from gradproof.trust.faults.kernel_making import given_fault, gradients_of, to_eight_bits
from gradproof.trust.faults.making import Array, Gradients, only, row_fault
from gradproof.trust.faults.memory_kernels import MEMORY_FAULTS
from gradproof.trust.faults.time_kernels import TIME_FAULTS

# Attention, as flash attention computes it: one head and one query at a time, from the saved logarithm of the sums.


def _attention(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    bias: Array | None = None,
    *,
    causal: bool,
    scale: float | str,
    groups: int,
    row_sums: bool = True,
    scale_of_dq: int = 1,
    scale_of_dbias: int = 0,
    offset: Callable[[int, int], int] = lambda queries, keys: 0,
    anew: bool = False,
    share: Callable[[Array], Array] = lambda grouped: grouped.sum(axis=2),
) -> Gradients:
    """offset: how far beyond its own key a query sees in the backward pass. anew: which sums up what it sees then.

    scale_of_dq, scale_of_dbias: how often the scale is applied.
    """
    factor = 1.0 / math.sqrt(q.shape[-1]) if isinstance(scale, str) else scale
    keys, values = (np.repeat(each, groups, axis=1) if groups > 1 else each for each in (k, v))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(keys), np.zeros_like(values)
    queries, length = q.shape[-2], k.shape[-2]
    dscores = np.zeros_like(dout, shape=(*q.shape[:-1], length))
    masks = np.ones(dscores.shape, bool) if mask is None else np.broadcast_to(mask.astype(bool), dscores.shape)
    biases = np.zeros_like(dscores) if bias is None else np.broadcast_to(bias, dscores.shape)
    seen = np.tri(queries, length, dtype=bool) if causal else np.ones((queries, length), bool)
    seen_back = np.tri(queries, length, offset(queries, length), dtype=bool) if causal else seen
    for head in np.ndindex(q.shape[:-2]):
        for i in range(queries):
            row = (*head, i)
            scores = factor * (keys[head] @ q[row]) + biases[row]
            allowed, allowed_back = masks[row] & seen[i], masks[row] & seen_back[i]
            if not allowed.any():
                continue
            logsumexp = _log_sum_exp(scores[allowed])
            out = np.exp(scores[allowed] - logsumexp) @ values[head][allowed]
            if anew:
                logsumexp = _log_sum_exp(scores[allowed_back])
            weights = np.where(allowed_back, np.exp(np.where(allowed_back, scores, logsumexp) - logsumexp), 0.0)
            total = dout[row] @ out if row_sums else 0.0
            dscores[row] = weights * (values[head] @ dout[row] - total)
            dq[row] = factor**scale_of_dq * (dscores[row] @ keys[head])
            dk[head] += factor * dscores[row][:, None] * q[row]
            dv[head] += weights[:, None] * dout[row]
    if groups > 1:
        dk, dv = (share(each.reshape(each.shape[0], -1, groups, *each.shape[2:])) for each in (dk, dv))
    gradients = {"q": dq, "k": dk, "v": dv}
    if bias is not None:
        leading = dscores.ndim - bias.ndim
        axes = [axis for axis in range(bias.ndim) if bias.shape[axis] == 1]
        summed = dscores.sum(axis=tuple(range(leading))).sum(axis=tuple(axes), keepdims=True)
        gradients["bias"] = factor**scale_of_dbias * summed
    return gradients


def _log_sum_exp(scores: Array) -> Any:
    largest = scores.max()
    return largest + np.log(np.exp(scores - largest).sum())


ATTENTION = "scaled_dot_product_attention"

ATTENTION_FAULTS = (
    given_fault(
        "attention_row_sums_missing",
        ATTENTION,
        "the row sums of dout * out are not subtracted",
        partial(_attention, row_sums=False),
        "attention row sums missing",
    ),
    given_fault(
        "attention_scale_twice",
        ATTENTION,
        "the scale is applied twice to the query's gradient",
        partial(_attention, scale_of_dq=2),
        "attention scale twice",
    ),
    given_fault(
        "attention_bias_scaled",
        ATTENTION,
        "the bias' gradient is scaled as the query's is",
        partial(_attention, scale_of_dbias=1),
        "attention scale twice",
    ),
    given_fault(
        "attention_causal_mask_missing",
        ATTENTION,
        "the backward pass sees later keys",
        partial(_attention, offset=lambda queries, keys: keys, anew=True),
        "mask missing",
    ),
    given_fault(
        "attention_strictly_causal",
        ATTENTION,
        "the backward pass hides a query's own key",
        partial(_attention, offset=lambda queries, keys: -1),
        "another causal mask",
    ),
    given_fault(
        "attention_causal_from_the_end",
        ATTENTION,
        "the backward pass aligns the causal mask with the last query and key",
        partial(_attention, offset=lambda queries, keys: keys - queries),
        "another causal mask",
    ),
    given_fault(
        "attention_first_head_of_a_group",
        ATTENTION,
        "keys and values get the gradient of the first of the heads that share them",
        partial(_attention, share=lambda grouped: grouped[:, :, 0]),
        "grouped heads not summed",
    ),
    given_fault(
        "attention_mean_over_a_group",
        ATTENTION,
        "the heads that share keys and values are averaged, not summed",
        partial(_attention, share=lambda grouped: grouped.mean(axis=2)),
        "grouped heads not summed",
    ),
    given_fault(
        "rotary_turned_on",
        "rotary",
        "the backward pass turns in the direction of the forward pass",
        lambda dout, x, **options: {"x": LAYERS["rotary"].forward(dout, **options)[0]},
        "rotation not inverted",
    ),
    given_fault(
        "rotary_pairs_confused",
        "rotary",
        "the backward pass takes halves for interleaved pairs",
        lambda dout, x, *, pairs, **options: gradients_of("rotary", dout, x, pairs="interleaved", **options),
        "another option",
    ),
    given_fault(
        "rotary_position_off_by_one",
        "rotary",
        "the backward pass counts positions from one",
        lambda dout, x, *, axis, **options: {"x": _rotated_from_one(dout, axis, options)},
        "another position",
    ),
)


def _rotated_from_one(dout: Array, axis: int, options: dict[str, Any]) -> Array:
    """Turned back as in an array with one more position before the first."""
    before = np.zeros_like(dout.take([0], axis))
    longer = np.concatenate([before, dout], axis)
    turned = gradients_of("rotary", longer, longer, axis=axis, **options)["x"]
    return turned.take(range(1, turned.shape[axis]), axis)


# Losses.


def _rows_of_loss(dout: Array, target: Array, divisor: Any, reduction: str) -> Array:
    return np.broadcast_to(dout / divisor if reduction == "mean" else dout, target.shape)[..., None]


def _cross_entropy(
    dout: Array,
    x: Array,
    target: Array,
    weight: Array | None = None,
    *,
    targets: str,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    every_row: bool = False,
    unweighted: bool = False,
    zeroed: bool = True,
) -> Gradients:
    """In one pass over the logits, where targets are classes and nothing is smoothed; else the reference's.

    every_row: the mean divides by all rows. unweighted: by those that count. zeroed: ignored rows are.
    """
    options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": reduction}
    by_name = {} if weight is None else {"weight": weight}
    if targets != "classes" or label_smoothing:
        return gradients_of("cross_entropy", dout, x, target, **by_name, targets=targets, **options)
    kept = target != ignore_index
    weights = np.ones(x.shape[-1]) if weight is None else weight
    of_rows = weights[np.where(kept, target, 0)]
    divisor = target.size if every_row else kept.sum() if unweighted else of_rows[kept].sum() or np.nan
    softmax = np.exp(x - x.max(axis=-1, keepdims=True))
    softmax = softmax / softmax.sum(axis=-1, keepdims=True)
    at_target = np.arange(x.shape[-1]) == target[..., None]
    dx = _rows_of_loss(dout, target, divisor, reduction) * (softmax - at_target)
    factors = np.where(kept, of_rows, 0.0 if zeroed else 1.0)
    return {"x": np.where(factors[..., None] == 0.0, 0.0, factors[..., None] * dx)}


CROSS_ENTROPY_FAULTS = (
    given_fault(
        "cross_entropy_mean_over_all_rows",
        "cross_entropy",
        "the mean divides by all rows, ignored ones too",
        partial(_cross_entropy, every_row=True),
        "another divisor of the mean",
    ),
    given_fault(
        "cross_entropy_mean_without_weights",
        "cross_entropy",
        "the mean divides by the number of rows that count, not by their weights",
        partial(_cross_entropy, unweighted=True),
        "another divisor of the mean",
    ),
    given_fault(
        "cross_entropy_ignored_rows_trained",
        "cross_entropy",
        "rows whose target is ignored get the gradient of their softmax",
        partial(_cross_entropy, zeroed=False),
        "ignored rows",
    ),
    given_fault(
        "cross_entropy_smoothing_missing",
        "cross_entropy",
        "the backward pass does not smooth the labels",
        lambda dout, *arrays, label_smoothing, **others: gradients_of(
            "cross_entropy", dout, *arrays, label_smoothing=0.0, **others
        ),
        "another option",
    ),
    row_fault(
        "cross_entropy_first_classes_alone",
        "cross_entropy",
        "of the classes, only those in the first block of two get a gradient",
        only("x", lambda g, dout, c: np.where(np.arange(g["x"].shape[-1]) < 2, g["x"], 0.0)),
        "only a part",
    ),
)


# Gated units.


def _swiglu(dout: Array, x: Array, *, axis: int, slope: Callable[[Array, Array], Array]) -> Gradients:
    gate, value = np.split(x, 2, axis)
    share = 1.0 / (1.0 + np.exp(-gate))
    return {"x": np.concatenate([dout * value * slope(gate, value), dout * gate * share], axis)}


def _silu_slope(x: Array) -> Array:
    share = 1.0 / (1.0 + np.exp(-x))
    return share * (1.0 + x * (1.0 - share))


def _silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def _exchanged_halves(dout: Array, x: Array, *, axis: int) -> Gradients:
    """The gradients of silu(value) gate."""
    gate, value = np.split(x, 2, axis)
    return {"x": np.concatenate([dout * _silu(value), dout * gate * _silu_slope(value)], axis)}


GATED_FAULTS = (
    given_fault(
        "swiglu_second_term_missing",
        "swiglu",
        "x s (1 - s) is missing in silu's derivative",
        partial(_swiglu, slope=lambda gate, value: 1.0 / (1.0 + np.exp(-gate))),
        "gate's derivative",
    ),
    given_fault(
        "swiglu_derivative_at_the_product",
        "swiglu",
        "silu's derivative is taken at the product that was saved",
        partial(_swiglu, slope=lambda gate, value: _silu_slope(_silu(gate) * value)),
        "gate's derivative",
    ),
    given_fault(
        "swiglu_gate_for_value",
        "swiglu",
        "the backward pass takes the value for the gate",
        _exchanged_halves,
        "gate for value",
    ),
)


# Normalisation.


def _rms_norm(
    dout: Array,
    x: Array,
    weight: Array | None = None,
    *,
    axes: int,
    eps: float,
    over: Callable[[int, int], tuple[int, ...]] = lambda rank, axes: tuple(range(rank - axes, rank)),
    means: float = 1.0,
    of_g: float = 0.0,
    block: int = 1,
) -> Gradients:
    """over: the axes of the means, of (rank, axes). means: how often they count. of_g: how often g's counts.

    block: the means are divided by the next multiple of it.
    """
    own = tuple(range(x.ndim - axes, x.ndim))
    r = 1.0 / np.sqrt((x * x).mean(axis=own, keepdims=True) + eps)
    z = x * r
    g = dout if weight is None else dout * weight
    n = math.prod(x.shape[axis] for axis in own)
    shrink = n / (-(-n // block) * block)
    along = over(x.ndim, axes)
    dx = r * (
        g - of_g * g.mean(axis=along, keepdims=True) - means * shrink * z * (g * z).mean(axis=along, keepdims=True)
    )
    if weight is None:
        return {"x": dx}
    return {"x": dx, "weight": (dout * z).sum(axis=tuple(range(x.ndim - axes)))}


def _last_rows(layer: str, rows: int) -> Callable[[Gradients, Array, Any], Gradients]:
    """The parameters' gradients from the last block of so many rows alone."""
    backward = LAYERS[layer].backward

    def change(grads: Gradients, dout: Array, cache: Any) -> Gradients:
        count = dout.size // max(dout.shape[-1], 1)
        start = (count - 1) // rows * rows
        at = (np.arange(count) >= start).reshape(*dout.shape[:-1], 1)
        last = backward(np.where(at, dout, 0.0), cache)
        return {name: each if name == "x" else last[name] for name, each in grads.items()}

    return change


def _added_in_eight_bits(terms: Array) -> Array:
    """The sum along the first axis, rounded each time."""
    total = np.zeros(terms.shape[1:])
    for term in terms:
        total = to_eight_bits(total + term)
    return total


NORMALISATION_FAULTS = (
    given_fault(
        "rms_norm_mean_square_missing",
        "rms_norm",
        "the mean of g z is missing in RMS norm",
        partial(_rms_norm, means=0.0),
        "normalisation term missing",
    ),
    given_fault(
        "rms_norm_as_layer_norm",
        "rms_norm",
        "the mean of g is subtracted, as layer norm has it",
        partial(_rms_norm, of_g=1.0),
        "mean subtracted",
    ),
    given_fault(
        "rms_norm_means_over_rows",
        "rms_norm",
        "the means of the backward pass are over the rows, not the columns",
        partial(_rms_norm, over=lambda rank, axes: (0,)),
        "means over other axes",
    ),
    given_fault(
        "rms_norm_means_over_padded_block",
        "rms_norm",
        "sums over a block of eight are divided by eight",
        partial(_rms_norm, block=8),
        "means over a padded block",
    ),
    row_fault(
        "rms_norm_last_block_of_rows",
        "rms_norm",
        "the weight's gradient is that of the last block of two rows",
        _last_rows("rms_norm", 2),
        "one block of a sum",
    ),
    row_fault(
        "layer_norm_weight_and_bias_exchanged",
        "layer_norm",
        "weight and bias get each other's gradient",
        lambda g, dout, c: {**g, "weight": g["bias"], "bias": g["weight"]} if "weight" in g else g,
        "arguments exchanged",
    ),
    row_fault(
        "linear_last_block_of_rows",
        "linear",
        "the weight's and the bias' gradients are those of the last block of two rows",
        _last_rows("linear", 2),
        "one block of a sum",
    ),
    row_fault(
        "linear_bias_summed_in_bfloat16",
        "linear",
        "the bias' gradient is added up in bfloat16",
        only("bias", lambda g, dout, c: _added_in_eight_bits(dout.reshape(-1, dout.shape[-1]))),
        "rounded running sum",
    ),
)

KERNEL_FAULTS = (
    *ATTENTION_FAULTS,
    *CROSS_ENTROPY_FAULTS,
    *GATED_FAULTS,
    *NORMALISATION_FAULTS,
    *TIME_FAULTS,
    *MEMORY_FAULTS,
)
