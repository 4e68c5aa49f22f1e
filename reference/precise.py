"""The pairs of functions that keep the digits which textbook formulas cancel, or lose to a number too small for them.

What is expected of a layer comes from here where `PRECISE` has its name; elementwise, to 4 units in the last place.
What the textbook's pair beside it loses is an honest error of rounding, which frameworks make too: the noise floor
measures it. Shapes: as in the textbook's pair. Complex-safe, like all of the reference.

Legend: s the logistic function, P the standard normal distribution function, u = sqrt(2 / pi) (x + 0.044715 x^3).
"""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
from scipy.special import erfcx, ndtr

from gradproof.model.layer import Layer
from gradproof.reference import activations as textbook
from gradproof.reference.common import Array, Gradients, clamp, logistic, magnitude
from gradproof.reference.gated import Unit, unit_backward, unit_forward
from gradproof.reference.walk import Row

# What constants that decide an exponent lack of the float64 number next to them.
QUICK_GELU_REST = float(Decimal("1.702") - Decimal(textbook.QUICK_GELU_SCALE))
TWICE_LINEAR, TWICE_LINEAR_REST = 1.5957691216057308, -9.96930880911092e-17
TWICE_CUBIC, TWICE_CUBIC_REST = 0.07135481627260025, -6.175149918155315e-19

GATE_END = 1000.0
"""From here on the gate of quick_gelu is 0 or 1 in every dtype; the halves of a larger x could overflow."""

FAR = -2.0
"""Below it a gate is small, and its digits are worth more than one rounding."""

SERIES_TERMS = 10


def tanh_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = tanh(x)."""
    return np.tanh(x), x


def tanh_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = 4 d / b^2, with d = exp(-2 |x|) and b = 1 + d, where 1 - tanh(x)^2 cancels."""
    d = np.exp(-2.0 * magnitude(x))
    b = 1.0 + d
    return {"x": dout * (4.0 * d / (b * b))}


def sigmoid_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = s(x)."""
    return logistic(x), x


def sigmoid_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = s(x) s(-x), where 1 - s(x) cancels."""
    return {"x": dout * logistic(x) * logistic(-x)}


def silu_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x s(x)."""
    return times_logistic(x, at=x), x


def silu_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = (1 + x s(-x)) s(x)."""
    return {"x": dout * times_logistic(1.0 + x * logistic(-x), at=x)}


def times_logistic(a: Array, *, at: Array, rest: Array | float = 0.0) -> Array:
    """a s(at + rest), where the square of `rest` does not count.

    s(y) = h^2 / (1 + exp(-|y|)), h = exp(min(y, 0) / 2): a stands between the halves, so that nothing is subnormal
    before the product is. s(y + rest) = s(y) (1 + rest s(-y)).
    """
    half = np.exp(0.5 * np.where(at.real < 0, at, 0.0))
    nearly = a * half / (1.0 + np.exp(-magnitude(at))) * half
    return nearly * (1.0 + rest * logistic(-at))


def gelu_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x P(x), far below 0 with P(x) = erfcx(-x / sqrt(2)) / 2 exp(-x^2 / 2)."""
    far = clamp(x, -textbook.SATURATED, FAR)
    gelu_far = times_gauss(0.5 * x * erfcx(-far / math.sqrt(2.0)), at=far)
    return np.where(x.real < FAR, gelu_far, x * ndtr(x)), x


def gelu_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = (erfcx(-x / sqrt(2)) / 2 + x / sqrt(2 pi)) exp(-x^2 / 2) far below 0, else the textbook's."""
    far = clamp(x, -textbook.SATURATED, FAR)
    ratio = 0.5 * erfcx(-far / math.sqrt(2.0)) + far / math.sqrt(2.0 * math.pi)
    _, kept = textbook.gelu_forward(x)
    return {"x": np.where(x.real < FAR, dout * times_gauss(ratio, at=far), textbook.gelu_backward(dout, kept)["x"])}


def times_gauss(a: Array, *, at: Array) -> Array:
    """a exp(-at^2 / 2) = a h (h (1 - low / 2)), h = exp(-high / 4), with at^2 = high + low to twice the digits.

    a stands before the halves, so that nothing is subnormal before the product is.
    """
    high, low = two_product(at, at)
    half = np.exp(-0.25 * high)
    return a * half * (half * (1.0 - 0.5 * low))


def gelu_tanh_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x s(2 u) = x (1 + tanh(u)) / 2."""
    return times_tanh_gate(x, at=x), x


def gelu_tanh_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = (1 + x s(-2 u) 2 u') s(2 u) far from 0, and near it the textbook's."""
    is_far = magnitude(x.real) > -FAR
    far = np.where(is_far, clamp(x, -textbook.SATURATED, textbook.SATURATED), FAR)
    closed = times_tanh_gate(np.ones_like(far), at=-far)  # s(-2 u), for u is odd
    slope = times_tanh_gate(1.0 + far * closed * (TWICE_LINEAR + 3.0 * TWICE_CUBIC * far * far), at=far)
    _, kept = textbook.gelu_tanh_forward(x)
    return {"x": np.where(is_far, dout * slope, textbook.gelu_tanh_backward(dout, kept)["x"])}


def times_tanh_gate(a: Array, *, at: Array) -> Array:
    """a s(2 u), u that of x = `at`, with 2 u = x (TWICE_LINEAR + TWICE_CUBIC x^2) to twice the digits."""
    near = clamp(at, -textbook.SATURATED, textbook.SATURATED)
    square, of_square = two_product(near, near)
    cubic, of_cubic = two_product(square, TWICE_CUBIC)
    factor, of_factor = two_sum(cubic, TWICE_LINEAR)
    high, of_high = two_product(near, factor)
    rest = of_factor + of_cubic + TWICE_CUBIC * of_square + TWICE_CUBIC_REST * square + TWICE_LINEAR_REST
    return times_logistic(a, at=high, rest=of_high + near * rest)


def quick_gelu_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x s(1.702 x)."""
    return times_quick_gate(x, at=x), x


def quick_gelu_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = (1 + 1.702 x s(-1.702 x)) s(1.702 x)."""
    closed = times_quick_gate(np.ones_like(x), at=-x)
    return {"x": dout * times_quick_gate(1.0 + textbook.QUICK_GELU_SCALE * x * closed, at=x)}


def times_quick_gate(a: Array, *, at: Array) -> Array:
    """a s(1.702 at).

    exp turns the absolute error of its argument into a relative one, so that 1.702 at needs more digits than a float64
    number has.
    """
    near = clamp(at, -GATE_END, GATE_END)
    high, low = two_product(near, textbook.QUICK_GELU_SCALE)
    return times_logistic(a, at=high, rest=low + QUICK_GELU_REST * near)


def mish_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x t, t = tanh(log(1 + w)) = w (2 + w) / (2 + 2 w + w^2), with w = exp(x) = s(x) (1 + w).

    That is x (1 + d) a / b s(x), with d = exp(-|x|), a = 2 + w and b = 2 + 2 w + w^2 as in `mish_quotient`.
    """
    d = np.exp(-magnitude(x))
    a, b = mish_quotient(x, d)
    return times_logistic(x * (1.0 + d) * a / b, at=x), x


def mish_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = (t / s(x) + x (1 - t^2)) s(x) far from 0, and near it the textbook's.

    t / s(x) = (1 + d) a / b as in `mish_forward`, and 1 - t^2 = (2 (1 + w) / b)^2.
    """
    is_far = magnitude(x.real) > -FAR
    far = np.where(is_far, x, FAR)
    d = np.exp(-magnitude(far))
    a, b = mish_quotient(far, d)
    root = np.where(far.real < 0, 2.0, 2.0 * d) * (1.0 + d) / b
    slope = times_logistic((1.0 + d) * a / b + far * root * root, at=far)
    _, kept = textbook.mish_forward(x)
    return {"x": np.where(is_far, dout * slope, textbook.mish_backward(dout, kept)["x"])}


def mish_quotient(x: Array, d: Array) -> tuple[Array, Array]:
    """a = 2 + w and b = 2 + 2 w + w^2, w = exp(x); above 0 over w and over w^2. d: the smaller of w and 1 / w."""
    square = d * d
    a = np.where(x.real < 0, 2.0 + d, 1.0 + 2.0 * d)
    return a, np.where(x.real < 0, 2.0 + 2.0 * d + square, 1.0 + 2.0 * d + 2.0 * square)


class Root(NamedTuple):
    """What squareplus keeps: x, root = sqrt(x^2 + b), and b."""

    x: Array
    root: Array
    b: float


def squareplus_forward(x: Array, *, b: float) -> tuple[Array, Root]:
    """f(x) = (x + root) / 2; below 0, where it cancels, b / (root + |x|) / 2."""
    root = textbook.root_plus(x, b)
    return np.where(x.real < 0, half_quotient(x, root, b), 0.5 * x + 0.5 * root), Root(x, root, b)


def squareplus_backward(dout: Array, kept: Root) -> Gradients:
    """f'(x) = (1 + x / root) / 2; below 0, where it cancels, b / (root + |x|) / 2 / root."""
    x, root = kept.x, kept.root
    return {"x": dout * np.where(x.real < 0, half_quotient(x, root, kept.b) / root, 0.5 * (1.0 + x / root))}


def half_quotient(x: Array, root: Array, b: float) -> Array:
    """b / (root + |x|) / 2, for a sum that may overflow."""
    return 0.25 * b / (0.5 * root + 0.5 * magnitude(x))


def tanhshrink_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x - t = (x cosh(x) - sinh(x)) / cosh(x), t = tanh(x).

    Below 1 the numerator is the sum of 2 k x^(2 k + 1) / (2 k + 1)! over k.
    """
    near = clamp(x, -1.0, 1.0)
    total = np.zeros_like(near)
    for k in range(SERIES_TERMS, 0, -1):
        total = near * near * (total + 2.0 * k / math.factorial(2 * k + 1))
    t = np.tanh(x)
    return np.where(magnitude(x.real) < 1.0, near * total / np.cosh(near), x - t), t


def swiglu_forward(x: Array, *, axis: int) -> tuple[Array, Unit]:
    """out = silu(a) b, a the first and b the second half of x along the axis."""
    return unit_forward(PRECISE["silu"], x, axis)


def geglu_forward(x: Array, *, axis: int, approximate: str) -> tuple[Array, Unit]:
    """out = gelu(a) b, gelu in its exact form or in its tanh form."""
    return unit_forward(PRECISE["gelu_tanh" if approximate == "tanh" else "gelu"], x, axis)


def two_product(a: Array, b: Array | float) -> tuple[Array, Array]:
    """a b and its rounding error, both exactly (Dekker 1971); |a| and |b| below 1e150."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _halves(a: Array | float) -> tuple[Any, Any]:
    """Two numbers of 26 bits whose sum is a (Veltkamp 1968)."""
    spread = 134217729.0 * a  # 2^27 + 1
    high = spread - (spread - a)
    return high, a - high


def two_sum(a: Array, b: float) -> tuple[Array, Array]:
    """a + b and its rounding error, both exactly (Knuth 1969)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


PRECISE: dict[str, Row] = {
    "tanh": (tanh_forward, tanh_backward),
    "sigmoid": (sigmoid_forward, sigmoid_backward),
    "silu": (silu_forward, silu_backward),
    "gelu": (gelu_forward, gelu_backward),
    "gelu_tanh": (gelu_tanh_forward, gelu_tanh_backward),
    "quick_gelu": (quick_gelu_forward, quick_gelu_backward),
    "mish": (mish_forward, mish_backward),
    "squareplus": (squareplus_forward, squareplus_backward),
    "tanhshrink": (tanhshrink_forward, textbook.tanhshrink_backward),
    "swiglu": (swiglu_forward, unit_backward),
    "geglu": (geglu_forward, unit_backward),
}
"""Layer name -> the pair that gives what is expected of it; a layer without one keeps its digits in the textbook's."""


def precise(layer: Layer) -> Layer:
    """The layer with the functions that what is expected of it comes from."""
    forward, backward = PRECISE.get(layer.name, (layer.forward, layer.backward))
    return replace(layer, forward=forward, backward=backward)
