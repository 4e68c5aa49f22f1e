"""Activations and gates."""

from __future__ import annotations

from typing import Any

import flax.linen
import jax
import jax.numpy as jnp


def hardtanh(x: Any, min_val: float, max_val: float) -> Any:
    """`jax.nn.hard_tanh` has no bounds to choose; this is its formula with them."""
    return jnp.where(x > max_val, max_val, jnp.where(x < min_val, min_val, x))


def softshrink(x: Any, lambd: float) -> Any:
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, 0.0))


def swiglu(x: Any, axis: int) -> Any:
    a, b = jnp.split(x, 2, axis)
    return jax.nn.silu(a) * b


def geglu(x: Any, axis: int, approximate: str) -> Any:
    a, b = jnp.split(x, 2, axis)
    return jax.nn.gelu(a, approximate=approximate == "tanh") * b


def maxout(x: Any, axis: int, pieces: int) -> Any:
    place = axis % x.ndim
    return x.reshape(*x.shape[:place], -1, pieces, *x.shape[place + 1 :]).max(place + 1)


def prelu(x: Any, weight: Any) -> Any:
    """flax has one slope for all; with one per channel, this is its formula."""
    if weight.size == 1:
        return flax.linen.PReLU().apply({"params": {"negative_slope": weight.reshape(())}}, x)
    return jnp.where(x >= 0, x, weight.reshape(-1, *[1] * (x.ndim - 2)) * x)
