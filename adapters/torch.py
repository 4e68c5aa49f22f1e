"""PyTorch autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gradproof.adapters.base import Composed, Row, is_floating
from gradproof.adapters.tape import TapeAdapter


def _layer_norm(x: Any, weight: Any = None, bias: Any = None, *, axes: int, eps: float) -> Any:
    return F.layer_norm(x, x.shape[-axes:], weight, bias, eps)


def _cross_entropy(x: Any, target: Any, *, targets: str, reduction: str) -> Any:
    """torch keeps the classes on axis 1 of a batch, gradproof on the last axis."""
    if x.ndim > 2:
        x = x.movedim(-1, 1)
        target = target.movedim(-1, 1) if targets == "probabilities" else target
    return F.cross_entropy(x, target, reduction=reduction)


def _swiglu(x: Any, axis: int) -> Any:
    a, b = x.chunk(2, axis)
    return F.silu(a) * b


def _geglu(x: Any, axis: int, approximate: str) -> Any:
    a, b = x.chunk(2, axis)
    return F.gelu(a, approximate=approximate) * b


def _maxout(x: Any, axis: int, pieces: int) -> Any:
    place = axis % x.ndim
    return x.unflatten(place, (-1, pieces)).max(place + 1).values


def _sparse_plus(x: Any) -> Any:
    bend = torch.clamp(x, -1.0, 1.0)
    return torch.where(x < 1.0, 0.25 * (bend + 1.0) ** 2, x)


def _recurrent(run: Any, cell: bool = False) -> Row:
    """A row for one of torch's recurrent functions, which want flat lists of states and parameters."""

    def row(
        x: Any, h0: Any = None, c0: Any = None, *, layers: int, bidirectional: bool, returns: str, **parameters: Any
    ) -> Any:
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ends = [f"_l{layer}{end}" for layer in range(layers) for end in ("", "_reverse")[: 1 + bidirectional]]
        flat = [parameters[f"{kind}{end}"] for end in ends for kind in kinds if f"{kind}{end}" in parameters]
        nothing = x.new_zeros(len(ends), x.shape[1], flat[1].shape[1])
        states = [nothing if state is None else state for state in (h0, c0)]
        biased = "bias_ih_l0" in parameters
        outputs = run(x, states if cell else states[0], flat, biased, layers, 0.0, True, bidirectional, False)
        return outputs[("sequence", "hidden", "cell").index(returns)]

    return row


ROWS: dict[str, Row] = {
    # activations, piecewise, elementwise
    "identity": torch.nn.Identity(),
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": Composed(lambda x: x * torch.sigmoid(1.702 * x)),
    "mish": F.mish,
    "softsign": F.softsign,
    "squareplus": Composed(lambda x, b: 0.5 * (x + torch.sqrt(x * x + b))),
    "tanhshrink": F.tanhshrink,
    "log_sigmoid": F.logsigmoid,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "threshold": F.threshold,
    "selu": F.selu,
    "celu": F.celu,
    "prelu": F.prelu,
    "rrelu": F.rrelu,
    "sparse_plus": Composed(_sparse_plus),
    "sparse_sigmoid": Composed(lambda x: torch.clamp(0.5 * (x + 1.0), 0.0, 1.0)),
    "abs": torch.abs,
    "clip": lambda x, low, high: torch.clamp(x, low, high),
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "reciprocal": torch.reciprocal,
    "power": torch.pow,
    "sin": torch.sin,
    "cos": torch.cos,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    # gated, softmax
    "softmax": lambda x, axis: F.softmax(x, dim=axis),
    "log_softmax": lambda x, axis: F.log_softmax(x, dim=axis),
    "softmin": lambda x, axis: F.softmin(x, dim=axis),
    "logsumexp": lambda x, axis, keepdims: torch.logsumexp(x, axis, keepdims),
    "glu": lambda x, axis: F.glu(x, dim=axis),
    "swiglu": Composed(_swiglu),
    "geglu": Composed(_geglu),
    "maxout": Composed(_maxout),
    # linear, indexing
    "linear": F.linear,
    "bilinear": F.bilinear,
    "matmul": torch.matmul,
    "einsum": lambda a, b, equation: torch.einsum(equation, a, b),
    # convolution, resampling
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    # pooling, normalization, dropout
    "layer_norm": _layer_norm,
    # recurrent, attention
    "rnn_tanh": _recurrent(torch.rnn_tanh),
    "gru": _recurrent(torch.gru),
    "lstm": _recurrent(torch.lstm, cell=True),
    # merges, shapes, reductions
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "concatenate": lambda *xs, axis: torch.cat(xs, dim=axis),
    "reshape": torch.reshape,
    "flatten": lambda x: torch.flatten(x, start_dim=1) if x.ndim > 1 else x.unflatten(0, (-1, 1)),
    # losses
    "mse": F.mse_loss,
    "half_squared_error": Composed(lambda x, target, reduction: 0.5 * F.mse_loss(x, target, reduction=reduction)),
    "mae": F.l1_loss,
    "bce": F.binary_cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "cross_entropy": _cross_entropy,
    # margins, ctc
}


class TorchAdapter(TapeAdapter):
    """Gradients as `torch.autograd.grad` gives them, on the CPU."""

    name = "torch"
    rows = ROWS

    def version(self) -> str:
        return str(torch.__version__)

    def tensor(self, value: np.ndarray, dtype: str) -> torch.Tensor:
        if not is_floating(value):
            return torch.tensor(value)
        return torch.tensor(value, dtype=getattr(torch, dtype), requires_grad=True)

    def array(self, tensor: torch.Tensor) -> np.ndarray:
        return np.asarray(tensor.detach().numpy())

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    def gradients(self, output: Any, cotangent: np.ndarray, tensors: Sequence[Any]) -> Sequence[Any]:
        seed = torch.tensor(cotangent, dtype=output.dtype)
        return torch.autograd.grad(output, tensors, seed, retain_graph=True, allow_unused=True)
