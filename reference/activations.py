"""Elementwise activations. Shapes: x, out, dout and dx all have the same shape, any rank.

Each backward function computes dx = dout * f'(x) from what forward kept.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr

from gradproof.layer import UNIT, Kink, Layer, Option, Real
from gradproof.reference.common import Array, Gradients, log_one_plus_exp, logistic, one_sided, positive_part


def identity_forward(x: Array) -> tuple[Array, None]:
    """f(x) = x."""
    return x.copy(), None


def identity_backward(dout: Array, cache: None) -> Gradients:
    """f'(x) = 1."""
    return {"x": dout}


def relu_forward(x: Array, *, at_zero: float = 0.0) -> tuple[Array, tuple[Array, float]]:
    """f(x) = max(x, 0) (Nair and Hinton 2010)."""
    return positive_part(x), (x, at_zero)


def relu_backward(dout: Array, cache: tuple[Array, float]) -> Gradients:
    """f'(x) = 0 below 0, 1 above. At 0: any number from 0 to 1, by default 0."""
    x, at_zero = cache
    return {"x": dout * one_sided(x, 0.0, 1.0, at_zero)}


def leaky_relu_forward(
    x: Array, *, negative_slope: float, at_zero: float = 0.0
) -> tuple[Array, tuple[Array, float, float]]:
    """f(x) = x above 0, negative_slope * x below (Maas et al. 2013)."""
    return np.where(x.real < 0, negative_slope * x, x), (x, negative_slope, at_zero)


def leaky_relu_backward(dout: Array, cache: tuple[Array, float, float]) -> Gradients:
    """f'(x) = negative_slope below 0, 1 above. At 0: any number between, by default the slope."""
    x, negative_slope, at_zero = cache
    return {"x": dout * one_sided(x, negative_slope, 1.0, at_zero)}


def elu_forward(x: Array, *, alpha: float, at_zero: float = 0.0) -> tuple[Array, tuple[Array, float, float]]:
    """f(x) = x above 0, alpha * (exp(x) - 1) below (Clevert et al. 2016)."""
    return np.where(x.real < 0, alpha * np.expm1(-positive_part(-x)), x), (x, alpha, at_zero)


def elu_backward(dout: Array, cache: tuple[Array, float, float]) -> Gradients:
    """f'(x) = alpha * exp(x) below 0, 1 above. At 0: any number from alpha to 1, by default alpha."""
    x, alpha, at_zero = cache
    return {"x": dout * one_sided(x, alpha * np.exp(-positive_part(-x)), 1.0, at_zero)}


def tanh_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = tanh(x)."""
    out = np.tanh(x)
    return out, out


def tanh_backward(dout: Array, out: Array) -> Gradients:
    """f'(x) = 1 - f(x)^2."""
    return {"x": dout * (1.0 - out * out)}


def sigmoid_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = 1 / (1 + exp(-x))."""
    out = logistic(x)
    return out, out


def sigmoid_backward(dout: Array, out: Array) -> Gradients:
    """f'(x) = f(x) (1 - f(x))."""
    return {"x": dout * out * (1.0 - out)}


def softplus_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = log(1 + exp(x)) (Dugas et al. 2001)."""
    return log_one_plus_exp(x), x


def softplus_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = sigmoid(x)."""
    return {"x": dout * logistic(x)}


def silu_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """f(x) = x sigmoid(x) (Hendrycks and Gimpel 2016)."""
    gate = logistic(x)
    return x * gate, (x, gate)


def silu_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """f'(x) = s + x s (1 - s), with s = sigmoid(x)."""
    x, gate = cache
    return {"x": dout * gate * (1.0 + x * (1.0 - gate))}


def gelu_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """f(x) = x P(x), with P the standard normal distribution function (Hendrycks and Gimpel 2016)."""
    below = ndtr(x)
    return x * below, (x, below)


def gelu_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """f'(x) = P(x) + x p(x), with p(x) = exp(-x^2 / 2) / sqrt(2 pi)."""
    x, below = cache
    density = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return {"x": dout * (below + x * density)}


GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715


def gelu_tanh_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """f(x) = x / 2 (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016)."""
    bend = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x))
    return 0.5 * x * (1.0 + bend), (x, bend)


def gelu_tanh_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """f'(x) = (1 + t) / 2 + x / 2 (1 - t^2) u', with t = tanh(u), u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)."""
    x, bend = cache
    slope = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * x * x)
    return {"x": dout * (0.5 * (1.0 + bend) + 0.5 * x * (1.0 - bend * bend) * slope)}


AT_ZERO = Kink("at_zero", point=0.0, default=0.0)
SLOPE = Option("negative_slope", Real(-10.0, 10.0, (0.2, 0.01, 0.0, 1.0, -0.5)), 0.01)
ALPHA = Option("alpha", Real(-10.0, 10.0, (1.0, 0.5, 2.0, -0.5)), 1.0)

LAYERS = (
    Layer("identity", "activation", "activations", identity_forward, identity_backward),
    Layer("relu", "activation", "activations", relu_forward, relu_backward, kinks=(AT_ZERO,)),
    Layer(
        "leaky_relu", "activation", "activations", leaky_relu_forward, leaky_relu_backward, (SLOPE,), kinks=(AT_ZERO,)
    ),
    Layer("elu", "activation", "activations", elu_forward, elu_backward, (ALPHA,), kinks=(AT_ZERO,)),
    Layer("tanh", "activation", "activations", tanh_forward, tanh_backward),
    Layer("sigmoid", "activation", "activations", sigmoid_forward, sigmoid_backward, codomain=UNIT),
    Layer("softplus", "activation", "activations", softplus_forward, softplus_backward, edges=(20.0, 21.0)),
    Layer("silu", "activation", "activations", silu_forward, silu_backward),
    Layer("gelu", "activation", "activations", gelu_forward, gelu_backward, edges=(-6.0, 6.0)),
    Layer("gelu_tanh", "activation", "activations", gelu_tanh_forward, gelu_tanh_backward, edges=(-6.0, 6.0)),
)
