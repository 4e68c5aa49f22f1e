"""Normalisation layers.

Legend: B batch, C channels, S any spatial axes, D the axes that are normalised together, ... the other ones,
n the number of elements of D, m their mean, v their variance (the biased one, divided by n), r = 1 / sqrt(v + eps),
z the normalised x, g = dout * weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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
    r = 1.0 / np.sqrt((centred * centred).mean(axis=over, keepdims=True) + eps)
    return centred * r, r


def standardized_backward(g: Array, z: Array, r: Array, over: Axes) -> Array:
    """dx = r (g - mean(g) - z mean(g z)): m depends on every x with slope 1/n, and v with slope 2 (x - m) / n."""
    mean_g = g.mean(axis=over, keepdims=True)
    mean_gz = (g * z).mean(axis=over, keepdims=True)
    return r * (g - mean_g - z * mean_gz)


class Standardized(NamedTuple):
    """z, shaped as x; r and the weight as they are broadcast; over: the axes D, none where the statistics are given."""

    z: Array
    r: Array
    weight: Array | None
    over: Axes


def layer_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axes: int,
    eps: float,
    normalize: Normalize = standardized,
) -> tuple[Array, Standardized]:
    """out = (x - m) r * weight + bias, m the mean over D, r = 1 / sqrt(variance over D + eps) (Ba et al. 2016).

    Shapes: x and out (..., D), D the trailing `axes`, weight and bias (D).
    """
    over = tuple(range(-axes, 0))
    z, r = normalize(x, over, eps)
    return (z if weight is None else z * weight + bias), Standardized(z, r, weight, over)


def layer_norm_backward(dout: Array, kept: Standardized, *, step: Step = standardized_backward) -> Gradients:
    """dx = r (g - mean(g) - z mean(g z)), g = dout * weight, z = (x - m) r; dweight = sum dout z; dbias = sum dout.

    The means are over D, the sums over the leading axes.
    """
    z, weight = kept.z, kept.weight
    g = dout if weight is None else dout * weight
    gradients = {"x": step(g, z, kept.r, kept.over)}
    if weight is not None:
        gradients |= {"weight": unbroadcast(dout * z, weight.shape), "bias": unbroadcast(dout, weight.shape)}
    return gradients


def rms_norm_forward(x: Array, weight: Array | None = None, *, axes: int, eps: float) -> tuple[Array, Standardized]:
    """out = x r * weight, r = 1 / sqrt(mean of x^2 over D + eps) (Zhang and Sennrich 2019).

    Shapes: x and out (..., D), D the trailing `axes`, weight (D).
    """
    over = tuple(range(-axes, 0))
    r = 1.0 / np.sqrt((x * x).mean(axis=over, keepdims=True) + eps)
    z = x * r
    return (z if weight is None else z * weight), Standardized(z, r, weight, over)


def scaled_backward(g: Array, z: Array, r: Array, over: Axes) -> Array:
    """dx = r (g - z mean(g z)): the mean of squares depends on every x with slope 2 x / n."""
    return r * (g - z * (g * z).mean(axis=over, keepdims=True))


def rms_norm_backward(dout: Array, kept: Standardized, *, step: Step = scaled_backward) -> Gradients:
    """dx = r (g - z mean(g z)), g = dout * weight, z = x r; dweight = sum of dout z over the leading axes."""
    z, weight = kept.z, kept.weight
    g = dout if weight is None else dout * weight
    gradients = {"x": step(g, z, kept.r, kept.over)}
    return gradients | ({} if weight is None else {"weight": unbroadcast(dout * z, weight.shape)})


def along_channels(each: Array, rank: int) -> Array:
    """A number per channel, (C,), as it broadcasts against (B, C, S...) of this rank."""
    return each.reshape(-1, *(1,) * (rank - 2))


def _affine(z: Array, weight: Array | None, bias: Array | None) -> Array:
    """z * weight + bias, with a weight and a bias for each channel, or none."""
    if weight is None or bias is None:
        return z
    return z * along_channels(weight, z.ndim) + along_channels(bias, z.ndim)


def _affine_backward(dout: Array, z: Array, weight: Array | None) -> tuple[Array, Gradients]:
    """g, and the gradients of weight and bias: the sums of dout z and of dout over all axes but the channels."""
    if weight is None:
        return dout, {}
    others = (0, *range(2, dout.ndim))
    gradients = {"weight": (dout * z).sum(axis=others), "bias": dout.sum(axis=others)}
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
) -> tuple[Array, Standardized]:
    """out = (x - m) r * weight + bias, per channel (Ioffe and Szegedy 2015).

    In training m and v are those of x over B and S. In evaluation they are given, and constant. What momentum does to
    the running statistics is no part of the output. Shapes: x and out (B, C, S...), all else (C,).
    """
    over: Axes = ()
    if running_mean is None or running_var is None:
        over = (0, *range(2, x.ndim))
        z, r = normalize(x, over, eps)
    else:
        r = along_channels(1.0 / np.sqrt(running_var + eps), x.ndim)
        z = (x - along_channels(running_mean, x.ndim)) * r
    return _affine(z, weight, bias), Standardized(z, r, weight, over)


def batch_norm_backward(dout: Array, kept: Standardized, *, step: Step = standardized_backward) -> Gradients:
    """In training dx = r (g - mean(g) - z mean(g z)), in evaluation dx = r g."""
    z, r, over = kept.z, kept.r, kept.over
    g, gradients = _affine_backward(dout, z, kept.weight)
    dx = step(g, z, r, over) if over else r * g
    return {"x": dx} | gradients


class Grouped(NamedTuple):
    """z, shaped as x; r of each group, (B, groups, 1); the weight, (C,)."""

    z: Array
    r: Array
    weight: Array | None


def group_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    groups: int,
    eps: float,
    normalize: Normalize = standardized,
) -> tuple[Array, Grouped]:
    """out = (x - m) r * weight + bias, m and v over S and the channels of a group (Wu and He 2018).

    Shapes: x and out (B, C, S...), weight and bias (C,); a group is C / `groups` channels in a row.
    """
    grouped = x.reshape(x.shape[0], groups, -1)
    z, r = normalize(grouped, (-1,), eps)
    z = z.reshape(x.shape)
    return _affine(z, weight, bias), Grouped(z, r, weight)


def group_norm_backward(dout: Array, kept: Grouped, *, step: Step = standardized_backward) -> Gradients:
    """dx = r (g - mean(g) - z mean(g z)), the means over each group."""
    z, r = kept.z, kept.r
    g, gradients = _affine_backward(dout, z, kept.weight)
    grouped = (*r.shape[:2], -1)
    dx = step(g.reshape(grouped), z.reshape(grouped), r, (2,))
    return {"x": dx.reshape(dout.shape)} | gradients


def instance_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float,
    normalize: Normalize = standardized,
) -> tuple[Array, Grouped]:
    """out = (x - m) r * weight + bias, m and v over S: each channel by itself (Ulyanov et al. 2016).

    Shapes: x and out (B, C, S...), weight and bias (C,).
    """
    return group_norm_forward(x, weight, bias, groups=x.shape[1], eps=eps, normalize=normalize)


class LocalResponse(NamedTuple):
    """x, d and shrink = d^-beta, of one shape; how far neighbours reach; factor: 2 alpha beta / size."""

    x: Array
    d: Array
    shrink: Array
    before: int
    after: int
    factor: float


def local_response_norm_forward(
    x: Array, *, size: int, alpha: float, beta: float, k: float
) -> tuple[Array, LocalResponse]:
    """out = x d^-beta, d = k + alpha / size * (sum of x^2 over `size` neighbouring channels).

    Channel c has the neighbours c - size // 2 to c + (size - 1) // 2, as far as they exist; the sum is divided by
    `size` even where there are fewer (Krizhevsky et al. 2012 do not divide). Shapes: x and out (B, C, S...).
    """
    before, after = size // 2, (size - 1) // 2
    d = k + (alpha / size) * channel_sums(x * x, before, after)
    shrink = d**-beta
    return x * shrink, LocalResponse(x, d, shrink, before, after, 2.0 * alpha * beta / size)


def local_response_norm_backward(dout: Array, kept: LocalResponse) -> Gradients:
    """dx_c = dout_c d_c^-beta - 2 alpha beta / size x_c (sum of dout_e x_e d_e^(-beta - 1) over e near c).

    c is a neighbour of e where e lies from c - (size - 1) // 2 to c + size // 2: the reach is mirrored.
    """
    x, shrink = kept.x, kept.shrink
    return {"x": dout * shrink - kept.factor * x * channel_sums(dout * x * shrink / kept.d, kept.after, kept.before)}


def channel_sums(each: Array, before: int, after: int) -> Array:
    """For every channel, the sum from `before` channels before it to `after` channels after it."""
    reach = [(0, 0)] * each.ndim
    reach[1] = (before, after)
    neighbours = np.lib.stride_tricks.sliding_window_view(np.pad(each, reach), before + after + 1, axis=1)
    return neighbours.sum(axis=-1)


class Directed(NamedTuple):
    """linear: what the linear layer keeps; u (O, I), magnitude and |direction| (O, 1)."""

    linear: Any
    u: Array
    magnitude: Array
    length: Array


def weight_norm_forward(
    x: Array, direction: Array, magnitude: Array, bias: Array | None = None
) -> tuple[Array, Directed]:
    """out = x weight^T + bias, weight = magnitude u, u = direction / |direction| (Salimans and Kingma 2016).

    Shapes: x (..., I), direction (O, I), magnitude and bias (O,), out (..., O); |.| is the norm of each row.
    """
    length = np.sqrt((direction * direction).sum(axis=1, keepdims=True))
    u = direction / length
    out, linear = linear_forward(x, magnitude[:, None] * u, bias)
    return out, Directed(linear, u, magnitude[:, None], length)


def weight_norm_backward(dout: Array, kept: Directed) -> Gradients:
    """dmagnitude = the sum of dweight u over a row; ddirection = magnitude (dweight - u dmagnitude) / |direction|.

    No step along u itself: the length of the direction has no effect.
    """
    u = kept.u
    gradients = linear_backward(dout, kept.linear)
    dweight = gradients.pop("weight")
    dmagnitude = (dweight * u).sum(axis=1, keepdims=True)
    ddirection = kept.magnitude * (dweight - u * dmagnitude) / kept.length
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
