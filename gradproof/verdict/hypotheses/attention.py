"""Mistakes in attention: masks, scales, sums over rows and over groups of heads; and in rotary embeddings.

Legend: L queries, S keys, E features of a head, N batch, H heads, P the softmax of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from gradproof.reference.attention import masked_softmax
from gradproof.reference.common import unbroadcast
from gradproof.verdict.hypotheses.suspect import Array, Arrays, Gradients, Guess, Suspect


@dataclass(frozen=True)
class Heads:
    """What all heads attend with.

    Shapes: q, k, v (..., L or S, E), with as many heads each; scores (..., L, S), to which causal and mask, true where
    a key may be seen, broadcast. factor: the scale of q k^T. groups: how many heads in a row had one key and value.
    """

    q: Array
    k: Array
    v: Array
    scores: Array
    causal: Array
    mask: Array
    factor: float
    groups: int

    @property
    def allowed(self) -> Array:
        return self.causal & self.mask

    @property
    def weights(self) -> Array:
        return self.weights_under(self.allowed)

    def weights_under(self, allowed: Array) -> Array:
        """P from the logarithm of the exponentials' sum, which is that under the right mask, under this mask."""
        _, logsumexp = masked_softmax(self.scores, self.allowed)
        return np.where(allowed, np.exp(np.where(allowed, self.scores - logsumexp, 0.0)), 0.0)


Within = Callable[[Heads, Array], Gradients]
"""(heads, the cotangent of their outputs) -> the gradients of q, k and v as their arguments had them, and of scores."""


def within(
    heads: Heads,
    dout: Array,
    weights: Array | None = None,
    row_sums: Array | None = None,
    share: Callable[[Array], Array] = lambda grouped: grouped.sum(axis=2),
) -> Gradients:
    """The right gradients, but for what is given in place of the right weights, row sums or sum over a group."""
    weights = heads.weights if weights is None else weights
    dweights = dout @ np.swapaxes(heads.v, -1, -2)
    row_sums = (dweights * weights).sum(axis=-1, keepdims=True) if row_sums is None else row_sums
    dscores = weights * (dweights - row_sums)
    dk = heads.factor * (np.swapaxes(dscores, -1, -2) @ heads.q)
    return {
        "q": heads.factor * (dscores @ heads.k),
        "k": _shared(dk, heads.groups, share),
        "v": _shared(np.swapaxes(weights, -1, -2) @ dout, heads.groups, share),
        "bias": dscores,
    }


def _shared(gradient: Array, groups: int, share: Callable[[Array], Array]) -> Array:
    if groups == 1:
        return gradient
    batch, heads, *rest = gradient.shape
    return share(gradient.reshape(batch, heads // groups, groups, *rest))


# The two layers that attend.


def _heads(q: Array, k: Array, v: Array, masks: Arrays, causal: bool, factor: float, groups: int = 1) -> Heads:
    scores = factor * (q @ np.swapaxes(k, -1, -2))
    shape = (q.shape[-2], k.shape[-2])
    everything = np.ones(shape, bool)
    return Heads(
        q,
        k,
        v,
        scores + masks["bias"] if "bias" in masks else scores,
        np.tri(*shape, dtype=bool) if causal else everything,
        masks["mask"].astype(bool) if "mask" in masks else everything,
        factor,
        groups,
    )


def _dot_product_heads(suspect: Suspect, arrays: Arrays) -> Heads:
    keywords = suspect.keywords
    q, k, v = (arrays[each] for each in "qkv")
    groups = keywords["groups"]
    if groups > 1:
        k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    factor = 1.0 / math.sqrt(q.shape[-1]) if keywords["scale"] == "default" else keywords["scale"]
    return _heads(q, k, v, arrays, keywords["causal"], factor, groups)


def _dot_product(suspect: Suspect, arrays: Arrays, dout: Array, inner: Within) -> Gradients:
    found = inner(_dot_product_heads(suspect, arrays), dout)
    dscores = found.pop("bias")
    return found | ({"bias": unbroadcast(dscores, arrays["bias"].shape)} if "bias" in arrays else {})


def _sources(arrays: Arrays) -> tuple[str, str, str]:
    """The arguments that are projected to queries, keys and values."""
    key = "key" if "key" in arrays else "query"
    return "query", key, "value" if "value" in arrays else key


def _projections(arrays: Arrays) -> list[Array]:
    together = "in_proj_weight" in arrays
    return np.split(arrays["in_proj_weight"], 3) if together else [arrays[f"{each}_proj_weight"] for each in "qkv"]


def _multi_head_heads(suspect: Suspect, arrays: Arrays) -> Heads:
    count = suspect.keywords["heads"]
    biases = np.split(arrays["in_proj_bias"], 3) if "in_proj_bias" in arrays else [0.0] * 3
    sources = [arrays[each] for each in _sources(arrays)]
    parts = zip(sources, _projections(arrays), biases, strict=True)
    q, k, v = (_by_head(x @ weight.T + bias, count) for x, weight, bias in parts)
    masks = {name: _per_head(arrays[name], count) for name in ("mask", "bias") if name in arrays}
    if "padding" in arrays:
        seen = arrays["padding"].reshape(-1, 1, 1, arrays["padding"].shape[-1])
        masks["mask"] = masks.get("mask", np.ones(())) * seen
    return _heads(q, k, v, masks, suspect.keywords["causal"], 1.0 / math.sqrt(q.shape[-1]))


def _by_head(x: Array, heads: int) -> Array:
    """(L, N, H E) or (L, H E) to (N, H, L, E)."""
    return x.reshape(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2, 0, 3)


def _per_head(mask: Array, heads: int) -> Array:
    """(N H, L, S) to (N, H, L, S)."""
    return mask.reshape(-1, heads, *mask.shape[1:]) if mask.ndim == 3 else mask


def _multi_head(suspect: Suspect, arrays: Arrays, dout: Array, inner: Within) -> Gradients:
    dattended = _by_head(dout @ arrays["out_proj_weight"], suspect.keywords["heads"])
    found = inner(_multi_head_heads(suspect, arrays), dattended)
    # (N, H, L, E) to (L, N, H E), or (L, H E).
    dparts = [each.transpose(2, 0, 1, 3) for each in (found["q"], found["k"], found["v"])]
    dparts = [each.reshape(each.shape[0], *each.shape[1:2] * (dout.ndim - 2), -1) for each in dparts]
    sources, weights = _sources(arrays), _projections(arrays)
    gradients: Gradients = {}
    for source, dpart, weight in zip(sources, dparts, weights, strict=True):
        gradients[source] = gradients.get(source, np.zeros(())) + dpart @ weight
    dweights = [_rows(dpart).T @ _rows(arrays[source]) for source, dpart in zip(sources, dparts, strict=True)]
    if "in_proj_weight" in arrays:
        gradients["in_proj_weight"] = np.concatenate(dweights)
    else:
        gradients |= {f"{each}_proj_weight": dweight for each, dweight in zip("qkv", dweights, strict=True)}
    if "in_proj_bias" in arrays:
        gradients["in_proj_bias"] = np.concatenate([_rows(dpart).sum(axis=0) for dpart in dparts])
    if "bias" in arrays:
        dscores = found["bias"]
        per_head = arrays["bias"].ndim == 3
        gradients["bias"] = dscores.reshape(arrays["bias"].shape) if per_head else dscores.sum(axis=(0, 1))
    return gradients


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


AROUND = {
    "scaled_dot_product_attention": (_dot_product_heads, _dot_product),
    "multi_head_attention": (_multi_head_heads, _multi_head),
}
"""Layer -> its heads from its arrays, and its gradients from those within the heads."""


def attending(suspect: Suspect, inner: Within, detail: str = "") -> Guess:
    """The guess that the heads' backward pass is another one."""
    _, around = AROUND[suspect.name]
    return suspect.computed(lambda arrays, dout: around(suspect, arrays, dout, inner), detail)


# Sums and scales.


def row_sums_missing(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name in AROUND:
        yield attending(suspect, partial(within, row_sums=np.zeros(())))


def heads_not_summed(suspect: Suspect) -> Iterator[Guess]:
    """Of the heads that share a key and a value, one alone, or the mean."""
    if suspect.name in AROUND and suspect.keywords.get("groups", 1) > 1:
        yield attending(suspect, partial(within, share=lambda grouped: grouped[:, :, 0]), "the first head alone")
        yield attending(suspect, partial(within, share=lambda grouped: grouped[:, :, -1]), "the last head alone")
        yield attending(suspect, partial(within, share=lambda grouped: grouped.mean(axis=2)), "the mean of the heads")


def _scaled(heads: Heads, dout: Array, power: int, names: tuple[str, ...]) -> Gradients:
    """Some of the gradients with so many more factors of the scale."""
    right = within(heads, dout)
    return {name: each * heads.factor**power if name in names else each for name, each in right.items()}


def scale_missing(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name in AROUND:
        yield attending(suspect, partial(_scaled, power=-1, names=("q", "k")))


def scale_too_many(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name in AROUND:
        yield attending(suspect, partial(_scaled, power=1, names=("q", "k")), "the queries' and keys' gradients")
        yield attending(suspect, partial(_scaled, power=1, names=("bias",)), "the bias' gradient")


# Masks.


def _under(heads: Heads, dout: Array, other: Callable[[Heads], Heads], saved: bool, from_out: bool) -> Gradients:
    """Backward under another mask than forward.

    saved: from the saved logarithm of the sums, else from sums under the other mask too. from_out: with the row sums of
    dout times the output, which was made under the right mask, else with those of P dP.
    """
    mistaken = other(heads)
    weights = heads.weights_under(mistaken.allowed) if saved else mistaken.weights
    row_sums = (dout * (heads.weights @ heads.v)).sum(axis=-1, keepdims=True) if from_out else None
    return within(heads, dout, weights, row_sums)


def _masked(suspect: Suspect, other: Callable[[Heads], Heads], detail: str = "") -> Iterator[Guess]:
    """The guesses that backward, or both passes, have another mask."""
    for saved, from_out in ((True, True), (True, False), (False, False), (False, True)):
        yield attending(suspect, partial(_under, other=other, saved=saved, from_out=from_out), detail)
    if suspect.name == "scaled_dot_product_attention":
        yield suspect.computed(
            lambda arrays, dout: _dot_product(
                suspect, arrays, dout, lambda heads, dheads: within(other(heads), dheads)
            ),
            detail,
            lambda arrays: _attended(other(_dot_product_heads(suspect, arrays))),
        )


def _attended(heads: Heads) -> Array:
    return heads.weights @ heads.v


def _seen_up_to(offset: Callable[[int, int], int]) -> Callable[[Heads], Heads]:
    """A causal mask by which query i sees key i + offset(queries, keys) and those before it."""

    def other(heads: Heads) -> Heads:
        queries, keys = heads.scores.shape[-2:]
        return replace(heads, causal=np.tri(queries, keys, offset(queries, keys), dtype=bool))

    return other


CAUSAL_MASKS = {
    "a query does not see its own key": lambda queries, keys: -1,
    "a query sees one key too many": lambda queries, keys: 1,
    "the last query is aligned with the last key, not the first with the first": lambda queries, keys: keys - queries,
}
"""What is wrong with a causal mask -> how far beyond its own key a query sees."""


def another_causal_mask(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name in AROUND and suspect.keywords["causal"]:
        for detail, offset in CAUSAL_MASKS.items():
            yield from _masked(suspect, _seen_up_to(offset), detail)


def _unmasked(heads: Heads, causal: bool, mask: bool) -> Heads:
    """Without one of the masks, or without both."""
    everything = np.ones(heads.scores.shape[-2:], bool)
    return replace(heads, causal=everything if causal else heads.causal, mask=everything if mask else heads.mask)


def mask_missing(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name == "dropout":
        yield suspect.changed(lambda g, dout, cache: {"x": dout})
        yield suspect.changed(lambda g, dout, cache: {"x": dout / (1.0 - suspect.keywords["p"])})
    if suspect.name == "embedding":
        yield from suspect.called(padding_idx=-1)
    if suspect.name in AROUND:
        for causal, mask in ((True, True), (True, False), (False, True)):
            yield from _masked(suspect, partial(_unmasked, causal=causal, mask=mask))


def mask_scale_missing(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name == "dropout":
        yield suspect.changed(lambda g, dout, cache: {"x": g["x"] * (1.0 - suspect.keywords["p"])})


# Rotary embeddings.


def turned(x: Array, keywords: dict[str, float | str | int], sign: float, shift: int) -> Array:
    """Each pair turned by sign times the angle of its position plus shift."""
    axis, base, pairs = int(keywords["axis"]), float(keywords["base"]), keywords["pairs"]
    half = x.shape[-1] // 2
    positions = (np.arange(x.shape[axis]) + shift).reshape(-1, *(1,) * (x.ndim - 1 - axis % x.ndim))
    angles = sign * positions * base ** (-np.arange(half) / half)
    first, second = (x[..., 0::2], x[..., 1::2]) if pairs == "interleaved" else (x[..., :half], x[..., half:])
    turned = (
        first * np.cos(angles) - second * np.sin(angles),
        first * np.sin(angles) + second * np.cos(angles),
    )
    if pairs == "interleaved":
        return np.stack(turned, axis=-1).reshape(x.shape)
    return np.concatenate(turned, axis=-1)


def turned_on(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name == "rotary":
        yield suspect.computed(partial(_dx_turned, suspect, sign=1.0, shift=0))


def another_position(suspect: Suspect) -> Iterator[Guess]:
    for shift, detail in ((1, "one later"), (-1, "one earlier")) if suspect.name == "rotary" else ():
        dx = partial(_dx_turned, suspect, sign=-1.0, shift=shift)
        yield suspect.computed(dx, detail)
        yield suspect.computed(dx, detail, partial(_out_turned, suspect, shift=shift))


def _dx_turned(suspect: Suspect, arrays: Arrays, dout: Array, sign: float, shift: int) -> Gradients:
    return {"x": turned(dout, suspect.keywords, sign, shift)}


def _out_turned(suspect: Suspect, arrays: Arrays, shift: int) -> Array:
    return turned(arrays["x"], suspect.keywords, 1.0, shift)
