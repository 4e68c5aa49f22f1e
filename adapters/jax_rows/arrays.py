"""Linear layers and indexing."""

from __future__ import annotations

from typing import Any

import flax.linen
import jax
import jax.numpy as jnp


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    out = x @ weight.T
    return out if bias is None else out + bias


def bilinear(x1: Any, x2: Any, weight: Any, bias: Any = None) -> Any:
    # As one einsum, JAX may begin with the outer product of x1 and x2, which overflows first.
    out = jnp.einsum("...oj,...j->...o", jnp.einsum("...i,oij->...oj", x1, weight), x2)
    return out if bias is None else out + bias


def embedding(indices: Any, weight: Any, *, padding_idx: int) -> Any:
    if padding_idx >= 0:  # flax has no row that is not trained
        weight = weight.at[padding_idx].set(jax.lax.stop_gradient(weight[padding_idx]))
    batch = indices.reshape(indices.shape or (1,))  # flax fails on a single index into a single row
    rows: Any = flax.linen.Embed(*weight.shape).apply({"params": {"embedding": weight}}, batch)
    return rows.reshape(*indices.shape, weight.shape[1])


def embedding_bag(indices: Any, weight: Any, per_sample_weights: Any = None, *, mode: str, padding_idx: int) -> Any:
    rows, kept = jnp.take(weight, indices, axis=0), (indices != padding_idx)[..., None]
    if mode == "max":
        first = jnp.argmax(jnp.where(kept, rows, -jnp.inf), axis=1, keepdims=True)
        largest = jnp.take_along_axis(rows, first, axis=1)[:, 0]
        return jnp.where(kept.any(axis=1), largest, 0.0)
    weighted = rows if per_sample_weights is None else rows * per_sample_weights[..., None]
    total = jnp.sum(weighted, axis=1, where=kept)
    return total / jnp.maximum(kept.sum(axis=1), 1) if mode == "mean" else total


def scatter_add(x: Any, indices: Any, source: Any, *, axis: int) -> Any:
    places = list(jnp.indices(indices.shape, sparse=True))
    places[axis] = indices
    return x.at[tuple(places)].add(source)


def slice_(x: Any, *, axis: int, start: int, stop: int, step: int) -> Any:
    return jnp.moveaxis(jnp.moveaxis(x, axis, 0)[start:stop:step], 0, axis)


def sort(x: Any, *, axis: int, descending: bool) -> Any:
    # Descending, `jnp.sort` is the ascending one reversed, equal elements too; flipping x brings them back in order.
    return jnp.sort(jnp.flip(x, axis) if descending else x, axis, descending=descending)


def top_k(x: Any, *, k: int, axis: int, largest: bool) -> Any:
    if not largest:  # of -x, where NaN would come first
        first = jax.lax.slice_in_dim(jnp.argsort(x, axis=axis), 0, k, axis=axis)
        return jnp.take_along_axis(x, first, axis=axis)
    # XLA counts -0.0 as smaller than 0.0; without its sign, zero ties with zero.
    unsigned = x - jax.lax.stop_gradient(jnp.where(x == 0.0, x, 0.0))
    return jax.lax.top_k(unsigned, k, axis=axis)[0]
