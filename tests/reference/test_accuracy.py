"""The digits of the elementwise layers, against definitions in 50-digit arithmetic that stand on their own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from mpmath import mp

from gradproof.accuracy import DEFINITIONS, GOAL, accuracies, accuracy, points, table, units
from gradproof.noise import Noisy, Rounding, observe
from gradproof.reference import LAYERS, digits

ELEMENTWISE = [
    layer.name
    for layer in LAYERS.values()
    if layer.kind == "activation"
    and layer.family in ("activations", "piecewise", "elementwise")
    and len(layer.arguments) == 1
    and not layer.parameters([(2,)], layer.defaults)
]


def test_every_elementwise_layer_of_one_argument_is_defined() -> None:
    assert set(DEFINITIONS) == set(ELEMENTWISE)


def test_every_layer_reaches_the_goal() -> None:
    found = list(accuracies())
    assert {each.layer for each in found} == set(DEFINITIONS)
    assert [each for each in found if not each.reaches_the_goal] == []
    assert table(found).count("\n") == len(DEFINITIONS) + 1


# The exact functions of reference/digits.py, and the usual formulas beside them.

EXACT = {name: f for name, f in vars(digits).items() if hasattr(f, "__wrapped__")}
ORDINARY = np.linspace(-3.0, 3.0, 41)


def rounding(array: np.ndarray) -> np.ndarray:
    """The array in arithmetic that rounds hardly at all."""
    rounding = Rounding(np.dtype("float64"), np.random.default_rng(0), to_grid=False)
    rounding.unit = 1e-300
    return observe(array, rounding)


def arguments_of(function: Callable[..., np.ndarray]) -> list[np.ndarray]:
    names = list(inspect.signature(function).parameters)
    given = {"x": ORDINARY, "a": ORDINARY[::-1] + 0.5, "root": np.sqrt(ORDINARY**2 + 4.0), "b": np.float64(4.0)}
    given["out"] = 1.0 / (1.0 + np.exp(-ORDINARY))
    return [given[name] for name in names]


@pytest.mark.parametrize("name", sorted(EXACT))
def test_both_formulas_give_the_same_numbers_where_neither_loses_digits(name: str) -> None:
    given = arguments_of(EXACT[name])
    usual = EXACT[name](*(rounding(each) if each.ndim else each for each in given))
    assert isinstance(usual, Noisy)
    np.testing.assert_allclose(np.asarray(usual), EXACT[name](*given), rtol=1e-12, atol=1e-15)


def test_arithmetic_that_rounds_loses_the_digits_that_frameworks_lose() -> None:
    far = np.array([30.0])
    assert digits.tanh_slope(far) == pytest.approx(4.0 * math.exp(-60.0), rel=1e-15)
    assert np.asarray(digits.tanh_slope(rounding(far))) == 0.0


def test_constants_to_twice_the_digits() -> None:
    with mp.workdps(60):
        linear = 2 * mp.sqrt(2 / mp.pi)
        pairs = {
            linear: (digits.TWICE_LINEAR, digits.TWICE_LINEAR_REST),
            linear * mp.mpf("0.044715"): (digits.TWICE_CUBIC, digits.TWICE_CUBIC_REST),
            mp.mpf("1.702"): (digits.QUICK_GELU_SCALE, digits.QUICK_GELU_REST),
        }
        for exact, (high, low) in pairs.items():
            assert abs(mp.mpf(high) + low - exact) < abs(exact) * mp.mpf(2) ** -105


def test_units_in_the_last_place() -> None:
    assert units(1.0, mp.mpf(1)) == 0.0
    assert units(1.0 + 2.0**-52, mp.mpf(1)) == 1.0
    assert units(0.0, mp.mpf(10) ** -400) < 1e-70
    assert units(math.inf, mp.mpf(10) ** 400) == 0.0
    assert units(math.inf, mp.mpf(10) ** 300) == math.inf
    assert units(math.nan, mp.mpf(1)) == math.inf


@pytest.mark.parametrize("factor", [1.0 + 1e-14, -1.0, 0.0, math.nan])
def test_a_wrong_derivative_shows(factor: float) -> None:
    layer = LAYERS["exp"]
    spoilt = replace(layer, backward=lambda dout, cache: {"x": layer.backward(dout, cache)["x"] * factor})
    assert accuracy(layer, {}).gradient <= GOAL
    assert accuracy(spoilt, {}).gradient > 40.0
    assert not accuracy(spoilt, {}).reaches_the_goal


def test_a_wrong_value_shows_where_it_is_wrong() -> None:
    layer = LAYERS["exp"]
    spoilt = replace(layer, forward=lambda x: (layer.forward(x)[0] + (x == 0.3) * 1e-12, layer.forward(x)[1]))
    assert (accuracy(spoilt, {}).value > 1000.0, accuracy(spoilt, {}).value_at) == (True, 0.3)


def test_points_keep_to_the_domain() -> None:
    assert (points(LAYERS["log"], {}) > 0.0).all()
    assert (points(LAYERS["tanh"], {}) < 0.0).any()
    assert np.isfinite(points(LAYERS["tanh"], {})).all()
