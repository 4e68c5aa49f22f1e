"""Mistakes in softmax and in normalisation layers.

Legend: as in `gradproof.reference.normalization`: n elements are normalised together, z the normalised x, r one over
their standard deviation, g = dout * weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradproof.verdict.hypotheses.general import axes_named, option_changed
from gradproof.verdict.hypotheses.suspect import Array, Arrays, Gradients, Guess, Suspect, subsets

DIAGONALS: dict[str, Callable[[Array], Array]] = {
    "softmax": lambda out: out * (1.0 - out),
    "softmin": lambda out: -out * (1.0 - out),
    "log_softmax": lambda out: 1.0 - np.exp(out),
}
"""What each output has for its own input in softmax's Jacobian."""


def element_by_element(suspect: Suspect) -> Iterator[Guess]:
    name, forward = suspect.name, suspect.node.layer.forward
    if name in DIAGONALS:
        yield suspect.computed(
            lambda arrays, dout: {"x": dout * DIAGONALS[name](forward(arrays["x"], **suspect.keywords)[0])}
        )


BY_LAST_AXES = ("layer_norm", "rms_norm")
NORMS = (*BY_LAST_AXES, "batch_norm", "group_norm", "instance_norm")


class Standard(NamedTuple):
    """What a normalisation layer's dx = r (g - mean(g) - z mean(g z)) is made of; plain: dout, shaped as g is.

    sigma: the standard deviation, n: how many elements each is of.
    """

    z: Array
    r: Array
    g: Array
    plain: Array
    over: tuple[int, ...]
    sigma: Array
    n: int


def _normalizes(suspect: Suspect) -> bool:
    """Whether the statistics are those of x."""
    return suspect.name in NORMS and "running_mean" not in suspect.arrays


def _groups(suspect: Suspect) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of x in which some axes are normalised together, and these axes."""
    shape = suspect.first.shape
    if suspect.name in BY_LAST_AXES:
        return shape, tuple(range(len(shape) - suspect.keywords["axes"], len(shape)))
    if suspect.name == "batch_norm":
        return shape, (0, *range(2, len(shape)))
    return (shape[0], suspect.keywords.get("groups", shape[1]), -1), (2,)


def _affine(suspect: Suspect, arrays: Arrays, slot: str, neutral: float) -> Array:
    """The weight or bias as it broadcasts against x."""
    if slot not in arrays:
        return np.array(neutral)
    by_channel = suspect.name not in BY_LAST_AXES
    return arrays[slot].reshape(-1, *(1,) * (suspect.first.ndim - 2)) if by_channel else arrays[slot]


def _standard(suspect: Suspect, arrays: Arrays, dout: Array, less: int = 0, outside: bool = False) -> Standard:
    """less: by how much the divisor of the variance is smaller than n. outside: eps is added to the deviation."""
    shape, over = _groups(suspect)
    x, eps = arrays["x"].reshape(shape), suspect.keywords["eps"]
    n = math.prod(x.shape[axis] for axis in over)
    if "running_mean" in arrays:
        centred = x - _channels(arrays["running_mean"], x.ndim)
        variance = _channels(arrays["running_var"], x.ndim)
    else:
        centred = x if suspect.name == "rms_norm" else x - _mean(x, over)
        variance = (centred * centred).sum(axis=over, keepdims=True) / (n - less)
    sigma = np.sqrt(variance) if outside else np.sqrt(variance + eps)
    r = 1.0 / (sigma + eps) if outside else 1.0 / sigma
    g = (dout * _affine(suspect, arrays, "weight", 1.0)).reshape(shape)
    return Standard(centred * r, r, g, dout.reshape(shape), over, sigma, n)


def _channels(each: Array, rank: int) -> Array:
    return each.reshape(-1, *(1,) * (rank - 2))


def _mean(each: Array, over: tuple[int, ...]) -> Array:
    return each.mean(axis=over, keepdims=True)


def _dx_by(suspect: Suspect, formula: Callable[[Standard], Array], detail: str = "") -> Guess:
    """The guess that dx is another one."""
    shape = suspect.first.shape
    return suspect.computed(
        lambda arrays, dout: {"x": formula(_standard(suspect, arrays, dout)).reshape(shape)}, detail
    )


def _with_means(s: Standard, over: tuple[int, ...], of_g: bool = True) -> Array:
    """dx with means over these axes; of_g: with that of g, which RMS norm does not have."""
    return s.r * (s.g - (_mean(s.g, over) if of_g else 0.0) - s.z * _mean(s.g * s.z, over))


def _without_weight(s: Standard, of_g: bool = True) -> Array:
    return _with_means(s._replace(g=s.plain), s.over, of_g)


TERMS: dict[str, Callable[[Standard], Array]] = {
    "the terms of the mean and of the variance": lambda s: s.r * s.g,
    "the term of the mean": lambda s: _with_means(s, s.over, of_g=False),
    "the term of the variance": lambda s: s.r * (s.g - _mean(s.g, s.over)),
    "the weight in dx": _without_weight,
}
RMS_TERMS: dict[str, Callable[[Standard], Array]] = {
    "the term of the mean square": lambda s: s.r * s.g,
    "the weight in dx": partial(_without_weight, of_g=False),
}
"""What is missing -> dx without it."""


def terms_missing(suspect: Suspect) -> Iterator[Guess]:
    terms = RMS_TERMS if suspect.name == "rms_norm" else TERMS
    for detail, formula in terms.items() if _normalizes(suspect) else ():
        yield _dx_by(suspect, formula, detail)


def mean_subtracted(suspect: Suspect) -> Iterator[Guess]:
    """Layer norm's formula in RMS norm."""
    if suspect.name == "rms_norm":
        yield _dx_by(suspect, lambda s: _with_means(s, s.over))


def other_axes(suspect: Suspect) -> Iterator[Guess]:
    """The means of the backward pass over other axes than forward's: rows for columns."""
    if _normalizes(suspect):
        shape, over = _groups(suspect)
        for axes in subsets(range(len(shape))):
            if axes != over:
                formula = partial(_with_means, over=axes, of_g=suspect.name != "rms_norm")
                yield _dx_by(suspect, formula, axes_named(axes))


def padded_means(suspect: Suspect) -> Iterator[Guess]:
    """The means of the backward pass divided by the length of a block that holds more than is normalised."""
    if not _normalizes(suspect):
        return
    of_g = suspect.name != "rms_norm"
    n = _standard(suspect, suspect.arrays, suspect.dout).n
    blocks = {2 ** math.ceil(math.log2(n)), *(-(-n // block) * block for block in (8, 16, 32, 64, 128, 256, 512, 1024))}
    for block in sorted(blocks - {n}):
        yield _dx_by(suspect, partial(_with_padded_means, of_g=of_g, block=block), f"{block} for {n}")


def _with_padded_means(s: Standard, of_g: bool, block: int) -> Array:
    return s.r * s.g + (_with_means(s, s.over, of_g) - s.r * s.g) * (s.n / block)


def training_formula(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name == "batch_norm" and "running_mean" in suspect.arrays:
        yield _dx_by(suspect, lambda s: _with_means(s, s.over))


def another_ddof(suspect: Suspect) -> Iterator[Guess]:
    yield from option_changed(suspect, "ddof")
    if _normalizes(suspect):
        yield from with_statistics(suspect, "n - 1", less=1)


def another_eps(suspect: Suspect) -> Iterator[Guess]:
    yield from option_changed(suspect, "eps")
    if _normalizes(suspect):
        yield from with_statistics(suspect, "eps added to the standard deviation", outside=True)


def with_statistics(suspect: Suspect, detail: str, **statistics: Any) -> Iterator[Guess]:
    """The guesses that the deviation is another one in the backward pass, or in both passes."""
    gradients = partial(_gradients_with, suspect, statistics)
    yield suspect.computed(gradients, detail, partial(_value_with, suspect, statistics))
    yield suspect.computed(gradients, detail)


def _value_with(suspect: Suspect, statistics: Mapping[str, Any], arrays: Arrays) -> Array:
    x = arrays["x"]
    z = _standard(suspect, arrays, np.zeros_like(x), **statistics).z.reshape(x.shape)
    return z * _affine(suspect, arrays, "weight", 1.0) + _affine(suspect, arrays, "bias", 0.0)


def _gradients_with(suspect: Suspect, statistics: Mapping[str, Any], arrays: Arrays, dout: Array) -> Gradients:
    """dx = r (g - mean(g) - z sum(g z) / divisor), times one over r sigma in the last term where eps is outside."""
    s = _standard(suspect, arrays, dout, **statistics)
    divisor = (s.n - statistics.get("less", 0)) * s.sigma * s.r
    centre = 0.0 if suspect.name == "rms_norm" else _mean(s.g, s.over)
    dx = s.r * (s.g - centre - s.z * (s.g * s.z).sum(axis=s.over, keepdims=True) / divisor)
    z = s.z.reshape(dout.shape)
    axes = _affine_axes(suspect)
    affine = {"weight": (dout * z).sum(axis=axes), "bias": dout.sum(axis=axes)}
    return {"x": dx.reshape(dout.shape)} | {slot: each for slot, each in affine.items() if slot in arrays}


def _affine_axes(suspect: Suspect) -> tuple[int, ...]:
    """Those that weight and bias are broadcast over."""
    rank = suspect.first.ndim
    return tuple(range(rank - suspect.keywords["axes"])) if suspect.name in BY_LAST_AXES else (0, *range(2, rank))
