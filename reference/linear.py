"""Linear maps.

Legend: I input features, O output features, ... any leading axes, none included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradproof.layer import MAX_RANK, Choice, Layer, Option, Options, Shape, Size
from gradproof.reference.common import Array, Gradients


def linear_forward(x: Array, weight: Array, bias: Array | None = None) -> tuple[Array, tuple[Array, Array, bool]]:
    """out = x weight^T + bias. Shapes: x (..., I), weight (O, I), bias (O,), out (..., O)."""
    out = x @ weight.T
    return (out if bias is None else out + bias), (x, weight, bias is not None)


def linear_backward(dout: Array, cache: tuple[Array, Array, bool]) -> Gradients:
    """dx = dout weight; dweight = sum of the outer products of dout and x over ...; dbias = sum of dout over ...."""
    x, weight, biased = cache
    count = math.prod(x.shape[:-1])
    rows = dout.reshape(count, weight.shape[0])
    gradients = {"x": dout @ weight, "weight": rows.T @ x.reshape(count, weight.shape[1])}
    return gradients | ({"bias": rows.sum(axis=0)} if biased else {})


def _output_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    return (*shapes[0][:-1], int(options["features"]))  # type: ignore[arg-type]


def _parameters(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    features = int(options["features"])  # type: ignore[arg-type]
    return {"weight": (features, shapes[0][-1])} | ({"bias": (features,)} if options["use_bias"] else {})


OPTIONS = (
    Option("features", Size(), structural=True),
    Option("use_bias", Choice((True, False)), True, structural=True),
)

LAYERS = (
    Layer(
        "linear",
        "layer",
        "linear",
        linear_forward,
        linear_backward,
        OPTIONS,
        ranks=(1, MAX_RANK),
        output_shape=_output_shape,
        parameters=_parameters,
    ),
)
