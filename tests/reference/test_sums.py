"""Layers that add up numbers, against definitions with 200 digits that stand on their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpmath import mp

from gradproof.model.case import Case
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference import LAYERS
from gradproof.trust.measure import sums
from gradproof.trust.sums import DEFINITIONS, Digits, digits, exact_tensors, table
from gradproof.verdict.kinks import one_node


@pytest.mark.parametrize("layer", DEFINITIONS)
def test_the_reference_keeps_its_digits(layer: str) -> None:
    found = digits(layer, networks=8, seed=2)
    assert found.networks == 8
    assert found.agrees


def square_case() -> Case:
    return one_node(LAYERS["mse"], {"reduction": "none"}, {"x": [3.0, 0.5], "target": 1.0}, "float64")


def test_exact_tensors_are_those_of_the_definition() -> None:
    case = square_case()
    found = exact_tensors(case, lambda x, target, reduction: (x - target) ** 2)
    assert found[value_of("mse")].tolist() == [4.0, 0.25]
    assert found[gradient_of("x")].tolist() == (case.cotangent * [4.0, -1.0]).tolist()
    assert found[gradient_of("target")].tolist() == (case.cotangent * [-4.0, 1.0]).tolist()
    assert found[gradient_of("mse")].tolist() == case.cotangent.tolist()


def test_derivatives_have_digits_to_spare() -> None:
    case = one_node(LAYERS["reduce_sum"], {}, {"x": [1e-20, 1e20]}, "float64")
    found = exact_tensors(case, lambda x, axes, keepdims: np.frompyfunc(mp.sqrt, 1, 1)(x.sum(axis=axes)))
    exact = float(case.cotangent) / (2.0 * 1e10)
    assert found[gradient_of("x")] == pytest.approx([exact, exact], rel=1e-15)


@pytest.mark.parametrize("factor", [1.0 + 1e-12, -1.0, 0.0])
def test_a_definition_that_differs_is_told(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = DEFINITIONS["reduce_mean"]
    monkeypatch.setitem(DEFINITIONS, "reduce_mean", lambda x, axes, keepdims: factor * right(x, axes, keepdims))
    assert not digits("reduce_mean", networks=8).agrees


def test_the_table_tells_each_layer() -> None:
    found = [Digits("mse", 3, 1.25, 2.5, True), Digits("matmul", 4, 0.5, 7.0, True)]
    assert table(found).splitlines()[2:] == ["| mse | 3 | 1.2 | 2.5 |", "| matmul | 4 | 0.5 | 7 |"]
    assert sums.NETWORKS >= 20
