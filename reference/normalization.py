"""Normalisation layers.

Legend: B batch, C channels, S any spatial axes, D the axes that are normalised together, ... the other ones,
n the number of elements of D, m their mean, v their variance (the biased one, divided by n), r = 1 / sqrt(v + eps),
z the normalised x, g = dout * weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gradproof.model.layer import Argument, Domain, Layer, ShapeError, normalized_shape
from gradproof.model.options import MAX_RANK, Choice, Divisor, Integer, Option, Options, Real, Shape, Size, TrailingAxes
from gradproof.reference.common import Array, Gradients, unbroadcast
from gradproof.reference.linear import linear_backward, linear_forward

Axes = tuple[int, ...]

Normalize = Callable[[Array, Axes, float], tuple[Array, Array]]
"""What gives z and r over some axes."""

Step = Callable[[Array, Array, Array, Axes], Array]
"""What gives dx from g, z and r, over some axes."""


def standardized(x: Array, over: Axes, eps: float) -> tuple[Array, Array]:
    """z = (x - m) r and r, over some axes. The variance is that of the centred numbers, so that it keeps its digits."""
    centred = x - x.mean(axis=over, keepdims=True)
    reciprocal = 1.0 / np.sqrt((centred * centred).mean(axis=over, keepdims=True) + eps)
    return centred * reciprocal, reciprocal


def standardized_backward(g: Array, normalized: Array, reciprocal: Array, over: Axes) -> Array:
    """dx = r (g - mean(g) - z mean(g z)): m depends on every x with slope 1/n, and v with slope 2 (x - m) / n."""
    mean_g = g.mean(axis=over, keepdims=True)
    mean_gz = (g * normalized).mean(axis=over, keepdims=True)
    return reciprocal * (g - mean_g - normalized * mean_gz)


def layer_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axes: int,
    eps: float,
    normalize: Normalize = standardized,
) -> tuple[Array, tuple[Any, ...]]:
    """out = (x - m) r * weight + bias, m the mean over D, r = 1 / sqrt(variance over D + eps) (Ba et al. 2016).

    Shapes: x and out (..., D), D the trailing `axes`, weight and bias (D).
    """
    over = tuple(range(-axes, 0))
    normalized, reciprocal = normalize(x, over, eps)
    cache = (normalized, reciprocal, weight, over)
    return (normalized if weight is None else normalized * weight + bias), cache


def layer_norm_backward(dout: Array, cache: tuple[Any, ...], *, step: Step = standardized_backward) -> Gradients:
    """dx = r (g - mean(g) - z mean(g z)), g = dout * weight, z = (x - m) r; dweight = sum dout z; dbias = sum dout.

    The means are over D, the sums over the leading axes.
    """
    normalized, reciprocal, weight, over = cache
    g = dout if weight is None else dout * weight
    gradients = {"x": step(g, normalized, reciprocal, over)}
    if weight is not None:
        gradients |= {"weight": unbroadcast(dout * normalized, weight.shape), "bias": unbroadcast(dout, weight.shape)}
    return gradients


def rms_norm_forward(x: Array, weight: Array | None = None, *, axes: int, eps: float) -> tuple[Array, tuple[Any, ...]]:
    """out = x r * weight, r = 1 / sqrt(mean of x^2 over D + eps) (Zhang and Sennrich 2019).

    Shapes: x and out (..., D), D the trailing `axes`, weight (D).
    """
    over = tuple(range(-axes, 0))
    reciprocal = 1.0 / np.sqrt((x * x).mean(axis=over, keepdims=True) + eps)
    normalized = x * reciprocal
    return (normalized if weight is None else normalized * weight), (normalized, reciprocal, weight, over)


def scaled_backward(g: Array, normalized: Array, reciprocal: Array, over: Axes) -> Array:
    """dx = r (g - z mean(g z)): the mean of squares depends on every x with slope 2 x / n."""
    return reciprocal * (g - normalized * (g * normalized).mean(axis=over, keepdims=True))


def rms_norm_backward(dout: Array, cache: tuple[Any, ...], *, step: Step = scaled_backward) -> Gradients:
    """dx = r (g - z mean(g z)), g = dout * weight, z = x r; dweight = sum of dout z over the leading axes."""
    normalized, reciprocal, weight, over = cache
    g = dout if weight is None else dout * weight
    gradients = {"x": step(g, normalized, reciprocal, over)}
    return gradients | ({} if weight is None else {"weight": unbroadcast(dout * normalized, weight.shape)})


def along_channels(each: Array, rank: int) -> Array:
    """A number per channel, (C,), as it broadcasts against (B, C, S...) of this rank."""
    return each.reshape(-1, *(1,) * (rank - 2))


def _affine(normalized: Array, weight: Array | None, bias: Array | None) -> Array:
    """z * weight + bias, with a weight and a bias for each channel, or none."""
    if weight is None or bias is None:
        return normalized
    return normalized * along_channels(weight, normalized.ndim) + along_channels(bias, normalized.ndim)


def _affine_backward(dout: Array, normalized: Array, weight: Array | None) -> tuple[Array, Gradients]:
    """g, and the gradients of weight and bias: the sums of dout z and of dout over all axes but the channels."""
    if weight is None:
        return dout, {}
    others = (0, *range(2, dout.ndim))
    gradients = {"weight": (dout * normalized).sum(axis=others), "bias": dout.sum(axis=others)}
    return dout * along_channels(weight, dout.ndim), gradients


def batch_norm_forward(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float,
    normalize: Normalize = standardized,
) -> tuple[Array, tuple[Any, ...]]:
    """out = (x - m) r * weight + bias, per channel (Ioffe and Szegedy 2015).

    In training m and v are those of x over B and S. In evaluation they are given, and constant. What momentum does to
    the running statistics is no part of the output. Shapes: x and out (B, C, S...), all else (C,).
    """
    over: Axes = ()
    if running_mean is None or running_var is None:
        over = (0, *range(2, x.ndim))
        normalized, reciprocal = normalize(x, over, eps)
    else:
        reciprocal = along_channels(1.0 / np.sqrt(running_var + eps), x.ndim)
        normalized = (x - along_channels(running_mean, x.ndim)) * reciprocal
    return _affine(normalized, weight, bias), (normalized, reciprocal, weight, over)


def batch_norm_backward(dout: Array, cache: tuple[Any, ...], *, step: Step = standardized_backward) -> Gradients:
    """In training dx = r (g - mean(g) - z mean(g z)), in evaluation dx = r g."""
    normalized, reciprocal, weight, over = cache
    g, gradients = _affine_backward(dout, normalized, weight)
    dx = step(g, normalized, reciprocal, over) if over else reciprocal * g
    return {"x": dx} | gradients


def group_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    groups: int,
    eps: float,
    normalize: Normalize = standardized,
) -> tuple[Array, tuple[Any, ...]]:
    """out = (x - m) r * weight + bias, m and v over S and the channels of a group (Wu and He 2018).

    Shapes: x and out (B, C, S...), weight and bias (C,); a group is C / `groups` channels in a row.
    """
    grouped = x.reshape(x.shape[0], groups, -1)
    normalized, reciprocal = normalize(grouped, (-1,), eps)
    normalized = normalized.reshape(x.shape)
    return _affine(normalized, weight, bias), (normalized, reciprocal, weight)


def group_norm_backward(dout: Array, cache: tuple[Any, ...], *, step: Step = standardized_backward) -> Gradients:
    """dx = r (g - mean(g) - z mean(g z)), the means over each group."""
    normalized, reciprocal, weight = cache
    g, gradients = _affine_backward(dout, normalized, weight)
    grouped = (*reciprocal.shape[:2], -1)
    dx = step(g.reshape(grouped), normalized.reshape(grouped), reciprocal, (2,))
    return {"x": dx.reshape(dout.shape)} | gradients


def instance_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float,
    normalize: Normalize = standardized,
) -> tuple[Array, tuple[Any, ...]]:
    """out = (x - m) r * weight + bias, m and v over S: each channel by itself (Ulyanov et al. 2016).

    Shapes: x and out (B, C, S...), weight and bias (C,).
    """
    return group_norm_forward(x, weight, bias, groups=x.shape[1], eps=eps, normalize=normalize)


def local_response_norm_forward(
    x: Array, *, size: int, alpha: float, beta: float, k: float
) -> tuple[Array, tuple[Any, ...]]:
    """out = x d^-beta, d = k + alpha / size * (sum of x^2 over `size` neighbouring channels).

    Channel c has the neighbours c - size // 2 to c + (size - 1) // 2, as far as they exist; the sum is divided by
    `size` even where there are fewer (Krizhevsky et al. 2012 do not divide). Shapes: x and out (B, C, S...).
    """
    before, after = size // 2, (size - 1) // 2
    divisor = k + (alpha / size) * channel_sums(x * x, before, after)
    shrink = divisor**-beta
    return x * shrink, (x, divisor, shrink, (before, after), 2.0 * alpha * beta / size)


def local_response_norm_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dx_c = dout_c d_c^-beta - 2 alpha beta / size x_c (sum of dout_e x_e d_e^(-beta - 1) over e near c).

    c is a neighbour of e where e lies from c - (size - 1) // 2 to c + size // 2: the reach is mirrored.
    """
    x, divisor, shrink, (before, after), factor = cache
    return {"x": dout * shrink - factor * x * channel_sums(dout * x * shrink / divisor, after, before)}


def channel_sums(each: Array, before: int, after: int) -> Array:
    """For every channel, the sum from `before` channels before it to `after` channels after it."""
    reach = [(0, 0)] * each.ndim
    reach[1] = (before, after)
    neighbours = np.lib.stride_tricks.sliding_window_view(np.pad(each, reach), before + after + 1, axis=1)
    return neighbours.sum(axis=-1)


def weight_norm_forward(
    x: Array, direction: Array, magnitude: Array, bias: Array | None = None
) -> tuple[Array, tuple[Any, ...]]:
    """out = x weight^T + bias, weight = magnitude u, u = direction / |direction| (Salimans and Kingma 2016).

    Shapes: x (..., I), direction (O, I), magnitude and bias (O,), out (..., O); |.| is the norm of each row.
    """
    size = np.sqrt((direction * direction).sum(axis=1, keepdims=True))
    unit = direction / size
    out, linear = linear_forward(x, magnitude[:, None] * unit, bias)
    return out, (linear, unit, magnitude[:, None], size)


def weight_norm_backward(dout: Array, cache: tuple[Any, ...]) -> Gradients:
    """dmagnitude = the sum of dweight u over a row; ddirection = magnitude (dweight - u dmagnitude) / |direction|.

    No step along u itself: the length of the direction has no effect.
    """
    linear, unit, magnitude, size = cache
    gradients = linear_backward(dout, linear)
    dweight = gradients.pop("weight")
    dmagnitude = (dweight * unit).sum(axis=1, keepdims=True)
    ddirection = magnitude * (dweight - unit * dmagnitude) / size
    return gradients | {"direction": ddirection, "magnitude": dmagnitude[:, 0]}


def _trailing_parameters(shapes: Sequence[Shape], options: Options, slots: tuple[str, ...]) -> dict[str, Shape]:
    normalized = shapes[0][-int(options["axes"]) :]  # type: ignore[arg-type]
    return dict.fromkeys(slots, normalized) if options["affine"] else {}


def _channel_parameters(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    return dict.fromkeys(("weight", "bias"), (shapes[0][1],)) if options["affine"] else {}


def _weight_norm_parameters(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    features = int(options["features"])  # type: ignore[arg-type]
    rows = {"direction": (features, shapes[0][-1]), "magnitude": (features,)}
    return rows | ({"bias": (features,)} if options["use_bias"] else {})


def _weight_norm_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    (x,) = shapes
    if x[-1] == 0:
        raise ShapeError(f"an input of shape {list(x)} has no features: the direction would have no length")
    return (*x[:-1], int(options["features"]))  # type: ignore[arg-type]


def _batch_norm_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x = normalized_shape(shapes, options)
    if options["mode"] == "training" and math.prod(x) == x[1]:
        raise ShapeError(f"in training it needs more than one value per channel, and an input of {list(x)} has one")
    for name, shape in zip(("running_mean", "running_var"), shapes[1:], strict=False):
        if shape != (x[1],):
            raise ShapeError(f"its {name} must have the shape {[x[1]]}, one number per channel, got {list(shape)}")
    return x


def _instance_norm_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x = normalized_shape(shapes, options)
    if math.prod(x[2:]) == 1:
        raise ShapeError(f"it needs more than one element per channel, and an input of shape {list(x)} has one")
    return x


def _evaluating(options: Options) -> bool:
    return options["mode"] == "evaluation"


def _per_channel(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return ((shape[1],),)


def _constant_real(shape: Shape, options: Options) -> Domain:
    return Domain("real", constant=True)


def _constant_positive(shape: Shape, options: Options) -> Domain:
    return Domain("positive", constant=True)


AXES = Option("axes", TrailingAxes(), 1)
EPS = Option("eps", Real(0.0, 1.0, (1e-5, 1e-3, 0.1)), 1e-5)
AFFINE = Option("affine", Choice((True, False)), True, structural=True)
MODE = Option("mode", Choice(("training", "evaluation")), "training", structural=True)
RUNNING = (
    Argument("x"),
    Argument("running_mean", _constant_real, _per_channel, when=_evaluating),
    Argument("running_var", _constant_positive, _per_channel, when=_evaluating),
)
LOCAL_RESPONSE = (
    Option("size", Integer(1, (3, 2, 1, 5))),
    Option("alpha", Real(0.0, 1e3, (1e-4, 1.0, 0.5)), 1e-4),
    Option("beta", Real(0.0, 10.0, (0.75, 1.0, 0.5)), 0.75),
    Option("k", Real(1e-3, 1e3, (1.0, 2.0)), 1.0),
)
LINEAR = (
    Option("features", Size(), structural=True),
    Option("use_bias", Choice((True, False)), True, structural=True),
)

normalization = partial(Layer, kind="layer", family="normalization", output_shape=normalized_shape)

LAYERS = (
    normalization(
        "layer_norm",
        forward=layer_norm_forward,
        backward=layer_norm_backward,
        options=(AXES, EPS, AFFINE),
        parameters=partial(_trailing_parameters, slots=("weight", "bias")),
    ),
    normalization(
        "rms_norm",
        forward=rms_norm_forward,
        backward=rms_norm_backward,
        options=(AXES, EPS, AFFINE),
        ranks=(1, MAX_RANK),
        shapes=((2, 3), (5,), (3, 1), (2, 3, 2), (1, 2, 1, 3)),
        parameters=partial(_trailing_parameters, slots=("weight",)),
    ),
    normalization(
        "batch_norm",
        forward=batch_norm_forward,
        backward=batch_norm_backward,
        options=(MODE, EPS, AFFINE),
        arguments=RUNNING,
        ranks=(2, MAX_RANK),
        shapes=((4, 3), (2, 3, 2), (3, 1), (1, 2, 2, 3), (2, 1, 5)),
        output_shape=_batch_norm_shape,
        parameters=_channel_parameters,
    ),
    normalization(
        "group_norm",
        forward=group_norm_forward,
        backward=group_norm_backward,
        options=(Option("groups", Divisor(axis=1)), EPS, AFFINE),
        ranks=(2, MAX_RANK),
        shapes=((2, 4, 3), (3, 6), (1, 4, 2, 2), (2, 6, 1), (2, 1, 5)),
        parameters=_channel_parameters,
    ),
    normalization(
        "instance_norm",
        forward=instance_norm_forward,
        backward=group_norm_backward,
        options=(EPS, AFFINE),
        ranks=(3, MAX_RANK),
        shapes=((2, 3, 4), (1, 2, 2, 3), (3, 1, 5), (1, 2, 2)),
        output_shape=_instance_norm_shape,
        parameters=_channel_parameters,
    ),
    normalization(
        "local_response_norm",
        forward=local_response_norm_forward,
        backward=local_response_norm_backward,
        options=LOCAL_RESPONSE,
        ranks=(3, MAX_RANK),
        shapes=((2, 5, 2), (1, 3, 2, 2), (2, 1, 3), (1, 7, 1)),
    ),
    normalization(
        "weight_norm",
        forward=weight_norm_forward,
        backward=weight_norm_backward,
        options=LINEAR,
        ranks=(1, MAX_RANK),
        output_shape=_weight_norm_shape,
        parameters=_weight_norm_parameters,
    ),
)
