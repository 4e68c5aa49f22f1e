"""Elementary functions of one array or, with broadcasting, of two. Shapes: as for activations and merges."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradproof.model.layer import POSITIVE, REAL, Argument, Domain, Kink, Layer
from gradproof.model.options import Option, Options, Real, Shape
from gradproof.reference.common import Array, Gradients, one_sided, unbroadcast
from gradproof.reference.merges import PAIR, broadcast_shape


def exp_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = exp(x)."""
    out = np.exp(x)
    return out, out


def exp_backward(dout: Array, out: Array) -> Gradients:
    """f'(x) = exp(x)."""
    return {"x": dout * out}


def log_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = log(x), x above 0."""
    return np.log(x), x


def log_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = 1 / x."""
    return {"x": dout / x}


def sqrt_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = sqrt(x), x above 0."""
    out = np.sqrt(x)
    return out, out


def sqrt_backward(dout: Array, out: Array) -> Gradients:
    """f'(x) = 1 / (2 sqrt(x))."""
    return {"x": dout * 0.5 / out}


def rsqrt_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """f(x) = 1 / sqrt(x), x above 0."""
    out = 1.0 / np.sqrt(x)
    return out, (x, out)


def rsqrt_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """f'(x) = -f(x) / (2 x)."""
    x, out = cache
    return {"x": dout * -0.5 * (out / x)}


def square_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = x^2."""
    return x * x, x


def square_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = 2 x."""
    return {"x": dout * 2.0 * x}


def reciprocal_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = 1 / x."""
    out = 1.0 / x
    return out, out


def reciprocal_backward(dout: Array, out: Array) -> Gradients:
    """f'(x) = -1 / x^2 = -f(x)^2."""
    return {"x": -dout * out * out}


def power_forward(x: Array, *, exponent: float) -> tuple[Array, tuple[Array, float]]:
    """f(x) = x^exponent; x above 0 where the exponent is no integer of at least 1."""
    return x**exponent, (x, exponent)


def power_backward(dout: Array, cache: tuple[Array, float]) -> Gradients:
    """f'(x) = exponent x^(exponent - 1)."""
    x, exponent = cache
    return {"x": dout * (exponent * x ** (exponent - 1.0))}


def sin_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = sin(x)."""
    return np.sin(x), x


def sin_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = cos(x)."""
    return {"x": dout * np.cos(x)}


def cos_forward(x: Array) -> tuple[Array, Array]:
    """f(x) = cos(x)."""
    return np.cos(x), x


def cos_backward(dout: Array, x: Array) -> Gradients:
    """f'(x) = -sin(x)."""
    return {"x": -dout * np.sin(x)}


def _share(a: Array, b: Array, below: float, above: float, at_tie: float) -> Array:
    """What a gets of the cotangent where it is below b, above b, or ties, also at infinity; NaN beside a NaN."""
    return one_sided(np.where(a == b, 0.0, a - b), below, above, at_tie)


class Compared(NamedTuple):
    """What the larger and the smaller of two keep; at_tie: the weight of a tie's right side."""

    a: Array
    b: Array
    at_tie: float


def maximum_forward(a: Array, b: Array, *, at_tie: float = 0.5) -> tuple[Array, Compared]:
    """out = the larger of a and b, NaN where one is. Shapes: a and b broadcast to out."""
    return np.where((b.real > a.real) | np.isnan(b), b, a), Compared(a, b, at_tie)


def maximum_backward(dout: Array, kept: Compared) -> Gradients:
    """dout goes to the larger one; in a tie a gets the weight w, b gets 1 - w, by default half each."""
    a, b = kept.a, kept.b
    share = _share(a, b, 0.0, 1.0, kept.at_tie)
    return {"a": unbroadcast(dout * share, a.shape), "b": unbroadcast(dout * (1.0 - share), b.shape)}


def minimum_forward(a: Array, b: Array, *, at_tie: float = 0.5) -> tuple[Array, Compared]:
    """out = the smaller of a and b, NaN where one is. Shapes: a and b broadcast to out."""
    return np.where((b.real < a.real) | np.isnan(b), b, a), Compared(a, b, at_tie)


def minimum_backward(dout: Array, kept: Compared) -> Gradients:
    """dout goes to the smaller one; in a tie a gets 1 - w, b gets the weight w, by default half each."""
    a, b = kept.a, kept.b
    share = _share(a, b, 1.0, 0.0, kept.at_tie)
    return {"a": unbroadcast(dout * share, a.shape), "b": unbroadcast(dout * (1.0 - share), b.shape)}


def _positive(shape: Shape, options: Options) -> Domain:
    return POSITIVE


def _base(shape: Shape, options: Options) -> Domain:
    exponent: Any = options["exponent"]
    return REAL if exponent >= 1.0 and float(exponent).is_integer() else POSITIVE


ABOVE_ZERO = (Argument("x", _positive),)
EXPONENT = Option("exponent", Real(-10.0, 10.0, (2.0, 3.0, 1.0, 0.5, -1.0, 1.5)))
AT_TIE = (Kink("at_tie", point=0.0, default=0.5),)

elementwise = partial(Layer, kind="activation", family="elementwise")

LAYERS = (
    elementwise("exp", forward=exp_forward, backward=exp_backward, codomain=POSITIVE),
    elementwise("log", forward=log_forward, backward=log_backward, arguments=ABOVE_ZERO),
    elementwise("sqrt", forward=sqrt_forward, backward=sqrt_backward, arguments=ABOVE_ZERO, codomain=POSITIVE),
    elementwise("rsqrt", forward=rsqrt_forward, backward=rsqrt_backward, arguments=ABOVE_ZERO, codomain=POSITIVE),
    elementwise("square", forward=square_forward, backward=square_backward),
    elementwise("reciprocal", forward=reciprocal_forward, backward=reciprocal_backward),
    elementwise(
        "power",
        forward=power_forward,
        backward=power_backward,
        options=(EXPONENT,),
        arguments=(Argument("x", _base),),
    ),
    elementwise("sin", forward=sin_forward, backward=sin_backward),
    elementwise("cos", forward=cos_forward, backward=cos_backward),
    elementwise(
        "maximum",
        forward=maximum_forward,
        backward=maximum_backward,
        arguments=PAIR,
        output_shape=broadcast_shape,
        kinks=AT_TIE,
    ),
    elementwise(
        "minimum",
        forward=minimum_forward,
        backward=minimum_backward,
        arguments=PAIR,
        output_shape=broadcast_shape,
        kinks=AT_TIE,
    ),
)
