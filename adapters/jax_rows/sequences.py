"""Recurrent layers and attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp

from gradproof.adapters.base import Row

Weights = Mapping[str, Any]


def _flax_gates(weights: Weights, names: str, biased: str) -> dict[str, Any]:
    """flax keeps a map per gate ("ii", "hf", ...), with one bias where two would be added; "i" or "h" has it."""
    split = {name: jnp.split(each, len(names)) for name, each in weights.items()}
    gates: dict[str, Any] = {}
    for at, name in enumerate(names):
        gates[f"i{name}"] = {"kernel": split["weight_ih"][at].T}
        gates[f"h{name}"] = {"kernel": split["weight_hh"][at].T}
        gates[f"{biased}{name}"]["bias"] = split["bias_ih"][at] + split["bias_hh"][at]
    return gates


def flax_lstm(weights: Weights) -> dict[str, Any]:
    return _flax_gates(weights, "ifgo", "h")


def flax_gru(weights: Weights) -> dict[str, Any]:
    """The new gate keeps both biases, for the reset gate stands between them."""
    gates = _flax_gates(weights, "rzn", "i")
    for part in "ih":
        gates[f"{part}n"]["bias"] = jnp.split(weights[f"bias_{part}h"], 3)[2]
    return gates


def flax_rnn_tanh(weights: Weights) -> dict[str, Any]:
    bias = weights["bias_ih"] + weights["bias_hh"]
    return {"i": {"kernel": weights["weight_ih"].T, "bias": bias}, "h": {"kernel": weights["weight_hh"].T}}


def recurrent(cell: Any, flax_parameters: Callable[[Weights], dict[str, Any]]) -> Row:
    """A row that runs flax's cell over time, once per layer and direction; flax has neither stacks nor no biases."""
    carries_cell = cell is flax.linen.OptimizedLSTMCell

    def row(
        x: Any, h0: Any = None, c0: Any = None, *, layers: int, bidirectional: bool, returns: str, **parameters: Any
    ) -> Any:
        ends = [f"_l{layer}{end}" for layer in range(layers) for end in ("", "_reverse")[: 1 + bidirectional]]
        features = parameters["weight_hh_l0"].shape[1]
        nothing = jnp.zeros((len(ends), x.shape[1], features), x.dtype)
        h0, c0 = (nothing if each is None else each for each in (h0, c0))
        unbiased = jnp.zeros(parameters["weight_hh_l0"].shape[:1], x.dtype)
        outs, last = [], []
        for at, end in enumerate(ends):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weights = {name: parameters.get(f"{name}{end}", unbiased) for name in names}
            run: Any = flax.linen.RNN(cell(features), time_major=True, return_carry=True, keep_order=True)
            first = (c0[at], h0[at]) if carries_cell else h0[at]
            tree = {"params": {"cell": flax_parameters(weights)}}
            carry, out = run.apply(tree, x, initial_carry=first, reverse=end.endswith("_reverse"))
            outs.append(out)
            last.append((carry[1], carry[0]) if carries_cell else (carry,))
            if len(outs) == 1 + bidirectional:
                x, outs = jnp.concatenate(outs, axis=-1), []
        if returns == "sequence":
            return x
        return jnp.stack([states[("hidden", "cell").index(returns)] for states in last])

    return row


def _some_allowed(attend: Row) -> Row:
    """flax and jax.nn attend to all keys alike where a query is allowed none; the layer gives 0 there."""

    def attend_or_zero(query: Any, key: Any, value: Any, *, mask: Any = None, **options: Any) -> Any:
        out = attend(query, key, value, mask=mask, **options)
        return out if mask is None else jnp.where(jnp.moveaxis(mask.any(-1), -2, -1)[..., None], out, 0.0)

    return attend_or_zero


def _combined(mask: Any, causal: bool, queries: int, keys: int) -> Any:
    earlier = jnp.tri(queries, keys, dtype=bool) if causal else None
    if mask is None:
        return earlier
    return mask.astype(bool) if earlier is None else mask.astype(bool) & earlier


def attention(
    q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None, *, causal: bool, scale: float | str, groups: int
) -> Any:
    """jax.nn's where it takes the values (as wide as keys) and keeps the digits (it is float32 inside), else flax's."""
    rank, factor = q.ndim, None if isinstance(scale, str) else scale
    allowed = _combined(mask, causal, q.shape[-2], k.shape[-2])
    masks = {name: None if m is None else _four_axes(m, rank) for name, m in (("mask", allowed), ("bias", bias))}
    query, key, value = (jnp.swapaxes(_four_axes(each, rank), 1, 2) for each in (q, k, v))
    if q.dtype != jnp.float32 or k.shape != v.shape:
        key, value = (jnp.repeat(each, groups, axis=2) for each in (key, value))
        query = query if factor is None else query * (factor * q.shape[-1] ** 0.5)
        out = _some_allowed(flax.linen.dot_product_attention)(query, key, value, **masks)
    elif mask is None:
        out = jax.nn.dot_product_attention(query, key, value, masks["bias"], scale=factor, is_causal=causal)
    else:
        out = _some_allowed(jax.nn.dot_product_attention)(query, key, value, **masks, scale=factor)
    return jnp.swapaxes(out, 1, 2).reshape(*q.shape[:-1], v.shape[-1])


def _four_axes(x: Any, rank: int) -> Any:
    """(batch, heads, ...) from an array that broadcasts to one of this rank; without an axis of heads, there is one."""
    batch = x.reshape(*[1] * (rank - x.ndim), *x.shape)
    return batch if rank == 4 else batch.reshape(*([1] if rank == 2 else batch.shape[:1]), 1, *batch.shape[-2:])


def multi_head_attention(
    query: Any,
    key: Any = None,
    value: Any = None,
    mask: Any = None,
    bias: Any = None,
    padding: Any = None,
    *,
    heads: int,
    causal: bool,
    in_proj_weight: Any = None,
    in_proj_bias: Any = None,
    out_proj_weight: Any,
    out_proj_bias: Any = None,
    **apart: Any,
) -> Any:
    """flax wants the batch first, a weight per head, and has no bias for the scores but in the function it calls."""
    features, batched = query.shape[-1], query.ndim == 3
    key = query if key is None else key
    value = key if value is None else value
    names = ("query", "key", "value")
    weights = [apart[f"{name[0]}_proj_weight"] for name in names] if apart else jnp.split(in_proj_weight, 3)
    tree = {name: {"kernel": w.T.reshape(-1, heads, features // heads)} for name, w in zip(names, weights, strict=True)}
    tree["out"] = {"kernel": out_proj_weight.T.reshape(heads, -1, features)}
    if in_proj_bias is not None:
        for name, each in zip(names, jnp.split(in_proj_bias, 3), strict=True):
            tree[name]["bias"] = each.reshape(heads, -1)
        tree["out"]["bias"] = out_proj_bias
    allowed = _per_head(_combined(_per_head(mask, heads), causal, query.shape[0], key.shape[0]), heads)
    if padding is not None:
        seen = padding.reshape(-1, 1, 1, key.shape[0]).astype(bool)
        allowed = seen if allowed is None else seen & allowed
    attend = partial(_some_allowed(flax.linen.dot_product_attention), bias=_per_head(bias, heads))
    module: Any = flax.linen.MultiHeadDotProductAttention(heads, use_bias=in_proj_bias is not None, attention_fn=attend)
    sources = [jnp.swapaxes(each, 0, 1) if batched else each[None] for each in (query, key, value)]
    with warnings.catch_warnings():
        # flax suspects that square values were meant as a mask.
        warnings.simplefilter("ignore", DeprecationWarning)
        out = module.apply({"params": tree}, *sources, mask=allowed)
    return jnp.swapaxes(out, 0, 1) if batched else out[0]


def _per_head(mask: Any, heads: int) -> Any:
    """(batch heads, queries, keys) to (batch, heads, queries, keys); (queries, keys) to (1, 1, queries, keys)."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask.reshape(-1, heads if mask.ndim == 3 else 1, *mask.shape[-2:])


def rotary(x: Any, *, axis: int, pairs: str, base: float) -> Any:
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=x.dtype) / half)
    angles = jnp.outer(jnp.arange(x.shape[axis], dtype=x.dtype), frequencies)
    shape = [1] * x.ndim
    shape[axis], shape[-1] = angles.shape
    cosine, sine = jnp.cos(angles).reshape(shape), jnp.sin(angles).reshape(shape)
    a, b = (x[..., 0::2], x[..., 1::2]) if pairs == "interleaved" else jnp.split(x, 2, axis=-1)
    turned = (a * cosine - b * sine, a * sine + b * cosine)
    return jnp.stack(turned, -1).reshape(x.shape) if pairs == "interleaved" else jnp.concatenate(turned, -1)
