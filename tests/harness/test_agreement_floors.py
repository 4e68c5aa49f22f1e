"""When the tensors of a real case agree, with their true floors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gradproof.model.case import Case
from gradproof.model.network import Input
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference import LAYERS, PRECISE, NumpyReference
from gradproof.verdict.agreement import judge
from gradproof.verdict.equations import Equations
from helpers.adapters import reference_with
from helpers.examining import EACH_DTYPE, examined, results
from helpers.networks import case_of, network, node, ordinary

Array = np.ndarray[Any, Any]


# With true floors.


WIDE = network(
    Input("x", (3, 4)),
    node("h", "linear", "x", parameters="weight:w", features=4, use_bias=False),
    node("s", "softmax", "h"),
    node("out", "layer_norm", "s", affine=False),
)


def equations_of(case: Case) -> tuple[Equations, Mapping[str, Array]]:
    """The equations of a run of the reference in the case's dtype, and what it gave."""
    got = results(NumpyReference(), case)
    return Equations(case, got, NumpyReference(rows=PRECISE), NumpyReference()), got


@EACH_DTYPE
@pytest.mark.parametrize("share", [1e-3, -1.0])
def test_an_error_in_any_tensor_of_a_true_case_is_found(dtype: str, share: float) -> None:
    equations, got = equations_of(ordinary(WIDE, dtype, seed=5))
    for statement in equations:
        array = got[statement.key]
        assert judge(statement, array, dtype).kind is None
        assert judge(statement, array * np.array(1.0 + share, dtype), dtype).kind == statement.key.role


def test_the_same_error_at_a_tiny_scale_is_found() -> None:
    """Gradients of 1e-12 that are off by 100 %."""
    case = ordinary(WIDE, "float64", seed=5)
    equations, got = equations_of(Case(case.network, case.dtype, case.values, 1e-12 * case.cotangent))
    right = got[gradient_of("w")]
    np.testing.assert_allclose(right, 2.0 * right, atol=1e-8)
    assert judge(equations[gradient_of("w")], right, "float64").kind is None
    assert judge(equations[gradient_of("w")], 2.0 * right, "float64").kind == "gradient"


def test_the_given_cotangent_has_no_floor() -> None:
    equations, got = equations_of(ordinary(WIDE, "float32", seed=5))
    given_back = got[gradient_of("out")]
    assert judge(equations[gradient_of("out")], given_back, "float32").kind is None
    assert judge(equations[gradient_of("out")], given_back * np.float32(1.00001), "float32").kind == "gradient"


# A value beyond the dtype's range has no gradient to speak of.


def relu_of_lost_values(slope_at_nan: float) -> NumpyReference:
    """Frameworks differ in what relu hands back where its input is NaN."""

    def backward(dout: Array, cache: Any) -> dict[str, Array]:
        x = cache[0]
        return {"x": dout * np.where(np.isnan(x), slope_at_nan, np.where(x > 0, 1.0, 0.0)).astype(dout.dtype)}

    return NumpyReference(rows={"relu": (LAYERS["relu"].forward, backward)})


@EACH_DTYPE
@pytest.mark.parametrize(("x", "agrees"), [([1e4, 1.0, 2.0], True), ([3.0, 1.0, 2.0], False)], ids=["lost", "finite"])
def test_a_gradient_says_nothing_where_its_value_is_lost(x: list[float], agrees: bool, dtype: str) -> None:
    of = network(
        Input("x", (1, 3)), node("e", "exp", "x"), node("n", "layer_norm", "e", affine=False), node("out", "relu", "n")
    )
    case = case_of(of, dtype, [[0.5, -1.5, 2.0]], x=[x])
    assert examined(relu_of_lost_values(1.0), case).agrees
    assert examined(reference_with("relu", lambda g, dout: {"x": dout}), case).agrees is agrees


def test_a_square_beyond_the_range_is_infinite_and_the_rest_is_verified() -> None:
    of = network(Input("x", (3,)), node("out", "multiply", "x", "x"))
    examination = examined(NumpyReference(), case_of(of, "float32", np.ones(3), x=[1e30, 2.0, 3.0]))
    assert {check.key: (check.kind, check.unverifiable) for check in examination.checks} == {
        value_of("out"): (None, 0),
        gradient_of("out"): (None, 0),
        gradient_of("x"): (None, 0),
    }
