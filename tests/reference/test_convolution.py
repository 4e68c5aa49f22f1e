"""Convolution and resampling against their definitions written out, and what the table's proofs cannot show."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import OptionValue, Shape
from gradproof.reference import LAYERS

Array = np.ndarray[Any, Any]
Geometry = dict[str, Any]

GEOMETRIES: dict[str, tuple[Shape, Shape, Geometry]] = {
    "plain": ((2, 3, 5), (4, 3, 3), {}),
    "stride that leaves a remainder": ((2, 2, 6, 7), (3, 2, 3, 2), {"stride": (2, 4), "padding": (1, 0)}),
    "dilation beside stride": ((1, 2, 7, 6), (2, 2, 2, 3), {"dilation": (3, 2), "stride": (2, 1), "padding": (0, 1)}),
    "depthwise with a multiplier": ((2, 3, 4, 4), (6, 1, 3, 2), {"groups": 3, "padding": (1, 1)}),
    "groups": ((2, 4, 5), (6, 2, 2), {"groups": 2, "stride": (3,)}),
    "all padding": ((1, 2, 1), (2, 2, 1), {"padding": (2,), "stride": (2,)}),
    "three axes": ((1, 2, 3, 4, 2), (2, 1, 2, 3, 1), {"groups": 2, "stride": (1, 2, 1), "padding": (1, 1, 0)}),
    "no samples": ((0, 2, 4), (3, 2, 2), {}),
}
SAMPLES = pytest.mark.parametrize("name", GEOMETRIES)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def geometry(axes: int, given: Geometry) -> Geometry:
    ones, zeros = (1,) * axes, (0,) * axes
    return {"stride": ones, "padding": zeros, "dilation": ones, "groups": 1} | given


def meetings(x: Shape, weight: Shape, out: Shape, options: Geometry) -> Iterator[tuple[Any, Any, Any]]:
    """Every (element of x, element of the kernel, element of out) that belong together in a convolution."""
    stride, padding, dilation = options["stride"], options["padding"], options["dilation"]
    features = out[1] // options["groups"]
    for (n, f, *s), c, k in product(np.ndindex(out), range(weight[1]), list(np.ndindex(weight[2:]))):
        place = [a * b + d * e - p for a, b, d, e, p in zip(stride, s, dilation, k, padding, strict=True)]
        if all(0 <= each < size for each, size in zip(place, x[2:], strict=True)):
            yield (n, f // features * weight[1] + c, *place), (f, c, *k), (n, f, *s)


@SAMPLES
def test_convolution_is_the_sum_it_is_defined_as(name: str) -> None:
    """One product after another, and each product's share of both gradients."""
    shape, kernel, given = GEOMETRIES[name]
    options = geometry(len(shape) - 2, given)
    x, weight, bias = normal(*shape), normal(*kernel, seed=1), normal(kernel[0], seed=2)
    layer = LAYERS[f"conv{len(shape) - 2}d"]
    out, cache = layer.forward(x, weight=weight, bias=bias, **options)
    dout = normal(*out.shape, seed=3)
    expected = np.zeros_like(out) + bias.reshape(-1, *[1] * (x.ndim - 2))
    dx, dweight = np.zeros_like(x), np.zeros_like(weight)
    for here, tap, there in meetings(shape, kernel, out.shape, options):
        expected[there] += weight[tap] * x[here]
        dx[here] += weight[tap] * dout[there]
        dweight[tap] += x[here] * dout[there]
    gradients = layer.backward(dout, cache)
    for got, wanted in [(out, expected), (gradients["x"], dx), (gradients["weight"], dweight)]:
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-13)
    np.testing.assert_allclose(gradients["bias"], dout.sum(axis=(0, *range(2, out.ndim))), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "three axes"])
def test_a_transposed_convolution_is_the_adjoint_of_a_convolution(name: str) -> None:
    """<convolution of x, y> = <x, transposed convolution of y>; the output padding is what the stride left over."""
    shape, kernel, given = GEOMETRIES[name]
    axes = len(shape) - 2
    options = geometry(axes, given)
    x, weight = normal(*shape), normal(*kernel, seed=1)
    out, _ = LAYERS[f"conv{axes}d"].forward(x, weight=weight, **options)
    y = normal(*out.shape, seed=2)
    reached = [
        s * (m - 1) - 2 * p + d * (k - 1) + 1
        for s, m, p, d, k in zip(
            options["stride"], out.shape[2:], options["padding"], options["dilation"], kernel[2:], strict=True
        )
    ]
    left_over = tuple(size - length for size, length in zip(shape[2:], reached, strict=True))
    back, cache = LAYERS[f"conv_transpose{axes}d"].forward(y, weight=weight, output_padding=left_over, **options)
    assert back.shape == x.shape
    np.testing.assert_allclose((out * y).sum(), (x * back).sum(), rtol=1e-12)
    again = LAYERS[f"conv_transpose{axes}d"].backward(x, cache)["x"]
    np.testing.assert_allclose(again, out, rtol=0, atol=1e-13)


def test_a_transposed_convolution_by_hand() -> None:
    x, weight = np.array([[[1.0, 2.0]]]), np.array([[[3.0, 4.0, 5.0]]])
    options = geometry(1, {"stride": (2,), "padding": (1,)}) | {"output_padding": (1,)}
    out, _ = LAYERS["conv_transpose1d"].forward(x, weight=weight, bias=np.array([0.5]), **options)
    # 3 4 5 . . and . . 6 8 10, one place of padding cut from both ends, and one place more at the end
    np.testing.assert_array_equal(out, [[[4.5, 11.5, 8.5, 10.5]]])


UPSAMPLED = {
    ("nearest", False, 6): [1, 1, 2, 2, 4, 4],
    ("nearest", False, 2): [1, 2],
    ("nearest_exact", False, 2): [1, 4],
    ("linear", False, 6): [1, 1.25, 1.75, 2.5, 3.5, 4],
    ("linear", True, 5): [1, 1.5, 2, 3, 4],
    ("linear", True, 1): [1],
    ("linear", False, 1): [2],
}


@pytest.mark.parametrize(("mode", "align_corners", "length"), UPSAMPLED)
def test_upsampling_by_hand(mode: str, align_corners: bool, length: int) -> None:
    x = np.array([[[1.0, 2.0, 4.0]]])
    out, _ = LAYERS["upsample"].forward(x, size=(length,), mode=mode, align_corners=align_corners)
    np.testing.assert_allclose(out[0, 0], UPSAMPLED[mode, align_corners, length], rtol=1e-15)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("align_corners", [True, False])
def test_interpolation_keeps_constants(mode: str, align_corners: bool) -> None:
    x = np.full((1, 1, 8, 3), 2.5)
    out, _ = LAYERS["upsample"].forward(x, size=(11, 7), mode=mode, align_corners=align_corners)
    np.testing.assert_allclose(out, 2.5, rtol=1e-14)


@pytest.mark.parametrize("align_corners", [True, False])
def test_linear_interpolation_keeps_straight_lines(align_corners: bool) -> None:
    x = np.arange(8.0)[None, None]
    out, _ = LAYERS["upsample"].forward(x, size=(11,), mode="linear", align_corners=align_corners)
    np.testing.assert_allclose(np.diff(out[0, 0, 1:-1]), 7 / 10 if align_corners else 8 / 11, rtol=1e-13)


def test_cubic_interpolation_by_hand() -> None:
    """Halfway between two elements the four nearest count a/8, 1/2 - a/8, 1/2 - a/8 and a/8, with a = -3/4."""
    x = np.array([[[[0.0, 0.0, 1.0, 10.0, 100.0, 0.0, 0.0, 0.0]]]])
    out, _ = LAYERS["upsample"].forward(x, size=(1, 4), mode="cubic", align_corners=False)
    np.testing.assert_allclose(out[0, 0, 0, 1], 0.59375 * 11.0 - 0.09375 * 100.0, rtol=1e-14)


PADDED = {"reflect": [3, 2, 1, 2, 3, 2], "replicate": [1, 1, 1, 2, 3, 3], "circular": [2, 3, 1, 2, 3, 1]}


@pytest.mark.parametrize("mode", PADDED)
def test_padding_by_hand(mode: str) -> None:
    x = np.array([1.0, 2.0, 3.0])
    out, cache = LAYERS["pad"].forward(x, amounts=(2, 1), mode=mode, value=0.0)
    np.testing.assert_array_equal(out, PADDED[mode])
    cotangent = 10.0 ** np.arange(6)
    expected = [cotangent[out == each].sum() for each in x]
    np.testing.assert_array_equal(LAYERS["pad"].backward(cotangent, cache)["x"], expected)


def test_the_first_amounts_belong_to_the_first_of_the_padded_axes() -> None:
    out, _ = LAYERS["pad"].forward(np.array([[1.0, 2.0]]), amounts=(1, 0, 0, 2), mode="constant", value=7.0)
    np.testing.assert_array_equal(out, [[7, 7, 7, 7], [1, 2, 7, 7]])


def test_pixel_shuffle_by_hand() -> None:
    x = np.arange(8.0).reshape(4, 1, 2)
    out, _ = LAYERS["pixel_shuffle"].forward(x, factor=2)
    np.testing.assert_array_equal(out, [[[0, 2, 1, 3], [4, 6, 5, 7]]])


REFUSED: dict[str, tuple[str, Shape, dict[str, OptionValue], str]] = {
    "stride 0": ("conv1d", (1, 2, 5), {"stride": (0,)}, r"stride=\(0,\): expected 1 integers of at least 1"),
    "one stride for two axes": ("conv2d", (1, 2, 5, 5), {"stride": (1,)}, "expected 2 integers of at least 1"),
    "negative padding": ("conv1d", (1, 2, 5), {"padding": (-1,)}, "expected 1 integers of at least 0"),
    "no dilation": ("conv1d", (1, 2, 5), {"dilation": (0,)}, "expected 1 integers of at least 1"),
    "no features": ("conv1d", (1, 2, 5), {"features": 0}, "features=0: expected an integer of at least 1"),
    "groups and channels": ("conv1d", (1, 3, 5), {"groups": 2}, "groups=2: expected a divisor of 3"),
    "groups and features": ("conv1d", (1, 2, 5), {"groups": 2, "features": 3}, "3 features cannot be divided into 2"),
    "no groups": ("conv_transpose1d", (1, 2, 5), {"groups": 0}, "groups=0: expected a divisor of 2"),
    "wide kernel": ("conv1d", (1, 2, 3), {"kernel": (6,), "padding": (1,)}, "reaches over 6 elements, and .* has 5"),
    "wide dilation": ("conv1d", (1, 2, 3), {"kernel": (2,), "dilation": (3,)}, "reaches over 4 elements, and .* has 3"),
    "no channels": ("conv1d", (1, 0, 3), {}, "needs a channel and no empty spatial axis"),
    "no space": ("conv1d", (1, 2, 0), {"padding": (3,)}, "needs a channel and no empty spatial axis"),
    "a rank too many": ("conv1d", (1, 2, 3, 4), {}, "needs an input of rank 3"),
    "output padding": (
        "conv_transpose1d",
        (1, 2, 3),
        {"stride": (2,), "output_padding": (2,)},
        "an output padding of 2 must be smaller than the stride 2 or dilation 1",
    ),
    "empty output": ("conv_transpose1d", (1, 2, 1), {"padding": (1,)}, "leaves an axis of length -1"),
    "factor 0": ("upsample", (1, 1, 2), {"size": 0}, "size=0: expected a factor of at least 1"),
    "too few lengths": ("upsample", (1, 1, 2, 2), {"size": (3,)}, "the new lengths of the 2 spatial axes"),
    "corners of cells": ("upsample", (1, 1, 2), {"size": 2, "align_corners": True}, "align_corners is for the modes"),
    "cubic line": ("upsample", (1, 1, 2), {"size": 2, "mode": "cubic"}, "cubic needs two spatial axes"),
    "nothing to repeat": ("upsample", (1, 1, 0), {"size": 2}, "has no element to take"),
    "indivisible channels": ("pixel_shuffle", (6, 2, 2), {"factor": 2}, "whose square divides 6"),
    "wide reflection": (
        "pad",
        (2, 3),
        {"amounts": (3, 0), "mode": "reflect"},
        "at most 2 elements to an axis of length 3",
    ),
    "wide circle": (
        "pad",
        (2, 3),
        {"amounts": (0, 4), "mode": "circular"},
        "at most 3 elements to an axis of length 3",
    ),
    "one side": ("pad", (2, 3), {"amounts": (1,)}, "2 integers of at least 0 for each of the last 1 to 2 axes"),
    "too many axes": ("pad", (3,), {"amounts": (1, 1, 1, 1)}, "for each of the last 1 to 1 axes"),
    "negative amount": ("pad", (3,), {"amounts": (-1, 0)}, "integers of at least 0"),
    "value of a mirror": ("pad", (3,), {"amounts": (1, 1), "mode": "reflect", "value": 1.0}, "value is for the mode"),
    "nothing to mirror": ("pad", (0,), {"amounts": (1, 1), "mode": "replicate"}, "has no element to take"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_fit_are_refused(name: str) -> None:
    layer, shape, given, message = REFUSED[name]
    assert single(layer, SIMPLEST[layer], {}).shapes
    with pytest.raises(NetworkError, match=message):
        single(layer, shape, given)


SIMPLEST: dict[str, Shape] = {
    "conv1d": (1, 2, 1),
    "conv2d": (1, 2, 1, 1),
    "conv_transpose1d": (1, 2, 1),
    "upsample": (1, 1, 2),
    "pixel_shuffle": (4, 2, 2),
    "pad": (2, 3),
}
GIVEN: dict[str, dict[str, OptionValue]] = {
    "upsample": {"size": 2},
    "pixel_shuffle": {"factor": 2},
    "pad": {"amounts": (1, 1)},
}


def single(name: str, shape: Shape, options: dict[str, OptionValue]) -> Network:
    """One node with these options; what must be given and is not is as simple as can be."""
    layer = LAYERS[name]
    slots = () if name in GIVEN else ("weight", "bias")
    needed = GIVEN.get(name, {"features": 2, "kernel": (1,) * (layer.ranks[0] - 2)})
    node = Node.of("h", layer, "x", options=needed | options, parameters={slot: slot for slot in slots})
    return Network((Input("x", shape),), (node,))
