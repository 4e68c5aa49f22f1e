"""Pooling, normalisation and dropout: numbers worked out by hand, limits, and options that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradproof.model.layer import Domain
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import OptionValue, Shape
from gradproof.reference import LAYERS

Array = np.ndarray[Any, Any]


def run(name: str, *arrays: Array, cotangent: Any = 1.0, **keywords: Any) -> tuple[Array, dict[str, Array]]:
    """The output, and the gradients for a cotangent, of ones where none is given."""
    layer = LAYERS[name]
    out, cache = layer.forward(*arrays, **keywords)
    return out, layer.backward(np.broadcast_to(np.asarray(cotangent, float), out.shape), cache)


def row(*numbers: float) -> Array:
    """A batch of one, with one channel."""
    return np.array([[numbers]], float)


def normal(*shape: int) -> Array:
    return np.random.default_rng(1).normal(size=shape)


AVG = {"kernel": 2, "stride": 2, "padding": 0, "ceil_mode": False, "count_include_pad": True}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.5, 3.5]),
        ({"ceil_mode": True}, [1.5, 3.5, 5.0]),  # the overhang is not counted
        ({"padding": 1}, [0.5, 2.5, 4.5]),
        ({"padding": 1, "count_include_pad": False}, [1.0, 2.5, 4.5]),
        ({"kernel": 3, "stride": 3, "padding": 1, "ceil_mode": True}, [1.0, 4.0]),
        ({"kernel": 3, "stride": 5, "padding": 1, "ceil_mode": True}, [1.0, 2.5]),  # the padding counts
        ({"kernel": 3, "stride": 6, "padding": 1, "ceil_mode": True}, [1.0]),  # no window begins in the padding
    ],
)
def test_means_of_one_to_five(options: dict[str, Any], expected: list[float]) -> None:
    x = row(1, 2, 3, 4, 5)
    out, gradients = run("avg_pool1d", x, **AVG | options)
    np.testing.assert_allclose(out, row(*expected), rtol=1e-15)
    np.testing.assert_allclose((gradients["x"] * x).sum(), out.sum(), rtol=1e-15)


MAX = {"kernel": 2, "stride": 1, "padding": 0, "dilation": 1, "ceil_mode": False}


@pytest.mark.parametrize(
    ("tie", "expected"), [(0.0, [1, 10, 100, 0]), (1.0, [0, 1, 110, 0]), (0.5, [0.5, 5.5, 105, 0])]
)
def test_gradients_of_overlapping_windows_that_tie_add_up(tie: float, expected: list[float]) -> None:
    _, gradients = run("max_pool1d", row(2, 2, 2, 1), cotangent=[1, 10, 100], tie=tie, **MAX)
    np.testing.assert_array_equal(gradients["x"], row(*expected))


def test_padding_is_never_the_largest() -> None:
    out, gradients = run("max_pool1d", row(-3, -2), **MAX | {"padding": 1})
    np.testing.assert_array_equal(out, row(-3, -2, -2))
    np.testing.assert_array_equal(gradients["x"], row(1, 2))


def test_a_dilated_window_skips_elements() -> None:
    out, gradients = run("max_pool1d", row(1, 9, 2, 3, 4), **MAX | {"dilation": 2, "stride": 2})
    np.testing.assert_array_equal(out, row(2, 4))
    np.testing.assert_array_equal(gradients["x"], row(0, 0, 1, 0, 1))


@pytest.mark.parametrize(
    ("size", "expected", "slope"),
    [
        (2, [2.0, 4.0], [1 / 3, 1 / 3, 2 / 3, 1 / 3, 1 / 3]),
        (3, [1.5, 3.0, 4.5], [1 / 2, 1 / 2 + 1 / 3, 1 / 3, 1 / 2 + 1 / 3, 1 / 2]),
        (6, [1.0, 1.5, 2.5, 3.5, 4.5, 5.0], [1.5, 1, 1, 1, 1.5]),
    ],
)
def test_adaptive_windows_overlap_where_sizes_do_not_divide(
    size: int, expected: list[float], slope: list[float]
) -> None:
    out, gradients = run("adaptive_avg_pool", row(1, 2, 3, 4, 5), output_size=(size,))
    np.testing.assert_allclose(out, row(*expected), rtol=1e-15)
    np.testing.assert_allclose(gradients["x"], row(*slope), rtol=1e-15)


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_an_adaptive_pool_to_one_is_the_global_pool(kind: str) -> None:
    x, cotangent = normal(2, 3, 4, 5), normal(2, 3, 1, 1)
    adaptive, from_adaptive = run(f"adaptive_{kind}_pool", x, cotangent=cotangent, output_size=(1, 1))
    whole, from_whole = run(f"global_{kind}_pool", x, cotangent=cotangent, keepdims=True)
    np.testing.assert_allclose(adaptive, whole, rtol=1e-14)
    np.testing.assert_allclose(from_adaptive["x"], from_whole["x"], rtol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
@pytest.mark.parametrize("p", [2, 3])
def test_the_p_norm_neither_overflows_nor_underflows(p: int, scale: float) -> None:
    out, gradients = run("lp_pool", scale * row(3, 4, 0), p=p, kernel=3, stride=1, ceil_mode=False)
    norm = (3**p + 4**p) ** (1 / p)
    np.testing.assert_allclose(out, scale * row(norm), rtol=1e-14)
    np.testing.assert_allclose(gradients["x"], row((3 / norm) ** (p - 1), (4 / norm) ** (p - 1), 0), rtol=1e-14)


@pytest.mark.parametrize(("p", "slope"), [(1, 1.0), (2, 0.0), (3, 0.0)])
def test_a_window_of_zeros_has_a_finite_gradient(p: int, slope: float) -> None:
    out, gradients = run("lp_pool", row(0, 0), p=p, kernel=2, stride=1, ceil_mode=False)
    np.testing.assert_array_equal(out, row(0))
    np.testing.assert_array_equal(gradients["x"], row(slope, slope))


NORMS: dict[str, dict[str, Any]] = {
    "layer_norm": {"axes": 1},
    "batch_norm": {},
    "group_norm": {"groups": 1},
    "instance_norm": {},
}


@pytest.mark.parametrize("name", NORMS)
def test_a_constant_is_normalised_to_zero(name: str) -> None:
    """Its variance is 0, and eps alone keeps the gradient finite: dx = (g - mean(g)) / sqrt(eps)."""
    out, gradients = run(name, np.full((1, 1, 2), 1e3), cotangent=row(3, 1), eps=1e-4, **NORMS[name])
    np.testing.assert_array_equal(out, row(0, 0))
    np.testing.assert_allclose(gradients["x"], row(100, -100), rtol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_the_variance_keeps_its_digits_far_from_zero(name: str) -> None:
    """E[x^2] - E[x]^2 would lose all of them; the shift itself is exact."""
    x = np.array([[[1.0, 2.0, 4.0]]])
    near, _ = run(name, x, eps=1e-5, **NORMS[name])
    far, _ = run(name, x + 2.0**40, eps=1e-5, **NORMS[name])
    np.testing.assert_allclose(far, near, rtol=1e-3, atol=0)


def test_one_number_alone() -> None:
    """Width 1: a layer norm gives 0, an RMS norm the sign but for eps."""
    out, gradients = run("layer_norm", np.array([[5.0]]), axes=1, eps=1e-5)
    assert (out.item(), gradients["x"].item()) == (0.0, 0.0)
    out, gradients = run("rms_norm", np.array([[3.0]]), axes=1, eps=16.0)
    np.testing.assert_allclose((out.item(), gradients["x"].item()), (0.6, 16 / 125), rtol=1e-15)


def test_batch_norm_in_evaluation_is_affine() -> None:
    x, mean, variance, weight, bias = normal(4, 3, 2), normal(3), normal(3) ** 2, normal(3) + 2.0, normal(3)
    out, gradients = run("batch_norm", x, running_mean=mean, running_var=variance, weight=weight, bias=bias, eps=0.1)
    slope = (weight / np.sqrt(variance + 0.1))[:, None]
    np.testing.assert_allclose(out, slope * (x - mean[:, None]) + bias[:, None], rtol=1e-12)
    np.testing.assert_allclose(gradients["x"], np.broadcast_to(slope, x.shape), rtol=1e-14)
    assert set(gradients) == {"x", "weight", "bias"}


def test_group_norm_between_layer_and_instance_norm() -> None:
    x, cotangent = normal(2, 4, 3), normal(4, 3)
    one, from_one = run("group_norm", x, cotangent=cotangent, groups=1, eps=0.1)
    layer, from_layer = run("layer_norm", x, cotangent=cotangent, axes=2, eps=0.1)
    np.testing.assert_allclose(one, layer, rtol=1e-13)
    np.testing.assert_allclose(from_one["x"], from_layer["x"], rtol=1e-12, atol=1e-15)
    every, _ = run("group_norm", x, groups=4, eps=0.1)
    np.testing.assert_allclose(every, run("instance_norm", x, eps=0.1)[0], rtol=1e-14)


def test_local_response_divides_by_the_size_at_the_ends_too() -> None:
    """With size 2 the neighbours are the channel before and the channel itself."""
    x = np.array([[[1.0], [2.0], [3.0]]])
    out, _ = run("local_response_norm", x, size=2, alpha=2.0, beta=1.0, k=1.0)
    np.testing.assert_allclose(out.ravel(), [1 / 2, 2 / 6, 3 / 14], rtol=1e-15)


def test_weight_norm_ignores_the_length_of_the_direction() -> None:
    x, direction, magnitude = normal(2, 3), normal(4, 3), normal(4)
    out, gradients = run("weight_norm", x, direction=direction, magnitude=magnitude)
    longer, _ = run("weight_norm", x, direction=7.0 * direction, magnitude=magnitude)
    np.testing.assert_allclose(longer, out, rtol=1e-12)
    np.testing.assert_allclose((gradients["direction"] * direction).sum(axis=1), 0.0, atol=1e-13)


def test_dropout_scales_what_it_keeps() -> None:
    out, gradients = run("dropout", np.array([1.0, 2.0, 3.0]), np.array([1, 0, 1]), p=0.75)
    np.testing.assert_array_equal(out, [4.0, 0.0, 12.0])
    np.testing.assert_array_equal(gradients["x"], [4.0, 0.0, 4.0])


REFUSED: list[tuple[str, Shape, dict[str, OptionValue], str]] = [
    ("max_pool1d", (1, 1, 5), {"kernel": 2, "stride": 0}, "stride=0: expected an integer of at least 1"),
    ("max_pool1d", (1, 1, 5), {"kernel": 2, "stride": 1, "padding": 2}, "padding of 2 is more than half the kernel"),
    ("max_pool1d", (1, 1, 5), {"kernel": 6, "stride": 1}, "a kernel of 6 with dilation 1 reaches over 6 elements"),
    ("max_pool1d", (1, 1, 1), {"kernel": 2, "stride": 1, "padding": 1, "dilation": 2}, "lies in the padding alone"),
    ("max_pool2d", (1, 1, 5), {"kernel": (2, 2), "stride": (1, 1)}, "needs an input of rank 4"),
    ("max_pool2d", (1, 1, 5, 5), {"kernel": (2,), "stride": (1, 1)}, "kernel=(2,): expected 2 integers"),
    ("avg_pool1d", (1, 1, 0), {"kernel": 1, "stride": 1}, "the padded axis has 0"),
    ("lp_pool", (1, 1, 5), {"p": 4, "kernel": 2, "stride": 1}, "p=4: expected one of 2, 1, 3"),
    (
        "adaptive_avg_pool",
        (1, 1, 5),
        {"output_size": (2, 2)},
        "expected an integer of at least 1 for each of 1 spatial axes",
    ),
    (
        "adaptive_max_pool",
        (1, 1, 5),
        {"output_size": (0,)},
        "expected an integer of at least 1 for each of 1 spatial axes",
    ),
    ("global_max_pool", (1, 1, 0), {}, "its channels have no elements"),
    ("group_norm", (1, 4, 2), {"groups": 3}, "groups=3: expected a divisor of 4"),
    ("instance_norm", (2, 3, 1), {}, "it needs more than one element per channel"),
    ("local_response_norm", (2, 3), {"size": 3}, "needs an input of rank 3 or more"),
    ("layer_norm", (2, 0), {}, "it has no elements"),
    ("rms_norm", (2, 3), {"axes": 3}, "axes=3: expected from 1 to 2 trailing axes"),
    ("weight_norm", (2, 0), {"features": 3}, "has no features"),
    ("batch_norm", (1, 3), {}, "in training it needs more than one value per channel, and an input of [1, 3] has one"),
]


@pytest.mark.parametrize(("name", "shape", "options", "message"), REFUSED, ids=lambda each: str(each)[:40])
def test_what_does_not_fit_is_refused(name: str, shape: Shape, options: dict[str, OptionValue], message: str) -> None:
    layer = LAYERS[name]
    slots = {slot: slot for slot in ("weight", "bias")} if "affine" in layer.defaults else {}
    with pytest.raises(NetworkError) as refused:
        Network((Input("x", shape),), (Node.of("h", layer, "x", options=options, parameters=slots),))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "others", "options", "message"),
    [
        ("dropout", {"mask": ((3,), Domain("index", 2))}, {}, "its mask must have the shape of x, [2, 3], got [3]"),
        ("dropout", {"mask": ((2, 3), Domain("index", 3))}, {}, "its mask must hold integers from 0 to 1"),
        ("dropout", {"mask": ((2, 3), Domain("index", 2))}, {"p": 1.0}, "p=1.0: expected a number from 0 to 0.999"),
        (
            "batch_norm",
            {"mean": ((2,), Domain("real", constant=True)), "var": ((3,), Domain("positive", constant=True))},
            {"mode": "evaluation", "affine": False},
            "its running_mean must have the shape [3], one number per channel, got [2]",
        ),
    ],
)
def test_companions_that_do_not_fit_are_refused(
    name: str, others: dict[str, tuple[Shape, Domain]], options: dict[str, OptionValue], message: str
) -> None:
    inputs = [Input("x", (2, 3)), *(Input(each, *held) for each, held in others.items())]
    with pytest.raises(NetworkError) as refused:
        Network(tuple(inputs), (Node.of("h", LAYERS[name], "x", *others, options=options),))
    assert message in str(refused.value)
