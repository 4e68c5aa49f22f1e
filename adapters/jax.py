"""JAX grad, each layer jitted by itself so that networks share compilations.

JAX compiles once per layer, options, shapes and dtype; the compilations are kept in a per-user cache
directory between processes. GRADPROOF_JAX_CACHE names another directory, or "off".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import platformdirs
from jax.scipy.special import xlog1py, xlogy

from gradproof.adapter import JAX_CACHE_VARIABLE
from gradproof.adapters.base import Composed, Row
from gradproof.adapters.functional import Arrays, FunctionalAdapter
from gradproof.layer import Options
from gradproof.network import Node

REDUCTIONS: dict[str, Row] = {"none": lambda loss: loss, "mean": jnp.mean, "sum": jnp.sum}


def _reduced(loss: Row) -> Row:
    """optax's losses are unreduced."""
    return lambda x, target, reduction: REDUCTIONS[reduction](loss(x, target))


def _layer_norm(x: Any, weight: Any = None, bias: Any = None, *, axes: int, eps: float) -> Any:
    # "stable" is the two-pass variance of the definition; the default "fast" one cancels.
    over = tuple(range(-axes, 0))
    normalized = jax.nn.standardize(x, over, epsilon=eps, algorithm="stable")  # type: ignore[call-arg]
    return normalized if weight is None else normalized * weight + bias


def _cross_entropy(x: Any, target: Any, *, targets: str, reduction: str) -> Any:
    by_class = optax.softmax_cross_entropy_with_integer_labels
    return REDUCTIONS[reduction]((by_class if targets == "classes" else optax.softmax_cross_entropy)(x, target))


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    out = x @ weight.T
    return out if bias is None else out + bias


def _bilinear(x1: Any, x2: Any, weight: Any, bias: Any = None) -> Any:
    out = jnp.einsum("...i,oij,...j->...o", x1, weight, x2)
    return out if bias is None else out + bias


def _hardtanh(x: Any, min_val: float, max_val: float) -> Any:
    """`jax.nn.hard_tanh` has no bounds to choose; this is its formula with them."""
    return jnp.where(x > max_val, max_val, jnp.where(x < min_val, min_val, x))


def _softshrink(x: Any, lambd: float) -> Any:
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, 0.0))


def _swiglu(x: Any, axis: int) -> Any:
    a, b = jnp.split(x, 2, axis)
    return jax.nn.silu(a) * b


def _geglu(x: Any, axis: int, approximate: str) -> Any:
    a, b = jnp.split(x, 2, axis)
    return jax.nn.gelu(a, approximate=approximate == "tanh") * b


def _maxout(x: Any, axis: int, pieces: int) -> Any:
    place = axis % x.ndim
    return x.reshape(*x.shape[:place], -1, pieces, *x.shape[place + 1 :]).max(place + 1)


def _prelu(x: Any, weight: Any) -> Any:
    """flax has one slope for all; with one per channel, this is its formula."""
    if weight.size == 1:
        return flax.linen.PReLU().apply({"params": {"negative_slope": weight.reshape(())}}, x)
    return jnp.where(x >= 0, x, weight.reshape(-1, *[1] * (x.ndim - 2)) * x)


def _convolution(
    x: Any, weight: Any, bias: Any = None, *, stride: Any, padding: Any, dilation: Any, groups: int
) -> Any:
    sides = [(each, each) for each in padding]
    out = jax.lax.conv_general_dilated(x, weight, stride, sides, rhs_dilation=dilation, feature_group_count=groups)
    return out if bias is None else out + bias.reshape(-1, *[1] * len(stride))


ROWS: dict[str, Row] = {
    # activations, piecewise, elementwise
    "identity": jax.nn.identity,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": lambda x, beta: jax.nn.softplus(beta * x) / beta,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": Composed(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "mish": jax.nn.mish,
    "softsign": jax.nn.soft_sign,
    "squareplus": jax.nn.squareplus,
    "tanhshrink": Composed(lambda x: x - jnp.tanh(x)),
    "log_sigmoid": jax.nn.log_sigmoid,
    "relu6": jax.nn.relu6,
    "hardtanh": Composed(_hardtanh),
    "hardsigmoid": jax.nn.hard_sigmoid,
    "hardswish": jax.nn.hard_swish,
    "softshrink": Composed(_softshrink),
    "hardshrink": Composed(lambda x, lambd: jnp.where(jnp.abs(x) > lambd, x, 0.0)),
    "threshold": Composed(lambda x, threshold, value: jnp.where(x > threshold, x, value)),
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "prelu": _prelu,
    "rrelu": lambda x, lower, upper: jax.nn.leaky_relu(x, (lower + upper) / 2.0),
    "sparse_plus": jax.nn.sparse_plus,
    "sparse_sigmoid": jax.nn.sparse_sigmoid,
    "abs": jnp.abs,
    "clip": lambda x, low, high: jnp.clip(x, low, high),
    "exp": jnp.exp,
    "log": jnp.log,
    "sqrt": jnp.sqrt,
    "rsqrt": jax.lax.rsqrt,
    "square": jnp.square,
    "reciprocal": jnp.reciprocal,
    "power": jnp.power,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    # gated, softmax
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "softmin": Composed(lambda x, axis: jax.nn.softmax(-x, axis)),
    "logsumexp": jax.nn.logsumexp,
    "glu": jax.nn.glu,
    "swiglu": Composed(_swiglu),
    "geglu": Composed(_geglu),
    "maxout": Composed(_maxout),
    # linear, indexing
    "linear": Composed(_linear),
    "bilinear": Composed(_bilinear),
    "matmul": jnp.matmul,
    "einsum": lambda a, b, equation: jnp.einsum(equation, a, b),
    # convolution, resampling
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    # pooling, normalization, dropout
    "layer_norm": _layer_norm,
    # recurrent, attention
    # merges, shapes, reductions
    "add": jnp.add,
    "subtract": jnp.subtract,
    "multiply": jnp.multiply,
    "concatenate": lambda *xs, axis: jnp.concatenate(xs, axis=axis),
    "reshape": jnp.reshape,
    "flatten": lambda x: jnp.reshape(x, (x.shape[0], -1)),
    # losses
    "mse": _reduced(optax.squared_error),
    "half_squared_error": _reduced(optax.l2_loss),
    "mae": Composed(_reduced(lambda x, target: jnp.abs(x - target))),
    "bce": Composed(_reduced(lambda x, target: -xlogy(target, x) - xlog1py(1.0 - target, -x))),
    "bce_with_logits": _reduced(optax.sigmoid_binary_cross_entropy),
    "cross_entropy": _cross_entropy,
    # margins, ctc
}


class JaxAdapter(FunctionalAdapter):
    """Gradients as `jax.vjp` gives them.

    jit: "layer" compiles each layer by itself and lets JAX differentiate their composition;
        "network" compiles the whole network's forward pass, anew for every network.
    """

    name = "jax"
    rows = ROWS

    def __init__(self, jit: Literal["layer", "network"] = "layer") -> None:
        self._jit = jit
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "highest")
        directory = os.environ.get(JAX_CACHE_VARIABLE) or platformdirs.user_cache_dir("gradproof/jax")
        if directory != "off":
            jax.config.update("jax_compilation_cache_dir", directory)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def version(self) -> str:
        return f"{jax.__version__} with optax {optax.__version__} and flax {flax.__version__}"

    def run_node(self, node: Node, known: Arrays, tap: Any) -> Any:
        arrays, by_name = node.bind(known)
        if self._jit == "network":
            return self.rows[node.layer.name](*arrays, **by_name, **node.keywords) + tap
        return _compiled(self.rows[node.layer.name], tuple(node.keywords.items()))(tap, arrays, by_name)

    def vjp(self, function: Callable[..., Any], *arguments: Any) -> tuple[Arrays, Any]:
        run = jax.jit(function) if self._jit == "network" else function
        output, pullback, outputs = jax.vjp(run, *arguments, has_aux=True)
        return jax.device_get(outputs), (pullback, output.dtype)

    def pull_back(self, pullback: Any, cotangent: np.ndarray) -> tuple[Arrays, Arrays]:
        pull, dtype = pullback
        gradients: tuple[Arrays, Arrays] = jax.device_get(pull(jnp.asarray(cotangent, dtype)))
        return gradients


@cache
def _compiled(row: Row, keywords: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """One compiled function per row and options, shared by every network."""
    options: Options = dict(keywords)

    def run(tap: Any, arrays: list[Any], by_name: Mapping[str, Any]) -> Any:
        return row(*arrays, **by_name, **options) + tap

    return jax.jit(run)
