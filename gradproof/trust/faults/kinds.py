"""One mistake of each kind that a hypothesis names and no other fault shows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gradproof.reference import LAYERS
from gradproof.reference.attention import Attended
from gradproof.reference.common import unbroadcast
from gradproof.reference.linear import LinearOperands
from gradproof.reference.normalization import Standardized
from gradproof.reference.recurrent import Unrolled
from gradproof.reference.walk import Row
from gradproof.trust.faults.making import Array, Gradients, only, pair_fault, row_fault


def _norm_with(divisor_less: int, outside: bool) -> Row:
    """Layer norm with another divisor of the variance, or with eps added to the standard deviation."""

    def forward(
        x: Array, weight: Array | None = None, bias: Array | None = None, *, axes: int, eps: float
    ) -> tuple[Array, Any]:
        over = tuple(range(-axes, 0))
        n = max(math.prod(x.shape[-axes:]) - divisor_less, 1)
        centred = x - x.mean(axis=over, keepdims=True)
        variance = (centred * centred).sum(axis=over, keepdims=True) / n
        sigma = np.sqrt(variance) if outside else np.sqrt(variance + eps)
        divisor = sigma + eps if outside else sigma
        z = centred / divisor
        cache = (z, weight, over, n, sigma, divisor)
        return (z if weight is None or bias is None else z * weight + bias), cache

    def backward(dout: Array, cache: Any) -> Gradients:
        z, weight, over, n, sigma, divisor = cache
        g = dout if weight is None else dout * weight
        through_sigma = z * (g * z).sum(axis=over, keepdims=True) / n * (divisor / sigma)
        gradients = {"x": (g - g.mean(axis=over, keepdims=True) - through_sigma) / divisor}
        if weight is None:
            return gradients
        return gradients | {"weight": unbroadcast(dout * z, weight.shape), "bias": unbroadcast(dout, weight.shape)}

    return forward, backward


def _without_eps(layer: str) -> Row:
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward
    return lambda *arrays, **others: forward(*arrays, **{**others, "eps": 0.0}), backward


def _batch_norm_as_in_training(grads: Gradients, dout: Array, kept: Standardized) -> Array:
    as_in_training = kept._replace(over=_channel_axes(dout))
    return grads["x"] if kept.over else LAYERS["batch_norm"].backward(dout, as_in_training)["x"]


def _channel_axes(x: Array) -> tuple[int, ...]:
    """All but the channels'."""
    return (0, *range(2, x.ndim))


def _choosing(layer: str, kink: str, few: float, many: float) -> Row:
    """A layer that chooses at its kink by the number of elements, as where large arrays take another path."""
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward
    return lambda x, **options: forward(x, **{**options, kink: few if x.size <= 2 else many}), backward


def _to_eleven_bits(array: Array) -> Array:
    """As TF32 and float16 have them."""
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.rint(mantissa * 2048.0) / 2048.0, exponent)


def _linear_tf32(grads: Gradients, dout: Array, kept: LinearOperands) -> Gradients:
    operands = LinearOperands(_to_eleven_bits(kept.x), _to_eleven_bits(kept.weight), biased=False)
    return {**grads, **LAYERS["linear"].backward(_to_eleven_bits(dout), operands)}


def _weights_of_the_first_step(grads: Gradients, dout: Array, kept: Unrolled) -> Gradients:
    """What a loop back through time leaves that assigns the weights' gradients."""
    first = [run._replace(x=_only_first(run.x), before=_only_first(run.before)) for run in kept.runs]
    alone = LAYERS["rnn_tanh"].backward(dout, kept._replace(runs=first))
    return {name: alone[name] if name.startswith("weight") else each for name, each in grads.items()}


def _only_first(steps: Array) -> Array:
    first = np.zeros_like(steps)
    first[0] = steps[0]
    return first


def _attention_unmasked(grads: Gradients, dout: Array, kept: Attended) -> Gradients:
    layer = LAYERS["scaled_dot_product_attention"]
    return layer.backward(dout, kept._replace(allowed=np.ones_like(kept.allowed)))


KIND_FAULTS = (
    pair_fault(
        "softplus_derivative_at_output",
        "softplus",
        "the derivative is taken at the activation",
        (
            lambda x, *, beta: (
                LAYERS["softplus"].forward(x, beta=beta)[0],
                LAYERS["softplus"].forward(x, beta=beta)[0] * beta,
            ),
            LAYERS["softplus"].backward,
        ),
        named="derivative at the output",
    ),
    pair_fault(
        "softsign_with_derivative_of_tanh",
        "softsign",
        "the derivative is that of another layer's activation",
        (
            lambda x: (LAYERS["softsign"].forward(x)[0], np.tanh(x)),
            lambda dout, out: {"x": dout * (1.0 - out * out)},
        ),
        named="another activation",
    ),
    row_fault(
        "avg_pool2d_sum",
        "avg_pool2d",
        "the gradient is not divided by the size of the window",
        lambda g, dout, c: {"x": g["x"] * math.prod(places.shape[1] for places, _ in c.windows)},
        named="factor 1/N missing",
    ),
    row_fault(
        "rnn_tanh_weights_assigned",
        "rnn_tanh",
        "the weights' gradients are assigned in the loop over time",
        _weights_of_the_first_step,
        named="one time step",
    ),
    row_fault(
        "dropout_scale_lost",
        "dropout",
        "the mask is applied to the gradient without its scale",
        lambda g, dout, c: {**g, "x": dout * (c != 0.0)},
        named="mask scale missing",
    ),
    row_fault(
        "attention_mask_forgotten",
        "scaled_dot_product_attention",
        "the mask is not applied in the backward pass",
        _attention_unmasked,
        named="mask missing",
    ),
    row_fault(
        "batch_norm_training_formula",
        "batch_norm",
        "the formula of training is used in evaluation",
        only("x", _batch_norm_as_in_training),
        named="training formula",
    ),
    row_fault(
        "reduce_var_divisor",
        "reduce_var",
        "n stands where n - ddof belongs",
        lambda g, dout, c: {"x": g["x"] * (c.divisor / max(c.centred.size // max(dout.size, 1), 1))},
        named="ddof",
    ),
    pair_fault(
        "layer_norm_sample_variance",
        "layer_norm",
        "the variance is divided by n - 1 in both passes",
        _norm_with(divisor_less=1, outside=False),
        named="ddof",
    ),
    pair_fault(
        "layer_norm_eps_outside",
        "layer_norm",
        "eps is added to the standard deviation in both passes",
        _norm_with(divisor_less=0, outside=True),
        named="eps",
    ),
    pair_fault("rms_norm_eps_missing", "rms_norm", "eps is added nowhere", _without_eps("rms_norm"), named="eps"),
    pair_fault(
        "relu_inconsistent_at_zero",
        "relu",
        "the derivative at 0 is 1 in arrays of more than two elements, 0 in others",
        _choosing("relu", "at_zero", 0.0, 1.0),
        named="another subgradient",
    ),
    pair_fault(
        "reduce_max_inconsistent_ties",
        "reduce_max",
        "the first of two largest gets the gradient, more than two share it",
        _choosing("reduce_max", "at_tie", 0.0, 0.5),
        named="ties",
    ),
    row_fault(
        "linear_tf32",
        "linear",
        "operands have eleven significant bits, as in TF32",
        _linear_tf32,
        named="operands rounded",
    ),
)
"""One of each kind that a hypothesis names and no other fault shows."""
