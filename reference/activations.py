"""Smooth elementwise activations. Shapes: x, out, dout and dx all have the same shape, any rank.

Each backward function computes dx = dout * f'(x) from what forward kept.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from scipy.special import ndtr

from gradproof.model.layer import UNIT, Layer
from gradproof.model.options import Option, Real
from gradproof.reference.common import Array, Gradients, clamp, log_one_plus_exp, logistic, magnitude

GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715
QUICK_GELU_SCALE = 1.702
SATURATED = 60.0
"""From here on the gates of both forms of gelu are 0 or 1 in every dtype; powers of a larger x could overflow."""


def identity_forward(x: Array) -> tuple[Array, None]:
    """f(x) = x."""
    return x.copy(), None


def identity_backward(dout: Array, cache: None) -> Gradients:
    """f'(x) = 1."""
    return {"x": dout}


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


def softplus_forward(x: Array, *, beta: float) -> tuple[Array, Array]:
    """f(x) = log(1 + exp(beta x)) / beta (Dugas et al. 2001)."""
    scaled = beta * x
    return log_one_plus_exp(scaled) / beta, scaled


def softplus_backward(dout: Array, scaled: Array) -> Gradients:
    """f'(x) = sigmoid(beta x)."""
    return {"x": dout * logistic(scaled)}


def silu_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """f(x) = x s(x), with s the logistic function (Hendrycks and Gimpel 2016)."""
    s = logistic(x)
    return x * s, (x, s)


def silu_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """f'(x) = s (1 + x (1 - s)), with s = s(x)."""
    x, s = cache
    return {"x": dout * (s * (1.0 + x * (1.0 - s)))}


def gelu_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """f(x) = x P(x), with P the standard normal distribution function (Hendrycks and Gimpel 2016)."""
    gate = ndtr(x)
    return x * gate, (x, gate)


def gelu_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """f'(x) = P(x) + x p(x), with the density p(x) = exp(-x^2 / 2) / sqrt(2 pi)."""
    x, gate = cache
    near = clamp(x, -SATURATED, SATURATED)
    density = np.exp(-0.5 * near * near) / math.sqrt(2.0 * math.pi)
    return {"x": dout * (gate + x * density)}


def gelu_tanh_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """f(x) = x (1 + t) / 2, t = tanh(u), u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016)."""
    near = clamp(x, -SATURATED, SATURATED)
    t = np.tanh(GELU_SCALE * (near + GELU_CUBIC * near * near * near))
    return x * (0.5 * (1.0 + t)), (x, t)


def gelu_tanh_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """f'(x) = (1 + t) / 2 + x / 2 (1 - t^2) u', with u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)."""
    x, t = cache
    near = clamp(x, -SATURATED, SATURATED)
    du = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * near * near)
    return {"x": dout * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * du)}


def quick_gelu_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """f(x) = x s(1.702 x), with s the logistic function (Hendrycks and Gimpel 2016)."""
    s = logistic(QUICK_GELU_SCALE * x)
    return x * s, (x, s)


def quick_gelu_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """f'(x) = s (1 + 1.702 x (1 - s)), with s = s(1.702 x)."""
    x, s = cache
    return {"x": dout * (s * (1.0 + QUICK_GELU_SCALE * x * (1.0 - s)))}


def mish_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """f(x) = x t, with t = tanh(log(1 + exp(x))) (Misra 2019)."""
    t = np.tanh(log_one_plus_exp(x))
    return x * t, (x, t)


def mish_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """f'(x) = t + x (1 - t^2) s(x), with s the logistic function."""
    x, t = cache
    return {"x": dout * (t + x * (1.0 - t * t) * logistic(x))}


def softsign_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x / b, b = 1 + |x| (Turian et al. 2009)."""
    b = 1.0 + magnitude(x)
    return x / b, b


def softsign_backward(dout: Array, b: Array) -> Gradients:
    """f'(x) = 1 / b^2."""
    return {"x": dout / b / b}


def squareplus_forward(x: Array, *, b: float) -> tuple[Array, tuple[Array, Array]]:
    """f(x) = (x + sqrt(x^2 + b)) / 2 (Barron 2021)."""
    root = root_plus(x, b)
    return 0.5 * (x + root), (x, root)


def squareplus_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """f'(x) = (1 + x / sqrt(x^2 + b)) / 2."""
    x, root = cache
    return {"x": dout * (0.5 * (1.0 + x / root))}


def root_plus(x: Array, b: float) -> Array:
    """sqrt(x^2 + b), with a scale taken out of the root, as x^2 may overflow."""
    scale = np.maximum(magnitude(x.real), math.sqrt(b))
    share = x / scale
    return scale * np.sqrt(share * share + (math.sqrt(b) / scale) ** 2)


def tanhshrink_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x - t, t = tanh(x)."""
    t = np.tanh(x)
    return x - t, t


def tanhshrink_backward(dout: Array, t: Array) -> Gradients:
    """f'(x) = t^2."""
    return {"x": dout * t * t}


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
