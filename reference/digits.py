"""Functions that keep the digits which their usual formulas cancel, or lose to a number too small to hold them.

Frameworks have the usual formulas, and what these lose is an honest error of rounding. So each function here has both:
the exact one gives the reference's numbers, and the usual one is what arithmetic that rounds (`rounds`, the noise
floor's arrays) goes through. Shapes: elementwise; complex-safe, like all of the reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
from scipy.special import erfcx, ndtr

from gradproof.reference.common import Array, clamp, log_one_plus_exp, logistic, magnitude, positive_part

GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715
QUICK_GELU_SCALE = 1.702
# What constants that decide an exponent lack of the float64 number next to them.
QUICK_GELU_REST = float(Decimal("1.702") - Decimal(QUICK_GELU_SCALE))
TWICE_LINEAR, TWICE_LINEAR_REST = 1.5957691216057308, -9.96930880911092e-17
TWICE_CUBIC, TWICE_CUBIC_REST = 0.07135481627260025, -6.175149918155315e-19

# From here on these gates are 0 or 1 in every dtype; powers of a larger x could overflow.
GATE_END = 1000.0
TANH_GATE_END = NORMAL_END = 60.0
FAR = -2.0
"""Below it a gate is small, and its digits are worth more than one rounding."""

SERIES_TERMS = 10

Function = Callable[..., Array]


def usually(usual: Function) -> Callable[[Function], Function]:
    """Decorates the exact function of some arrays with the usual formula for the same numbers."""

    def decorate(exact: Function) -> Function:
        @functools.wraps(exact)
        def choose(*arrays: Array, **options: Any) -> Array:
            rounds = any(getattr(each, "rounds", False) for each in arrays)
            return (usual if rounds else exact)(*arrays, **options)

        return choose

    return decorate


def negative_part(x: Array) -> Array:
    """min(x, 0)."""
    return np.where(x.real < 0, x, 0.0)


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


@usually(lambda x: 1.0 - np.square(np.tanh(x)))
def tanh_slope(x: Array) -> Array:
    """1 - tanh(x)^2 = 4 d / (1 + d)^2, with d = exp(-2 |x|)."""
    decay = np.exp(-2.0 * magnitude(x))
    below = 1.0 + decay
    return 4.0 * decay / (below * below)


@usually(lambda x, out: 1.0 - out)
def logistic_rest(x: Array, out: Array) -> Array:
    """1 - out, out = sigmoid(x); above 0, where it cancels, exp(-x) out."""
    return np.where(x.real < 0, 1.0 - out, np.exp(-positive_part(x)) * out)


@usually(lambda a, x: a * logistic(x))
def times_logistic(a: Array, x: Array) -> Array:
    """a sigmoid(x)."""
    return _times_logistic(a, x)


def _times_logistic(a: Array, high: Array, low: Array | float = 0.0) -> Array:
    """a sigmoid(high + low), where the square of `low` does not count; exp in halves, which are never subnormal."""
    half = np.exp(0.5 * negative_part(high))
    nearly = a * half / (1.0 + np.exp(-magnitude(high))) * half
    return nearly * (1.0 + low * logistic(-high))


@usually(lambda a, x: a * logistic(QUICK_GELU_SCALE * x))
def times_quick_gate(a: Array, x: Array) -> Array:
    """a sigmoid(1.702 x). exp turns the absolute error of its argument into a relative one, so that 1.702 x needs more
    digits than a float64 number has."""
    near = clamp(x, -GATE_END, GATE_END)
    high, low = two_product(near, QUICK_GELU_SCALE)
    return _times_logistic(a, high, low + QUICK_GELU_REST * near)


@usually(lambda x: 1.0 - logistic(QUICK_GELU_SCALE * x))
def quick_gate_rest(x: Array) -> Array:
    """1 - sigmoid(1.702 x) = sigmoid(-1.702 x)."""
    return times_quick_gate(np.ones_like(x), -x)


@usually(lambda a, x: a * (0.5 * (1.0 + np.tanh(_bend(x)))))
def times_tanh_gate(a: Array, x: Array) -> Array:
    """a (1 + tanh(u)) / 2 = a sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3); 2 u to twice the digits."""
    near = clamp(x, -TANH_GATE_END, TANH_GATE_END)
    square, of_square = two_product(near, near)
    cubic, of_cubic = two_product(square, TWICE_CUBIC)
    factor, of_factor = _two_sum(cubic, TWICE_LINEAR)
    high, of_high = two_product(near, factor)
    rest = of_factor + of_cubic + TWICE_CUBIC * of_square + TWICE_CUBIC_REST * square + TWICE_LINEAR_REST
    return _times_logistic(a, high, of_high + near * rest)


def _bend(x: Array) -> Array:
    near = clamp(x, -TANH_GATE_END, TANH_GATE_END)
    return GELU_SCALE * (near + GELU_CUBIC * near * near * near)


def _two_sum(a: Array, b: float) -> tuple[Array, Array]:
    """a + b and its rounding error, both exactly (Knuth 1969)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _usual_gelu_tanh_slope(x: Array) -> Array:
    bend = np.tanh(_bend(x))
    return 0.5 * (1.0 + bend) + 0.5 * x * (1.0 - bend * bend) * _bend_slope(x)


def _bend_slope(x: Array) -> Array:
    near = clamp(x, -TANH_GATE_END, TANH_GATE_END)
    return GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * near * near)


@usually(_usual_gelu_tanh_slope)
def gelu_tanh_slope(x: Array) -> Array:
    """(1 + t) / 2 + x / 2 (1 - t^2) u', t = tanh(u); far from 0 with the gate (1 + t) / 2 taken out of both.

    1 - t = 1 + tanh(-u), which is twice the gate at -x, as u is odd.
    """
    is_far = magnitude(x.real) > -FAR
    far = np.where(is_far, x, FAR)
    rest = times_tanh_gate(np.ones_like(far), -far)
    factored = times_tanh_gate(1.0 + 2.0 * far * rest * _bend_slope(far), far)
    return np.where(is_far, factored, _usual_gelu_tanh_slope(x))


@usually(lambda a, x: a * ndtr(x))
def times_normal(a: Array, x: Array) -> Array:
    """a P(x), P the normal distribution function; far below 0 as erfcx(-x / sqrt(2)) exp(-x^2 / 2) / 2."""
    far = clamp(x, -NORMAL_END, FAR)
    tail = times_gauss(0.5 * a * erfcx(-far / math.sqrt(2.0)), far)
    return np.where(x.real < FAR, tail, a * ndtr(x))


def _usual_gelu_slope(x: Array) -> Array:
    return ndtr(x) + x * _density(x)


@usually(_usual_gelu_slope)
def gelu_slope(x: Array) -> Array:
    """P(x) + x p(x), with p(x) = exp(-x^2 / 2) / sqrt(2 pi); far below 0 with exp taken out of both terms."""
    far = clamp(x, -NORMAL_END, FAR)
    ratio = 0.5 * erfcx(-far / math.sqrt(2.0)) + far / math.sqrt(2.0 * math.pi)
    return np.where(x.real < FAR, times_gauss(ratio, far), _usual_gelu_slope(x))


def _density(x: Array) -> Array:
    near = clamp(x, -NORMAL_END, NORMAL_END)
    return np.exp(-0.5 * near * near) / math.sqrt(2.0 * math.pi)


def times_gauss(a: Array, x: Array) -> Array:
    """a exp(-x^2 / 2), x^2 to twice the digits; exp in halves, which are never subnormal."""
    high, low = two_product(x, x)
    half = np.exp(-0.25 * high)
    return a * half * (half * (1.0 - 0.5 * low))


@usually(lambda a, x: a * np.tanh(log_one_plus_exp(x)))
def times_mish_gate(a: Array, x: Array) -> Array:
    """a tanh(log(1 + w)) = a sigmoid(x) (1 + w) (2 + w) / (2 + 2 w + w^2), with w = exp(x)."""
    decay = np.exp(-magnitude(x))
    above, below = _mish_quotient(x, decay)
    return _times_logistic(a * (1.0 + decay) * above / below, x)


def _mish_quotient(x: Array, decay: Array) -> tuple[Array, Array]:
    """2 + w and 2 + 2 w + w^2 below 0, above it over w and over w^2; decay: the smaller of w, 1 / w."""
    square = decay * decay
    above = np.where(x.real < 0, 2.0 + decay, 1.0 + 2.0 * decay)
    return above, np.where(x.real < 0, 2.0 + 2.0 * decay + square, 1.0 + 2.0 * decay + 2.0 * square)


def _usual_mish_slope(x: Array) -> Array:
    gate = np.tanh(log_one_plus_exp(x))
    return gate + x * (1.0 - gate * gate) * logistic(x)


@usually(_usual_mish_slope)
def mish_slope(x: Array) -> Array:
    """t + x (1 - t^2) sigmoid(x), t = tanh(log(1 + w)); far from 0 with the logistic function taken out of both.

    1 - t^2 = 4 (1 + w)^2 / (2 + 2 w + w^2)^2, with w = exp(x).
    """
    is_far = magnitude(x.real) > -FAR
    far = np.where(is_far, x, FAR)
    decay = np.exp(-magnitude(far))
    above, below = _mish_quotient(far, decay)
    root = np.where(far.real < 0, 2.0, 2.0 * decay) * (1.0 + decay) / below
    factored = _times_logistic((1.0 + decay) * above / below + far * root * root, far)
    return np.where(is_far, factored, _usual_mish_slope(x))


@usually(lambda x: x - np.tanh(x))
def tanh_gap(x: Array) -> Array:
    """x - tanh(x) = (x cosh(x) - sinh(x)) / cosh(x); below 1, from the sum of 2 k x^(2 k + 1) / (2 k + 1)!."""
    near = clamp(x, -1.0, 1.0)
    total = np.zeros_like(near)
    for k in range(SERIES_TERMS, 0, -1):
        total = near * near * (total + 2.0 * k / math.factorial(2 * k + 1))
    return np.where(magnitude(x.real) < 1.0, near * total / np.cosh(near), x - np.tanh(x))


@usually(lambda x, root, b: 0.5 * (x + root))
def squareplus_value(x: Array, root: Array, b: float) -> Array:
    """(x + root) / 2, root = sqrt(x^2 + b); below 0 it is b / (root + |x|) / 2."""
    return np.where(x.real < 0, 0.25 * b / (0.5 * root + 0.5 * magnitude(x)), 0.5 * x + 0.5 * root)


@usually(lambda x, root, b: 0.5 * (1.0 + x / root))
def squareplus_slope(x: Array, root: Array, b: float) -> Array:
    """(1 + x / root) / 2, root = sqrt(x^2 + b); below 0 it is b / (root + |x|) / root / 2."""
    return np.where(x.real < 0, 0.25 * b / (0.5 * root + 0.5 * magnitude(x)) / root, 0.5 * (1.0 + x / root))
