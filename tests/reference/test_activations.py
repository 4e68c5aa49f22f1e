"""Activations, softmax and gated layers: values worked out by hand, limits, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gradproof.model.layer import Layer
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import OptionValue, Shape
from gradproof.reference import LAYERS
from gradproof.reference.precise import precise

Array = np.ndarray[Any, Any]

DOUT = 2.0


def run(name: str, *arrays: Any, dout: Any = DOUT, **options: Any) -> tuple[Array, dict[str, Array]]:
    """The layer's output, and its gradients for this cotangent."""
    return run_layer(LAYERS[name], *arrays, dout=dout, **options)


def run_layer(layer: Layer, *arrays: Any, dout: Any = DOUT, **options: Any) -> tuple[Array, dict[str, Array]]:
    out, cache = layer.forward(*(np.asarray(each, float) for each in arrays), **options)
    return out, layer.backward(np.broadcast_to(np.asarray(dout, float), np.shape(out)), cache)


def network(name: str, shape: Shape, **options: OptionValue) -> Network:
    return Network((Input("x", shape),), (Node.of("h", LAYERS[name], "x", options=options),))


# name, x, f(x), f'(x): where the formula as it stands would overflow, or lose every digit.
FAR: list[tuple[str, float, float, float]] = [
    ("gelu_tanh", 1e200, 1e200, 1.0),
    ("gelu_tanh", -1e200, 0.0, 0.0),
    ("gelu", 1e200, 1e200, 1.0),
    ("silu", -1e200, 0.0, 0.0),
    ("mish", 1e200, 1e200, 1.0),
    ("squareplus", 1e200, 1e200, 1.0),
    ("squareplus", -1e200, 0.0, 0.0),
    ("softsign", 1e8, 1.0, 1e-16),
    ("softsign", -1e150, -1.0, 1e-300),
    ("tanhshrink", 1e-8, 0.0, 1e-16),
    ("log_sigmoid", -1e200, -1e200, 1.0),
    ("log_sigmoid", 40.0, -math.exp(-40.0), math.exp(-40.0)),
    ("softplus", -40.0, math.exp(-40.0), math.exp(-40.0)),
    ("softplus", 1e200, 1e200, 1.0),
    ("elu", -40.0, -1.0, math.exp(-40.0)),
    ("elu", 1000.0, 1000.0, 1.0),
    ("sigmoid", -1000.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("name", "x", "value", "slope"), FAR)
def test_far_from_zero_and_close_to_it(name: str, x: float, value: float, slope: float) -> None:
    for layer in (LAYERS[name], precise(LAYERS[name])):
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            out, gradients = run_layer(layer, x, **layer.defaults)
        np.testing.assert_allclose(out, value, rtol=1e-7, atol=1e-15)
        np.testing.assert_allclose(gradients["x"], DOUT * slope, rtol=1e-7, atol=0.0)


def test_a_reciprocal_near_zero_passes_on_a_zero() -> None:
    _, gradients = run("reciprocal", [1e-200, 1e-200], dout=[0.0, 1e-100])
    np.testing.assert_allclose(gradients["x"], [0.0, -1e300])


def test_softmin_by_hand() -> None:
    out, gradients = run("softmin", [[0.0, math.log(3.0)]], dout=[[1.0, 0.0]], axis=-1)
    np.testing.assert_allclose(out, [[0.75, 0.25]])
    np.testing.assert_allclose(gradients["x"], [[-0.1875, 0.1875]])


@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
def test_logsumexp_by_hand(shift: float) -> None:
    out, gradients = run("logsumexp", [[shift, shift + math.log(3.0)]], axis=(-1,), keepdims=False)
    np.testing.assert_allclose(out, [shift + math.log(4.0)])
    np.testing.assert_allclose(gradients["x"], [[0.5, 1.5]])


@pytest.mark.parametrize(
    ("axis", "keepdims", "shape"),
    [
        ((-1,), False, (2, 3)),
        ((1,), True, (2, 1, 4)),
        ((2, 0), False, (3,)),
        ((0, -1), True, (1, 3, 1)),
        ((0, 1, 2), False, ()),
    ],
)
def test_logsumexp_reduces_its_axes(axis: tuple[int, ...], keepdims: bool, shape: Shape) -> None:
    assert network("logsumexp", (2, 3, 4), axis=axis, keepdims=keepdims).shapes["h"] == shape
    out, gradients = run("logsumexp", np.zeros((2, 3, 4)), axis=axis, keepdims=keepdims)
    count = 24 // math.prod(shape)
    np.testing.assert_allclose(out, np.full(shape, math.log(count)))
    np.testing.assert_allclose(gradients["x"], np.full((2, 3, 4), DOUT / count))


def test_gates_by_hand() -> None:
    """With the gate's input 0 a sigmoid is 1/2 with the slope 1/4; silu(a) and gelu(a) are 0 with the slope 1/2."""
    x = [[3.0, 0.0], [0.0, 5.0]]
    out, gradients = run("glu", x, axis=1)
    np.testing.assert_allclose(out[0], [1.5])
    np.testing.assert_allclose(gradients["x"][0], [DOUT * 0.5, DOUT * 3.0 * 0.25])
    for name, options in (("swiglu", {}), ("geglu", {"approximate": "none"}), ("geglu", {"approximate": "tanh"})):
        out, gradients = run(name, x, axis=1, **options)
        np.testing.assert_allclose(out[1], [0.0])
        np.testing.assert_allclose(gradients["x"][1], [DOUT * 0.5 * 5.0, 0.0])


@pytest.mark.parametrize(
    ("name", "options", "active", "other"),
    [
        ("glu", {}, "sigmoid", "a"),
        ("swiglu", {}, "silu", "b"),
        ("geglu", {"approximate": "none"}, "gelu", "b"),
        ("geglu", {"approximate": "tanh"}, "gelu_tanh", "b"),
    ],
)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_gate_is_an_activation_times_the_other_half(
    name: str, options: dict[str, Any], active: str, other: str, axis: int
) -> None:
    x = np.random.default_rng(1).normal(size=(4, 6, 2))
    halves = dict(zip("ab", np.split(x, 2, axis), strict=True))
    gated = halves["b" if other == "a" else "a"]
    out, gradients = run(name, x, axis=axis, **options)
    value, _ = run(active, gated)
    np.testing.assert_allclose(out, value * halves[other], rtol=1e-15)
    _, of_gated = run(active, gated, dout=DOUT * halves[other])
    expected = {other: DOUT * value, "b" if other == "a" else "a": of_gated["x"]}
    np.testing.assert_allclose(gradients["x"], np.concatenate((expected["a"], expected["b"]), axis), rtol=1e-13)


def test_maxout_takes_neighbours() -> None:
    out, gradients = run("maxout", [[1.0, 4.0], [3.0, 2.0], [5.0, 0.0], [6.0, -1.0]], axis=0, pieces=2)
    np.testing.assert_array_equal(out, [[3.0, 4.0], [6.0, 0.0]])
    np.testing.assert_array_equal(gradients["x"], DOUT * np.array([[0, 1], [1, 0], [0, 1], [1, 0]]))


@pytest.mark.parametrize(("weight", "shares"), [(0.0, [1, 0, 0]), (1.0, [0, 1, 0]), (0.5, [0.5, 0.5, 0])])
def test_maxout_ties(weight: float, shares: list[float]) -> None:
    _, gradients = run("maxout", [2.0, 2.0, 1.0], axis=-1, pieces=3, at_tie=weight)
    np.testing.assert_array_equal(gradients["x"], DOUT * np.array(shares))


def test_maxout_lets_nan_through() -> None:
    out, gradients = run("maxout", [np.nan, 2.0, 1.0, 3.0], axis=-1, pieces=2)
    np.testing.assert_array_equal(out, [np.nan, 3.0])
    np.testing.assert_array_equal(gradients["x"], [np.nan, np.nan, 0.0, DOUT])


def test_prelu_with_one_slope_and_with_one_per_channel() -> None:
    x = [[[-1.0, 2.0], [-3.0, -4.0]]]
    out, gradients = run("prelu", x, [0.5, 0.25])
    np.testing.assert_array_equal(out, [[[-0.5, 2.0], [-0.75, -1.0]]])
    np.testing.assert_array_equal(gradients["x"], DOUT * np.array([[[0.5, 1.0], [0.25, 0.25]]]))
    np.testing.assert_array_equal(gradients["weight"], DOUT * np.array([-1.0, -7.0]))
    _, shared = run("prelu", x, [0.5])
    np.testing.assert_array_equal(shared["weight"], [DOUT * -8.0])


def test_prelu_of_a_single_number() -> None:
    out, gradients = run("prelu", -4.0, [0.5])
    assert np.shape(out) == np.shape(gradients["x"]) == ()
    np.testing.assert_array_equal(gradients["weight"], [DOUT * -4.0])


@pytest.mark.parametrize("name", ["glu", "swiglu", "geglu"])
def test_an_odd_length_has_no_halves(name: str) -> None:
    assert network(name, (3, 4), axis=1).shapes["h"] == (3, 2)
    with pytest.raises(
        NetworkError, match=r"needs a multiple of 2 elements along axis 0, got an input of shape \[3, 4\]"
    ):
        network(name, (3, 4), axis=0)


REFUSED: list[tuple[str, Shape, dict[str, OptionValue], str]] = [
    ("maxout", (2, 6), {"pieces": 4}, r"needs a multiple of 4 elements along axis -1, got an input of shape \[2, 6\]"),
    ("maxout", (2, 6), {"pieces": 0}, r"option pieces=0: expected an integer of at least 1"),
    ("maxout", (2, 6), {}, r"option 'pieces' must be given"),
    ("glu", (2, 6), {"axis": 2}, r"option axis=2: expected an axis of an input of shape \[2, 6\]: -2 to 1"),
    ("glu", (), {}, r"needs an input of rank 1 or more, got shape \[\]"),
    ("geglu", (2, 6), {"approximate": "sigmoid"}, r"expected one of 'none', 'tanh'"),
    ("softmax", (), {}, r"needs an input of rank 1 or more, got shape \[\]"),
    ("logsumexp", (2, 0), {}, r"cannot normalise an input of shape \[2, 0\]: it has no elements"),
    ("logsumexp", (2, 3), {"axis": (0, -2)}, r"expected different axes of an input of shape \[2, 3\]"),
    ("logsumexp", (2, 3), {"axis": (2,)}, r"expected different axes of an input of shape \[2, 3\], each from -2 to 1"),
]


@pytest.mark.parametrize(("name", "shape", "options", "message"), REFUSED)
def test_refusals(name: str, shape: Shape, options: dict[str, OptionValue], message: str) -> None:
    with pytest.raises((NetworkError, ValueError), match=message):
        network(name, shape, **options)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
@pytest.mark.parametrize("lost", ["a", "b"])
def test_the_larger_or_smaller_of_a_number_and_nan_is_nan(name: str, lost: str) -> None:
    values = {"a": np.array([1.0, 2.0]), "b": np.array([2.0, 1.0])}
    values[lost] = np.array([np.nan, values[lost][1]])
    out, cache = LAYERS[name].forward(values["a"], values["b"])
    gradients = LAYERS[name].backward(np.ones(2), cache)
    assert [np.isnan(each).tolist() for each in (out, gradients["a"], gradients["b"])] == [[True, False]] * 3
