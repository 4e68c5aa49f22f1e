"""How many digits of the reference are right: its elementwise layers against 50-digit arithmetic.

Each definition stands on its own, and its derivative is taken numerically at high precision; nothing is copied from
the reference. Run `python -m gradproof.trust.accuracy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
from mpmath import mp
from rich.console import Console

from gradproof.model.layer import Layer
from gradproof.model.options import OptionValue
from gradproof.reference import LAYERS
from gradproof.reference.precise import precise

DIGITS = 50

GOAL = 4.0
"""Units in the last place that a value or a derivative may be off."""

Number = Any  # mpmath's mpf, which has no types
Definition = Callable[..., Number]


def _sigmoid(x: Number) -> Number:
    return 1 / (1 + mp.exp(-x))


def _normal(x: Number) -> Number:
    """The normal distribution function; mpmath's erfc fails for arguments of 300 digits."""
    return mp.erfc(-x / mp.sqrt(2)) / 2 if abs(x) < 1e6 else mp.mpf(x > 0)


def _between(x: Number, low: Number, high: Number) -> Number:
    return min(max(x, low), high)


def _gelu_tanh(x: Number) -> Number:
    return x / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3)))


def _elu(x: Number, alpha: float) -> Number:
    return x if x > 0 else alpha * mp.expm1(x)


def _sparse_plus(x: Number) -> Number:
    return 0 if x <= -1 else x if x >= 1 else (x + 1) ** 2 / 4


def _selu(x: Number) -> Number:
    scale, alpha = mp.mpf("1.0507009873554804934193349852946"), mp.mpf("1.6732632423543772848170429916717")
    return scale * _elu(x, alpha)


DEFINITIONS: dict[str, Definition] = {
    "identity": lambda x: x,
    "tanh": mp.tanh,
    "sigmoid": _sigmoid,
    "softplus": lambda x, beta: mp.log1p(mp.exp(beta * x)) / beta,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * _normal(x),
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _sigmoid(mp.mpf("1.702") * x),
    "mish": lambda x: x * mp.tanh(mp.log1p(mp.exp(x))),
    "softsign": lambda x: x / (1 + abs(x)),
    "squareplus": lambda x, b: (x + mp.sqrt(x * x + b)) / 2,
    "tanhshrink": lambda x: x - mp.tanh(x),
    "log_sigmoid": lambda x: -mp.log1p(mp.exp(-x)),
    "relu": lambda x: max(x, 0),
    "leaky_relu": lambda x, negative_slope: x if x > 0 else negative_slope * x,
    "elu": _elu,
    "relu6": lambda x: _between(x, 0, 6),
    "hardtanh": lambda x, min_val, max_val: _between(x, min_val, max_val),
    "hardsigmoid": lambda x: _between(x / 6 + mp.mpf(1) / 2, 0, 1),
    "hardswish": lambda x: x * _between(x + 3, 0, 6) / 6,
    "softshrink": lambda x, lambd: x - _between(x, -lambd, lambd),
    "hardshrink": lambda x, lambd: x if abs(x) > lambd else 0 * x,
    "threshold": lambda x, threshold, value: x if x > threshold else value + 0 * x,
    "selu": _selu,
    "celu": lambda x, alpha: x if x > 0 else alpha * mp.expm1(x / alpha),
    "rrelu": lambda x, lower, upper: x if x > 0 else (mp.mpf(lower) + upper) / 2 * x,
    "sparse_plus": _sparse_plus,
    "sparse_sigmoid": lambda x: _between((x + 1) / 2, 0, 1),
    "abs": abs,
    "clip": lambda x, low, high: _between(x, low, high),
    "exp": mp.exp,
    "log": mp.log,
    "sqrt": mp.sqrt,
    "rsqrt": lambda x: 1 / mp.sqrt(x),
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1 / x,
    "power": lambda x, exponent: x ** mp.mpf(exponent),
    "sin": mp.sin,
    "cos": mp.cos,
}

LARGE = (10.0, 20.0, 37.0, 40.0, 88.0, 100.0, 300.0, 700.0, 710.0, 745.0, 800.0, 1e3, 1e6, 1e12, 1e100, 1e150, 1e300)
SMALL = (0.1, 1e-2, 1e-3, 1e-5, 1e-8, 1e-12, 1e-30, 1e-100, 1e-160, 1e-300, 1e-310, 5e-324)
PLAIN = (0.3, 0.7, 0.99, 1.01, 1.5, 1.99, 2.3, 2.99, 3.01, 4.5, 5.99, 6.01, 8.0)


def points(layer: Layer, options: Mapping[str, OptionValue]) -> np.ndarray:
    """Numbers over the whole range, near kinks but not on them, of the layer's domain."""
    positive = np.array([*SMALL, *PLAIN, *LARGE])
    (argument,) = layer.arguments
    if argument.domain((1,), options).kind == "positive":
        return positive
    return np.concatenate([-positive[::-1], positive])


@dataclass(frozen=True)
class Accuracy:
    """The largest errors of one layer, in units in the last place, and where they are."""

    layer: str
    options: tuple[tuple[str, OptionValue], ...]
    value: float
    value_at: float
    gradient: float
    gradient_at: float

    @property
    def reaches_the_goal(self) -> bool:
        return max(self.value, self.gradient) <= GOAL


def accuracy(layer: Layer, options: Mapping[str, OptionValue]) -> Accuracy:
    """The layer with these options, value and derivative, at all its points."""
    x = points(layer, options)
    with np.errstate(all="ignore"):
        out, cache = layer.forward(x, **options)
        slope = np.broadcast_to(layer.backward(np.ones_like(x), cache)["x"], x.shape)
    with mp.workdps(DIGITS):
        exact = [_exact(DEFINITIONS[layer.name], float(each), options) for each in x]
    values = np.array([units(got, true) for got, (true, _) in zip(out, exact, strict=True)])
    gradients = np.array([units(got, true) for got, (_, true) in zip(slope, exact, strict=True)])
    at_value, at_gradient = int(values.argmax()), int(gradients.argmax())
    return Accuracy(
        layer.name,
        tuple(options.items()),
        float(values[at_value]),
        float(x[at_value]),
        float(gradients[at_gradient]),
        float(x[at_gradient]),
    )


def _exact(definition: Definition, x: float, options: Mapping[str, OptionValue]) -> tuple[Number, Number]:
    """The value and the derivative, a central difference with enough digits to spare for every cancellation."""
    at = mp.mpf(x)
    with mp.workdps(1500):
        step = abs(at) * mp.mpf(10) ** -400
        above, below = (definition(at + side * step, **options) for side in (1, -1))
        return definition(at, **options), (above - below) / (2 * step)


def units(got: float, exact: Number) -> float:
    """The error in units in the last place of the exact number; 0 where both are beyond the range."""
    nearest = float(exact)
    if math.isinf(nearest) or math.isinf(got) or math.isnan(got):
        return 0.0 if got == nearest else math.inf
    return float(abs(mpmath.mpf(float(got)) - exact) / math.ulp(nearest))


def accuracies_of(name: str) -> Iterator[Accuracy]:
    """What is expected of the layer of that name, with each value of each option."""
    layer = precise(LAYERS[name])
    yield accuracy(layer, dict(layer.defaults))
    for option in layer.options:
        for value in option.domain.choices((1,))[1:]:
            yield accuracy(layer, dict(layer.defaults) | {option.name: value})


def accuracies() -> Iterator[Accuracy]:
    """Every elementwise layer."""
    return (each for name in DEFINITIONS for each in accuracies_of(name))


def table(found: Sequence[Accuracy]) -> str:
    """A Markdown table with one row per layer, its worst options."""
    lines = ["| layer | value, ULP | at | derivative, ULP | at |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(each.layer for each in found):
        own = [each for each in found if each.layer == name]
        value, gradient = max(own, key=lambda each: each.value), max(own, key=lambda each: each.gradient)
        lines.append(
            f"| {name} | {value.value:.2g} | {value.value_at:g} | {gradient.gradient:.2g} | {gradient.gradient_at:g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    Console().print(table(list(accuracies())))
