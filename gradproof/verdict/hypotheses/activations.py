"""Mistakes in the derivative of an activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from scipy.special import ndtr

from gradproof.reference import LAYERS
from gradproof.reference.common import log_one_plus_exp, logistic
from gradproof.verdict.hypotheses.general import option_changed
from gradproof.verdict.hypotheses.suspect import Array, Forward, Guess, Suspect


def derivative_missing(suspect: Suspect) -> Iterator[Guess]:
    yield suspect.changed(lambda g, dout, cache: {n: dout for n, each in g.items() if each.shape == dout.shape})


def at_output(suspect: Suspect) -> Iterator[Guess]:
    """The derivative at f(x) in place of x, be it computed anew or from what was cached."""
    right = suspect.node.layer.forward
    if suspect.elementwise:
        yield Guess(forward=lambda x, **options: (right(x, **options)[0], right(right(x, **options)[0], **options)[1]))
    yield Guess(forward=_confused(right, lambda arrays, out: {id(each): out for each in arrays}))


FROM_OUTPUT: dict[str, Callable[[Array], Array]] = {"tanh": lambda y: 1.0 - y * y, "sigmoid": lambda y: y * (1.0 - y)}
"""The derivative from y = f(x), as it is commonly computed."""


def at_input(suspect: Suspect) -> Iterator[Guess]:
    """The formula for the derivative from f(x), with x put in."""
    derivative = FROM_OUTPUT.get(suspect.name)
    if derivative:
        yield suspect.computed(lambda arrays, dout: {"x": dout * derivative(arrays["x"])})
    elif suspect.elementwise:
        yield Guess(forward=_confused(suspect.node.layer.forward, lambda arrays, out: {id(out): arrays[0]}))


def _confused(forward: Forward, which: Callable[[tuple[Array, ...], Array], dict[int, Array]]) -> Forward:
    """The forward function, with one array in its cache taken for another: id of the one -> the other."""

    def confusing(*arrays: Array, **others: Any) -> tuple[Array, Any]:
        out, cache = forward(*arrays, **others)
        return out, _substituted(cache, which(arrays, out))

    return confusing


def _substituted(cache: Any, others: Mapping[int, Array]) -> Any:
    if isinstance(cache, tuple):
        items = [_substituted(each, others) for each in cache]
        return cache._make(items) if hasattr(cache, "_make") else tuple(items)
    return others.get(id(cache), cache)


def twice(suspect: Suspect) -> Iterator[Guess]:
    backward = suspect.node.layer.backward
    if suspect.elementwise:
        yield suspect.changed(lambda g, dout, cache: backward(g["x"], cache))
    if suspect.name in SQUASHING:
        derivative = SQUASHING[suspect.name]
        yield suspect.computed(lambda arrays, dout: {"x": derivative(suspect.right(arrays, dout)["x"], arrays["x"])})


def softmax(x: Array) -> Array:
    """Along the last axis."""
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _softmax_derivative(dout: Array, x: Array) -> Array:
    out = softmax(x)
    return out * (dout - (dout * out).sum(axis=-1, keepdims=True))


SQUASHING: dict[str, Callable[[Array, Array], Array]] = {
    "cross_entropy": _softmax_derivative,
    "bce_with_logits": lambda dout, x: dout * logistic(x) * logistic(-x),
}
"""(dout, x) -> what the squashing function within a loss makes of dout."""

GATES: dict[str, Callable[[Array], Array]] = {
    "silu": logistic,
    "gelu": ndtr,
    "gelu_tanh": lambda x: 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))),
    "quick_gelu": lambda x: logistic(1.702 * x),
    "mish": lambda x: np.tanh(log_one_plus_exp(x)),
}
"""The gate of layers f(x) = x gate(x)."""


def one_term(suspect: Suspect) -> Iterator[Guess]:
    """Of x gate(x): gate, or x gate'(x)."""
    gate = GATES.get(suspect.name)
    if gate:
        yield suspect.computed(lambda arrays, dout: {"x": dout * gate(arrays["x"])})
        yield suspect.computed(lambda arrays, dout: {"x": suspect.right(arrays, dout)["x"] - dout * gate(arrays["x"])})


GELUS = ("gelu", "gelu_tanh", "quick_gelu")


def another_gelu(suspect: Suspect) -> Iterator[Guess]:
    for other in GELUS if suspect.name in GELUS else ():
        yield from _as_layer(suspect, other)
    yield from option_changed(suspect, "approximate")


def other_activation(suspect: Suspect) -> Iterator[Guess]:
    named = ("identity", suspect.name, *GELUS)
    if suspect.node.layer.kind == "activation" and suspect.elementwise:
        for other in LAYERS.values():
            if other.kind == "activation" and len(other.arguments) == 1 and other.name not in named:
                yield from _as_layer(suspect, other.name)


def _as_layer(suspect: Suspect, name: str) -> Iterator[Guess]:
    """The guesses that the backward pass, or both passes, are those of another elementwise layer."""
    right, other = suspect.node.layer.forward, LAYERS[name]
    options = {option.name: other.defaults[option.name] for option in other.options if not option.structural}

    def backward_alone(x: Array, **others: Any) -> tuple[Array, Any]:
        return right(x, **others)[0], other.forward(x, **options)[1]

    yield Guess(other.backward, backward_alone, detail=name)
    yield Guess(other.backward, lambda x, **others: other.forward(x, **options), detail=name)
