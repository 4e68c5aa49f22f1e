"""Mistakes in gated linear units: out = f(gate) value, where gate and value are the halves of x."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from gradproof.reference import LAYERS
from gradproof.reference.common import logistic
from gradproof.verdict.hypotheses.activations import GATES
from gradproof.verdict.hypotheses.suspect import Array, Arrays, Gradients, Guess, Suspect

Slope = Callable[[str, Array, Array], Array]
"""(f's layer, gate, value) -> what stands where f'(gate) belongs."""


def _function(suspect: Suspect) -> str:
    """The layer of f."""
    approximate = suspect.keywords.get("approximate") == "tanh"
    return {"glu": "sigmoid", "swiglu": "silu", "geglu": "gelu_tanh" if approximate else "gelu"}[suspect.name]


def _value_of(function: str, x: Array) -> Array:
    return LAYERS[function].forward(x)[0]


def slope_of(function: str, x: Array) -> Array:
    layer = LAYERS[function]
    return layer.backward(np.ones_like(x), layer.forward(x)[1])["x"]


def _first_term(function: str, x: Array) -> Array:
    """Of the product rule: s of s (1 - s), and s(x) of (x s(x))'."""
    return logistic(x) if function == "sigmoid" else GATES[function](x)


SLOPES: dict[str, Slope] = {
    "the derivative left out": lambda f, gate, value: np.ones_like(gate),
    "the derivative at the product": lambda f, gate, value: slope_of(f, _value_of(f, gate) * value),
    "the derivative at the activation": lambda f, gate, value: slope_of(f, _value_of(f, gate)),
    "the first term of the derivative alone": lambda f, gate, value: _first_term(f, gate),
    "the second term of the derivative alone": lambda f, gate, value: slope_of(f, gate) - _first_term(f, gate),
}
"""What is said of it -> what stands where f'(gate) belongs."""


def _halves(suspect: Suspect, x: Array) -> tuple[Array, Array]:
    """Gate and value: glu's gate is the second half."""
    first, second = np.split(x, 2, suspect.keywords["axis"])
    return (second, first) if suspect.name == "glu" else (first, second)


def _joined(suspect: Suspect, dgate: Array, dvalue: Array) -> Array:
    halves = (dvalue, dgate) if suspect.name == "glu" else (dgate, dvalue)
    return np.concatenate(halves, suspect.keywords["axis"])


def gradients(suspect: Suspect, slope: Slope, arrays: Arrays, dout: Array) -> Gradients:
    function, (gate, value) = _function(suspect), _halves(suspect, arrays["x"])
    dgate = dout * value * slope(function, gate, value)
    return {"x": _joined(suspect, dgate, dout * _value_of(function, gate))}


def gate_derivative(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name in ("glu", "swiglu", "geglu"):
        for detail, slope in SLOPES.items():
            yield suspect.computed(partial(gradients, suspect, slope), detail)


def gate_for_value(suspect: Suspect) -> Iterator[Guess]:
    """The activation of the other half, in the backward pass or in both."""
    if suspect.name in ("glu", "swiglu", "geglu"):
        yield suspect.computed(partial(_exchanged_gradients, suspect))
        yield suspect.computed(partial(_exchanged_gradients, suspect), value=partial(_exchanged_value, suspect))


def _exchanged_gradients(suspect: Suspect, arrays: Arrays, dout: Array) -> Gradients:
    function, (gate, value) = _function(suspect), _halves(suspect, arrays["x"])
    dvalue = dout * gate * slope_of(function, value)
    return {"x": _joined(suspect, dout * _value_of(function, value), dvalue)}


def _exchanged_value(suspect: Suspect, arrays: Arrays) -> Array:
    gate, value = _halves(suspect, arrays["x"])
    return _value_of(_function(suspect), value) * gate
