"""Activations made of pieces. Shapes: x, out, dout and dx all have the same shape, any rank.

Where the pieces meet at a kink, the derivative is left + weight * (right - left) with the weight of that kink.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradproof.model.layer import UNIT, Kink, Layer
from gradproof.model.options import Choice, Option, Options, Real, Shape
from gradproof.reference.common import Array, Gradients, clamp, magnitude, one_sided, positive_part, unbroadcast


def between(x: Array, low: float, high: float, slopes: tuple[Any, Any, Any], weights: tuple[float, float]) -> Array:
    """A derivative with three pieces: below `low`, between, above `high`; a weight for each of the two kinks."""
    below, middle, above = slopes
    at_low, at_high = weights
    upper = one_sided(x - high, middle, above, at_high)
    return np.where(x.real == low, one_sided(x - low, below, middle, at_low), np.where(x.real < low, below, upper))


def relu_forward(x: Array, *, at_zero: float = 0.0) -> tuple[Array, tuple[Array, float]]:
    """f(x) = max(x, 0) (Nair and Hinton 2010)."""
    return positive_part(x), (x, at_zero)


def relu_backward(dout: Array, cache: tuple[Array, float]) -> Gradients:
    """f'(x) = 0 below 0, 1 above. At 0: any number from 0 to 1, by default 0."""
    x, at_zero = cache
    return {"x": dout * one_sided(x, 0.0, 1.0, at_zero)}


class Sloped(NamedTuple):
    """x, the slope below 0, and the weight of the kink."""

    x: Array
    negative_slope: float
    at_zero: float


def leaky_relu_forward(x: Array, *, negative_slope: float, at_zero: float = 0.0) -> tuple[Array, Sloped]:
    """f(x) = x above 0, negative_slope * x below (Maas et al. 2013)."""
    return np.where(x.real < 0, negative_slope * x, x), Sloped(x, negative_slope, at_zero)


def leaky_relu_backward(dout: Array, kept: Sloped) -> Gradients:
    """f'(x) = negative_slope below 0, 1 above. At 0: any number between, by default the slope."""
    return {"x": dout * one_sided(kept.x, kept.negative_slope, 1.0, kept.at_zero)}


class Exponential(NamedTuple):
    """x, the factor of the exponential below 0, and the weight of the kink."""

    x: Array
    alpha: float
    at_zero: float


def elu_forward(x: Array, *, alpha: float, at_zero: float = 0.0) -> tuple[Array, Exponential]:
    """f(x) = x above 0, alpha * (exp(x) - 1) below (Clevert et al. 2016)."""
    return np.where(x.real < 0, alpha * np.expm1(-positive_part(-x)), x), Exponential(x, alpha, at_zero)


def elu_backward(dout: Array, kept: Exponential) -> Gradients:
    """f'(x) = alpha * exp(x) below 0, 1 above. At 0: any number from alpha to 1, by default alpha."""
    x = kept.x
    return {"x": dout * one_sided(x, kept.alpha * np.exp(-positive_part(-x)), 1.0, kept.at_zero)}


def relu6_forward(
    x: Array, *, at_zero: float = 0.0, at_six: float = 1.0
) -> tuple[Array, tuple[Array, tuple[float, float]]]:
    """f(x) = min(max(x, 0), 6) (Krizhevsky 2010)."""
    return clamp(x, 0.0, 6.0), (x, (at_zero, at_six))


def relu6_backward(dout: Array, cache: tuple[Array, tuple[float, float]]) -> Gradients:
    """f'(x) = 1 between 0 and 6, 0 outside. At 0 and 6: any number between, by default 0."""
    x, weights = cache
    return {"x": dout * between(x, 0.0, 6.0, (0.0, 1.0, 0.0), weights)}


class Bounded(NamedTuple):
    """x, the bounds, and the weight of the kink at each."""

    x: Array
    low: float
    high: float
    weights: tuple[float, float]


def hardtanh_forward(
    x: Array, *, min_val: float, max_val: float, at_min: float = 0.0, at_max: float = 1.0
) -> tuple[Array, Bounded]:
    """f(x) = min(max(x, min_val), max_val) (Collobert 2004)."""
    return clamp(x, min_val, max_val), Bounded(x, min_val, max_val, (at_min, at_max))


def hardtanh_backward(dout: Array, kept: Bounded) -> Gradients:
    """f'(x) = 1 between the bounds, 0 outside. At a bound: any number from 0 to 1, by default 0."""
    return {"x": dout * between(kept.x, kept.low, kept.high, (0.0, 1.0, 0.0), kept.weights)}


def hardsigmoid_forward(
    x: Array, *, at_low: float = 0.0, at_high: float = 1.0
) -> tuple[Array, tuple[Array, tuple[float, float]]]:
    """f(x) = min(max(x + 3, 0), 6) / 6 (Howard et al. 2019)."""
    return clamp(x + 3.0, 0.0, 6.0) / 6.0, (x, (at_low, at_high))


def hardsigmoid_backward(dout: Array, cache: tuple[Array, tuple[float, float]]) -> Gradients:
    """f'(x) = 1/6 between -3 and 3, 0 outside. At -3 and 3: any number between, by default 0."""
    x, weights = cache
    return {"x": dout * between(x, -3.0, 3.0, (0.0, 1.0 / 6.0, 0.0), weights)}


def hardswish_forward(
    x: Array, *, at_low: float = 0.0, at_high: float = 1.0
) -> tuple[Array, tuple[Array, tuple[float, float]]]:
    """f(x) = x min(max(x + 3, 0), 6) / 6 (Howard et al. 2019)."""
    return x * clamp(x + 3.0, 0.0, 6.0) / 6.0, (x, (at_low, at_high))


def hardswish_backward(dout: Array, cache: tuple[Array, tuple[float, float]]) -> Gradients:
    """f'(x) = 0 below -3, (2 x + 3) / 6 up to 3, 1 above. At -3 and 3: any number between the two sides."""
    x, weights = cache
    return {"x": dout * between(x, -3.0, 3.0, (0.0, (2.0 * x + 3.0) / 6.0, 1.0), weights)}


class Shrunk(NamedTuple):
    """x, lambd, and the weights of the kinks at -lambd and at lambd."""

    x: Array
    lambd: float
    weights: tuple[float, float]


def softshrink_forward(x: Array, *, lambd: float, at_minus: float = 1.0, at_plus: float = 0.0) -> tuple[Array, Shrunk]:
    """f(x) = x + lambd below -lambd, x - lambd above lambd, 0 between (Donoho 1995)."""
    shrunk = np.where(x.real > lambd, x - lambd, np.where(x.real < -lambd, x + lambd, 0.0 * x))
    return shrunk, Shrunk(x, lambd, (at_minus, at_plus))


def softshrink_backward(dout: Array, kept: Shrunk) -> Gradients:
    """f'(x) = 1 beyond +-lambd, 0 between. At +-lambd: any number from 0 to 1, by default 0."""
    return {"x": dout * between(kept.x, -kept.lambd, kept.lambd, (1.0, 0.0, 1.0), kept.weights)}


def hardshrink_forward(x: Array, *, lambd: float) -> tuple[Array, Array]:
    """f(x) = x beyond +-lambd, 0 from -lambd to lambd, both included (the function jumps there)."""
    passed = np.where(magnitude(x).real > lambd, 1.0, 0.0)
    return x * passed, passed


def hardshrink_backward(dout: Array, passed: Array) -> Gradients:
    """f'(x) = 1 beyond +-lambd, 0 from -lambd to lambd."""
    return {"x": dout * passed}


def threshold_forward(x: Array, *, threshold: float, value: float) -> tuple[Array, Array]:
    """f(x) = x above the threshold, `value` from it downwards (the function jumps there), NaN where x is."""
    stopped = x.real <= threshold
    return np.where(stopped, value, x), np.where(stopped, 0.0, 1.0)


def threshold_backward(dout: Array, passed: Array) -> Gradients:
    """f'(x) = 1 above the threshold, 0 from it downwards."""
    return {"x": dout * passed}


SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


def selu_forward(x: Array, *, at_zero: float = 0.0) -> tuple[Array, tuple[Array, float]]:
    """f(x) = scale * elu(x; alpha), with the alpha and scale of Klambauer et al. 2017."""
    out, _ = elu_forward(x, alpha=SELU_ALPHA)
    return SELU_SCALE * out, (x, at_zero)


def selu_backward(dout: Array, cache: tuple[Array, float]) -> Gradients:
    """f'(x) = scale alpha exp(x) below 0, scale above. At 0: any number between, by default scale alpha."""
    x, at_zero = cache
    below = SELU_SCALE * SELU_ALPHA * np.exp(-positive_part(-x))
    return {"x": dout * one_sided(x, below, SELU_SCALE, at_zero)}


def celu_forward(x: Array, *, alpha: float) -> tuple[Array, tuple[Array, float]]:
    """f(x) = x above 0, alpha (exp(x / alpha) - 1) below (Barron 2017)."""
    return np.where(x.real < 0, alpha * np.expm1(-positive_part(-x) / alpha), x), (x, alpha)


def celu_backward(dout: Array, cache: tuple[Array, float]) -> Gradients:
    """f'(x) = exp(x / alpha) below 0, 1 above; 1 at 0."""
    x, alpha = cache
    return {"x": dout * np.exp(-positive_part(-x) / alpha)}


class Weighted(NamedTuple):
    """x, the weight as it was given, and the weight of the kink."""

    x: Array
    weight: Array
    at_zero: float


def prelu_forward(x: Array, weight: Array, *, at_zero: float = 0.0) -> tuple[Array, Weighted]:
    """f(x) = x above 0, weight x below (He et al. 2015). Shapes: weight (1,), or (C,) for x (B, C, ...)."""
    slope = _along_channels(weight, x.ndim)
    return np.where(x.real < 0, slope * x, x), Weighted(x, weight, at_zero)


def prelu_backward(dout: Array, kept: Weighted) -> Gradients:
    """f'(x) = weight below 0, 1 above, at 0 any number between; dweight = sum of dout x where x is below 0."""
    x, weight = kept.x, kept.weight
    slope = _along_channels(weight, x.ndim)
    negative = dout * np.where(x.real > 0, 0.0, x)
    dweight = unbroadcast(negative, slope.shape).reshape(weight.shape)
    return {"x": dout * one_sided(x, slope, 1.0, kept.at_zero), "weight": dweight}


def _along_channels(weight: Array, rank: int) -> Array:
    """The weight as it broadcasts against x: channels are axis 1."""
    return weight.reshape([-1, *[1] * (rank - 2)][:rank])


def rrelu_forward(x: Array, *, lower: float, upper: float, at_zero: float = 0.0) -> tuple[Array, Sloped]:
    """f(x) = x above 0, x (lower + upper) / 2 below: randomised leaky relu in evaluation (Xu et al. 2015)."""
    return leaky_relu_forward(x, negative_slope=(lower + upper) / 2.0, at_zero=at_zero)


def sparse_plus_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = 0 up to -1, (x + 1)^2 / 4 between -1 and 1, x from 1 (Martins and Astudillo 2016)."""
    bend = clamp(x, -1.0, 1.0)
    return np.where(x.real < 1.0, 0.25 * (bend + 1.0) * (bend + 1.0), x), bend


def sparse_plus_backward(dout: Array, bend: Array) -> Gradients:
    """f'(x) = 0 up to -1, (x + 1) / 2 between -1 and 1, 1 from 1."""
    return {"x": dout * 0.5 * (bend + 1.0)}


def sparse_sigmoid_forward(
    x: Array, *, at_low: float = 0.0, at_high: float = 1.0
) -> tuple[Array, tuple[Array, tuple[float, float]]]:
    """f(x) = 0 up to -1, (x + 1) / 2 between -1 and 1, 1 from 1 (Martins and Astudillo 2016)."""
    return 0.5 * (clamp(x, -1.0, 1.0) + 1.0), (x, (at_low, at_high))


def sparse_sigmoid_backward(dout: Array, cache: tuple[Array, tuple[float, float]]) -> Gradients:
    """f'(x) = 1/2 between -1 and 1, 0 outside. At -1 and 1: any number between, by default 0."""
    x, weights = cache
    return {"x": dout * between(x, -1.0, 1.0, (0.0, 0.5, 0.0), weights)}


def abs_forward(x: Array, *, at_zero: float = 0.5) -> tuple[Array, tuple[Array, float]]:
    """f(x) = |x|."""
    return magnitude(x), (x, at_zero)


def abs_backward(dout: Array, cache: tuple[Array, float]) -> Gradients:
    """f'(x) = sign(x). At 0: any number from -1 to 1, by default 0."""
    x, at_zero = cache
    return {"x": dout * one_sided(x, -1.0, 1.0, at_zero)}


def clip_forward(
    x: Array, *, low: float, high: float, at_low: float = 1.0, at_high: float = 0.0
) -> tuple[Array, Bounded]:
    """f(x) = min(max(x, low), high)."""
    return clamp(x, low, high), Bounded(x, low, high, (at_low, at_high))


def _weight_shape(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    x = shapes[0]
    return {"weight": (1,) if options["shared"] or len(x) < 2 else (x[1],)}


AT_ZERO = Kink("at_zero", point=0.0, default=0.0)
AT_LOW = Kink("at_low", point=-3.0, default=0.0)
AT_HIGH = Kink("at_high", point=3.0, default=1.0)

SLOPE = Option("negative_slope", Real(-10.0, 10.0, (0.2, 0.01, 0.0, 1.0, -0.5)), 0.01)
ALPHA = Option("alpha", Real(-10.0, 10.0, (1.0, 0.5, 2.0, -0.5)), 1.0)
POSITIVE_ALPHA = Option("alpha", Real(1e-3, 1e3, (1.0, 0.5, 2.0)), 1.0)
LAMBDA = Option("lambd", Real(0.0, 1e3, (0.5, 1.0, 0.25)), 0.5)
BOUNDS = (
    Option("min_val", Real(-1e3, 0.0, (-1.0, -0.5)), -1.0),
    Option("max_val", Real(1e-3, 1e3, (1.0, 3.0)), 1.0),
)
THRESHOLD = (
    Option("threshold", Real(-1e3, 1e3, (0.5, 0.0, -1.0))),
    Option("value", Real(-1e3, 1e3, (0.0, 20.0, 0.5))),
)
RANDOM_SLOPES = (
    Option("lower", Real(0.0, 1.0, (0.125, 0.25)), 0.125),
    Option("upper", Real(0.0, 1.0, (0.375, 0.5)), 0.375),
)
CLIP = (Option("low", Real(-1e3, 0.0, (-1.0, -0.5))), Option("high", Real(1e-3, 1e3, (1.0, 0.5, 3.0))))

activation = partial(Layer, kind="activation", family="activations")

LAYERS = (
    activation("relu", forward=relu_forward, backward=relu_backward, kinks=(AT_ZERO,)),
    activation(
        "leaky_relu", forward=leaky_relu_forward, backward=leaky_relu_backward, options=(SLOPE,), kinks=(AT_ZERO,)
    ),
    activation("elu", forward=elu_forward, backward=elu_backward, options=(ALPHA,), kinks=(AT_ZERO,)),
    activation(
        "relu6", forward=relu6_forward, backward=relu6_backward, kinks=(AT_ZERO, Kink("at_six", point=6.0, default=1.0))
    ),
    activation(
        "hardtanh",
        forward=hardtanh_forward,
        backward=hardtanh_backward,
        options=BOUNDS,
        kinks=(Kink("at_min", point="min_val", default=0.0), Kink("at_max", point="max_val", default=1.0)),
    ),
    activation(
        "hardsigmoid",
        forward=hardsigmoid_forward,
        backward=hardsigmoid_backward,
        kinks=(AT_LOW, AT_HIGH),
        codomain=UNIT,
    ),
    activation("hardswish", forward=hardswish_forward, backward=hardswish_backward, kinks=(AT_LOW, AT_HIGH)),
    activation(
        "softshrink",
        forward=softshrink_forward,
        backward=softshrink_backward,
        options=(LAMBDA,),
        kinks=(Kink("at_minus", point="lambd", default=1.0, sign=-1.0), Kink("at_plus", point="lambd", default=0.0)),
    ),
    activation("hardshrink", forward=hardshrink_forward, backward=hardshrink_backward, options=(LAMBDA,)),
    activation("threshold", forward=threshold_forward, backward=threshold_backward, options=THRESHOLD),
    activation("selu", forward=selu_forward, backward=selu_backward, kinks=(AT_ZERO,)),
    activation("celu", forward=celu_forward, backward=celu_backward, options=(POSITIVE_ALPHA,)),
    activation(
        "prelu",
        forward=prelu_forward,
        backward=prelu_backward,
        options=(Option("shared", Choice((True, False)), True, structural=True),),
        parameters=_weight_shape,
        kinks=(AT_ZERO,),
    ),
    activation("rrelu", forward=rrelu_forward, backward=leaky_relu_backward, options=RANDOM_SLOPES, kinks=(AT_ZERO,)),
    activation("sparse_plus", forward=sparse_plus_forward, backward=sparse_plus_backward),
    activation(
        "sparse_sigmoid",
        forward=sparse_sigmoid_forward,
        backward=sparse_sigmoid_backward,
        kinks=(Kink("at_low", point=-1.0, default=0.0), Kink("at_high", point=1.0, default=1.0)),
        codomain=UNIT,
    ),
    activation("abs", forward=abs_forward, backward=abs_backward, kinks=(Kink("at_zero", point=0.0, default=0.5),)),
    activation(
        "clip",
        forward=clip_forward,
        backward=hardtanh_backward,
        options=CLIP,
        kinks=(Kink("at_low", point="low", default=1.0), Kink("at_high", point="high", default=0.0)),
    ),
)
