"""The digits of the elementwise layers, against definitions in 50-digit arithmetic that stand on their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from mpmath import mp

from gradproof.model.layer import Layer
from gradproof.model.options import OptionValue
from gradproof.reference import LAYERS, PRECISE
from gradproof.reference.activations import QUICK_GELU_SCALE
from gradproof.reference.precise import (
    QUICK_GELU_REST,
    TWICE_CUBIC,
    TWICE_CUBIC_REST,
    TWICE_LINEAR,
    TWICE_LINEAR_REST,
    precise,
)
from gradproof.trust.accuracy import DEFINITIONS, GOAL, accuracies, accuracies_of, accuracy, points, table, units

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


# The precise pairs, and the textbook's beside them.


def tensors(layer: Layer, x: np.ndarray, options: Mapping[str, OptionValue]) -> tuple[np.ndarray, np.ndarray]:
    """The value and the derivative."""
    with np.errstate(all="ignore"):
        out, cache = layer.forward(x, **options)
        return out, layer.backward(np.ones_like(out), cache)["x"]


def both_pairs(name: str, x: np.ndarray, options: Mapping[str, OptionValue]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The textbook's value and the precise one, then both derivatives."""
    layer = LAYERS[name]
    return zip(tensors(layer, x, options), tensors(precise(layer), x, options), strict=True)


def choices(name: str) -> Iterator[dict[str, OptionValue]]:
    """Each combination of the layer's options, for two numbers."""
    options = LAYERS[name].options
    for values in product(*(option.domain.choices((2,)) for option in options)):
        yield dict(zip((option.name for option in options), values, strict=True))


@pytest.mark.parametrize("name", PRECISE)
def test_both_pairs_give_the_same_numbers_where_neither_loses_digits(name: str) -> None:
    for options in choices(name):
        for usual, exact in both_pairs(name, np.linspace(-3.0, 3.0, 40), options):
            np.testing.assert_allclose(usual, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", PRECISE)
def test_every_precise_pair_is_needed(name: str) -> None:
    """Somewhere the textbook's pair is off by much more than the goal allows."""
    spread = points(LAYERS["tanh"], {})
    for options in choices(name):
        pairs = both_pairs(name, np.concatenate([spread, np.ones_like(spread)]), options)
        apart = [np.nanmax(np.abs(usual - exact) / np.spacing(np.abs(exact))) for usual, exact in pairs]
        assert max(apart) > 10.0 * GOAL


def test_layers_without_a_precise_pair_are_as_they_are() -> None:
    assert PRECISE.keys() < LAYERS.keys()
    assert [name for name, layer in LAYERS.items() if precise(layer) != layer] == [n for n in LAYERS if n in PRECISE]


def test_what_is_expected_is_what_is_measured() -> None:
    assert all(each.reaches_the_goal for each in accuracies_of("tanh"))
    assert not accuracy(LAYERS["tanh"], {}).reaches_the_goal


def test_constants_to_twice_the_digits() -> None:
    with mp.workdps(60):
        linear = 2 * mp.sqrt(2 / mp.pi)
        pairs = {
            linear: (TWICE_LINEAR, TWICE_LINEAR_REST),
            linear * mp.mpf("0.044715"): (TWICE_CUBIC, TWICE_CUBIC_REST),
            mp.mpf("1.702"): (QUICK_GELU_SCALE, QUICK_GELU_REST),
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
