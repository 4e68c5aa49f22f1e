"""Merges, shapes and reductions: values computed by hand, the ends of the range, and options that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import OptionValue, Shape
from gradproof.reference import LAYERS

Array = np.ndarray[Any, Any]


def run(name: str, *arrays: Any, dout: Any = 1.0, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The output and the gradients, as lists."""
    layer = LAYERS[name]
    given = [np.asarray(array, float) for array in arrays]
    with np.errstate(all="ignore"):
        out, cache = layer.forward(*given, **options)
        gradients = layer.backward(np.broadcast_to(np.asarray(dout, float), out.shape), cache)
    return out.tolist(), {name: gradient.tolist() for name, gradient in gradients.items()}


def reduced(name: str, x: Any, axes: tuple[int, ...] = (0,), **options: Any) -> tuple[Any, Any]:
    out, gradients = run(name, x, axes=axes, keepdims=False, **options)
    return out, gradients["x"]


# Products.

PRODUCTS = {
    "no zero": ([2.0, 3.0, 4.0], 24.0, [12.0, 8.0, 6.0]),
    "one zero": ([2.0, 0.0, 5.0], 0.0, [0.0, 10.0, 0.0]),
    "two zeros": ([2.0, 0.0, 0.0], 0.0, [0.0, 0.0, 0.0]),
    "all zeros": ([0.0, 0.0], 0.0, [0.0, 0.0]),
    "one factor": ([0.0], 0.0, [1.0]),
    "an odd number of factors": ([2.0, 1.0, 3.0, 1.0, 0.0], 0.0, [0.0, 0.0, 0.0, 0.0, 6.0]),
    "a vanishing product of others that do not": ([1e-200, 1e-200, 1.0], 0.0, [1e-200, 1e-200, 0.0]),
    "an infinite product of others that are not": ([1e200, 1e200], math.inf, [1e200, 1e200]),
}


@pytest.mark.parametrize(("x", "product", "gradient"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_and_the_products_of_all_others(x: list[float], product: float, gradient: list[float]) -> None:
    assert reduced("reduce_prod", x) == (product, gradient)


def test_products_over_two_axes_that_are_no_neighbours() -> None:
    x = np.arange(12.0).reshape(2, 3, 2) - 2.0
    out, gradient = reduced("reduce_prod", x, axes=(2, 0))
    assert out == [x[:, i].prod() for i in range(3)]
    others = [np.delete(x[:, i].ravel(), j).prod() for i in range(3) for j in range(4)]
    assert np.array_equal(np.moveaxis(gradient, 1, 0).ravel(), others)


# Norms and standard deviations, where squares leave the range of float64.

SCALES = (1.0, 1e200, 1e-200, 1e-300)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("p", "size"), [(1.0, 7.0), (2.0, 5.0), (3.0, 91.0 ** (1 / 3)), (math.inf, 4.0)])
def test_norms_of_any_size(p: float, size: float, scale: float) -> None:
    out, gradient = reduced("reduce_norm", [3.0 * scale, -4.0 * scale, 0.0], p=p)
    assert out == pytest.approx(size * scale, rel=1e-15)
    slopes = {1.0: [1.0, -1.0, 0.0], math.inf: [0.0, -1.0, 0.0]}
    wanted = slopes.get(p, [(3.0 / size) ** (p - 1.0), -((4.0 / size) ** (p - 1.0)), 0.0])
    assert gradient == pytest.approx(wanted, rel=1e-15)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_the_norm_of_the_zero_vector_has_the_gradient_zero(p: float) -> None:
    assert reduced("reduce_norm", [0.0, 0.0], p=p) == (0.0, [0.0, 0.0])


def test_elements_of_equal_magnitude_share_the_largest_norm() -> None:
    assert reduced("reduce_norm", [2.0, -2.0, 1.0], p=math.inf) == (2.0, [0.5, -0.5, 0.0])
    assert reduced("reduce_norm", [2.0, -2.0], p=math.inf, at_tie=0.0)[1] == [1.0, 0.0]
    assert reduced("reduce_norm", [2.0, -2.0], p=math.inf, at_tie=1.0)[1] == [0.0, -1.0]


@pytest.mark.parametrize("scale", SCALES)
def test_standard_deviations_of_any_size(scale: float) -> None:
    """Of 1 and 3: the mean is 2, and each is 1 away from it."""
    out, gradient = reduced("reduce_std", [scale, 3.0 * scale], ddof=0)
    assert out == pytest.approx(scale, rel=1e-15)
    assert gradient == pytest.approx([-0.5, 0.5], rel=1e-15)
    out, gradient = reduced("reduce_std", [scale, 3.0 * scale], ddof=1)
    assert out == pytest.approx(math.sqrt(2.0) * scale, rel=1e-15)
    assert gradient == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-15)


@pytest.mark.parametrize("number", [0.0, 0.1, 1e8 + 0.1, 1e-300])
@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_equal_numbers_have_exactly_no_spread(number: float, count: int) -> None:
    """Although the rounded mean of three times 0.1 is not 0.1."""
    for name in ("reduce_var", "reduce_std"):
        assert reduced(name, [number] * count, ddof=1) == (0.0, [0.0] * count)


def test_a_spread_is_that_of_the_shifted_numbers() -> None:
    """The mean of squares less the square of the mean would be right to four digits here."""
    x = np.array([0.0, 1.0, 3.0])
    for name in ("reduce_var", "reduce_std"):
        near, far = reduced(name, x, ddof=1), reduced(name, x + 2.0**20, ddof=1)
        assert near[0] == pytest.approx(far[0], rel=1e-15)
        assert near[1] == pytest.approx(far[1], rel=1e-9)


# Largest and smallest.


def test_ties_of_the_largest_and_smallest() -> None:
    x = [1.0, 3.0, 3.0, 1.0]
    assert reduced("reduce_max", x) == (3.0, [0.0, 0.5, 0.5, 0.0])
    assert reduced("reduce_min", x) == (1.0, [0.5, 0.0, 0.0, 0.5])
    assert reduced("reduce_max", x, at_tie=0.0)[1] == [0.0, 1.0, 0.0, 0.0]
    assert reduced("reduce_max", x, at_tie=1.0)[1] == [0.0, 0.0, 1.0, 0.0]
    assert reduced("reduce_min", x, at_tie=0.0)[1] == [0.0, 0.0, 0.0, 1.0]
    assert reduced("reduce_min", x, at_tie=1.0)[1] == [1.0, 0.0, 0.0, 0.0]


def test_infinities_do_not_spoil_their_neighbours() -> None:
    assert reduced("reduce_max", [-math.inf, 2.0]) == (2.0, [0.0, 1.0])
    assert reduced("reduce_min", [math.inf, 2.0]) == (2.0, [0.0, 1.0])


@pytest.mark.parametrize("axes", [axes for count in (1, 2, 3) for axes in permutations(range(3), count)])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize(
    ("name", "reduce"),
    [("reduce_sum", np.sum), ("reduce_mean", np.mean), ("reduce_max", np.max), ("reduce_prod", np.prod)],
)
def test_any_axes_in_any_order(name: str, reduce: Callable[..., Array], keepdims: bool, axes: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    for signed in (axes, tuple(axis - 3 for axis in axes)):
        out, cache = LAYERS[name].forward(x, axes=signed, keepdims=keepdims)
        assert np.allclose(out, reduce(x, axis=axes, keepdims=keepdims), rtol=1e-14, atol=0.0)
        assert LAYERS[name].backward(out, cache)["x"].shape == x.shape


# Sums along an axis, quotients, and shapes.


def test_cumulative_sums() -> None:
    assert run("cumsum", [1.0, 2.0, 4.0], dout=[1.0, 10.0, 100.0], axis=0, reverse=False) == (
        [1.0, 3.0, 7.0],
        {"x": [111.0, 110.0, 100.0]},
    )
    assert run("cumsum", [1.0, 2.0, 4.0], dout=[1.0, 10.0, 100.0], axis=-1, reverse=True) == (
        [7.0, 6.0, 4.0],
        {"x": [1.0, 11.0, 111.0]},
    )


def test_quotients_whose_squared_divisor_leaves_the_range() -> None:
    assert run("divide", [1e-200], [1e-200]) == ([1.0], {"a": [1e200], "b": [-1e200]})
    assert run("divide", [1e200], [1e200]) == ([1.0], {"a": [1e-200], "b": [-1e-200]})
    assert run("divide", [0.0], [1e-200])[1] == {"a": [1e200], "b": [-0.0]}


def test_a_divisor_of_zero_gives_infinity() -> None:
    out, gradients = run("divide", [1.0, -2.0], [0.0, 0.0])
    assert out == [math.inf, -math.inf]
    assert gradients == {"a": [math.inf, math.inf], "b": [-math.inf, math.inf]}


def test_a_sum_over_nothing_is_zero() -> None:
    layer = LAYERS["reduce_sum"]
    out, cache = layer.forward(np.zeros((2, 0)), axes=(1,), keepdims=False)
    assert out.tolist() == [0.0, 0.0]
    assert layer.backward(out, cache)["x"].shape == (2, 0)
    network = Network((Input("x", (2, 0)),), (Node.of("out", layer, "x", options={"axes": (1,)}),))
    assert network.shapes["out"] == (2,)


@pytest.mark.parametrize("axes", [*permutations(range(3)), (-1, 0, 1), (-3, -1, 1)])
def test_transposing_back(axes: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    out, cache = LAYERS["transpose"].forward(x, axes=axes)
    assert np.array_equal(out, np.transpose(x, axes))
    assert np.array_equal(LAYERS["transpose"].backward(out, cache)["x"], x)


# Refused.

REFUSED: dict[str, tuple[str, tuple[Shape, ...], dict[str, OptionValue], str]] = {
    "an axis twice": ("reduce_sum", ((2, 3),), {"axes": (1, -1)}, "axes=(1, -1): expected different axes"),
    "an axis too far": ("reduce_max", ((2, 3),), {"axes": (0, 2)}, "each from -2 to 1"),
    "no axis": ("reduce_mean", ((2, 3),), {"axes": ()}, "axes=(): expected different axes"),
    "an axis that is no tuple": ("reduce_mean", ((2, 3),), {"axes": 1}, "axes=1: expected different axes"),
    "nothing to average": ("reduce_mean", ((2, 0),), {"axes": (1,)}, "[2, 0] has no elements to reduce over axes (1,)"),
    "nothing to compare": ("reduce_min", ((0,),), {}, "[0] has no elements to reduce over axes (-1,)"),
    "a scalar": ("reduce_prod", ((),), {}, "needs an input of rank 1 or more, got shape []"),
    "one element less one": (
        *("reduce_var", ((3, 1),), {"axes": (-1,), "ddof": 1}),
        "ddof=1 needs more elements than the 1 over axes (-1,)",
    ),
    "another ddof": ("reduce_std", ((3,),), {"ddof": 2}, "ddof=2: expected one of 0, 1"),
    "another norm": ("reduce_norm", ((3,),), {"p": 0.5}, "p=0.5: expected one of 2.0, 1.0, 3.0, inf"),
    "a cumulative axis too far": ("cumsum", ((2, 3),), {"axis": 2}, "axis=2: expected an axis of an input"),
    "unequal shapes in a stack": (
        "stack",
        ((2, 3), (3,)),
        {},
        "cannot stack shapes [2, 3] and [3]: they must be equal",
    ),
    "a new axis too far": ("stack", ((2, 3),), {"axis": 3}, "axis=3: expected a place for a new axis"),
    "shapes that do not broadcast": ("divide", ((2, 3), (2,)), {}, "cannot broadcast shapes [2, 3] and [2]"),
    "an axis left out": ("transpose", ((2, 3, 4),), {"axes": (1, 0)}, "every axis of an input of shape [2, 3, 4] once"),
    "an axis repeated": ("transpose", ((2, 3),), {"axes": (1, -1)}, "every axis of an input of shape [2, 3] once"),
    "a shape not larger": ("broadcast", ((2, 3),), {"shape": (2, 1)}, "a shape to which an input of shape [2, 3]"),
    "a shape of fewer axes": ("broadcast", ((1, 3),), {"shape": (3,)}, "a shape to which an input of shape [1, 3]"),
    "axes added behind": ("broadcast", ((2,),), {"shape": (2, 3)}, "a shape to which an input of shape [2]"),
}


@pytest.mark.parametrize(("name", "shapes", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_option_or_shape_is_refused(
    name: str, shapes: tuple[Shape, ...], options: dict[str, OptionValue], message: str
) -> None:
    inputs = tuple(Input(f"x{i}", shape) for i, shape in enumerate(shapes))
    with pytest.raises(NetworkError) as refusal:
        Network(inputs, (Node.of("out", LAYERS[name], *(each.name for each in inputs), options=options),))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
