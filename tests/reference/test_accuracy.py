"""The digits of the elementwise layers, against definitions in 50-digit arithmetic that stand on their own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from mpmath import mp

from gradproof.accuracy import DEFINITIONS, accuracies, accuracy, points, table, units
from gradproof.reference import LAYERS

GOAL = 4.0
"""Units in the last place."""

NOT_YET = {
    "tanh": "1 - y^2 cancels where y is nearly 1",
    "sigmoid": "y (1 - y) cancels where y is nearly 1",
    "silu": "x times a subnormal number",
    "gelu": "x times a subnormal number",
    "gelu_tanh": "1 + tanh(u) cancels far below 0",
    "quick_gelu": "x times a subnormal number",
    "mish": "x times a subnormal number",
    "squareplus": "x + sqrt(x^2 + b) cancels far below 0",
    "tanhshrink": "x - tanh(x) cancels near 0",
}
"""Layers that lose more, mostly with the formula that frameworks use as well; why."""

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


def test_all_but_those_that_are_listed_reach_the_goal() -> None:
    found = list(accuracies())
    assert {each.layer for each in found} == set(DEFINITIONS)
    off = {each.layer for each in found if max(each.value, each.gradient) > GOAL}
    assert off == set(NOT_YET)
    assert table(found).count("\n") == len(DEFINITIONS) + 1


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


def test_a_wrong_value_shows_where_it_is_wrong() -> None:
    layer = LAYERS["exp"]
    spoilt = replace(layer, forward=lambda x: (layer.forward(x)[0] + (x == 0.3) * 1e-12, layer.forward(x)[1]))
    assert (accuracy(spoilt, {}).value > 1000.0, accuracy(spoilt, {}).value_at) == (True, 0.3)


def test_points_keep_to_the_domain() -> None:
    assert (points(LAYERS["log"], {}) > 0.0).all()
    assert (points(LAYERS["tanh"], {}) < 0.0).any()
    assert np.isfinite(points(LAYERS["tanh"], {})).all()
