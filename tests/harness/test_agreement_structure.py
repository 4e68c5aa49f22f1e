"""When a tensor agrees: what is structurally wrong, what is not finite, and what is not known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradproof.model.dtypes import VALID_DTYPES, limits
from gradproof.model.tensors import Tensor, gradient_of, value_of
from gradproof.verdict.agreement import TensorCheck, judge, unknown
from helpers.agreement import checked, judged, stated
from helpers.examining import EACH_DTYPE

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
    check = unknown(gradient_of("b"), np.zeros((2, 3)))
    assert (check.key, check.kind, check.got, check.shape) == (gradient_of("b"), "missing", "not asked for", (2, 3))


@pytest.mark.parametrize("odd", [None, [[1.0], [2.0, 3.0]], object(), "text"], ids=["None", "list", "object", "text"])
def test_a_tensor_that_nobody_asked_for_may_be_anything(odd: Any) -> None:
    check = unknown(gradient_of("odd"), odd)
    assert (check.key, check.kind, check.shape) == (gradient_of("odd"), "missing", ())


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
    check = TensorCheck(gradient_of("h1.weight"), (2, 3), None)
    assert (check.key.role, check.key.name, check.elements) == ("gradient", "h1.weight", 6)


@pytest.mark.parametrize(("key", "kind"), [(value_of("h"), "value"), (gradient_of("h"), "gradient")])
def test_a_wrong_number_is_of_the_kind_of_its_tensor(key: Tensor, kind: str) -> None:
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
