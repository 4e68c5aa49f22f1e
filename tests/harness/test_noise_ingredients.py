"""Every ingredient of the noise floor is needed, and so is judging each equation by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from scipy.special import erf

from gradproof.model.adapter import Adapter
from gradproof.model.case import Case
from gradproof.model.dtypes import VALID_DTYPES
from gradproof.model.network import Input, Network
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference import LAYERS, PRECISE, NumpyReference
from gradproof.reference.linear import LinearOperands
from gradproof.verdict import agreement, equations, noise
from gradproof.verdict.agreement import FEW_RUNS, judge
from gradproof.verdict.equations import Equations
from gradproof.verdict.judging import Subject
from gradproof.verdict.noise import Rounding
from gradproof.verdict.sweep import Sweep
from helpers.examining import examined, results
from helpers.networks import case_of, node
from helpers.noise import GRID, chain_case, equations_of, floor, in_float64, normal

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


# Every ingredient is needed: with it the case below agrees, without it there is a false alarm, or a wrong floor.

Patch = Callable[[pytest.MonkeyPatch], None]


def disagreeing(adapter: Adapter, of: Case) -> list[str]:
    """The tensors whose equations do not hold."""
    got = results(adapter, of)
    every = Subject(adapter, {}).equations(of, got)
    return [each.key for each in every if judge(each, got[each.key], of.dtype).kind]


def without_operand_noise(patch: pytest.MonkeyPatch) -> None:
    plain = noise._plain
    patch.setattr(noise, "_plain", lambda value, rounding: plain(value, None))


def without_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rounding, "__call__", lambda self, exact, at_one=False: exact)


def with_one_kind(to_grid: bool) -> Patch:
    made = Rounding.__init__

    def patched(self: Rounding, dtype: Any, generator: Any, **_: bool) -> None:
        made(self, dtype, generator, to_grid)

    return lambda patch: patch.setattr(Rounding, "__init__", patched)


def with_attributes(**values: Any) -> Patch:
    made = Rounding.__init__

    def patched(self: Rounding, *arguments: Any, **others: Any) -> None:
        made(self, *arguments, **others)
        vars(self).update(values)

    return lambda patch: patch.setattr(Rounding, "__init__", patched)


def with_precise_samples(patch: pytest.MonkeyPatch) -> None:
    made = Equations.__init__

    def patched(self: Equations, of: Case, got: Arrays, reference: NumpyReference, *others: Any) -> None:
        made(self, of, got, reference, reference, *others[1:])

    patch.setattr(Equations, "__init__", patched)


def with_constant(module: Any, name: str, value: Any) -> Patch:
    return lambda patch: patch.setattr(module, name, value)


def cancelling_sum(large: float = 1e8) -> tuple[Adapter, Case]:
    """A bias whose gradient is 1, the sum of much larger terms."""
    network = Network((Input("x", (3, 1)),), (node("out", "linear", "x", parameters="weight:w bias:b", features=1),))
    ones = {"x": np.ones((3, 1)), "w": np.ones((1, 1)), "b": np.zeros(1)}
    return NumpyReference(), case_of(network, "float32", [[large], [1.0], [-large]], **ones)


def _linear_in_order(x: Array, weight: Array) -> tuple[Array, LinearOperands]:
    return (x[..., None, :] * weight).cumsum(axis=-1)[..., -1], LinearOperands(x, weight, biased=False)


def cancelling_product() -> tuple[Adapter, Case]:
    """The same terms inside a matrix product, added up one after another."""
    network = Network(
        (Input("x", (1, 3)),), (node("out", "linear", "x", parameters="weight:w", features=1, use_bias=False),)
    )
    adapter = NumpyReference(rows={"linear": (_linear_in_order, LAYERS["linear"].backward)})
    return adapter, case_of(network, "float32", x=[[1e8, 1.0, -1e8]], w=np.ones((1, 3)))


def sum_in_order(count: int, seed: int) -> tuple[Adapter, Case]:
    """Numbers that add up to nearly nothing, in one row."""
    network = Network(
        (Input("x", (1, count)),), (node("out", "linear", "x", parameters="weight:w", features=1, use_bias=False),)
    )
    x = normal(1, count, seed=seed).astype("float32")
    x[0, -1] -= x.sum(dtype=float)
    adapter = NumpyReference(rows={"linear": (_linear_in_order, LAYERS["linear"].backward)})
    return adapter, case_of(network, "float32", x=x, w=np.ones((1, count)), cotangent=[[1.0]])


def small_differences() -> tuple[Adapter, Case]:
    """Numbers that differ in few of their digits, less their mean."""
    network = Network((Input("x", (4, 5)),), (node("out", "layer_norm", "x", affine=False),))
    return NumpyReference(), case_of(network, "float32", x=1000.0 + normal(4, 5))


def sum_of_the_dtypes_own_numbers() -> tuple[Adapter, Case]:
    """Terms and total are exact in float32, but not what lies between: 2^24 + 1 is 2^24."""
    return cancelling_sum(2.0**24)


def squares_beyond_the_range() -> tuple[Adapter, Case]:
    """The root of the mean of the squares is in float32's range, they are not."""
    network = Network((Input("x", (2, 2)),), (node("out", "rms_norm", "x", affine=False),))
    return NumpyReference(), case_of(network, "float32", x=[[1e30, 2e30], [1.0, 2.0]])


def _flushing_rms_norm(x: Array, **options: Any) -> tuple[Array, Any]:
    flushed = np.where(x * x < np.finfo(x.dtype).smallest_normal, x.dtype.type(0.0), x)
    return LAYERS["rms_norm"].forward(flushed, **options)


def flushed_squares() -> tuple[Adapter, Case]:
    """Subnormal numbers on the way, which some hardware takes for zero."""
    network = Network((Input("x", (2, 2)),), (node("out", "rms_norm", "x", affine=False, eps=0.0),))
    adapter = NumpyReference(rows={"rms_norm": (_flushing_rms_norm, LAYERS["rms_norm"].backward)})
    return adapter, case_of(network, "float32", x=[[1e-20, 2e-20], [1.0, 2.0]])


def _gelu_by_erf(x: Array) -> tuple[Array, Any]:
    below = x.dtype.type(0.5) * (x.dtype.type(1.0) + erf(x * x.dtype.type(math.sqrt(0.5))))
    return x * below, (x, below)


def gelu_far_below() -> tuple[Adapter, Case]:
    """Frameworks take the distribution function as (1 + erf) / 2, which keeps few digits far below zero."""
    network = Network((Input("x", (20,)),), (node("out", "gelu", "x"),))
    adapter = NumpyReference(rows={"gelu": (_gelu_by_erf, LAYERS["gelu"].backward)})
    return adapter, case_of(network, "float32", x=np.linspace(-5.0, -4.0, 20))


def saturated() -> tuple[Adapter, Case]:
    """The textbook's 1 - tanh(x)^2 is 0 from x = 19 on, where 4 exp(-2 x) is meant."""
    network = Network((Input("x", (1,)),), (node("out", "tanh", "x"),))
    return NumpyReference(), case_of(network, "float64", x=[30.0])


INGREDIENTS: dict[str, tuple[Patch, Callable[[], tuple[Adapter, Case]]]] = {
    "every operation is perturbed": (without_noise, small_differences),
    "the operands of sums": (without_operand_noise, cancelling_sum),
    "the operands of matrix products": (without_operand_noise, cancelling_product),
    "relative shifts": (with_one_kind(GRID), sum_of_the_dtypes_own_numbers),
    # The cast to the grid overflows by itself.
    "the dtype's range": (with_attributes(largest=math.inf, to_grid=False), squares_beyond_the_range),
    "the smallest normal number": (with_attributes(smallest_normal=0.0), flushed_squares),
    "escalation": (with_constant(agreement, "MANY_RUNS", FEW_RUNS), lambda: sum_in_order(10, seed=0)),
    "the largest deviation": (with_constant(equations, "PEAK", math.inf), lambda: sum_in_order(100, seed=17)),
    "functions that round at one": (with_constant(noise, "ROUNDED_AT_ONE", frozenset()), gelu_far_below),
    "the textbook's formulas": (with_precise_samples, saturated),
}


@pytest.mark.parametrize(("leave_out", "make"), INGREDIENTS.values(), ids=INGREDIENTS)
def test_leaving_out_an_ingredient_gives_a_false_alarm(
    monkeypatch: pytest.MonkeyPatch, leave_out: Patch, make: Callable[[], tuple[Adapter, Case]]
) -> None:
    adapter, of = make()
    assert disagreeing(adapter, of) == []
    leave_out(monkeypatch)
    assert disagreeing(adapter, of) != []


def test_what_is_expected_is_precise_and_the_textbook_agrees_with_it() -> None:
    adapter, of = saturated()
    (expected,) = equations_of(of)[gradient_of("x")].expected
    assert expected == pytest.approx(float(of.cotangent[0]) * 4.0 * math.exp(-60.0), rel=1e-15)
    assert adapter.backward(adapter.forward(of.network, of.values, of.dtype), of.cotangent)["x"] == 0.0
    assert examined(adapter, of).agrees


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_the_root_of_squares_would_be_a_wrong_floor(scale: float) -> None:
    network = Network((Input("x", (5,)), Input("c", (1,))), (node("out", "multiply", "x", "c"),))
    statement = equations_of(case_of(network, "float64", x=normal(5), c=[scale]))[value_of("out")]
    spread = statement.floor(8, {}).spread
    unit = np.finfo("float64").eps * np.abs(statement.expected)
    assert ((0.1 * unit < spread) & (spread < 2.0 * unit)).all()
    with np.errstate(all="ignore"):
        assert set(spread**2) <= {0.0, np.inf}


def test_unverifiable_elements_are_counted() -> None:
    lost = examined(*squares_beyond_the_range()).checks
    assert {check.key: check.unverifiable for check in lost} == {
        value_of("out"): 2,
        gradient_of("out"): 0,
        gradient_of("x"): 2,
    }


# Whole sweeps.


def cancelling_chain() -> tuple[Adapter, Case]:
    """(x + 1000) - 1000 keeps four digits."""
    network = Network(
        (Input("x", (5,)), Input("c", (1,))), (node("h", "add", "x", "c"), node("out", "subtract", "h", "c"))
    )
    return NumpyReference(), case_of(network, "float32", x=normal(5), c=[1000.0])


def test_errors_add_up_over_a_sweep_and_in_no_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, of = cancelling_chain()
    got = adapter.forward(of.network, of.values, of.dtype).outputs["out"]
    assert Sweep(of, {}).off(value_of("out"), got) is None
    without_noise(monkeypatch)
    assert disagreeing(adapter, of) == []
    assert Sweep(of, {}).off(value_of("out"), got) is not None


def test_a_sweep_expects_what_the_reference_computes() -> None:
    of = chain_case()
    exact = results(NumpyReference(rows=PRECISE), in_float64(of))
    found = Sweep(of, {}).expected
    assert found.keys() == exact.keys()
    for key, array in exact.items():
        np.testing.assert_array_equal(found[key], array)


def test_a_sweeps_floor_grows_on_the_way() -> None:
    found = Sweep(chain_case(), {})
    size = {key: found.floor(key).spread.mean() / np.abs(found.expected[key]).mean() for key in found.expected}
    assert size[gradient_of("out")] <= np.finfo("float32").eps
    assert (
        size[gradient_of("w")]
        > 2.0
        * floor(chain_case(), gradient_of("w"), 16).spread.mean()
        / np.abs(found.expected[gradient_of("w")]).mean()
    )


@pytest.mark.parametrize("dtype", VALID_DTYPES)
def test_a_tensor_is_off_where_rounding_on_the_way_does_not_explain_it(dtype: str) -> None:
    found = Sweep(chain_case(dtype), {})
    for key, array in found.expected.items():
        assert found.off(key, array.astype(dtype)) is None
        assert found.off(key, (array * 3.0 + 1.0).astype(dtype)) is not None


def test_nothing_is_off_where_the_dtype_overflows() -> None:
    _, of = squares_beyond_the_range()
    found = Sweep(of, {})
    assert found.floor(value_of("out")).lost.tolist() == [[True, True], [False, False]]
    expected = found.expected[value_of("out")]
    assert found.off(value_of("out"), expected * [[5.0], [1.0]]) is None
    assert found.off(value_of("out"), expected * [[1.0], [5.0]]) is not None
