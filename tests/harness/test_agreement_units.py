"""When a tensor agrees: how an error is counted in noise units, how many runs are made, and when it is too much."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradproof.model.dtypes import limits
from gradproof.reference import NumpyReference
from gradproof.verdict import agreement
from gradproof.verdict.agreement import FEW_RUNS, MANY_RUNS, SUFFICIENT, THRESHOLD, WHOLE_ROUNDINGS, TensorCheck, judge
from gradproof.verdict.equations import EVERY, INSIDE, STORED, Arithmetic, Floor
from helpers.agreement import KEY, GivenFloor, checked, judged, stated
from helpers.examining import EACH_DTYPE, EACH_HALF

Array = np.ndarray[Any, Any]


# Counting.


def at_units(units: float, spread: float = 1.0) -> TensorCheck:
    """The check of an element whose error is so many noise units; own and median floor are the same."""
    return checked([0.0, 0.0], [units * 2.0 * spread, 0.0], spread)


@pytest.mark.parametrize("spread", [1e-290, 1e-12, 1.0, 1e250])
def test_one_threshold_serves_every_magnitude(spread: float) -> None:
    assert at_units(THRESHOLD * 0.999, spread).kind is None
    assert at_units(THRESHOLD * 1.001, spread).kind == "gradient"


def test_noise_units_are_the_error_over_four_terms() -> None:
    """The element's floor, the median floor, one rounding of the terms, and the smallest normal number."""
    rounding = 0.5 * float(np.finfo("float32").eps) * 2.0**33
    smallest = float(np.finfo("float32").smallest_normal)
    small = checked([0.0, 2.0**33], [100.0, 2.0**33], [1.0, 2.0], "float32")
    assert small.noise_units == 100.0 / (1.0 + 1.0 + smallest)
    large = checked([0.0, 2.0**33], [0.0, 2.0**33 + 2.0**20], [1.0, 2.0], "float32")
    assert large.noise_units == 2.0**20 / (2.0 + 1.0 + rounding + smallest)


def test_each_term_of_a_sum_may_round_to_its_own_size() -> None:
    """1e8 + 1 - 1e8 in float32 may be off by more than 1."""
    one, three = ("r",), ("r", "s", "t")
    assert checked([1.0], [9.0], dtype="float32").kind == "gradient"
    assert checked([1.0], [9.0], dtype="float32", size=np.array([2e8])).kind is None
    unit = 0.5 * float(np.finfo("float32").eps) * 2e8 * THRESHOLD
    assert checked([1.0], [1.0 + 2.0 * unit], dtype="float32", size=np.array([2e8]), readers=one).kind == "gradient"
    assert checked([1.0], [1.0 + 2.0 * unit], dtype="float32", size=np.array([2e8]), readers=three).kind is None


@EACH_DTYPE
def test_some_roundings_of_the_result_need_no_run(dtype: str) -> None:
    statement = stated([1.0])
    unit = 0.5 * np.finfo(dtype).eps
    few = judged(statement, [1.0 + WHOLE_ROUNDINGS[dtype] * unit], dtype)
    assert (few.kind, few.bound, statement.counts) == (None, True, [])
    more = judged(statement, [1.0 + (WHOLE_ROUNDINGS[dtype] + 2.0) * unit], dtype)
    assert (more.kind, more.bound, statement.counts) == (None, False, [FEW_RUNS, MANY_RUNS])


def test_the_median_floor_of_the_tensor_carries_an_element_without_one() -> None:
    floor = [0.0, 1.0, 1.0]
    assert checked([0.0] * 3, [0.99 * THRESHOLD, 0.0, 0.0], floor).kind is None
    assert checked([0.0] * 3, [1.01 * THRESHOLD, 0.0, 0.0], floor).kind == "gradient"


def test_a_large_floor_of_few_elements_excuses_no_other() -> None:
    """At a kink or where numbers cancel, rounding may move an element by all of itself; its neighbours it may not."""
    for floor in ([1.0, 0.0], [1.0, 1e-16, 1e-16, 1e-16]):
        expected = np.ones(len(floor))
        assert checked(expected, expected * 1.001, floor).kind == "gradient"


@pytest.mark.parametrize("scale", [1e-12, 1e-30, 1e-200])
def test_an_error_of_all_of_a_tiny_value_is_wrong(scale: float) -> None:
    """What an absolute tolerance lets pass."""
    expected = scale * np.array([1.0, 2.0, 3.0])
    for got in (np.zeros(3), 2.0 * expected, -expected):
        np.testing.assert_allclose(got, expected, atol=1e-8)
        assert checked(expected, got, 1e-16 * scale).kind == "gradient"


def test_one_tiny_element_that_is_wrong_beside_a_large_one() -> None:
    assert checked([1e-12, 1.0], [0.0, 1.0], [1e-28, 1e-16]).kind == "gradient"


def test_nan_that_both_sides_would_replace_by_zero_is_wrong() -> None:
    """What nan_to_num hides."""
    assert checked([0.0, 1.0], [np.nan, 1.0], 1.0).kind == "nonfinite"


def test_an_error_whose_mean_vanishes_is_wrong() -> None:
    """What a comparison of means hides."""
    assert checked([1.0, 2.0], [2.0, 1.0]).kind == "gradient"


def test_the_worst_element_is_the_one_with_the_most_noise_units() -> None:
    """Not the one with the largest error: that one's floor is higher still."""
    expected = np.array([[1.0, 1000.0], [3.0, 4.0]])
    got = expected + [[0.0, 300.0], [200.0, 0.001]]
    check = checked(expected, got, [[10.0, 10.0], [0.0, 10.0]])
    assert (check.index, check.expected, check.got, check.max_error) == ((1, 0), 3.0, 203.0, 200.0)
    assert check.noise_units == pytest.approx(20.0)


def test_agreement_reports_the_worst_element_too() -> None:
    got = [1.0, 2.0 + 4 * np.finfo(float).eps, 3.0]
    check = checked([1.0, 2.0, 3.0], got)
    assert (check.kind, check.index, check.expected, check.got) == (None, (1,), 2.0, got[1])
    assert check.noise_units == pytest.approx(4.0)


def test_evidence_holds_every_element_of_a_tensor_that_disagrees() -> None:
    check = checked([[1.0, 2.0], [3.0, 4.0]], np.array([[1.0, 2.5], [3.0, 3.0]]))
    assert check.evidence is not None
    assert check.evidence.wrong.tolist() == [[False, True], [False, True]]
    assert check.evidence.error.tolist() == [[0.0, 0.5], [0.0, 1.0]]
    assert check.evidence.expected.tolist() == [[1.0, 2.0], [3.0, 4.0]]


# Escalation.


def test_few_runs_suffice_where_they_explain_the_error() -> None:
    statement = stated([0.0], 1e-9, few=1.0)
    assert judged(statement, [1.9 * SUFFICIENT]).kind is None
    assert statement.counts == [FEW_RUNS]


def test_many_runs_may_explain_what_few_do_not() -> None:
    statement = stated([0.0], 1.0, few=1e-9)
    check = judged(statement, [2.0])
    assert (check.kind, check.noise_units) == (None, 1.0)
    assert statement.counts == [FEW_RUNS, MANY_RUNS]


def test_many_runs_decide_where_few_were_in_doubt() -> None:
    statement = stated([0.0], 0.1, few=1.0)
    check = judged(statement, [1.5 * SUFFICIENT * 2.0])
    assert (check.kind, check.noise_units) == ("gradient", pytest.approx(60.0))
    assert statement.counts == [FEW_RUNS, MANY_RUNS]


def test_an_overflow_that_only_many_runs_meet_counts() -> None:
    class Late(GivenFloor):
        def floor(self, count: int, *others: Any) -> Floor:
            found = super().floor(count, *others)
            return Floor(found.spread, np.array([count == MANY_RUNS, False]))

    check = judged(Late(KEY, np.ones(2), np.ones(2), ()), [np.nan, 1.0])
    assert (check.kind, check.unverifiable) == (None, 1)


# The arithmetic of coarse dtypes.


@EACH_HALF
def test_a_right_result_in_half_precision_is_rounded_once_and_needs_no_run(dtype: str) -> None:
    expected = np.random.default_rng(1).normal(size=1000)
    statement = stated(expected)
    check = judged(statement, expected.astype(dtype), dtype)
    assert (check.kind, check.bound, statement.counts) == (None, True, [])
    assert 0.5 < check.noise_units <= WHOLE_ROUNDINGS[dtype]


@EACH_HALF
def test_two_roundings_of_the_result_are_one_too_many(dtype: str) -> None:
    eps = float(limits(dtype).eps)
    assert checked([1.0], [1.0 + eps], 0.0, dtype).kind == "gradient"
    assert checked([1.0], [1.0 + eps], 0.0, "float32").kind == "gradient"


@EACH_HALF
def test_beyond_its_one_rounding_an_error_is_counted_in_the_arithmetics_own_dtype(dtype: str) -> None:
    eps = float(limits(dtype).eps)
    tiny = float(limits("float32").eps) / 2.0
    check = checked([1.0], [1.0 + eps], 1e-5, dtype)
    assert check.noise_units == pytest.approx(0.5 * eps / (2e-5 + tiny), rel=1e-2)


@EACH_HALF
@pytest.mark.parametrize("arithmetic", [INSIDE, STORED])
def test_the_rounding_of_the_result_is_forgiven_where_operations_round_less(dtype: str, arithmetic: Arithmetic) -> None:
    eps = float(limits(dtype).eps)
    inside = judged(stated([1.0], 0.25 * eps), [1.0 + eps], dtype, r=arithmetic)
    every = judged(stated([1.0], 0.25 * eps), [1.0 + eps], dtype, r=EVERY)
    assert inside.noise_units == pytest.approx(0.5 / 0.5, rel=1e-3)
    assert every.noise_units == pytest.approx(1.0 / (0.25 + 0.25 + 0.5), rel=1e-3)


@EACH_HALF
def test_the_coarsest_of_the_readers_counts(dtype: str) -> None:
    eps = float(limits(dtype).eps)
    statement = stated([1.0], readers=("r", "s"))
    for classes in ({}, {"r": STORED}, {"s": INSIDE}, {"elsewhere": EVERY}):
        assert judged(statement, [1.0 + 4.0 * eps], dtype, **classes).kind == "gradient"
    for classes in ({"r": EVERY}, {"s": EVERY}, {"r": EVERY, "s": STORED}):
        assert judged(statement, [1.0 + 4.0 * eps], dtype, **classes).kind is None


@EACH_DTYPE
def test_in_fine_dtypes_every_class_is_the_same(dtype: str) -> None:
    got = [1.0 + 12.0 * float(np.finfo(dtype).eps)]
    (units,) = {judged(stated([1.0]), got, dtype, r=each).noise_units for each in (INSIDE, STORED, EVERY)}
    assert units == pytest.approx(24.0, rel=1e-3)


def test_classes_and_formulas_reach_the_floor() -> None:
    statement = stated([1.0])
    arithmetics, references = {"r": STORED}, {"r": NumpyReference()}
    judge(statement, np.array([2.0]), "float64", arithmetics, references)
    assert (arithmetics, references) in statement.asked


# The test made first.

MAGNITUDES = st.floats(-1e300, 1e300) | st.floats(-1e-300, 1e-300) | st.floats(-10.0, 10.0)


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    """Expected and got, a few roundings apart or not at all alike, with a floor."""
    shape = draw(hnp.array_shapes(max_dims=2, max_side=3))
    expected = draw(hnp.arrays("float64", shape, elements=MAGNITUDES))
    steps = draw(hnp.arrays("float64", shape, elements=st.floats(-12.0, 12.0)))
    near = expected + steps * 0.5 * np.finfo(float).eps * np.abs(expected)
    far = draw(hnp.arrays("float64", shape, elements=MAGNITUDES | st.just(np.nan)))
    floors = draw(hnp.arrays("float64", shape, elements=st.floats(0.0, 1e100)))
    return expected, np.where(draw(st.booleans()), near, far), floors


@given(comparisons())
def test_what_suffices_at_first_never_passes_what_the_full_test_rejects(drawn: tuple[Array, Array, Array]) -> None:
    expected, got, floors = drawn
    quick = stated(expected, floors)
    at_once = judged(quick, got)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(agreement.WHOLE_ROUNDINGS, "float64", -1.0)
        in_full = judged(stated(expected, floors), got)
    if not quick.counts:
        assert in_full.kind is None
        assert in_full.noise_units <= at_once.noise_units
    assert at_once.kind == in_full.kind


def test_both_outcomes_of_the_first_test_occur() -> None:
    """So that the property above is about something."""
    counts = []
    for steps in (4.0, 12.0):
        statement = stated([1.0])
        judged(statement, [1.0 + steps * 0.5 * np.finfo(float).eps])
        counts.append(len(statement.counts))
    assert counts == [0, 2]
