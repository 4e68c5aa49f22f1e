"""PyTorch autograd."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gradproof.adapters.base import Composed, Row, is_floating
from gradproof.adapters.tape import TapeAdapter
from gradproof.model.adapter import AdapterError


def _layer_norm(x: Any, weight: Any = None, bias: Any = None, *, axes: int, eps: float) -> Any:
    return F.layer_norm(x, x.shape[-axes:], weight, bias, eps)


def _lp_pool(x: Any, p: int, kernel: int, stride: int, ceil_mode: bool) -> Any:
    """Windows that overhang are filled with zeros beforehand, for torch counts what is not there."""
    pool = F.lp_pool1d if x.ndim == 3 else F.lp_pool2d
    if ceil_mode:
        sizes = reversed(x.shape[2:])
        x = F.pad(x, [side for size in sizes for side in (0, _overhang(size, kernel, stride))])
    return pool(x, p, kernel, stride)


def _overhang(size: int, kernel: int, stride: int) -> int:
    """Places beyond the end of an axis that its last window has; every window begins within the axis."""
    last = -(-(size - kernel) // stride) * stride
    return max((last if last < size else last - stride) + kernel - size, 0)


HALF = (torch.bfloat16, torch.float16)


def _idle(small: Any, large: Any, taps: Any, stride: Any, padding: Any, dilation: Any) -> bool:
    """Whether some tap of a kernel meets padding alone; each argument has a number for every axis.

    small, large: the sizes between which stride * i + dilation * tap - padding leads, those of a convolution's output
    and input.
    """
    return any(
        not any(0 <= s * i + d * tap - p < size for i in range(count))
        for count, size, kernel, s, p, d in zip(small, large, taps, stride, padding, dilation, strict=True)
        for tap in range(kernel)
    )


def _convolution(native: Any) -> Row:
    """In half precision the padding is put on beforehand where a tap meets nothing else: torch fails then."""

    def convolve(
        x: Any, weight: Any, bias: Any = None, *, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Any:
        sizes, taps = x.shape[2:], weight.shape[2:]
        if x.dtype in HALF:
            along = zip(sizes, taps, stride, padding, dilation, strict=True)
            out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in along]
            if _idle(out, sizes, taps, stride, padding, dilation):
                x, padding = F.pad(x, [p for each in reversed(padding) for p in (each, each)]), 0
        return native(x, weight, bias, stride, padding, dilation, groups)

    return convolve


def _transposed_convolution(native: Any) -> Row:
    """In half precision the padding is cut off afterwards where a tap meets nothing else: see `_convolution`."""

    def convolve(
        x: Any, weight: Any, bias: Any = None, *, stride: Any, padding: Any, dilation: Any, **rest: Any
    ) -> Any:
        sizes, taps = x.shape[2:], weight.shape[2:]
        if x.dtype in HALF:
            along = zip(sizes, taps, stride, padding, dilation, rest["output_padding"], strict=True)
            out = [(size - 1) * s - 2 * p + d * (k - 1) + more + 1 for size, k, s, p, d, more in along]
            if _idle(sizes, out, taps, stride, padding, dilation):
                whole = native(x, weight, bias, stride, 0, dilation=dilation, **rest)
                return whole[(..., *(slice(p, p + size) for p, size in zip(padding, out, strict=True)))]
        return native(x, weight, bias, stride, padding, dilation=dilation, **rest)

    return convolve


ADAPTIVE_AVG_POOLS = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
ADAPTIVE_MAX_POOLS = {3: F.adaptive_max_pool1d, 4: F.adaptive_max_pool2d, 5: F.adaptive_max_pool3d}


def _global_pool(pools: dict[int, Any]) -> Row:
    """torch has these as adaptive pools to a size of 1."""

    def pool(x: Any, keepdims: bool) -> Any:
        pooled = pools[x.ndim](x, 1)
        return pooled if keepdims else pooled.flatten(1)

    return pool


def _batch_norm(
    x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None, *, eps: float
) -> Any:
    if running_mean is None:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    return F.batch_norm(x, running_mean.detach(), running_var.detach(), weight, bias, eps=eps)


def _rms_norm(x: Any, weight: Any = None, *, axes: int, eps: float) -> Any:
    return F.rms_norm(x, x.shape[-axes:], weight, eps)


def _group_norm(x: Any, weight: Any = None, bias: Any = None, *, groups: int, eps: float) -> Any:
    """The function behind `F.group_norm`, which refuses a group of one value in a batch of one."""
    return torch.group_norm(x, groups, weight, bias, eps)


def _instance_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float) -> Any:
    """Its backward pass reads the memory of its cotangent in a row, whatever the strides; it is put in a row before."""
    out = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if out.requires_grad:
        out.register_hook(torch.Tensor.contiguous)
    return out


def _weight_norm(x: Any, direction: Any, magnitude: Any, bias: Any = None) -> Any:
    """What `torch.nn.utils.parametrizations.weight_norm` computes, for a linear layer."""
    return F.linear(x, torch._weight_norm(direction, magnitude[:, None], 0), bias)


def _constant(weight: Any) -> Any:
    """torch refuses weights that are recorded on the tape, for it cannot differentiate with respect to them."""
    return None if weight is None else weight.detach()


def _bce(x: Any, target: Any, weight: Any = None, *, reduction: str) -> Any:
    lost = torch.isnan(x) | torch.isnan(target)
    if not lost.any():
        return F.binary_cross_entropy(x, target, _constant(weight), reduction=reduction)
    # What overflowed before is refused by torch; it is NaN here too, and the other elements count.
    x, target = (torch.where(lost, 0.5, each) for each in (x, target))
    loss = F.binary_cross_entropy(x, target, _constant(weight), reduction="none")
    return _reduced(torch.where(lost, torch.nan, loss), reduction)


def _bce_with_logits(x: Any, target: Any, weight: Any = None, pos_weight: Any = None, *, reduction: str) -> Any:
    weights = {"weight": _constant(weight), "pos_weight": _constant(pos_weight)}
    return F.binary_cross_entropy_with_logits(x, target, **weights, reduction=reduction)


def _cross_entropy(x: Any, target: Any, weight: Any = None, *, targets: str, **options: Any) -> Any:
    """torch keeps the classes on axis 1 of a batch, gradproof on the last axis."""
    if x.ndim > 2:
        x = x.movedim(-1, 1)
        target = target.movedim(-1, 1) if targets == "probabilities" else target
    return F.cross_entropy(x, target, _constant(weight), **options)


def _nll(x: Any, target: Any, weight: Any = None, **options: Any) -> Any:
    # Where x has four axes, its backward pass raises "grad_input must be contiguous" without that call.
    x = x.movedim(-1, 1).contiguous() if x.ndim > 2 else x
    return F.nll_loss(x, target, _constant(weight), **options)


def _kl_div(x: Any, target: Any, *, log_target: bool, reduction: str) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "reduction: 'mean'")  # that it is not "batchmean"
        return F.kl_div(x, target, log_target=log_target, reduction=reduction)


def _log_cosh(x: Any, target: Any, reduction: str) -> Any:
    """In two forms: one keeps its digits near 0, the other does not overflow."""
    error = x - target
    near = error.abs() < 1.0
    half = torch.sinh(0.5 * torch.where(near, error, 0.0))
    size = torch.where(near, 1.0, error).abs()
    far = size + torch.log1p(torch.exp(-2.0 * size)) - math.log(2.0)
    return _reduced(torch.where(near, torch.log1p(2.0 * half * half), far), reduction)


def _sigmoid_focal(x: Any, target: Any, *, alpha: float, gamma: float, reduction: str) -> Any:
    wrong = (1.0 - target) * torch.sigmoid(x) + target * torch.sigmoid(-x)
    # binary_cross_entropy_with_logits loses the digits of sigmoid(x) - target where x is large.
    below = x < 0.0
    size = torch.where(below, -x, x)
    entropy = torch.log1p(torch.exp(-size)) + torch.where(below, target, 1.0 - target) * size
    balance = alpha * target + (1.0 - alpha) * (1.0 - target) if alpha >= 0.0 else 1.0
    return _reduced(balance * wrong**gamma * entropy, reduction)


def _dice(x: Any, target: Any, *, axes: int, smooth: float, squared: bool, reduction: str) -> Any:
    over = tuple(range(-axes, 0))
    sizes = x * x + target * target if squared else x + target
    overlap = (2.0 * (x * target).sum(over) + smooth) / (sizes.sum(over) + smooth)
    return _reduced(1.0 - overlap, reduction)


def _half_squared_error(x: Any, target: Any, reduction: str) -> Any:
    error = x - target
    return _reduced(0.5 * error * error, reduction)


def _reduced(loss: Any, reduction: str) -> Any:
    return loss if reduction == "none" else getattr(loss, reduction)()


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


def _causal(queries: int, keys: int) -> Any:
    return torch.ones(queries, keys, dtype=torch.bool).tril()


def _attention(
    q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None, *, causal: bool, scale: float | str, groups: int
) -> Any:
    """torch takes one mask, and either it or `is_causal`."""
    attended = bias if mask is None else mask.bool()
    if causal and attended is not None:
        attended = torch.where(_causal(q.shape[-2], k.shape[-2]), attended, -torch.inf if mask is None else False)
    factor = None if isinstance(scale, str) else scale
    return F.scaled_dot_product_attention(
        q, k, v, attended, is_causal=causal and attended is None, scale=factor, enable_gqa=groups > 1
    )


def _multi_head_attention(
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
    """torch's masks are true where a key is hidden; where one mask is additive, all are."""
    key = query if key is None else key
    scores = (query.shape[0], key.shape[0])
    hidden = None if mask is None else mask == 0
    if causal:
        later = ~_causal(*scores)
        hidden = later if hidden is None else hidden | later
        bias = None if bias is None else torch.where(later, -torch.inf, bias)
    unseen = None if padding is None else padding == 0
    if bias is not None and unseen is not None:
        unseen = torch.where(unseen, -torch.inf, torch.zeros((), dtype=bias.dtype))
    out, _ = F.multi_head_attention_forward(
        *(query, key, key if value is None else value, query.shape[-1], heads, in_proj_weight, in_proj_bias),
        *(None, None, False, 0.0, out_proj_weight, out_proj_bias),
        key_padding_mask=unseen,
        # The weights would be NaN where a query is allowed no key; without them, torch gives 0.
        need_weights=False,
        attn_mask=hidden if bias is None else bias,
        is_causal=causal and mask is None and bias is None,
        use_separate_proj_weight=in_proj_weight is None,
        **apart,
    )
    return out


def _rotary(x: Any, *, axis: int, pairs: str, base: float) -> Any:
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.outer(torch.arange(x.shape[axis], dtype=x.dtype), frequencies)
    shape = [1] * x.ndim
    shape[axis], shape[-1] = angles.shape
    cosine, sine = angles.cos().reshape(shape), angles.sin().reshape(shape)
    a, b = (x[..., 0::2], x[..., 1::2]) if pairs == "interleaved" else x.chunk(2, dim=-1)
    turned = (a * cosine - b * sine, a * sine + b * cosine)
    return torch.stack(turned, dim=-1).flatten(-2) if pairs == "interleaved" else torch.cat(turned, dim=-1)


def _reduce_prod(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    """torch.prod takes one axis; the axes are made one, the last."""
    positive = [axis % x.ndim for axis in axes]
    product = x.movedim(positive, tuple(range(-len(axes), 0))).flatten(-len(axes)).prod(dim=-1)
    return (
        product.reshape([1 if axis in positive else size for axis, size in enumerate(x.shape)]) if keepdims else product
    )


def _cumsum(x: Any, axis: int, reverse: bool) -> Any:
    return torch.cumsum(x.flip(axis), dim=axis).flip(axis) if reverse else torch.cumsum(x, dim=axis)


def _binary_hinge(x: Any, target: Any) -> Any:
    return F.relu(1.0 - target * x)


def _multi_margin(x: Any, target: Any, weight: Any = None, **options: Any) -> Any:
    return F.multi_margin_loss(x, target, weight=None if weight is None else weight.detach(), **options)


def _ctc(logits: Any, *targets_and_lengths: Any, **options: Any) -> Any:
    return F.ctc_loss(F.log_softmax(logits, dim=-1), *targets_and_lengths, **options)


def _upsample(x: Any, *, size: int | tuple[int, ...], mode: str, align_corners: bool) -> Any:
    linear = ("linear", "bilinear", "trilinear")[x.ndim - 3]
    named = {"nearest_exact": "nearest-exact", "linear": linear, "cubic": "bicubic"}.get(mode, mode)
    extent: dict[str, Any] = {"size": size} if isinstance(size, tuple) else {"scale_factor": size}
    return F.interpolate(x, **extent, mode=named, align_corners=align_corners if mode in ("linear", "cubic") else None)


def _pad(x: Any, *, amounts: tuple[int, ...], mode: str, value: float) -> Any:
    """torch begins with the last axis, and takes other modes than constant after exactly two axes."""
    axes = len(amounts) // 2
    last_first = [each for axis in reversed(range(axes)) for each in amounts[2 * axis : 2 * axis + 2]]
    if mode == "constant":
        return F.pad(x, last_first, value=value)
    leading = x.shape[: x.ndim - axes]
    padded = F.pad(x.reshape(leading.numel(), 1, *x.shape[x.ndim - axes :]), last_first, mode=mode)
    return padded.reshape(*leading, *padded.shape[2:])


def _embedding(indices: Any, weight: Any, *, padding_idx: int) -> Any:
    return F.embedding(indices, weight, None if padding_idx < 0 else padding_idx)


def _embedding_bag(indices: Any, weight: Any, per_sample_weights: Any = None, *, mode: str, padding_idx: int) -> Any:
    padding = None if padding_idx < 0 else padding_idx
    return F.embedding_bag(indices, weight, mode=mode, per_sample_weights=per_sample_weights, padding_idx=padding)


def _slice(x: Any, *, axis: int, start: int, stop: int, step: int) -> Any:
    """torch has no negative steps; they are positive ones through the flipped axis."""
    places = range(x.shape[axis])[start:stop:step]
    if step < 0:
        last = x.shape[axis] - 1
        x, places = x.flip(axis), range(last - places[0], last - places[-1] + 1, -step)
    return x.movedim(axis, 0)[places.start : places.stop : places.step].movedim(0, axis)


def _top_k(x: Any, *, k: int, axis: int, largest: bool) -> Any:
    """`torch.topk` picks any of equal elements; its stable sort, used where there are some, picks the first."""
    ordered = torch.sort(x, dim=axis, descending=largest, stable=True).values
    count = x.shape[axis] - 1
    tied = bool((ordered.narrow(axis, 1, count) == ordered.narrow(axis, 0, count)).any())  # infinities too
    return ordered.narrow(axis, 0, k) if tied else torch.topk(x, k, axis, largest).values


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
    "squareplus": Composed(lambda x, b: 0.5 * (x + torch.hypot(x, torch.full_like(x, b**0.5)))),
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
    "sparse_sigmoid": Composed(lambda x: 0.5 * (torch.clamp(x, -1.0, 1.0) + 1.0)),
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
    "embedding": _embedding,
    "embedding_bag": _embedding_bag,
    "gather": lambda x, indices, axis: torch.take_along_dim(x, indices, dim=axis),
    "scatter_add": lambda x, indices, source, axis: torch.scatter_add(x, axis, indices, source),
    "where": lambda a, b, condition: torch.where(condition == 1, a, b),
    "slice": _slice,
    "split": lambda x, axis, parts, index: torch.tensor_split(x, parts, dim=axis)[index],
    "sort": lambda x, axis, descending: torch.sort(x, dim=axis, descending=descending, stable=True).values,
    "top_k": _top_k,
    # convolution, resampling
    "conv1d": _convolution(F.conv1d),
    "conv2d": _convolution(F.conv2d),
    "conv3d": _convolution(F.conv3d),
    "conv_transpose1d": _transposed_convolution(F.conv_transpose1d),
    "conv_transpose2d": _transposed_convolution(F.conv_transpose2d),
    "upsample": _upsample,
    "pixel_shuffle": lambda x, factor: F.pixel_shuffle(x, factor),
    "pad": _pad,
    # pooling, normalization, dropout
    "max_pool1d": lambda x, kernel, **options: F.max_pool1d(x, kernel, **options),
    "max_pool2d": lambda x, kernel, **options: F.max_pool2d(x, kernel, **options),
    "avg_pool1d": lambda x, kernel, **options: F.avg_pool1d(x, kernel, **options),
    "avg_pool2d": lambda x, kernel, **options: F.avg_pool2d(x, kernel, **options),
    "lp_pool": _lp_pool,
    "adaptive_avg_pool": lambda x, output_size: ADAPTIVE_AVG_POOLS[x.ndim](x, output_size),
    "adaptive_max_pool": lambda x, output_size: ADAPTIVE_MAX_POOLS[x.ndim](x, output_size),
    "global_avg_pool": _global_pool(ADAPTIVE_AVG_POOLS),
    "global_max_pool": _global_pool(ADAPTIVE_MAX_POOLS),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "local_response_norm": F.local_response_norm,
    "weight_norm": _weight_norm,
    "dropout": Composed(lambda x, mask, p: x * mask.to(x.dtype) / (1.0 - p)),
    # recurrent, attention
    "rnn_tanh": _recurrent(torch.rnn_tanh),
    "gru": _recurrent(torch.gru),
    "lstm": _recurrent(torch.lstm, cell=True),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention": _multi_head_attention,
    "rotary": Composed(_rotary),
    # merges, shapes, reductions
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "concatenate": lambda *xs, axis: torch.cat(xs, dim=axis),
    "reshape": torch.reshape,
    "flatten": lambda x: torch.flatten(x, start_dim=1) if x.ndim > 1 else x.unflatten(0, (-1, 1)),
    "stack": lambda *xs, axis: torch.stack(xs, dim=axis),
    "transpose": lambda x, axes: torch.permute(x, axes),
    "broadcast": lambda x, shape: torch.broadcast_to(x, shape),
    "reduce_sum": lambda x, axes, keepdims: torch.sum(x, dim=axes, keepdim=keepdims),
    "reduce_mean": lambda x, axes, keepdims: torch.mean(x, dim=axes, keepdim=keepdims),
    "reduce_max": lambda x, axes, keepdims: torch.amax(x, dim=axes, keepdim=keepdims),
    "reduce_min": lambda x, axes, keepdims: torch.amin(x, dim=axes, keepdim=keepdims),
    "reduce_prod": _reduce_prod,
    "reduce_var": lambda x, axes, ddof, keepdims: torch.var(x, dim=axes, correction=ddof, keepdim=keepdims),
    "reduce_std": lambda x, axes, ddof, keepdims: torch.std(x, dim=axes, correction=ddof, keepdim=keepdims),
    "reduce_norm": lambda x, p, axes, keepdims: torch.linalg.vector_norm(x, ord=p, dim=axes, keepdim=keepdims),
    "cumsum": _cumsum,
    # losses
    "mse": F.mse_loss,
    "half_squared_error": Composed(_half_squared_error),
    "mae": F.l1_loss,
    "huber": F.huber_loss,
    "smooth_l1": F.smooth_l1_loss,
    "log_cosh": Composed(_log_cosh),
    "poisson_nll": F.poisson_nll_loss,
    "gaussian_nll": F.gaussian_nll_loss,
    "bce": _bce,
    "bce_with_logits": _bce_with_logits,
    "cross_entropy": _cross_entropy,
    "nll": _nll,
    "kl_div": _kl_div,
    "sigmoid_focal": Composed(_sigmoid_focal),
    "dice": Composed(_dice),
    # margins, ctc
    "hinge": Composed(lambda x, target, reduction: _reduced(_binary_hinge(x, target), reduction)),
    "squared_hinge": Composed(lambda x, target, reduction: _reduced(_binary_hinge(x, target) ** 2, reduction)),
    "hinge_embedding": F.hinge_embedding_loss,
    "soft_margin": lambda x, target, reduction: F.soft_margin_loss(x, target.detach(), reduction=reduction),
    "multi_margin": _multi_margin,
    "multilabel_margin": F.multilabel_margin_loss,
    "multilabel_soft_margin": F.multilabel_soft_margin_loss,
    "margin_ranking": F.margin_ranking_loss,
    "cosine_embedding": F.cosine_embedding_loss,
    "triplet_margin": F.triplet_margin_loss,
    "ctc": _ctc,
}


NO_HALF_KERNEL = ("local_response_norm", "multi_margin", "multilabel_margin", "ctc")
"""Layers for which torch has no kernel on the CPU in bfloat16 and float16; for some shapes alone in the first."""

LACKING = {"bfloat16": (*NO_HALF_KERNEL, "conv3d"), "float16": NO_HALF_KERNEL}
"""Dtype -> the layers that cannot be run. Part of what conv3d gives in bfloat16 is whatever was in memory."""


class TorchAdapter(TapeAdapter):
    """Gradients as `torch.autograd.grad` gives them.

    device: where they are computed, as torch names it: "cpu", "cuda", "cuda:1", "mps".
    """

    name = "torch"
    rows = ROWS
    lacking = MappingProxyType(LACKING)

    def __init__(self, device: str = "cpu") -> None:
        try:
            self._device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise AdapterError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error

    def version(self) -> str:
        return str(torch.__version__)

    def tensor(self, value: np.ndarray, dtype: str) -> torch.Tensor:
        if not is_floating(value):
            return torch.tensor(value, device=self._device)
        return torch.tensor(_readable(value), dtype=getattr(torch, dtype), device=self._device, requires_grad=True)

    def array(self, tensor: torch.Tensor) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return tensor.detach().float().cpu().numpy().astype("bfloat16")
        return np.asarray(tensor.detach().cpu().numpy())

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    def gradients(self, output: Any, cotangent: np.ndarray, tensors: Sequence[Any]) -> Sequence[Any]:
        seed = torch.tensor(_readable(cotangent), dtype=output.dtype, device=self._device)
        return torch.autograd.grad(output, tensors, seed, retain_graph=True, allow_unused=True)


def _readable(value: np.ndarray) -> np.ndarray:
    """The numbers in a dtype that torch reads from NumPy, which has no bfloat16 of its own."""
    return value.astype(np.float32) if value.dtype == "bfloat16" else value
