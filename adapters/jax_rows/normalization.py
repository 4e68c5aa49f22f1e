"""Normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp

from gradproof.adapters.jax_rows.windows import (
    channels_last,
)


def layer_norm(x: Any, weight: Any = None, bias: Any = None, *, axes: int, eps: float) -> Any:
    # "stable" is the two-pass variance of the definition; the default "fast" one cancels.
    over = tuple(range(-axes, 0))
    normalized = jax.nn.standardize(x, over, epsilon=eps, algorithm="stable")  # type: ignore[call-arg]
    return normalized if weight is None else normalized * weight + bias


def _flax_norm(norm: Callable[..., Any], x: Any, weight: Any, bias: Any, eps: float, **options: Any) -> Any:
    """flax's fast variance E[x^2] - E[x]^2 cancels; without it, it is the definition's."""
    scale = {"use_scale": weight is not None, "use_bias": bias is not None}
    module = norm(epsilon=eps, use_fast_variance=False, **scale, **options)
    given = {name: each for name, each in (("scale", weight), ("bias", bias)) if each is not None}
    return channels_last(lambda moved: module.apply({"params": given}, moved), x)


def rms_norm(x: Any, weight: Any = None, *, axes: int, eps: float) -> Any:
    over = tuple(range(-axes, 0))
    module = flax.linen.RMSNorm(
        epsilon=eps, use_scale=weight is not None, reduction_axes=over, feature_axes=over, use_fast_variance=False
    )
    return module.apply({"params": {} if weight is None else {"scale": weight}}, x)


def batch_norm(
    x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None, *, eps: float
) -> Any:
    running = running_mean is not None
    module = flax.linen.BatchNorm(
        use_running_average=running,
        axis=1,
        epsilon=eps,
        use_scale=weight is not None,
        use_bias=bias is not None,
        use_fast_variance=False,
    )
    initial = (jnp.zeros(x.shape[1], x.dtype), jnp.ones(x.shape[1], x.dtype))
    mean, variance = (running_mean, running_var) if running else initial
    parameters = {} if weight is None else {"scale": weight, "bias": bias}
    variables = {"params": parameters, "batch_stats": {"mean": mean, "var": variance}}
    return module.apply(variables, x, mutable=["batch_stats"])[0]


def group_norm(x: Any, weight: Any = None, bias: Any = None, *, groups: int, eps: float) -> Any:
    return _flax_norm(flax.linen.GroupNorm, x, weight, bias, eps, num_groups=groups)


def instance_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float) -> Any:
    return _flax_norm(flax.linen.InstanceNorm, x, weight, bias, eps)


def local_response_norm(x: Any, size: int, alpha: float, beta: float, k: float) -> Any:
    window = (1, size, *(1,) * (x.ndim - 2))
    reach = [(0, 0), (size // 2, (size - 1) // 2), *[(0, 0)] * (x.ndim - 2)]
    total = jax.lax.reduce_window(x * x, 0.0, jax.lax.add, window, (1,) * x.ndim, reach)
    return x * (k + alpha / size * total) ** -beta


def weight_norm(x: Any, direction: Any, magnitude: Any, bias: Any = None) -> Any:
    """flax adds epsilon to the squared norm by default; the definition adds nothing."""
    module = flax.linen.WeightNorm(flax.linen.Dense(len(magnitude), use_bias=bias is not None), epsilon=0.0)
    dense = {"kernel": direction.T} | ({} if bias is None else {"bias": bias})
    return module.apply({"params": {"layer_instance": dense, "layer_instance/kernel/scale": magnitude}}, x)
