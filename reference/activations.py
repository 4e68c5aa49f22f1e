"""Smooth elementwise activations. Shapes: x, out, dout and dx all have the same shape, any rank.

Each backward function computes dx = dout * f'(x) from what forward kept.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from gradproof.layer import UNIT, Layer, Option, Real
from gradproof.reference.common import Array, Gradients, log_one_plus_exp, logistic, magnitude
from gradproof.reference.digits import (
    QUICK_GELU_SCALE,
    gelu_slope,
    gelu_tanh_slope,
    logistic_rest,
    mish_slope,
    quick_gate_rest,
    squareplus_slope,
    squareplus_value,
    tanh_gap,
    tanh_slope,
    times_logistic,
    times_mish_gate,
    times_normal,
    times_quick_gate,
    times_tanh_gate,
)


def identity_forward(x: Array) -> tuple[Array, None]:
    """f(x) = x."""
    return x.copy(), None


def identity_backward(dout: Array, cache: None) -> Gradients:
    """f'(x) = 1."""
    return {"x": dout}


def tanh_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = tanh(x)."""
    return np.tanh(x), x


def tanh_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = 1 - tanh(x)^2."""
    return {"x": dout * tanh_slope(x)}


def sigmoid_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """f(x) = 1 / (1 + exp(-x))."""
    out = logistic(x)
    return out, (x, out)


def sigmoid_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """f'(x) = f(x) (1 - f(x))."""
    x, out = cache
    return {"x": dout * out * logistic_rest(x, out)}


def softplus_forward(x: Array, *, beta: float) -> tuple[Array, Array]:
    """f(x) = log(1 + exp(beta x)) / beta (Dugas et al. 2001)."""
    scaled = beta * x
    return log_one_plus_exp(scaled) / beta, scaled


def softplus_backward(dout: Array, scaled: Array) -> Gradients:
    """f'(x) = sigmoid(beta x)."""
    return {"x": dout * logistic(scaled)}


def silu_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x s(x), with s the logistic function (Hendrycks and Gimpel 2016)."""
    return times_logistic(x, x), x


def silu_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = s(x) (1 + x (1 - s(x)))."""
    return {"x": dout * times_logistic(1.0 + x * logistic_rest(x, logistic(x)), x)}


def gelu_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x P(x), with P the standard normal distribution function (Hendrycks and Gimpel 2016)."""
    return times_normal(x, x), x


def gelu_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = P(x) + x p(x), with p(x) = exp(-x^2 / 2) / sqrt(2 pi)."""
    return {"x": dout * gelu_slope(x)}


def gelu_tanh_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x t(x), t(x) = (1 + tanh(u)) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016)."""
    return times_tanh_gate(x, x), x


def gelu_tanh_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = t(x) + x / 2 (1 - tanh(u)^2) u', with u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)."""
    return {"x": dout * gelu_tanh_slope(x)}


def quick_gelu_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x s(1.702 x), with s the logistic function (Hendrycks and Gimpel 2016)."""
    return times_quick_gate(x, x), x


def quick_gelu_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = s (1 + 1.702 x (1 - s)), with s = s(1.702 x)."""
    return {"x": dout * times_quick_gate(1.0 + QUICK_GELU_SCALE * x * quick_gate_rest(x), x)}


def mish_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x tanh(softplus(x)) (Misra 2019)."""
    return times_mish_gate(x, x), x


def mish_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = t + x (1 - t^2) sigmoid(x), with t = tanh(softplus(x))."""
    return {"x": dout * mish_slope(x)}


def softsign_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x / (1 + |x|) (Turian et al. 2009)."""
    below = 1.0 + magnitude(x)
    return x / below, below


def softsign_backward(dout: Array, below: Array) -> Gradients:
    """f'(x) = 1 / (1 + |x|)^2."""
    return {"x": dout / below / below}


def squareplus_forward(x: Array, *, b: float) -> tuple[Array, tuple[Array, Array, float]]:
    """f(x) = (x + sqrt(x^2 + b)) / 2 (Barron 2021), with a scale taken out of the root, as x^2 may overflow."""
    scale = np.maximum(magnitude(x.real), math.sqrt(b))
    share = x / scale
    root = scale * np.sqrt(share * share + (math.sqrt(b) / scale) ** 2)
    return squareplus_value(x, root, b=b), (x, root, b)


def squareplus_backward(dout: Array, cache: tuple[Array, Array, float]) -> Gradients:
    """f'(x) = (1 + x / sqrt(x^2 + b)) / 2."""
    x, root, b = cache
    return {"x": dout * squareplus_slope(x, root, b=b)}


def tanhshrink_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x - tanh(x)."""
    return tanh_gap(x), np.tanh(x)


def tanhshrink_backward(dout: Array, bend: Array) -> Gradients:
    """f'(x) = tanh(x)^2."""
    return {"x": dout * bend * bend}


def log_sigmoid_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = log(sigmoid(x)) = -softplus(-x)."""
    return -log_one_plus_exp(-x), x


def log_sigmoid_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = sigmoid(-x)."""
    return {"x": dout * logistic(-x)}


BETA = Option("beta", Real(1e-3, 1e3, (1.0, 2.0, 0.5)), 1.0)
SQUARE_B = Option("b", Real(1e-6, 1e6, (4.0, 1.0)), 4.0)

activation = partial(Layer, kind="activation", family="activations")

LAYERS = (
    activation("identity", forward=identity_forward, backward=identity_backward),
    activation("tanh", forward=tanh_forward, backward=tanh_backward),
    activation("sigmoid", forward=sigmoid_forward, backward=sigmoid_backward, codomain=UNIT),
    activation("softplus", forward=softplus_forward, backward=softplus_backward, options=(BETA,), edges=(20.0, 21.0)),
    activation("silu", forward=silu_forward, backward=silu_backward),
    activation("gelu", forward=gelu_forward, backward=gelu_backward, edges=(-6.0, 6.0)),
    activation("gelu_tanh", forward=gelu_tanh_forward, backward=gelu_tanh_backward, edges=(-6.0, 6.0)),
    activation("quick_gelu", forward=quick_gelu_forward, backward=quick_gelu_backward),
    activation("mish", forward=mish_forward, backward=mish_backward),
    activation("softsign", forward=softsign_forward, backward=softsign_backward),
    activation("squareplus", forward=squareplus_forward, backward=squareplus_backward, options=(SQUARE_B,)),
    activation("tanhshrink", forward=tanhshrink_forward, backward=tanhshrink_backward),
    activation("log_sigmoid", forward=log_sigmoid_forward, backward=log_sigmoid_backward),
)
