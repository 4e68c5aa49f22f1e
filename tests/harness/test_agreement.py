"""When a tensor agrees: what is structurally wrong, how an error is counted in noise units, and when it is too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradproof.draw.drawing import Drawn
from gradproof.model.case import Case
from gradproof.model.dtypes import VALID_DTYPES, limits
from gradproof.model.network import Input, Network, Node
from gradproof.reference import LAYERS, PRECISE, NumpyReference
from gradproof.verdict import agreement
from gradproof.verdict.agreement import (
    FEW_RUNS,
    MANY_RUNS,
    SUFFICIENT,
    THRESHOLD,
    WHOLE_ROUNDINGS,
    TensorCheck,
    judge,
    unknown,
)
from gradproof.verdict.equations import EVERY, INSIDE, STORED, Arithmetic, Equations, Floor, Statement
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject

Array = np.ndarray[Any, Any]

KEY = "gradient:x"
EACH_DTYPE = pytest.mark.parametrize("dtype", ["float64", "float32"])
EACH_HALF = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@dataclass(frozen=True, eq=False)
class GivenFloor(Statement):
    """A statement whose floor is simply given, and what was asked of it.

    spread, few: of many and (where it differs) of few runs. overflows: flat indices of elements without a floor.
    """

    spread: Any = 0.0
    few: Any = None
    overflows: Sequence[int] = ()
    counts: list[int] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)

    def floor(
        self,
        count: int,
        arithmetics: Mapping[str, Arithmetic],
        references: Mapping[str, NumpyReference] | None = None,
    ) -> Floor:
        self.counts.append(count)
        self.asked.append((arithmetics, references))
        spread = self.few if self.few is not None and count == FEW_RUNS else self.spread
        lost = np.isin(np.arange(self.expected.size), self.overflows).reshape(self.expected.shape)
        return Floor(np.where(lost, 0.0, np.broadcast_to(spread, self.expected.shape)), lost)


def stated(
    expected: Any, spread: Any = 0.0, key: str = KEY, readers: Sequence[str] = ("r",), **more: Any
) -> GivenFloor:
    """What a tensor must be, as the sum of what these readers send."""
    wanted = np.asarray(expected, np.float64)
    parts: Any = tuple((SimpleNamespace(node=SimpleNamespace(name=name)), "x") for name in readers)
    return GivenFloor(key, wanted, more.pop("size", np.abs(wanted)), parts, spread=spread, **more)


def checked(expected: Any, got: Any, spread: Any = 0.0, dtype: str = "float64", **more: Any) -> TensorCheck:
    """The check of one tensor; lists become arrays in the dtype."""
    return judged(stated(expected, spread, **more), got, dtype)


def judged(statement: Statement, got: Any, dtype: str = "float64", **classes: Arithmetic) -> TensorCheck:
    return judge(statement, np.asarray(got, dtype) if isinstance(got, (list, float)) else got, dtype, classes)


# Structure.


def test_identical_tensors_agree_without_any_run() -> None:
    statement = stated([1.0, -2.0])
    check = judged(statement, [1.0, -2.0])
    assert (check.kind, check.noise_units, check.max_error, check.evidence) == (None, 0.0, 0.0, None)
    assert (check.bound, statement.counts) == (False, [])


def test_a_tensor_that_is_not_there_is_missing() -> None:
    check = judged(stated([1.0, 1.0]), None)
    assert (check.kind, check.expected, check.got) == ("missing", "an array", "None")
    assert check.noise_units == np.inf


def test_a_tensor_that_nobody_asked_for_is_named() -> None:
    check = unknown("gradient:b", np.zeros((2, 3)))
    assert (check.key, check.kind, check.got, check.shape) == ("gradient:b", "missing", "not asked for", (2, 3))


@pytest.mark.parametrize("odd", [None, [[1.0], [2.0, 3.0]], object(), "text"], ids=["None", "list", "object", "text"])
def test_a_tensor_that_nobody_asked_for_may_be_anything(odd: Any) -> None:
    check = unknown("gradient:odd", odd)
    assert (check.key, check.kind, check.shape) == ("gradient:odd", "missing", ())


@pytest.mark.parametrize("other", [[1.0, 2.0], 1.0, "text", memoryview(b"ab")], ids=lambda each: type(each).__name__)
def test_what_is_no_array_is_of_the_wrong_type(other: Any) -> None:
    check = judge(stated([1.0, 2.0]), other, "float64")
    assert (check.kind, check.expected, check.got) == ("dtype", "a NumPy array of float64", type(other).__name__)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3), (2,), (), (0,)])
def test_another_shape_is_named(shape: tuple[int, ...]) -> None:
    check = checked(np.zeros((2, 3)), np.zeros(shape))
    assert (check.kind, check.expected, check.got) == ("shape", "[2, 3]", str(list(shape)))
    assert check.shape == (2, 3)


def test_a_shape_that_would_broadcast_is_no_agreement() -> None:
    assert checked([1.0, 1.0], np.array(1.0)).kind == "shape"
    assert checked([[1.0]], np.array([1.0])).kind == "shape"


@pytest.mark.parametrize("other", ["float16", "float64", "int64", "complex64", "bool", "object", "longdouble"])
def test_another_dtype_is_named(other: str) -> None:
    check = checked([1.0, 0.0], np.array([1, 0]).astype(other), dtype="float32")
    assert (check.kind, check.expected, check.got) == ("dtype", "float32", str(np.dtype(other)))


@EACH_DTYPE
def test_scalars_agree_as_arrays_and_as_numpy_scalars(dtype: str) -> None:
    for scalar in (np.array(2.0, dtype), np.dtype(dtype).type(2.0)):
        assert checked(2.0, scalar, dtype=dtype).kind is None
        wrong = checked(3.0, scalar, dtype=dtype)
        assert (wrong.kind, wrong.index, wrong.expected, wrong.got) == ("gradient", (), 3.0, 2.0)
        assert wrong.elements == 1


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_empty_tensors_agree_in_the_right_shape_and_dtype(shape: tuple[int, ...]) -> None:
    check = checked(np.zeros(shape), np.zeros(shape))
    assert (check.kind, check.noise_units, check.index, check.elements) == (None, 0.0, None, 0)
    assert checked(np.zeros(shape), np.zeros(shape, "float32")).kind == "dtype"
    assert checked(np.zeros(shape), np.zeros((*shape, 1))).kind == "shape"


def test_a_key_says_its_role_and_its_tensor() -> None:
    check = TensorCheck("gradient:h1.weight", (2, 3), None)
    assert (check.role, check.tensor, check.elements) == ("gradient", "h1.weight", 6)


@pytest.mark.parametrize(("key", "kind"), [("value:h", "value"), ("gradient:h", "gradient")])
def test_a_wrong_number_is_of_the_kind_of_its_tensor(key: str, kind: str) -> None:
    assert checked([1.0, 1.0], [1.0, 2.0], key=key).kind == kind


# Numbers that are not finite.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_where_the_reference_is(bad: float) -> None:
    check = checked([1.0, 2.0, 3.0], [1.0, bad, 3.0], 1.0)
    assert (check.kind, check.index, check.noise_units) == ("nonfinite", (1,), np.inf)
    assert check.got == pytest.approx(bad, nan_ok=True)
    assert check.evidence is not None
    assert check.evidence.wrong.tolist() == [False, True, False]


def test_no_floor_excuses_nan() -> None:
    assert checked([1.0, 1.0], [1.0, np.nan], 1e300).kind == "nonfinite"


def test_a_nan_does_not_hide_a_wrong_number() -> None:
    check = checked([1.0, 2.0, 3.0], [1.0, np.nan, 4.0])
    assert check.kind == "nonfinite"
    assert check.evidence is not None
    assert check.evidence.wrong.tolist() == [False, True, True]


@pytest.mark.parametrize("got", [np.nan, -np.inf, 0.0])
def test_nothing_is_said_where_the_dtype_overflows(got: float) -> None:
    check = checked([1.0, np.inf], [1.0, got], overflows=[1])
    assert (check.kind, check.unverifiable) == (None, 1)
    assert checked([1.0, np.inf], [1.0, got]).kind is not None


@pytest.mark.parametrize("dtype", VALID_DTYPES)
def test_an_infinity_is_right_where_the_number_is_beyond_the_range(dtype: str) -> None:
    largest = float(limits(dtype).max)
    statement = stated([largest * (1.0 + float(limits(dtype).eps)) if dtype != "float64" else np.inf, -np.inf])
    right = judged(statement, [np.inf, -np.inf], dtype)
    assert (right.kind, right.unverifiable, statement.counts) == (None, 0, [])
    assert judged(statement, [-np.inf, -np.inf], dtype).kind == "nonfinite"
    assert checked([0.9 * largest], [np.inf], dtype=dtype).kind == "nonfinite"


def test_both_may_be_nan() -> None:
    assert checked([np.nan, 1.0], [np.nan, 1.0]).kind is None
    assert checked([np.nan, 1.0], [0.0, 1.0]).kind == "gradient"


def test_an_overflow_excuses_no_other_element() -> None:
    check = checked([1.0, np.inf, 5.0], [1.0, np.nan, 6.0], 1e-16, overflows=[1])
    assert (check.kind, check.index, check.unverifiable) == ("gradient", (2,), 1)
    assert check.evidence is not None
    assert check.evidence.wrong.tolist() == [False, False, True]


def test_a_tensor_may_be_unverifiable_as_a_whole() -> None:
    check = checked([1.0, 2.0], [np.nan, -5.0], overflows=[0, 1])
    assert (check.kind, check.unverifiable, check.noise_units) == (None, 2, 0.0)


def test_unverifiable_elements_do_not_enter_the_median_floor() -> None:
    """The third element is no further off than its own floor and its median allow."""
    wanted, got = [np.inf, np.inf, 0.0], [0.0, 0.0, 15.0]
    assert checked(wanted, got, 1.0, overflows=[0, 1]).kind is None
    assert checked(wanted, [0.0, 0.0, 17.0], 1.0, overflows=[0, 1]).kind == "gradient"


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


# What is not known, or not finite.


def test_what_rests_on_unknown_numbers_is_open() -> None:
    check = checked([1.0, 2.0], [5.0, np.nan], open=True)
    assert (check.kind, check.unverifiable, check.index) == (None, 2, None)
    assert checked([1.0, 2.0], [5.0, np.nan]).kind == "nonfinite"


def test_what_is_open_has_a_shape_and_a_dtype_all_the_same() -> None:
    assert checked([1.0, 2.0], None, open=True).kind == "missing"
    assert checked([1.0, 2.0], np.ones(3), open=True).kind == "shape"
    assert checked([1.0, 2.0], np.ones(2, "float32"), open=True).kind == "dtype"


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_how_far_a_nan_spreads_is_not_laid_down(lost: float) -> None:
    assert checked([0.0, 1.0], [lost, 1.0]).kind == "nonfinite"
    check = checked([0.0, 1.0], [lost, 1.0], finite=False)
    assert (check.kind, check.unverifiable) == (None, 1)
    assert checked([0.0, 1.0], [lost, 1.1], finite=False).kind == "gradient"
    back = checked([lost, 1.0], [0.0, 1.0], finite=False)
    assert (back.kind, back.unverifiable) == (None, 1)


def test_which_of_the_numbers_that_are_not_finite_it_is_does_not_matter() -> None:
    assert checked([np.inf, 1.0], [np.nan, 1.0], finite=False).kind is None
    assert checked([np.inf, 1.0], [np.nan, 1.0]).kind == "nonfinite"


def test_nothing_has_a_derivative_where_its_value_is_nan() -> None:
    undefined = np.array([True, False])
    check = checked([0.0, 1.0], [5.0, 1.0], finite=False, undefined=undefined)
    assert (check.kind, check.unverifiable) == (None, 1)
    assert checked([0.0, 1.0], [5.0, 1.0], finite=False).kind == "gradient"
    assert checked([0.0, 1.0], [0.0, 6.0], finite=False, undefined=undefined).kind == "gradient"


# Numbers at the ends of the range.


def test_numbers_near_the_end_of_the_range_are_compared() -> None:
    """Warnings are errors in this suite: the mean of such numbers must not overflow."""
    expected = np.array([1.5e308, 1.5e308])
    assert checked(expected, expected * [1.0, 1.1], 1e292).kind == "gradient"


def test_floors_near_the_end_of_the_range_hide_nothing() -> None:
    floor = [1e308, 1.7e308, 1.0]
    assert checked([1e308, 1e308, 1.0], [1e308, 1e308, np.nan], floor).kind == "nonfinite"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_hardware_may_flush_what_is_below_the_smallest_normal_number(dtype: str) -> None:
    smallest = float(limits(dtype).smallest_normal)
    assert checked([0.9 * smallest], [0.0], dtype=dtype).kind is None
    assert checked([30.0 * smallest], [0.0], dtype=dtype).kind == "gradient"


def test_float16_is_not_flushed() -> None:
    """Many of a network's gradients are that small."""
    smallest = float(limits("float16").smallest_normal)
    assert checked([0.9 * smallest], [0.0], dtype="float16").kind == "gradient"
    assert checked([0.9 * smallest], [0.9 * smallest], dtype="float16").kind is None


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


# With true floors.


def wide_network() -> Network:
    nodes = (
        Node.of("h", LAYERS["linear"], "x", parameters={"weight": "w"}, options={"features": 4, "use_bias": False}),
        Node.of("s", LAYERS["softmax"], "h"),
        Node.of("out", LAYERS["layer_norm"], "s", options={"affine": False}),
    )
    return Network((Input("x", (3, 4)),), nodes)


def equations_of(case: Case) -> tuple[Equations, dict[str, Array]]:
    """The equations of a run of the reference in the case's dtype, and what it gave."""
    reference = NumpyReference()
    forward = reference.forward(case.network, case.values, case.dtype)
    gradients = reference.backward(forward, case.cotangent)
    got = {f"value:{name}": array for name, array in forward.outputs.items()}
    got |= {f"gradient:{name}": gradients[name] for name in case.network.differentiable}
    return Equations(case, got, NumpyReference(rows=PRECISE), reference), got


def drawn_case(dtype: str) -> Case:
    return Drawn(wide_network(), seed=5, edge_share=0.0, scale=1.0).case(dtype)


@EACH_DTYPE
@pytest.mark.parametrize("share", [1e-3, -1.0])
def test_an_error_in_any_tensor_of_a_true_case_is_found(dtype: str, share: float) -> None:
    equations, got = equations_of(drawn_case(dtype))
    for statement in equations:
        array = got[statement.key]
        assert judge(statement, array, dtype).kind is None
        assert judge(statement, array * np.array(1.0 + share, dtype), dtype).kind == statement.key.partition(":")[0]


def test_the_same_error_at_a_tiny_scale_is_found() -> None:
    """Gradients of 1e-12 that are off by 100 %."""
    case = drawn_case("float64")
    equations, got = equations_of(Case(case.network, case.dtype, case.values, 1e-12 * case.cotangent))
    right = got["gradient:w"]
    np.testing.assert_allclose(right, 2.0 * right, atol=1e-8)
    assert judge(equations["gradient:w"], right, "float64").kind is None
    assert judge(equations["gradient:w"], 2.0 * right, "float64").kind == "gradient"


def test_the_given_cotangent_has_no_floor() -> None:
    equations, got = equations_of(drawn_case("float32"))
    given_back = got["gradient:out"]
    assert judge(equations["gradient:out"], given_back, "float32").kind is None
    assert judge(equations["gradient:out"], given_back * np.float32(1.00001), "float32").kind == "gradient"


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
    nodes = (
        Node.of("e", LAYERS["exp"], "x"),
        Node.of("n", LAYERS["layer_norm"], "e", options={"affine": False}),
        Node.of("out", LAYERS["relu"], "n"),
    )
    network = Network((Input("x", (1, 3)),), nodes)
    case = Case(network, dtype, {"x": np.array([x], dtype)}, np.array([[0.5, -1.5, 2.0]], dtype))
    lost = relu_of_lost_values(1.0)
    wrong = NumpyReference(rows={"relu": (LAYERS["relu"].forward, lambda dout, cache: {"x": dout})})
    assert examine(Subject(lost, {}), case).agrees
    assert examine(Subject(wrong, {}), case).agrees is agrees


def test_a_square_beyond_the_range_is_infinite_and_the_rest_is_verified() -> None:
    network = Network((Input("x", (3,)),), (Node.of("out", LAYERS["multiply"], "x", "x"),))
    values = {"x": np.array([1e30, 2.0, 3.0], "float32")}
    examination = examine(Subject(NumpyReference(), {}), Case(network, "float32", values, np.ones(3, "float32")))
    assert {check.key: (check.kind, check.unverifiable) for check in examination.checks} == {
        "value:out": (None, 0),
        "gradient:out": (None, 0),
        "gradient:x": (None, 0),
    }
