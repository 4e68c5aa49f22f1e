"""JAX grad, each layer jitted by itself so that networks share compilations.

JAX compiles once per layer, options, shapes and dtype; the compilations are kept in a per-user cache
directory between processes. GRADPROOF_JAX_CACHE names another directory, or "off".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import platformdirs

from gradproof.adapters.base import Composed, Row
from gradproof.adapters.functional import Arrays, FunctionalAdapter
from gradproof.adapters.jax_rows import activations, arrays, losses, normalization, sequences, windows
from gradproof.model.adapter import JAX_CACHE_VARIABLE, AdapterError
from gradproof.model.network import Network, Node
from gradproof.model.options import Options

JITS = ("layer", "network")
KEPT = 4
"""Whole networks whose programs are kept, so that several numbers can be tried on one."""


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
    "hardtanh": Composed(activations.hardtanh),
    "hardsigmoid": jax.nn.hard_sigmoid,
    "hardswish": jax.nn.hard_swish,
    "softshrink": Composed(activations.softshrink),
    "hardshrink": Composed(lambda x, lambd: jnp.where(jnp.abs(x) > lambd, x, 0.0)),
    "threshold": Composed(lambda x, threshold, value: jnp.where(x > threshold, x, value)),
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "prelu": activations.prelu,
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
    "power": lambda x, exponent: jnp.power(x, exponent),
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
    "swiglu": Composed(activations.swiglu),
    "geglu": Composed(activations.geglu),
    "maxout": Composed(activations.maxout),
    # linear, indexing
    "linear": Composed(arrays.linear),
    "bilinear": Composed(arrays.bilinear),
    "matmul": jnp.matmul,
    "einsum": lambda a, b, equation: jnp.einsum(equation, a, b),
    "embedding": arrays.embedding,
    "embedding_bag": Composed(arrays.embedding_bag),
    "gather": lambda x, indices, axis: jnp.take_along_axis(x, indices, axis),
    "scatter_add": arrays.scatter_add,
    "where": lambda a, b, condition: jnp.where(condition == 1, a, b),
    "slice": arrays.slice_,
    "split": lambda x, axis, parts, index: jnp.array_split(x, parts, axis=axis)[index],
    "sort": arrays.sort,
    "top_k": arrays.top_k,
    # convolution, resampling
    "conv1d": windows.convolution,
    "conv2d": windows.convolution,
    "conv3d": windows.convolution,
    "conv_transpose1d": windows.convolution_transpose,
    "conv_transpose2d": windows.convolution_transpose,
    "upsample": windows.upsample,
    "pixel_shuffle": Composed(windows.pixel_shuffle),
    "pad": windows.pad,
    # pooling, normalization, dropout
    "max_pool1d": windows.max_pool,
    "max_pool2d": windows.max_pool,
    "avg_pool1d": windows.avg_pool,
    "avg_pool2d": windows.avg_pool,
    "lp_pool": Composed(windows.lp_pool),
    "adaptive_avg_pool": Composed(windows.adaptive_pool(jnp.mean)),
    "adaptive_max_pool": Composed(windows.adaptive_pool(jnp.max)),
    "global_avg_pool": windows.global_pool(jnp.mean),
    "global_max_pool": windows.global_pool(jnp.max),
    "layer_norm": normalization.layer_norm,
    "rms_norm": normalization.rms_norm,
    "batch_norm": normalization.batch_norm,
    "group_norm": normalization.group_norm,
    "instance_norm": normalization.instance_norm,
    "local_response_norm": Composed(normalization.local_response_norm),
    "weight_norm": normalization.weight_norm,
    "dropout": Composed(lambda x, mask, p: x * mask.astype(x.dtype) / (1.0 - p)),
    # recurrent, attention
    "rnn_tanh": sequences.recurrent(flax.linen.SimpleCell, sequences.flax_rnn_tanh),
    "gru": sequences.recurrent(flax.linen.GRUCell, sequences.flax_gru),
    "lstm": sequences.recurrent(flax.linen.OptimizedLSTMCell, sequences.flax_lstm),
    "scaled_dot_product_attention": sequences.attention,
    "multi_head_attention": sequences.multi_head_attention,
    "rotary": Composed(sequences.rotary),
    # merges, shapes, reductions
    "add": jnp.add,
    "subtract": jnp.subtract,
    "multiply": jnp.multiply,
    "divide": jnp.divide,
    "concatenate": lambda *xs, axis: jnp.concatenate(xs, axis=axis),
    "reshape": jnp.reshape,
    "flatten": lambda x: jnp.reshape(x, (x.shape[0], -1)),
    "stack": lambda *xs, axis: jnp.stack(xs, axis=axis),
    "transpose": jnp.transpose,
    "broadcast": jnp.broadcast_to,
    "reduce_sum": lambda x, axes, keepdims: jnp.sum(x, axes, keepdims=keepdims),
    "reduce_mean": lambda x, axes, keepdims: jnp.mean(x, axes, keepdims=keepdims),
    "reduce_max": lambda x, axes, keepdims: jnp.max(x, axes, keepdims=keepdims),
    "reduce_min": lambda x, axes, keepdims: jnp.min(x, axes, keepdims=keepdims),
    "reduce_prod": lambda x, axes, keepdims: jnp.prod(x, axes, keepdims=keepdims),
    "reduce_var": lambda x, axes, ddof, keepdims: jnp.var(x, axes, ddof=ddof, keepdims=keepdims),
    "reduce_std": lambda x, axes, ddof, keepdims: jnp.std(x, axes, ddof=ddof, keepdims=keepdims),
    "reduce_norm": lambda x, p, axes, keepdims: jnp.linalg.vector_norm(x, ord=p, axis=axes, keepdims=keepdims),
    "cumsum": lambda x, axis, reverse: jax.lax.cumsum(x, axis % x.ndim, reverse=reverse),
    # losses
    "mse": losses.reduced(optax.squared_error),
    "half_squared_error": losses.reduced(optax.l2_loss),
    "mae": Composed(losses.reduced(lambda x, target: jnp.abs(x - target))),
    "huber": losses.reduced(optax.huber_loss),
    "smooth_l1": Composed(losses.reduced(losses.smooth_l1)),
    "log_cosh": losses.reduced(optax.log_cosh),
    "poisson_nll": Composed(losses.reduced(losses.poisson_nll)),
    "gaussian_nll": Composed(losses.reduced(losses.gaussian_nll)),
    "bce": Composed(losses.reduced(losses.bce)),
    "bce_with_logits": losses.reduced(losses.bce_with_logits),
    "cross_entropy": losses.cross_entropy,
    "nll": Composed(losses.nll),
    "kl_div": losses.kl_div,
    "sigmoid_focal": losses.reduced(losses.sigmoid_focal),
    "dice": Composed(losses.reduced(losses.dice)),
    # margins, ctc
    "hinge": losses.reduced(optax.hinge_loss),
    "squared_hinge": Composed(losses.reduced(lambda x, target: optax.hinge_loss(x, target) ** 2)),
    "hinge_embedding": Composed(losses.reduced(losses.hinge_embedding)),
    "soft_margin": Composed(losses.reduced(losses.soft_margin)),
    "multi_margin": Composed(losses.reduced(losses.multi_margin)),
    "multilabel_margin": Composed(losses.reduced(losses.multilabel_margin)),
    "multilabel_soft_margin": Composed(losses.reduced(losses.multilabel_soft_margin)),
    "margin_ranking": Composed(losses.reduced(losses.margin_ranking)),
    "cosine_embedding": Composed(losses.reduced(losses.cosine_embedding)),
    "triplet_margin": Composed(losses.reduced(losses.triplet_margin)),
    "ctc": losses.ctc,
}


class JaxAdapter(FunctionalAdapter):
    """Gradients as `jax.vjp` gives them.

    jit: "layer" compiles each layer by itself and lets JAX differentiate their composition; "network" compiles
        the whole network, forward and backward in one program, anew for every network.
    cache: the directory in which JAX keeps its compilations, or "off". Where it is not given, the environment
        variable GRADPROOF_JAX_CACHE says it, else it is a per-user cache.
    """

    name = "jax"
    rows = ROWS

    def __init__(self, jit: str = "layer", cache: str = "") -> None:
        if jit not in JITS:
            raise AdapterError(f"unknown jit {jit!r}; valid: {', '.join(JITS)}")
        self._jit = jit
        self.fused = self._jit == "network"
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "highest")
        directory = cache or os.environ.get(JAX_CACHE_VARIABLE) or platformdirs.user_cache_dir("gradproof/jax")
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

    def vjp(self, network: Network, floating: Arrays, constant: Arrays, taps: Arrays) -> tuple[Arrays, Any]:
        if self._jit == "network":
            run = partial(_whole(self, network), floating, taps, constant)
            # The program takes the cotangent too, which comes later: whatever it is, the outputs are the same.
            outputs, _ = run(np.zeros_like(taps[network.output]))
            return jax.device_get(outputs), lambda cotangent: run(cotangent)[1]
        function = partial(self.walk, network, constant=constant)
        output, pullback, outputs = jax.vjp(function, floating, taps, has_aux=True)
        return jax.device_get(outputs), lambda cotangent: pullback(jnp.array(cotangent, output.dtype))

    def pull_back(self, pullback: Any, cotangent: np.ndarray) -> tuple[Arrays, Arrays]:
        gradients: tuple[Arrays, Arrays] = jax.device_get(pullback(cotangent))
        return gradients


@cache
def _compiled(row: Row, keywords: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """One compiled function per row and options, shared by every network."""
    options: Options = dict(keywords)

    def run(tap: Any, arrays: list[Any], by_name: Mapping[str, Any]) -> Any:
        return row(*arrays, **by_name, **options) + tap

    return jax.jit(run)


@lru_cache(maxsize=KEPT)
def _whole(adapter: JaxAdapter, network: Network) -> Callable[..., Any]:
    """All outputs and all gradients of a network in one compiled function; numbers of any dtype share it."""

    def run(floating: Arrays, taps: Arrays, constant: Arrays, cotangent: Any) -> tuple[Arrays, Any]:
        function = partial(adapter.walk, network, constant=constant)
        output, pullback, outputs = jax.vjp(function, floating, taps, has_aux=True)
        return outputs, pullback(jnp.asarray(cotangent, output.dtype))

    return jax.jit(run)
