"""Mistakes in losses of classes: rows that are ignored, and what their mean is divided by."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from gradproof.verdict.hypotheses.activations import softmax
from gradproof.verdict.hypotheses.suspect import Array, Arrays, Forward, Gradients, Guess, Suspect

NO_CLASS = -(2**31)
"""A class number that no target has."""


def _of_classes(suspect: Suspect) -> bool:
    """Whether it is a loss of target classes, of which one number is ignored."""
    return suspect.name in ("cross_entropy", "nll") and suspect.keywords.get("targets", "classes") == "classes"


def _kept(suspect: Suspect) -> Array:
    return suspect.arrays["target"] != suspect.keywords["ignore_index"]


def _row_weights(suspect: Suspect, targets: Array) -> Array:
    """The weight of each row's target class."""
    weight = suspect.arrays.get("weight")
    return np.ones(targets.shape) if weight is None else weight[targets]


def _divisor(suspect: Suspect) -> float:
    """What the mean is divided by."""
    targets, kept = suspect.arrays["target"], _kept(suspect)
    return float(_row_weights(suspect, targets[kept]).sum()) if suspect.keywords["reduction"] == "mean" else 1.0


def another_divisor(suspect: Suspect) -> Iterator[Guess]:
    """Of the mean: all rows, or those that count without their weights."""
    if not _of_classes(suspect) or suspect.keywords["reduction"] != "mean":
        return
    kept, forward = _kept(suspect), suspect.node.layer.forward
    others = {
        f"all {kept.size} rows, ignored ones too": kept.size,
        f"the {kept.sum()} rows that count, without their weights": kept.sum(),
    }
    for detail, divisor in others.items():
        factor = _divisor(suspect) / divisor if divisor else 1.0
        if factor not in (0.0, 1.0):
            scaled = suspect.each(partial(np.multiply, factor), detail)
            yield scaled
            yield Guess(scaled.backward, partial(_scaled_value, forward, factor), detail=detail)


def _scaled_value(forward: Forward, factor: float, *arrays: Array, **others: Any) -> tuple[Array, Any]:
    out, cache = forward(*arrays, **others)
    return out * factor, cache


def ignored_rows(suspect: Suspect) -> Iterator[Guess]:
    """Rows that are ignored get a gradient: with class 0, with the class their number points at, or with none."""
    if not _of_classes(suspect) or _kept(suspect).all():
        return
    classes = suspect.arrays["x"].shape[-1]
    for stand_in in dict.fromkeys((suspect.keywords["ignore_index"] % classes, 0)):
        yield suspect.computed(partial(_not_ignored, suspect, stand_in))
    if suspect.name == "cross_entropy":
        yield suspect.computed(partial(_without_class, suspect))


def _spread(suspect: Suspect, dout: Array) -> Array:
    """The cotangent of each row."""
    return np.broadcast_to(dout / _divisor(suspect), suspect.arrays["target"].shape)


def _not_ignored(suspect: Suspect, stand_in: int, arrays: Arrays, dout: Array) -> Gradients:
    layer = suspect.node.layer
    targets = np.where(_kept(suspect), arrays["target"], stand_in)
    weight = {"weight": arrays["weight"]} if "weight" in arrays else {}
    keywords = {**suspect.keywords, "ignore_index": NO_CLASS, "reduction": "none"}
    _, cache = layer.forward(arrays["x"], targets, **weight, **keywords)
    return {"x": layer.backward(_spread(suspect, dout), cache)["x"]}


def _without_class(suspect: Suspect, arrays: Arrays, dout: Array) -> Gradients:
    """The softmax alone, in rows that are ignored."""
    right = _not_ignored(suspect, 0, arrays, dout)["x"]
    softened = _spread(suspect, dout)[..., None] * softmax(arrays["x"])
    return {"x": np.where(_kept(suspect)[..., None], right, softened)}
