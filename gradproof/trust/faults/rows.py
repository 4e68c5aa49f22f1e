"""Mistakes in one backward function: of activations, norms, losses, linear maps and merges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit, ndtr

from gradproof.reference import LAYERS
from gradproof.reference.classification import CrossEntropyTerms, LogitTerms
from gradproof.reference.common import unbroadcast
from gradproof.reference.normalization import Standardized
from gradproof.reference.walk import Row
from gradproof.trust.faults.making import Array, Change, Gradients, given, only, pair_fault, row_fault, scaled


def _caching_the_input(layer: str, derivative: Callable[[Array], Array]) -> Row:
    """An elementwise pair whose backward function has the input where it needs the output."""
    forward = LAYERS[layer].forward
    return lambda x: (forward(x)[0], x), lambda dout, x: {"x": dout * derivative(x)}


def _first_element_zeroed(gradient: Array) -> Array:
    flat = gradient.reshape(-1).copy()
    flat[:1] = 0.0
    return flat.reshape(gradient.shape)


def _swap(first: str, second: str) -> Change:
    return lambda grads, dout, cache: {**grads, first: grads[second], second: grads[first]}


def _linear_weight_mean(grads: Gradients, dout: Array, cache: Any) -> Array:
    return grads["weight"] / max(dout.size // dout.shape[-1], 1)


def _layer_norm_first_term(grads: Gradients, dout: Array, kept: Standardized) -> Array:
    return kept.r * (dout if kept.weight is None else dout * kept.weight)


def _layer_norm_without_second_mean(grads: Gradients, dout: Array, kept: Standardized) -> Array:
    g = dout if kept.weight is None else dout * kept.weight
    return kept.r * (g - g.mean(axis=kept.over, keepdims=True))


def _layer_norm_without_weight(grads: Gradients, dout: Array, kept: Standardized) -> Array:
    z, over = kept.z, kept.over
    return kept.r * (dout - dout.mean(axis=over, keepdims=True) - z * (dout * z).mean(axis=over, keepdims=True))


def _batch_mean(grads: Gradients, dout: Array, cache: Any) -> Gradients:
    """Divide by the batch alone where the mean is over all elements."""
    error, reduction = cache
    per_row = error.size / error.shape[0]
    return {name: gradient * per_row for name, gradient in grads.items()} if reduction == "mean" else grads


def _sum_for_mean(grads: Gradients, dout: Array, cache: Any) -> Gradients:
    error, reduction = cache
    return {name: gradient * error.size for name, gradient in grads.items()} if reduction == "mean" else grads


def _first_cotangent(layer: str) -> Row:
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward
    return forward, lambda dout, cache: backward(np.full_like(dout, dout.reshape(-1)[0]), cache)


def _unit_cotangent(layer: str) -> Row:
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward
    return forward, lambda dout, cache: backward(np.ones_like(dout), cache)


def _softmax_again(grads: Gradients, dout: Array, kept: CrossEntropyTerms) -> Array:
    probabilities = np.exp(kept.log_probabilities)
    return probabilities * (grads["x"] - (grads["x"] * probabilities).sum(axis=-1, keepdims=True))


def _sigmoid_again(grads: Gradients, dout: Array, kept: LogitTerms) -> Array:
    probabilities = 1.0 / (1.0 + np.exp(-np.clip(kept.x, -30.0, 30.0)))
    return grads["x"] * probabilities * (1.0 - probabilities)


ROW_FAULTS = (
    row_fault(
        "relu_derivative_left_out",
        "relu",
        "the activation's derivative is left out",
        lambda g, dout, c: {"x": dout},
        named="derivative missing",
    ),
    row_fault("elu_sign_flipped", "elu", "the gradient's sign is flipped", scaled(-1.0), named="sign"),
    row_fault(
        "elu_alpha_left_out",
        "elu",
        "the slope below zero lacks alpha",
        lambda g, dout, c: {"x": np.where(c.x < 0, dout * np.exp(np.minimum(c.x, 0.0)), g["x"])},
        named="another option",
    ),
    row_fault(
        "leaky_relu_slope_left_out",
        "leaky_relu",
        "the gradient below zero is zero, as for relu",
        lambda g, dout, c: {"x": np.where(c.x < 0, 0.0, g["x"])},
        named="another option",
    ),
    pair_fault(
        "tanh_derivative_at_input",
        "tanh",
        "1 - x^2 is taken at the pre-activation",
        _caching_the_input("tanh", lambda x: 1.0 - x * x),
        named="derivative at the input",
    ),
    pair_fault(
        "sigmoid_derivative_at_input",
        "sigmoid",
        "x (1 - x) is taken at the pre-activation",
        _caching_the_input("sigmoid", lambda x: x * (1.0 - x)),
        named="derivative at the input",
    ),
    row_fault("sigmoid_scaled_by_1e-6", "sigmoid", "the gradient is off by one part in a million", scaled(1.0 + 1e-6)),
    row_fault("softplus_scaled_by_1e-3", "softplus", "the gradient is off by one part in a thousand", scaled(1.001)),
    pair_fault(
        "silu_second_term_missing",
        "silu",
        "x s (1 - s) is missing",
        given("silu", lambda dout, x: {"x": dout * expit(x)}),
        named="product term missing",
    ),
    pair_fault(
        "gelu_density_missing",
        "gelu",
        "x p(x) is missing",
        given("gelu", lambda dout, x: {"x": dout * ndtr(x)}),
        named="product term missing",
    ),
    pair_fault(
        "gelu_approximated",
        "gelu",
        "the backward pass is that of the tanh approximation",
        (
            lambda x: (LAYERS["gelu"].forward(x)[0], LAYERS["gelu_tanh"].forward(x)[1]),
            LAYERS["gelu_tanh"].backward,
        ),
        named="approximate gelu",
    ),
    row_fault(
        "softmax_element_by_element",
        "softmax",
        "softmax is treated as an elementwise function",
        lambda g, dout, c: {"x": dout * c[0] * (1.0 - c[0])},
        named="softmax element by element",
    ),
    row_fault(
        "log_softmax_sum_missing",
        "log_softmax",
        "the cotangents are not summed",
        lambda g, dout, c: {"x": dout - np.exp(c[0]) * dout},
        named="softmax element by element",
    ),
    row_fault(
        "linear_weight_mean",
        "linear",
        "the batch is averaged, not summed",
        only("weight", _linear_weight_mean),
        named="factor 1/N too many",
    ),
    row_fault(
        "linear_weight_transposed",
        "linear",
        "the weight's gradient is transposed",
        only("weight", lambda g, dout, c: g["weight"].T),
        named="transposed",
    ),
    row_fault(
        "linear_bias_not_summed",
        "linear",
        "the bias's gradient is that of the first row",
        only("bias", lambda g, dout, c: dout.reshape(-1, dout.shape[-1])[0]),
        named="bias not summed",
    ),
    row_fault(
        "linear_element_zeroed",
        "linear",
        "one element of the weight's gradient is zero",
        only("weight", lambda g, dout, c: _first_element_zeroed(g["weight"])),
    ),
    row_fault(
        "add_broadcast_averaged",
        "add",
        "a broadcast operand's gradient is averaged, not summed",
        only("b", lambda g, dout, c: g["b"] * (max(g["b"].size, 1) / max(dout.size, 1))),
        named="factor 1/N too many",
    ),
    row_fault(
        "add_not_unbroadcast",
        "add",
        "a broadcast gradient keeps the output's shape",
        only("b", lambda g, dout, c: dout),
        named="broadcast not summed",
    ),
    row_fault(
        "subtract_sign_lost",
        "subtract",
        "the second operand's sign is lost",
        only("b", lambda g, dout, c: -g["b"]),
        named="sign",
    ),
    row_fault(
        "multiply_swapped",
        "multiply",
        "each operand is multiplied by itself",
        lambda g, dout, c: {name: unbroadcast(dout * x, x.shape) for name, x in zip(("a", "b"), c, strict=True)},
        named="arguments exchanged",
    ),
    row_fault(
        "concatenate_reversed",
        "concatenate",
        "the parts are handed back along the axis in reverse",
        lambda g, dout, c: {name: np.flip(part, c[1]) for name, part in g.items()},
        named="flipped",
    ),
    row_fault(
        "reshape_column_major",
        "reshape",
        "the elements are read in column-major order",
        lambda g, dout, c: {"x": dout.reshape(c, order="F")},
        named="another layout",
    ),
    row_fault(
        "layer_norm_first_term",
        "layer_norm",
        "only dout * weight / sigma is kept",
        only("x", _layer_norm_first_term),
        named="normalisation term missing",
    ),
    row_fault(
        "layer_norm_second_mean_missing",
        "layer_norm",
        "the mean of g z is missing",
        only("x", _layer_norm_without_second_mean),
        named="normalisation term missing",
    ),
    row_fault(
        "layer_norm_weight_missing",
        "layer_norm",
        "the weight is left out of dx",
        only("x", _layer_norm_without_weight),
        named="normalisation term missing",
    ),
    row_fault("mse_factor_two_missing", "mse", "the factor 2 is missing", scaled(0.5), named="factor 2"),
    row_fault("mse_batch_mean", "mse", "the mean is over the batch alone", _batch_mean, named="factor 1/N missing"),
    row_fault(
        "half_squared_error_sum",
        "half_squared_error",
        "the sum is taken for the mean",
        _sum_for_mean,
        named="reduction",
    ),
    row_fault(
        "mae_magnitude",
        "mae",
        "the sign is lost",
        lambda g, dout, c: {name: np.abs(x) for name, x in g.items()},
        named="sign lost",
    ),
    row_fault(
        "bce_against_missing",
        "bce",
        "(1 - target) / (1 - x) is missing",
        only("x", lambda g, dout, c: np.where(c.target < 1, 0.0, g["x"])),
        named="zero",
    ),
    row_fault(
        "bce_target_forgotten",
        "bce",
        "the target gets no gradient",
        only("target", lambda g, dout, c: 0.0 * g["x"]),
        named="zero",
    ),
    row_fault(
        "bce_with_logits_sigmoid_twice",
        "bce_with_logits",
        "the sigmoid's derivative is applied again",
        only("x", _sigmoid_again),
        named="derivative twice",
    ),
    row_fault(
        "cross_entropy_softmax_twice",
        "cross_entropy",
        "the softmax's derivative is applied again",
        only("x", _softmax_again),
        named="derivative twice",
    ),
    pair_fault(
        "cross_entropy_first_cotangent",
        "cross_entropy",
        "the loss is scaled by cotangent[0]",
        _first_cotangent("cross_entropy"),
        named="cotangent's first element",
    ),
    pair_fault(
        "mse_cotangent_ignored",
        "mse",
        "the cotangent is taken as ones",
        _unit_cotangent("mse"),
        named="cotangent as ones",
    ),
    row_fault(
        "identity_lower_precision",
        "identity",
        "the gradient is computed in float16",
        lambda g, dout, c: {"x": dout.astype(np.float16).astype(dout.dtype)},
        named="lower precision",
    ),
)
