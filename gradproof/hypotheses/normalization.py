"""Mistakes in softmax and in normalisation layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gradproof.hypotheses.general import option_changed
from gradproof.hypotheses.suspect import Array, Change, Gradients, Guess, Suspect
from gradproof.reference.normalization import along_channels

# Softmax and normalisation.


def element_by_element(suspect: Suspect) -> Iterator[Guess]:
    diagonal: dict[str, Callable[[Array], Array]] = {
        "softmax": lambda out: out * (1.0 - out),
        "softmin": lambda out: -out * (1.0 - out),
        "log_softmax": lambda out: 1.0 - np.exp(out),
    }
    if suspect.name in diagonal:
        of = diagonal[suspect.name]
        yield suspect.changed(lambda g, dout, cache: {"x": dout * of(cache[0])})


NORMS = ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm")


class Standard(NamedTuple):
    """What a normalisation layer's dx = r (g - mean(g) - z mean(g z)) is made of; plain: dout, shaped as g is."""

    z: Array
    r: Array
    g: Array
    plain: Array
    over: tuple[int, ...]


def _standard(name: str, dout: Array, cache: tuple[Any, ...]) -> Standard:
    z, r, weight, *over = cache
    by_channel = name not in ("layer_norm", "rms_norm")
    factor = 1.0 if weight is None else along_channels(weight, dout.ndim) if by_channel else weight
    if over:
        return Standard(z, r, dout * factor, dout, over[0])
    grouped = (*r.shape[:2], -1)
    return Standard(z.reshape(grouped), r, (dout * factor).reshape(grouped), dout.reshape(grouped), (2,))


def _mean(each: Array, over: tuple[int, ...]) -> Array:
    return each.mean(axis=over, keepdims=True)


def _without_second(s: Standard) -> Array:
    return s.r * (s.g - _mean(s.g, s.over))


def _without_weight(s: Standard) -> Array:
    return s.r * (s.plain - _mean(s.plain, s.over) - s.z * _mean(s.plain * s.z, s.over))


def _as_in_training(s: Standard) -> Array:
    over = (0, *range(2, s.g.ndim))
    return s.r * (s.g - _mean(s.g, over) - s.z * _mean(s.g * s.z, over))


TERMS: dict[str, Callable[[Standard], Array]] = {
    "the terms of the mean and of the variance": lambda s: s.r * s.g,
    "the term of the mean": lambda s: s.r * (s.g - s.z * _mean(s.g * s.z, s.over)),
    "the term of the variance": _without_second,
    "the weight in dx": _without_weight,
}


def terms_missing(suspect: Suspect) -> Iterator[Guess]:
    name = suspect.name
    formulas = TERMS if name in NORMS and suspect.cache[3:] != ((),) else {}
    for detail, formula in formulas.items():
        yield suspect.changed(_by_formula(name, formula), detail)


def _by_formula(name: str, formula: Callable[[Standard], Array]) -> Change:
    return lambda g, dout, cache: {"x": formula(_standard(name, dout, cache)).reshape(dout.shape)}


def training_formula(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name == "batch_norm" and suspect.cache[3] == ():
        yield suspect.changed(lambda g, dout, cache: {"x": _as_in_training(_standard("batch_norm", dout, cache))})


def _normalized_count(name: str, x: Array, options: Mapping[str, Any]) -> int:
    """How many elements are normalised together."""
    if name in ("layer_norm", "rms_norm"):
        return math.prod(x.shape[-options["axes"] :])
    sets = {"batch_norm": x.shape[1], "instance_norm": x.shape[0] * x.shape[1]}
    return x.size // sets.get(name, x.shape[0] * options.get("groups", 1))


def another_ddof(suspect: Suspect) -> Iterator[Guess]:
    yield from option_changed(suspect, "ddof")
    if suspect.name in NORMS and suspect.cache[3:] != ((),):
        yield from _norm_with_ddof(suspect)


def _norm_with_ddof(suspect: Suspect) -> Iterator[Guess]:
    """The variance divided by n - 1: the layer with eps (n - 1) / n and a weight times sqrt((n - 1) / n)."""
    name, right, backward = suspect.name, suspect.node.layer.forward, suspect.node.layer.backward

    def forward(x: Array, *, eps: float, **others: Any) -> tuple[Array, Any]:
        n = _normalized_count(name, x, others)
        shrink = math.sqrt((n - 1) / n)
        affine = "weight" in others
        given = {**others, "weight": others["weight"] * shrink} if affine else others
        out, cache = right(x, eps=eps * (n - 1) / n, **given)
        return (out if affine else out * shrink), (cache, shrink, affine)

    def ddof_backward(dout: Array, cache: Any) -> Gradients:
        inner, shrink, affine = cache
        gradients = backward(dout if affine else dout * shrink, inner)
        return {**gradients, "weight": gradients["weight"] * shrink} if affine else gradients

    def backward_alone(x: Array, **others: Any) -> tuple[Array, Any]:
        return right(x, **others)[0], forward(x, **others)[1]

    yield Guess(ddof_backward, forward, detail="n - 1")
    yield Guess(ddof_backward, backward_alone, detail="n - 1")


def another_eps(suspect: Suspect) -> Iterator[Guess]:
    yield from option_changed(suspect, "eps")
    if suspect.name in NORMS and suspect.cache[3:] != ((),):
        yield from _eps_outside(suspect)


def _eps_outside(suspect: Suspect) -> Iterator[Guess]:
    """r = 1 / (sigma + eps), whose derivative with respect to sigma has another factor than with eps in the root."""
    name, right, backward = suspect.name, suspect.node.layer.forward, suspect.node.layer.backward
    by_channel = name not in ("layer_norm", "rms_norm")

    def forward(x: Array, *, eps: float, **others: Any) -> tuple[Array, Any]:
        out, (z, r, *rest) = right(x, eps=0.0, **others)
        sigma = 1.0 / r
        outside = 1.0 / (sigma + eps)
        grouped = z.reshape(*r.shape[:2], -1) if len(rest) == 1 else z
        scaled = (grouped * (outside / r)).reshape(x.shape)
        shaped = {
            slot: along_channels(others[slot], x.ndim) if by_channel else others[slot]
            for slot in ("weight", "bias")
            if slot in others
        }
        out = scaled * shaped.get("weight", 1.0) + shaped.get("bias", 0.0)
        return out, ((scaled, outside, *rest), eps / sigma)

    def outside_backward(dout: Array, cache: Any) -> Gradients:
        inner, share = cache
        s = _standard(name, dout, inner)
        more = s.r * s.z * _mean(s.g * s.z, s.over) * share
        gradients = backward(dout, inner)
        return {**gradients, "x": gradients["x"] - more.reshape(dout.shape)}

    def backward_alone(x: Array, **others: Any) -> tuple[Array, Any]:
        return right(x, **others)[0], forward(x, **others)[1]

    yield Guess(outside_backward, forward, detail="eps added to the standard deviation")
    yield Guess(outside_backward, backward_alone, detail="eps added to the standard deviation")
