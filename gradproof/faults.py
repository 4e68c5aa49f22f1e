"""Planted faults: mistakes that people make in a backward pass, each as an adapter that makes it.

They are the reference with one row replaced, or with one step of its walk done wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradproof.adapter import Adapter, Forward
from gradproof.network import Network
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.common import unbroadcast
from gradproof.reference.walk import Row

Array = np.ndarray[Any, Any]
Gradients = dict[str, Array]
Change = Callable[[Gradients, Array, Any], Gradients]


@dataclass(frozen=True)
class Fault:
    """One mistake.

    layer: the layer that must be named, None where the fault lies between the layers.
    mistake: what is done wrong, in a sentence. make: the adapter that does it.
    named: the hypothesis that must name it, None where it is of no named kind.
    """

    name: str
    layer: str | None
    mistake: str
    make: Callable[[], Adapter]
    named: str | None = None


def _faulty_row(layer: str, change: Change) -> Row:
    """The layer's pair, with its gradients changed by change(gradients, dout, cache)."""
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward
    return forward, lambda dout, cache: change(backward(dout, cache), dout, cache)


def _row_fault(name: str, layer: str, mistake: str, change: Change, named: str | None = None) -> Fault:
    return _pair_fault(name, layer, mistake, _faulty_row(layer, change), named)


def _pair_fault(name: str, layer: str, mistake: str, row: Row, named: str | None = None) -> Fault:
    return Fault(name, layer, mistake, lambda: NumpyReference(rows={layer: row}), named)


def _caching_the_input(layer: str) -> Row:
    """An elementwise pair whose backward function has the input where it needs the output."""
    forward = LAYERS[layer].forward
    return lambda x: (forward(x)[0], x), LAYERS[layer].backward


def _only(key: str, compute: Callable[[Gradients, Array, Any], Array]) -> Change:
    """Replace one gradient, where the layer has it."""
    return lambda grads, dout, cache: {**grads, key: compute(grads, dout, cache)} if key in grads else grads


def _scaled(factor: float) -> Change:
    return lambda grads, dout, cache: {name: gradient * factor for name, gradient in grads.items()}


def _first_element_zeroed(gradient: Array) -> Array:
    flat = gradient.reshape(-1).copy()
    flat[:1] = 0.0
    return flat.reshape(gradient.shape)


def _swap(first: str, second: str) -> Change:
    return lambda grads, dout, cache: {**grads, first: grads[second], second: grads[first]}


def _linear_weight_mean(grads: Gradients, dout: Array, cache: Any) -> Array:
    return grads["weight"] / max(dout.size // dout.shape[-1], 1)


def _layer_norm_first_term(grads: Gradients, dout: Array, cache: Any) -> Array:
    _, reciprocal, weight, _ = cache
    return reciprocal * (dout if weight is None else dout * weight)


def _layer_norm_without_second_mean(grads: Gradients, dout: Array, cache: Any) -> Array:
    _, reciprocal, weight, over = cache
    g = dout if weight is None else dout * weight
    return reciprocal * (g - g.mean(axis=over, keepdims=True))


def _layer_norm_without_weight(grads: Gradients, dout: Array, cache: Any) -> Array:
    normalized, reciprocal, _, over = cache
    means = (dout.mean(axis=over, keepdims=True), (dout * normalized).mean(axis=over, keepdims=True))
    return reciprocal * (dout - means[0] - normalized * means[1])


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


def _softmax_again(grads: Gradients, dout: Array, cache: Any) -> Array:
    probabilities = np.exp(cache[0])
    return probabilities * (grads["x"] - (grads["x"] * probabilities).sum(axis=-1, keepdims=True))


def _sigmoid_again(grads: Gradients, dout: Array, cache: Any) -> Array:
    probabilities = 1.0 / (1.0 + np.exp(-np.clip(cache[0], -30.0, 30.0)))
    return grads["x"] * probabilities * (1.0 - probabilities)


def _input_mutated(x: Array, *, at_zero: float = 0.0) -> tuple[Array, Any]:
    """ReLU in place: the forward pass overwrites what others still need."""
    out, _ = LAYERS["relu"].forward(x, at_zero=at_zero)
    np.copyto(x, out)
    return out, (out, at_zero)


ROW_FAULTS = (
    _row_fault(
        "relu_derivative_left_out",
        "relu",
        "the activation's derivative is left out",
        lambda g, dout, c: {"x": dout},
        named="derivative missing",
    ),
    _row_fault("elu_sign_flipped", "elu", "the gradient's sign is flipped", _scaled(-1.0), named="sign"),
    _row_fault(
        "elu_alpha_left_out",
        "elu",
        "the slope below zero lacks alpha",
        lambda g, dout, c: {"x": np.where(c[0] < 0, dout * np.exp(np.minimum(c[0], 0.0)), g["x"])},
        named="another option",
    ),
    _row_fault(
        "leaky_relu_slope_left_out",
        "leaky_relu",
        "the gradient below zero is zero, as for relu",
        lambda g, dout, c: {"x": np.where(c[0] < 0, 0.0, g["x"])},
        named="another option",
    ),
    _pair_fault(
        "tanh_derivative_at_input",
        "tanh",
        "1 - x^2 is taken at the pre-activation",
        _caching_the_input("tanh"),
        named="derivative at the input",
    ),
    _pair_fault(
        "sigmoid_derivative_at_input",
        "sigmoid",
        "x (1 - x) is taken at the pre-activation",
        _caching_the_input("sigmoid"),
        named="derivative at the input",
    ),
    _row_fault(
        "sigmoid_scaled_by_1e-6", "sigmoid", "the gradient is off by one part in a million", _scaled(1.0 + 1e-6)
    ),
    _row_fault("softplus_scaled_by_1e-3", "softplus", "the gradient is off by one part in a thousand", _scaled(1.001)),
    _row_fault(
        "silu_second_term_missing",
        "silu",
        "x s (1 - s) is missing",
        lambda g, dout, c: {"x": dout * c[1]},
        named="product term missing",
    ),
    _row_fault(
        "gelu_density_missing",
        "gelu",
        "x p(x) is missing",
        lambda g, dout, c: {"x": dout * c[1]},
        named="product term missing",
    ),
    _pair_fault(
        "gelu_approximated",
        "gelu",
        "the backward pass is that of the tanh approximation",
        (
            lambda x: (LAYERS["gelu"].forward(x)[0], LAYERS["gelu_tanh"].forward(x)[1]),
            LAYERS["gelu_tanh"].backward,
        ),
        named="approximate gelu",
    ),
    _row_fault(
        "softmax_element_by_element",
        "softmax",
        "softmax is treated as an elementwise function",
        lambda g, dout, c: {"x": dout * c[0] * (1.0 - c[0])},
        named="softmax element by element",
    ),
    _row_fault(
        "log_softmax_sum_missing",
        "log_softmax",
        "the cotangents are not summed",
        lambda g, dout, c: {"x": dout - np.exp(c[0]) * dout},
        named="softmax element by element",
    ),
    _row_fault(
        "linear_weight_mean",
        "linear",
        "the batch is averaged, not summed",
        _only("weight", _linear_weight_mean),
        named="factor 1/N too many",
    ),
    _row_fault(
        "linear_weight_transposed",
        "linear",
        "the weight's gradient is transposed",
        _only("weight", lambda g, dout, c: g["weight"].T),
        named="transposed",
    ),
    _row_fault(
        "linear_bias_not_summed",
        "linear",
        "the bias's gradient is that of the first row",
        _only("bias", lambda g, dout, c: dout.reshape(-1, dout.shape[-1])[0]),
        named="bias not summed",
    ),
    _row_fault(
        "linear_element_zeroed",
        "linear",
        "one element of the weight's gradient is zero",
        _only("weight", lambda g, dout, c: _first_element_zeroed(g["weight"])),
    ),
    _row_fault(
        "add_broadcast_averaged",
        "add",
        "a broadcast operand's gradient is averaged, not summed",
        _only("b", lambda g, dout, c: g["b"] * (max(g["b"].size, 1) / max(dout.size, 1))),
        named="factor 1/N too many",
    ),
    _row_fault(
        "add_not_unbroadcast",
        "add",
        "a broadcast gradient keeps the output's shape",
        _only("b", lambda g, dout, c: dout),
        named="broadcast not summed",
    ),
    _row_fault(
        "subtract_sign_lost",
        "subtract",
        "the second operand's sign is lost",
        _only("b", lambda g, dout, c: -g["b"]),
        named="sign",
    ),
    _row_fault(
        "multiply_swapped",
        "multiply",
        "each operand is multiplied by itself",
        lambda g, dout, c: {name: unbroadcast(dout * x, x.shape) for name, x in zip(("a", "b"), c, strict=True)},
        named="arguments exchanged",
    ),
    _row_fault(
        "concatenate_reversed",
        "concatenate",
        "the parts are handed back along the axis in reverse",
        lambda g, dout, c: {name: np.flip(part, c[1]) for name, part in g.items()},
        named="flipped",
    ),
    _row_fault(
        "reshape_column_major",
        "reshape",
        "the elements are read in column-major order",
        lambda g, dout, c: {"x": dout.reshape(c, order="F")},
        named="another layout",
    ),
    _row_fault(
        "layer_norm_first_term",
        "layer_norm",
        "only dout * weight / sigma is kept",
        _only("x", _layer_norm_first_term),
        named="normalisation term missing",
    ),
    _row_fault(
        "layer_norm_second_mean_missing",
        "layer_norm",
        "the mean of g z is missing",
        _only("x", _layer_norm_without_second_mean),
        named="normalisation term missing",
    ),
    _row_fault(
        "layer_norm_weight_missing",
        "layer_norm",
        "the weight is left out of dx",
        _only("x", _layer_norm_without_weight),
        named="normalisation term missing",
    ),
    _row_fault("mse_factor_two_missing", "mse", "the factor 2 is missing", _scaled(0.5), named="factor 2"),
    _row_fault("mse_batch_mean", "mse", "the mean is over the batch alone", _batch_mean, named="factor 1/N missing"),
    _row_fault(
        "half_squared_error_sum",
        "half_squared_error",
        "the sum is taken for the mean",
        _sum_for_mean,
        named="reduction",
    ),
    _row_fault(
        "mae_magnitude",
        "mae",
        "the sign is lost",
        lambda g, dout, c: {name: np.abs(x) for name, x in g.items()},
        named="sign lost",
    ),
    _row_fault(
        "bce_against_missing",
        "bce",
        "(1 - target) / (1 - x) is missing",
        _only("x", lambda g, dout, c: np.where(c[1] < 1, 0.0, g["x"])),
        named="zero",
    ),
    _row_fault(
        "bce_target_forgotten",
        "bce",
        "the target gets no gradient",
        _only("target", lambda g, dout, c: 0.0 * g["x"]),
        named="zero",
    ),
    _row_fault(
        "bce_with_logits_sigmoid_twice",
        "bce_with_logits",
        "the sigmoid's derivative is applied again",
        _only("x", _sigmoid_again),
        named="derivative twice",
    ),
    _row_fault(
        "cross_entropy_softmax_twice",
        "cross_entropy",
        "the softmax's derivative is applied again",
        _only("x", _softmax_again),
        named="derivative twice",
    ),
    _pair_fault(
        "cross_entropy_first_cotangent",
        "cross_entropy",
        "the loss is scaled by cotangent[0]",
        _first_cotangent("cross_entropy"),
        named="cotangent's first element",
    ),
    _pair_fault(
        "mse_cotangent_ignored",
        "mse",
        "the cotangent is taken as ones",
        _unit_cotangent("mse"),
        named="cotangent as ones",
    ),
    _row_fault(
        "identity_lower_precision",
        "identity",
        "the gradient is computed in float16",
        lambda g, dout, c: {"x": dout.astype(np.float16).astype(dout.dtype)},
        named="lower precision",
    ),
)


def _embedding_rows_assigned(grads: Gradients, dout: Array, cache: Any) -> Array:
    indices, shape, padding = cache
    weight = np.zeros(shape, dout.dtype)
    weight[indices] = np.where((indices == padding)[..., None], 0.0, dout)
    return weight


def _padding_trained(grads: Gradients, dout: Array, cache: Any) -> Gradients:
    indices, shape, _ = cache
    return LAYERS["embedding"].backward(dout, (indices, shape, -1))


def _assigned(grads: Gradients, dout: Array, cache: Any) -> Gradients:
    indices, shape, axis = cache
    dx = np.zeros(shape, dout.dtype)
    np.put_along_axis(dx, indices, dout, axis)
    return {"x": dx}


def _gates_permuted(grads: Gradients, dout: Array, cache: Any) -> Gradients:
    """Every gradient that has one row per gate and unit: four gates, of which two are exchanged."""
    return {name: _exchanged(each) if "weight" in name or "bias" in name else each for name, each in grads.items()}


def _exchanged(gates: Array) -> Array:
    first, second, *others = np.split(gates, 4)
    return np.concatenate((second, first, *others))


def _batch_norm_first_term(grads: Gradients, dout: Array, cache: Any) -> Array:
    _, reciprocal, weight, _ = cache
    return reciprocal * (dout if weight is None else dout * weight.reshape(-1, *[1] * (dout.ndim - 2)))


def _halves_exchanged(grads: Gradients, dout: Array, cache: Any) -> Gradients:
    axis = cache[-1]
    return {"x": np.concatenate(np.split(grads["x"], 2, axis)[::-1], axis)}


def _swapped_where_alike(first: str, second: str) -> Change:
    """Exchange two gradients, where they have one shape."""

    def change(grads: Gradients, dout: Array, cache: Any) -> Gradients:
        alike = grads[first].shape == grads[second].shape
        return {**grads, first: grads[second], second: grads[first]} if alike else grads

    return change


STRUCTURE_FAULTS = (
    _row_fault(
        "conv1d_padding_off_by_one",
        "conv1d",
        "the input's gradient is one element off along the axis",
        _only("x", lambda g, dout, c: np.roll(g["x"], 1, axis=-1)),
        named="shifted",
    ),
    _row_fault(
        "conv1d_bias_of_first_sample",
        "conv1d",
        "the bias's gradient is not summed over the batch",
        _only("bias", lambda g, dout, c: dout[:1].sum(axis=(0, 2))),
        named="bias not summed",
    ),
    _row_fault(
        "conv2d_kernel_flipped",
        "conv2d",
        "the kernel's gradient is flipped along both axes",
        _only("weight", lambda g, dout, c: g["weight"][..., ::-1, ::-1].copy()),
        named="flipped",
    ),
    _row_fault(
        "conv2d_mean_over_places",
        "conv2d",
        "the kernel's gradient is divided by the number of windows",
        _only("weight", lambda g, dout, c: g["weight"] / max(math.prod(dout.shape[2:]), 1)),
        named="factor 1/N too many",
    ),
    _row_fault(
        "conv_transpose2d_kernel_transposed",
        "conv_transpose2d",
        "height and width of the kernel's gradient are exchanged",
        _only("weight", lambda g, dout, c: np.swapaxes(g["weight"], 2, 3).reshape(g["weight"].shape)),
        named="transposed",
    ),
    _row_fault(
        "batch_norm_first_term",
        "batch_norm",
        "only dout * weight / sigma is kept, as in evaluation",
        _only("x", _batch_norm_first_term),
        named="normalisation term missing",
    ),
    _row_fault(
        "dropout_mask_forgotten",
        "dropout",
        "the mask is not applied to the gradient",
        lambda g, dout, c: {**g, "x": dout},
        named="mask missing",
    ),
    _row_fault(
        "prelu_weight_averaged",
        "prelu",
        "the slope's gradient is averaged, not summed",
        _only("weight", lambda g, dout, c: g["weight"] / max(dout.size, 1)),
        named="factor 1/N too many",
    ),
    _row_fault(
        "glu_halves_exchanged",
        "glu",
        "the gate's gradient stands in the place of the other half",
        _halves_exchanged,
        named="halves exchanged",
    ),
    _row_fault(
        "lstm_gates_in_another_order",
        "lstm",
        "the rows of the first two gates are exchanged",
        _gates_permuted,
        named="gate order",
    ),
    _row_fault(
        "attention_key_and_value_exchanged",
        "scaled_dot_product_attention",
        "the key's gradient is handed to the value, and the value's to the key",
        _swapped_where_alike("k", "v"),
        named="arguments exchanged",
    ),
    _row_fault(
        "attention_scale_missing",
        "scaled_dot_product_attention",
        "the query's gradient lacks the scale",
        lambda g, dout, c: {**g, "q": g["q"] / c[6]},
        named="attention scale missing",
    ),
    _row_fault(
        "embedding_rows_assigned",
        "embedding",
        "the gradient of a row that is picked twice is that of the last pick",
        _only("weight", _embedding_rows_assigned),
        named="assigned, not accumulated",
    ),
    _row_fault(
        "embedding_padding_trained",
        "embedding",
        "the padding row gets a gradient",
        _padding_trained,
        named="mask missing",
    ),
    _row_fault(
        "gather_assigned",
        "gather",
        "an element that is picked twice counts once",
        _assigned,
        named="assigned, not accumulated",
    ),
    _row_fault(
        "cumsum_from_the_same_end",
        "cumsum",
        "the gradient is summed from the end that the values are summed from",
        lambda g, dout, c: {"x": LAYERS["cumsum"].forward(dout, axis=c[0], reverse=c[1])[0]},
        named="another option",
    ),
    _row_fault(
        "where_exchanged",
        "where",
        "each side gets the other's gradient",
        _swapped_where_alike("a", "b"),
        named="arguments exchanged",
    ),
    _row_fault(
        "reduce_mean_as_sum",
        "reduce_mean",
        "the factor 1 / N is missing",
        lambda g, dout, c: {"x": g["x"] * (g["x"].size / max(dout.size, 1))},
        named="factor 1/N missing",
    ),
)


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


def _batch_norm_as_in_training(grads: Gradients, dout: Array, cache: Any) -> Array:
    z, reciprocal, weight, over = cache
    return (
        grads["x"] if over else LAYERS["batch_norm"].backward(dout, (z, reciprocal, weight, _channel_axes(dout)))["x"]
    )


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


def _linear_tf32(grads: Gradients, dout: Array, cache: Any) -> Gradients:
    x, weight, _ = cache
    rounded = LAYERS["linear"].backward(_to_eleven_bits(dout), (_to_eleven_bits(x), _to_eleven_bits(weight), False))
    return {**grads, **rounded}


def _weights_of_the_first_step(grads: Gradients, dout: Array, cache: Any) -> Gradients:
    """What a loop back through time leaves that assigns the weights' gradients."""
    runs, *others = cache
    first = [(_only_first(x), _only_first(before), kept, weights) for x, before, kept, weights in runs]
    alone = LAYERS["rnn_tanh"].backward(dout, (first, *others))
    return {name: alone[name] if name.startswith("weight") else each for name, each in grads.items()}


def _only_first(steps: Array) -> Array:
    first = np.zeros_like(steps)
    first[0] = steps[0]
    return first


def _attention_unmasked(grads: Gradients, dout: Array, cache: Any) -> Gradients:
    layer = LAYERS["scaled_dot_product_attention"]
    return layer.backward(dout, (*cache[:5], np.ones_like(cache[5]), *cache[6:]))


KIND_FAULTS = (
    _pair_fault(
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
    _pair_fault(
        "softsign_with_derivative_of_tanh",
        "softsign",
        "the derivative is that of another layer's activation",
        (
            lambda x: (LAYERS["softsign"].forward(x)[0], np.tanh(x)),
            LAYERS["tanh"].backward,
        ),
        named="another activation",
    ),
    _row_fault(
        "avg_pool2d_sum",
        "avg_pool2d",
        "the gradient is not divided by the size of the window",
        lambda g, dout, c: {"x": g["x"] * math.prod(places.shape[1] for places, _ in c[0])},
        named="factor 1/N missing",
    ),
    _row_fault(
        "rnn_tanh_weights_assigned",
        "rnn_tanh",
        "the weights' gradients are assigned in the loop over time",
        _weights_of_the_first_step,
        named="one time step",
    ),
    _row_fault(
        "dropout_scale_lost",
        "dropout",
        "the mask is applied to the gradient without its scale",
        lambda g, dout, c: {**g, "x": dout * (c != 0.0)},
        named="mask scale missing",
    ),
    _row_fault(
        "attention_mask_forgotten",
        "scaled_dot_product_attention",
        "the mask is not applied in the backward pass",
        _attention_unmasked,
        named="mask missing",
    ),
    _row_fault(
        "batch_norm_training_formula",
        "batch_norm",
        "the formula of training is used in evaluation",
        _only("x", _batch_norm_as_in_training),
        named="training formula",
    ),
    _row_fault(
        "reduce_var_divisor",
        "reduce_var",
        "n stands where n - ddof belongs",
        lambda g, dout, c: {"x": g["x"] * (c[1] / max(c[0].size // max(dout.size, 1), 1))},
        named="ddof",
    ),
    _pair_fault(
        "layer_norm_sample_variance",
        "layer_norm",
        "the variance is divided by n - 1 in both passes",
        _norm_with(divisor_less=1, outside=False),
        named="ddof",
    ),
    _pair_fault(
        "layer_norm_eps_outside",
        "layer_norm",
        "eps is added to the standard deviation in both passes",
        _norm_with(divisor_less=0, outside=True),
        named="eps",
    ),
    _pair_fault("rms_norm_eps_missing", "rms_norm", "eps is added nowhere", _without_eps("rms_norm"), named="eps"),
    _pair_fault(
        "relu_inconsistent_at_zero",
        "relu",
        "the derivative at 0 is 1 in arrays of more than two elements, 0 in others",
        _choosing("relu", "at_zero", 0.0, 1.0),
        named="another subgradient",
    ),
    _pair_fault(
        "reduce_max_inconsistent_ties",
        "reduce_max",
        "the first of two largest gets the gradient, more than two share it",
        _choosing("reduce_max", "at_tie", 0.0, 0.5),
        named="ties",
    ),
    _row_fault(
        "linear_tf32",
        "linear",
        "operands have eleven significant bits, as in TF32",
        _linear_tf32,
        named="operands rounded",
    ),
)
"""One of each kind that a hypothesis names and no other fault shows."""


class _WrongWalk(NumpyReference):
    """The reference, which adds up wrongly what several readers of a tensor send back."""

    def __init__(self, accumulate: Callable[[Array, Array], Array]) -> None:
        super().__init__()
        self._accumulate = accumulate

    def add_up(self, name: str, before: Array | None, arriving: Array) -> Array:
        return arriving if before is None else self._accumulate(before, arriving)


class _OverwrittenParameters(NumpyReference):
    """The reference, in whose backward pass every use of a parameter overwrites what an earlier one left."""

    def backward(self, forward: Forward, cotangent: Array) -> Gradients:
        self._parameters = forward.tape[0].parameters
        return super().backward(forward, cotangent)

    def add_up(self, name: str, before: Array | None, arriving: Array) -> Array:
        return super().add_up(name, None if name in self._parameters else before, arriving)


WALK_FAULTS = (
    Fault(
        "fan_out_path_dropped",
        None,
        "of the paths that meet, and of the uses of a shared parameter, only the last one counts",
        lambda: _WrongWalk(lambda before, arriving: arriving),
        named="path missing",
    ),
    Fault(
        "fan_out_path_doubled",
        None,
        "of the paths that meet, one counts twice",
        lambda: _WrongWalk(lambda before, arriving: before + 2.0 * arriving),
        named="path doubled",
    ),
    Fault(
        "shared_parameter_overwritten",
        None,
        "of the uses of a shared parameter only the last one counts; paths between layers add up",
        _OverwrittenParameters,
        named="path missing",
    ),
)


class _AddingTape(NumpyReference):
    """The reference with a tape that keeps its gradients: each backward pass adds to them, and nothing zeroes them."""

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        forward = super().forward(network, values, dtype)
        return Forward(forward.outputs, (forward, {}))

    def backward(self, forward: Forward, cotangent: Array) -> Gradients:
        tape, kept = forward.tape
        for name, gradient in super().backward(tape, cotangent).items():
            kept[name] = kept[name] + gradient if name in kept else gradient
        return dict(kept)


def _overwriting_its_cache(layer: str) -> Row:
    """The backward function computes into an array that the forward pass has kept for it."""
    right, backward = LAYERS[layer].forward, LAYERS[layer].backward

    def keeping(x: Array) -> tuple[Array, Any]:
        return right(x.copy())  # what is overwritten is not the caller's

    def in_place(dout: Array, kept: Any) -> Gradients:
        gradients = backward(dout, kept)
        np.copyto(kept[0], gradients["x"])
        return gradients

    return keeping, in_place


def _cotangent_in_place(dout: Array, cache: Any) -> Gradients:
    """ReLU's backward pass, in place."""
    np.copyto(dout, LAYERS["relu"].backward(dout, cache)["x"])
    return {"x": dout}


TAPE_FAULTS = (
    Fault("tape_adds_up", None, "a second backward pass on the same tape adds to the first", _AddingTape),
    _pair_fault(
        "gelu_cache_overwritten",
        "gelu",
        "the backward pass computes in place, into what it needs the next time",
        _overwriting_its_cache("gelu"),
    ),
    _pair_fault(
        "relu_cotangent_overwritten",
        "relu",
        "the backward pass computes in place, into the cotangent",
        (LAYERS["relu"].forward, _cotangent_in_place),
    ),
)


def _unsteady() -> Callable[[Gradients, str], Gradients]:
    generator = np.random.default_rng(0)
    return lambda gradients, name: {**gradients, name: gradients[name] * generator.uniform(1.0, 2.0)}


class _Misbehaving(NumpyReference):
    """The reference, whose gradients are spoilt on their way out wherever a layer takes part."""

    def __init__(self, layer: str, spoil: Callable[[Gradients, str], Mapping[str, Any]]) -> None:
        super().__init__()
        self._layer = layer
        self._spoil = spoil

    def backward(self, forward: Forward, cotangent: np.ndarray) -> dict[str, Any]:
        gradients = super().backward(forward, cotangent)
        for node in forward.tape[0].nodes:
            if node.layer.name == self._layer:
                gradients = dict(self._spoil(gradients, node.inputs[0]))
        return gradients


def _raise(gradients: Gradients, name: str) -> Gradients:
    raise RuntimeError("the kernel is not implemented")


def _hang(gradients: Gradients, name: str) -> Gradients:
    while True:
        time.sleep(0.01)


def _out_of_memory(gradients: Gradients, name: str) -> Gradients:
    raise MemoryError("cannot allocate the gradients")


def _error_state_changed(gradients: Gradients, name: str) -> Gradients:
    np.seterr(under="raise" if np.geterr()["under"] == "ignore" else "ignore")
    return gradients


def _misbehaviour(name: str, mistake: str, spoil: Callable[[Gradients, str], Mapping[str, Any]]) -> Fault:
    return Fault(name, "tanh", mistake, lambda: _Misbehaving("tanh", spoil))


MISBEHAVIOUR = {
    "nonfinite": _misbehaviour("returns_nan", "a gradient is NaN", lambda g, name: {**g, name: g[name] * np.nan}),
    "missing": _misbehaviour("returns_none", "a gradient is None", lambda g, name: {**g, name: None}),
    "shape": _misbehaviour(
        "wrong_shape", "a gradient has an axis too many", lambda g, name: {**g, name: g[name][None]}
    ),
    "dtype": _misbehaviour(
        "wrong_dtype", "a gradient is in another dtype", lambda g, name: {**g, name: g[name].astype(np.float16)}
    ),
    "crash": _misbehaviour("raises", "the backward pass raises", _raise),
    "timeout": _misbehaviour("hangs", "the backward pass does not return", _hang),
    "memory": _misbehaviour("runs_out_of_memory", "the backward pass finds no memory", _out_of_memory),
    "global_state": _misbehaviour(
        "changes_the_error_state", "how NumPy treats underflow is left changed", _error_state_changed
    ),
    "view": _pair_fault(
        "hands_its_input_on",
        "identity",
        "the output is the very array that was given",
        (lambda x: (x, None), LAYERS["identity"].backward),
    ),
    "nondeterministic": Fault(
        "never_the_same",
        "tanh",
        "two identical calls give different numbers",
        lambda: _Misbehaving("tanh", _unsteady()),
    ),
    "mutated_input": _pair_fault(
        "writes_to_its_input", "relu", "the input is overwritten", (_input_mutated, LAYERS["relu"].backward)
    ),
}
"""The kind of verdict that each must get -> the fault."""

SORTS = (ROW_FAULTS, STRUCTURE_FAULTS, KIND_FAULTS, WALK_FAULTS, TAPE_FAULTS, tuple(MISBEHAVIOUR.values()))

FAULTS: dict[str, Fault] = {fault.name: fault for sort in SORTS for fault in sort}
