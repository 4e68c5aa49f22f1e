"""Attention and rotary embeddings.

Legend: L queries, S keys, E features of queries and keys, V features of values, N batch, H heads, ... leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gradproof.model.layer import MASK, Argument, Domain, Layer, ShapeError
from gradproof.model.options import Choice, Divisor, Option, Options, OptionValue, Real, Shape, is_integer
from gradproof.reference.common import Array, Gradients, unbroadcast


def masked_softmax(logits: Array, allowed: Array) -> tuple[Array, Array]:
    """Softmax over those elements of the last axis that are allowed, 0 elsewhere; and the logarithm of their sum.

    Where none is allowed, both are 0.
    """
    some = np.broadcast_to(allowed, logits.shape).any(axis=-1, keepdims=True)
    largest = np.where(some, np.where(allowed, logits.real, -np.inf).max(axis=-1, keepdims=True), 0.0)
    weights = _exponential(logits - largest, allowed)
    total = np.where(some, weights.sum(axis=-1, keepdims=True), 1.0)
    return weights / total, largest + np.log(total)


def _exponential(x: Array, allowed: Array) -> Array:
    """exp(x) where allowed, 0 elsewhere, however large x is there."""
    return np.where(allowed, np.exp(np.where(allowed, x, 0.0)), 0.0)


def _allowed(mask: Array | None, causal: bool, queries: int, keys: int) -> Array:
    """Which query may see which key: what the mask says, and where causal none that comes later."""
    seen = np.tri(queries, keys, dtype=bool) if causal else np.ones((queries, keys), bool)
    return seen if mask is None else mask.astype(bool) & seen


class Attended(NamedTuple):
    """What attention keeps.

    Shapes: q (..., L, E), k (..., S, E), v (..., S, V), with as many heads each; logits (..., L, S), logsumexp
    (..., L, 1), to which allowed broadcasts; bias_shape None without a bias.
    """

    q: Array
    k: Array
    v: Array
    logits: Array
    logsumexp: Array
    allowed: Array
    scale: float
    groups: int
    bias_shape: Shape | None


def scaled_dot_product_attention_forward(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    bias: Array | None = None,
    *,
    causal: bool,
    scale: float | str,
    groups: int,
) -> tuple[Array, Attended]:
    """out = P v, P = softmax(scale q k^T + bias) over the keys that are allowed (Vaswani et al. 2017).

    Shapes: q (..., L, E), k (..., S, E), v (..., S, V), out (..., L, V), mask (1 where allowed) and bias broadcast to
    (..., L, S). Causal allows query i the keys 0 to i. With groups, q (N, H, L, E) shares each of the H / groups heads
    of k and v among that many of its own (Ainslie et al. 2023). A query that is allowed no key gets 0.
    """
    factor = 1.0 / math.sqrt(q.shape[-1]) if isinstance(scale, str) else scale
    if groups > 1:
        k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    logits = factor * (q @ np.swapaxes(k, -1, -2))
    if bias is not None:
        logits = logits + bias
    allowed = _allowed(mask, causal, q.shape[-2], k.shape[-2])
    probabilities, logsumexp = masked_softmax(logits, allowed)
    bias_shape = None if bias is None else bias.shape
    return probabilities @ v, Attended(q, k, v, logits, logsumexp, allowed, factor, groups, bias_shape)


RowSums = Callable[[Array, Array, Array], Array]


def scaled_dot_product_attention_backward(dout: Array, kept: Attended, *, rows: RowSums | None = None) -> Gradients:
    """dv = P^T dout, P the probabilities; with dP = dout v^T: dlogits = P (dP - sum_s dP P).

    dq = scale dlogits k, dk = scale dlogits^T q, dbias = dlogits. P is made again from the logits and the logarithm of
    their exponentials' sum, as fused attention makes it (Dao et al. 2022). The heads of k and v that a group shares
    sum its gradients. rows: what gives sum_s dP P in another way, from dout, v and P.
    """
    q, k, v = kept.q, kept.k, kept.v
    probabilities = _exponential(kept.logits - kept.logsumexp, kept.allowed)
    dprobabilities = dout @ np.swapaxes(v, -1, -2)
    textbook = (dprobabilities * probabilities).sum(axis=-1, keepdims=True)
    dlogits = probabilities * (dprobabilities - (textbook if rows is None else rows(dout, v, probabilities)))
    gradients = {
        "q": kept.scale * (dlogits @ k),
        "k": _shared(kept.scale * (np.swapaxes(dlogits, -1, -2) @ q), kept.groups),
        "v": _shared(np.swapaxes(probabilities, -1, -2) @ dout, kept.groups),
    }
    return gradients | ({} if kept.bias_shape is None else {"bias": unbroadcast(dlogits, kept.bias_shape)})


def _shared(gradient: Array, groups: int) -> Array:
    """The sum over each group of heads: the adjoint of repeating them."""
    if groups == 1:
        return gradient
    batch, heads, *rest = gradient.shape
    return gradient.reshape(batch, heads // groups, groups, *rest).sum(axis=2)


APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""The input maps of multi-head attention where query, key and value do not all have the same features."""


class HeadsAttended(NamedTuple):
    """What multi-head attention keeps: within its heads, and around them.

    sources, weights: of the query, the key and the value. joined: the heads' attentions side by side, (L, N, E) or
    (L, E). given: which of query, key and value were. together: whether the three weights are one parameter. biased:
    whether the maps have biases. bias_shape: of the scores' bias, None without one.
    """

    within: Attended
    sources: tuple[Array, ...]
    weights: Sequence[Array]
    joined: Array
    out_proj_weight: Array
    given: tuple[bool, ...]
    together: bool
    biased: bool
    heads: int
    bias_shape: Shape | None


def multi_head_attention_forward(
    query: Array,
    key: Array | None = None,
    value: Array | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    padding: Array | None = None,
    *,
    heads: int,
    causal: bool,
    out_proj_weight: Array,
    out_proj_bias: Array | None = None,
    in_proj_bias: Array | None = None,
    **projections: Array,
) -> tuple[Array, HeadsAttended]:
    """out = (the heads' attentions, side by side) out_proj_weight^T + out_proj_bias (Vaswani et al. 2017).

    Each head has D = E / heads features of the projected query, key and value. Shapes: query and out (L, N, E) or
    (L, E), key and value (S, N, their features), by default the query's, the value by default the key. in_proj_weight
    (3 E, E) holds the rows of the query, the key and the value, unless key or value have other features: then
    q_proj_weight, k_proj_weight and v_proj_weight (E, their features). mask (1 where allowed) and bias (L, S) or
    (N heads, L, S); padding (N, S) or (S,), 1 where a key may be seen at all.
    """
    given = (query, key, value)
    key = query if key is None else key
    sources = (query, key, key if value is None else value)
    together = "in_proj_weight" in projections
    weights = np.split(projections["in_proj_weight"], 3) if together else [projections[slot] for slot in APART]
    shifts = [0.0] * 3 if in_proj_bias is None else np.split(in_proj_bias, 3)
    q, k, v = (_by_head(x @ w.T + b, heads) for x, w, b in zip(sources, weights, shifts, strict=True))
    attended, within = scaled_dot_product_attention_forward(
        q,
        k,
        v,
        _padded(None if mask is None else _per_head(mask, heads), padding),
        None if bias is None else _per_head(bias, heads),
        causal=causal,
        scale="default",
        groups=1,
    )
    joined = _side_by_side(attended, query.ndim)
    out = joined @ out_proj_weight.T
    kept = HeadsAttended(
        within,
        sources,
        weights,
        joined,
        out_proj_weight,
        tuple(each is not None for each in given),
        together,
        in_proj_bias is not None,
        heads,
        None if bias is None else bias.shape,
    )
    return (out if out_proj_bias is None else out + out_proj_bias), kept


def multi_head_attention_backward(dout: Array, kept: HeadsAttended, *, rows: RowSums | None = None) -> Gradients:
    """Back through the output's linear map, the heads, and the three input maps, whose sources sum what they feed."""
    djoined = dout @ kept.out_proj_weight
    dheads = scaled_dot_product_attention_backward(_by_head(djoined, kept.heads), kept.within, rows=rows)
    dparts = [_side_by_side(dheads[name], dout.ndim) for name in "qkv"]
    dsources = [dpart @ weight for dpart, weight in zip(dparts, kept.weights, strict=True)]
    dweights = [_outer(dpart, source) for dpart, source in zip(dparts, kept.sources, strict=True)]
    gradients = {"out_proj_weight": _outer(dout, kept.joined)} | _dsources(dsources, kept.given)
    if kept.together:
        gradients["in_proj_weight"] = np.concatenate(dweights)
    else:
        gradients |= dict(zip(APART, dweights, strict=True))
    if kept.biased:
        gradients["in_proj_bias"] = np.concatenate([_summed(dpart) for dpart in dparts])
        gradients["out_proj_bias"] = _summed(dout)
    return gradients | ({} if kept.bias_shape is None else {"bias": dheads["bias"].reshape(kept.bias_shape)})


def _dsources(dsources: Sequence[Array], given: tuple[bool, ...]) -> Gradients:
    """The gradients of those sources that were given: one that was not stands for the one before it."""
    found: Gradients = {}
    last = ""
    for name, dsource, own in zip(("query", "key", "value"), dsources, given, strict=True):
        last = name if own else last
        found[last] = found[last] + dsource if last in found else dsource
    return found


def _by_head(x: Array, heads: int) -> Array:
    """(L, N, E) or (L, E) to (N, H, L, D)."""
    length, features = x.shape[0], x.shape[-1]
    return x.reshape(length, -1, heads, features // heads).transpose(1, 2, 0, 3)


def _side_by_side(x: Array, rank: int) -> Array:
    """(N, H, L, D) to (L, N, E), or (L, E) where the rank is 2: the inverse, and the adjoint, of `_by_head`."""
    batch, heads, length, features = x.shape
    shape = (length, batch, heads * features) if rank == 3 else (length, heads * features)
    return x.transpose(2, 0, 1, 3).reshape(shape)


def _per_head(mask: Array, heads: int) -> Array:
    """(N H, L, S) to (N, H, L, S); (L, S) as it is."""
    return mask.reshape(-1, heads, *mask.shape[1:]) if mask.ndim == 3 else mask


def _padded(mask: Array | None, padding: Array | None) -> Array | None:
    """What both allow; padding (N, S) or (S,)."""
    if padding is None:
        return mask
    seen = padding.reshape(-1, 1, 1, padding.shape[-1])
    return seen if mask is None else mask * seen


def _outer(dout: Array, x: Array) -> Array:
    """The sum of the outer products over all but the last axis."""
    return dout.reshape(-1, dout.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def _summed(dout: Array) -> Array:
    return dout.reshape(-1, dout.shape[-1]).sum(axis=0)


def _attention_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    q, k, v, *others = shapes
    groups = int(options["groups"])  # type: ignore[arg-type]
    _require_elements("queries", q)
    leading = q[:-2] if groups == 1 else (q[0], q[1] // groups)
    _require("keys", k, (*leading, "S", q[-1]))
    _require("values", v, (*leading, k[-2], "V"))
    scores = (*q[:-1], k[-2])
    for each in others:
        if not _broadcasts(each, scores):
            raise ShapeError(f"its mask must broadcast to {list(scores)}, queries by keys; got shape {list(each)}")
    return (*q[:-1], v[-1])


def _require(what: str, shape: Shape, wanted: tuple[int | str, ...]) -> None:
    """Raise ShapeError unless the shape is the wanted one, in which letters stand for any size."""
    fits = len(shape) == len(wanted) and all(
        isinstance(need, str) or size == need for size, need in zip(shape, wanted, strict=True)
    )
    if not fits:
        raise ShapeError(f"its {what} must have shape [{', '.join(map(str, wanted))}], got {list(shape)}")
    _require_elements(what, shape)


def _require_elements(what: str, shape: Shape) -> None:
    if 0 in shape:
        raise ShapeError(f"cannot attend with {what} of shape {list(shape)}: there are none")


def _broadcasts(shape: Shape, to: Shape) -> bool:
    return len(shape) <= len(to) and all(size in (1, full) for size, full in zip(shape[::-1], to[::-1], strict=False))


def _keys_for(queries: int) -> int:
    """How many keys are drawn beside so many queries: more, as many or fewer.

    One number alone, so that keys, values and masks fit together, which are drawn one by one.
    """
    return {1: 3, 3: 5, 5: 2}.get(queries, queries)


def _key_shapes(shape: Shape, options: Options) -> tuple[Shape, ...]:
    groups = int(options["groups"])  # type: ignore[arg-type]
    leading = shape[:-2] if groups == 1 else (shape[0], shape[1] // groups)
    return ((*leading, _keys_for(shape[-2]), shape[-1]),)


def _value_shapes(shape: Shape, options: Options) -> tuple[Shape, ...]:
    (key,) = _key_shapes(shape, options)
    return (key, (*key[:-1], 3 if key[-1] == 2 else 2))


def _mask_shapes(shape: Shape, options: Options) -> tuple[Shape, ...]:
    """One mask for all, one row of it per element of the batch (padding), or one for each head."""
    keys = _keys_for(shape[-2])
    batch = (*shape[:1], *[1] * (len(shape) - 3)) if len(shape) > 2 else ()
    return ((shape[-2], keys), (*batch, 1, keys), (*shape[:-1], keys))


def _mask_domain(shape: Shape, options: Options) -> Domain:
    return MASK


def _multi_head_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    named = _named(shapes, options)
    query = named["query"]
    _require_elements("queries", query)
    key = named.get("key", query)
    batch = query[1:-1]
    if "key" in named:
        _require("keys", key, ("S", *batch, "K"))
    if "value" in named:
        _require("values", named["value"], (key[0], *batch, "V"))
    scores = (query[0], key[0])
    per_head = (math.prod(batch) * int(options["heads"]), *scores)  # type: ignore[arg-type]
    for name in ("mask", "bias"):
        if named.get(name, scores) not in (scores, per_head):
            raise ShapeError(f"its {name} must have shape {list(scores)} or {list(per_head)}, got {list(named[name])}")
    if "padding" in named:
        _require("padding", named["padding"], (*batch, key[0]))
    return query


def _named(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    wanted = [each.name for each in MULTI_HEAD_ARGUMENTS if each.when is None or each.when(options)]
    return dict(zip(wanted, shapes, strict=True))


def _multi_head_parameters(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    named = _named(shapes, options)
    features = named["query"][-1]
    key = named.get("key", named["query"])[-1]
    value = named["value"][-1] if "value" in named else key
    slots: dict[str, Shape] = {"in_proj_weight": (3 * features, features)}
    if not key == value == features:
        slots = {slot: (features, width) for slot, width in zip(APART, (features, key, value), strict=True)}
    biases: dict[str, Shape] = {"in_proj_bias": (3 * features,), "out_proj_bias": (features,)}
    return {**slots, "out_proj_weight": (features, features), **(biases if options["use_bias"] else {})}


def _length(shape: Shape, options: Options) -> int:
    return shape[0] if options["attends"] == "self" else _keys_for(shape[0])


def _source_shapes(shape: Shape, options: Options) -> tuple[Shape, ...]:
    """With the query's features, or with others."""
    batch = (_length(shape, options), *shape[1:-1])
    return ((*batch, shape[-1]), (*batch, 3))


def _head_mask_shapes(shape: Shape, options: Options) -> tuple[Shape, ...]:
    scores = (shape[0], _length(shape, options))
    return (scores, (math.prod(shape[1:-1]) * int(options["heads"]), *scores))  # type: ignore[arg-type]


def _padding_shapes(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return ((*shape[1:-1], _length(shape, options)),)


@dataclass(frozen=True)
class Scale:
    """A number, or "default": one over the square root of the queries' features."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return value == "default" or Real(-1e3, 1e3, ()).contains(value, shape)

    def describe(self, shape: Shape) -> str:
        return '"default" (one over the square root of the features), or ' + Real(-1e3, 1e3, ()).describe(shape)

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return ("default", 0.5, -2.0)


@dataclass(frozen=True)
class HeadGroups:
    """How many heads of the queries share one of the keys: a divisor of the heads where there is an axis of them."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value) and value in self._divisors(shape)

    def describe(self, shape: Shape) -> str:
        if len(shape) != 4:
            return f"1, for an input of shape {list(shape)} has no axis of heads"
        return f"a divisor of {shape[1]}, the number of heads of an input of shape {list(shape)}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return self._divisors(shape)

    def _divisors(self, shape: Shape) -> list[int]:
        heads = shape[1] if len(shape) == 4 else 1
        return [each for each in range(1, heads + 1) if heads % each == 0] or [1]


MASKS = Option("mask", Choice(("none", "boolean", "additive")), "none", structural=True)
CAUSAL = Option("causal", Choice((False, True)), False)
ATTENTION_ARGUMENTS = (
    Argument("q"),
    Argument("k", shapes=_key_shapes),
    Argument("v", shapes=_value_shapes),
    Argument("mask", _mask_domain, _mask_shapes, when=lambda options: options["mask"] == "boolean"),
    Argument("bias", shapes=_mask_shapes, when=lambda options: options["mask"] == "additive"),
)
MULTI_HEAD_ARGUMENTS = (
    Argument("query"),
    Argument("key", shapes=_source_shapes, when=lambda options: options["attends"] != "self"),
    Argument("value", shapes=_source_shapes, when=lambda options: options["attends"] == "separate"),
    Argument("mask", _mask_domain, _head_mask_shapes, when=lambda options: options["mask"] == "boolean"),
    Argument("bias", shapes=_head_mask_shapes, when=lambda options: options["mask"] == "additive"),
    Argument("padding", _mask_domain, _padding_shapes, when=lambda options: bool(options["padding"])),
)

LAYERS: tuple[Layer, ...] = (
    Layer(
        "scaled_dot_product_attention",
        "layer",
        "attention",
        scaled_dot_product_attention_forward,
        scaled_dot_product_attention_backward,
        (MASKS, CAUSAL, Option("scale", Scale(), "default"), Option("groups", HeadGroups(), 1)),
        ATTENTION_ARGUMENTS,
        ranks=(2, 4),
        shapes=((2, 3), (3, 5, 2), (2, 4, 3, 2), (1, 2, 1, 4)),
        output_shape=_attention_shape,
    ),
    Layer(
        "multi_head_attention",
        "layer",
        "attention",
        multi_head_attention_forward,
        multi_head_attention_backward,
        (
            Option("heads", Divisor(-1)),
            Option("attends", Choice(("self", "memory", "separate")), "self", structural=True),
            MASKS,
            CAUSAL,
            Option("padding", Choice((False, True)), False, structural=True),
            Option("use_bias", Choice((True, False)), True, structural=True),
        ),
        MULTI_HEAD_ARGUMENTS,
        ranks=(2, 3),
        shapes=((3, 2, 4), (2, 4), (1, 1, 2), (5, 2, 2)),
        output_shape=_multi_head_shape,
        parameters=_multi_head_parameters,
    ),
)
