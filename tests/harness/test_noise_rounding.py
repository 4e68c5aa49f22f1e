"""What a perturbed array does: one rounding of either kind, and which operations make such errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from scipy.special import erf, ndtr, xlogy

from gradproof.model.dtypes import limits
from gradproof.verdict.noise import Noisy, observe
from helpers.noise import GRID, SHIFT, normal, rounding

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
BOTH_KINDS = pytest.mark.parametrize("to_grid", [SHIFT, GRID], ids=["shift", "grid"])
EACH_DTYPE = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
COARSE_DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])


# One rounding.


@EACH_DTYPE
def test_a_shift_is_bounded_by_the_unit_and_fills_it(dtype: str) -> None:
    exact, error = normal(10_000), rounding(dtype)
    shift = (error(exact) - exact) / exact
    # In float64 the shifted number is rounded once more.
    slack = 1.5 if dtype == "float64" else 1.0 + 1e-6
    assert np.abs(shift).max() <= error.unit * slack
    assert shift.max() > 0.9 * error.unit
    assert shift.min() < -0.9 * error.unit


@COARSE_DTYPES
def test_the_unit_is_half_a_unit_in_the_last_place(dtype: str) -> None:
    assert rounding(dtype).unit == limits(dtype).eps / 2


@COARSE_DTYPES
def test_the_grid_gives_both_neighbours_and_nothing_else(dtype: str) -> None:
    exact = 1.0 + np.abs(normal(10_000))
    rounded = rounding(dtype, GRID)(exact)
    nearest = exact.astype(dtype)
    below = np.where(nearest <= exact, nearest, np.nextafter(nearest, np.array(-np.inf, dtype)))
    above = np.where(nearest >= exact, nearest, np.nextafter(nearest, np.array(np.inf, dtype)))
    assert (below < above).mean() > 0.9
    assert ((rounded == below) | (rounded == above)).all()
    assert 0.4 < (rounded == above).mean() < 0.6
    assert 0.05 < (rounded != nearest).mean() < 0.6


@COARSE_DTYPES
def test_the_grid_leaves_the_dtypes_own_numbers(dtype: str) -> None:
    own = np.concatenate([normal(1000), [0.0, -0.0, 1.0, 3.0, float(limits(dtype).max)]]).astype(dtype).astype(float)
    np.testing.assert_array_equal(rounding(dtype, GRID)(own), own)


@BOTH_KINDS
def test_float64_noise_is_of_the_order_of_a_unit_in_the_last_place(to_grid: bool) -> None:
    exact = normal(10_000)
    moved = np.abs(rounding("float64", to_grid)(exact) - exact) / np.spacing(np.abs(exact))
    assert moved.max() <= 2.0
    assert 0.2 < moved.mean() < 1.0


@BOTH_KINDS
@EACH_DTYPE
def test_a_number_minus_itself_is_exactly_zero(dtype: str, to_grid: bool) -> None:
    x = observe(normal(100), rounding(dtype, to_grid))
    np.testing.assert_array_equal(x - x, np.zeros(100))


@BOTH_KINDS
@EACH_DTYPE
def test_zero_stays_zero(dtype: str, to_grid: bool) -> None:
    np.testing.assert_array_equal(rounding(dtype, to_grid)(np.zeros(100)), np.zeros(100))


@BOTH_KINDS
@EACH_DTYPE
def test_overflow_becomes_nan(dtype: str, to_grid: bool) -> None:
    largest = float(limits(dtype).max)
    x = observe(np.array([largest, 1.0, -largest]), rounding(dtype, to_grid))
    with np.errstate(all="ignore"):
        doubled = np.asarray(x * 2.0)
    assert np.isnan(doubled).tolist() == [True, False, True]


def test_the_largest_number_is_no_overflow() -> None:
    largest = np.array([float(np.finfo("float32").max)])
    assert np.isfinite(rounding("float32", GRID)(largest)).all()


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
@BOTH_KINDS
def test_what_is_not_finite_becomes_nan(special: float, to_grid: bool) -> None:
    with np.errstate(all="ignore"):
        assert np.isnan(rounding("float32", to_grid)(np.array([special]))).all()


@BOTH_KINDS
def test_overflow_poisons_what_depends_on_it_and_nothing_else(to_grid: bool) -> None:
    x = observe(np.array([[1e30, 1.0], [2.0, 3.0]]), rounding("float32", to_grid))
    with np.errstate(all="ignore"):
        sums = np.asarray(1.0 / (x * x).sum(axis=1))
    assert np.isnan(sums).tolist() == [True, False]


@EACH_DTYPE
@BOTH_KINDS
def test_numbers_below_the_smallest_normal_one_are_kept_or_flushed(dtype: str, to_grid: bool) -> None:
    smallest = float(limits(dtype).smallest_normal)
    below = np.full(1000, smallest / 2)
    rounded = rounding(dtype, to_grid)(below)
    moved = rounded[rounded != 0.0] - smallest / 2
    assert np.abs(moved).max() <= 0.51 * float(limits(dtype).smallest_subnormal)
    assert 0.4 < (rounded == 0.0).mean() < 0.6
    kept = rounding(dtype, to_grid)(np.full(100, smallest))
    np.testing.assert_allclose(kept, smallest, rtol=float(limits(dtype).eps), atol=0)


@EACH_DTYPE
def test_what_is_near_zero_rounds_to_multiples_of_the_smallest_number(dtype: str) -> None:
    """Or, where such numbers are shifted, by up to half of it."""
    smallest = float(limits(dtype).smallest_subnormal)
    exact = np.full(1000, 2.0 * smallest if dtype == "float64" else 2.25 * smallest)
    near = set(rounding(dtype, GRID)(exact) / smallest)
    assert near == ({0.0, 2.0} if dtype == "float64" else {0.0, 2.0, 3.0})
    shifted = rounding(dtype, SHIFT)(exact)
    assert np.abs((shifted[shifted != 0.0] - exact[0]) / smallest).max() <= (1.0 if dtype == "float64" else 0.5)


def test_at_one_rounds_as_a_number_near_one_does() -> None:
    """To one of the neighbours on the grid there, which may be 1 itself: (1 + erf) / 2 is 0 far below 0."""
    exact = np.full(1000, 1e-6)
    rounded = np.asarray(rounding("float32", GRID)(exact, at_one=True))
    np.testing.assert_array_equal((1.0 + rounded).astype("float32").astype(float), 1.0 + rounded)
    assert set(np.round((rounded - exact) / np.finfo("float32").eps, 1)) <= {-0.4, 0.6}
    assert (np.asarray(rounding("float32", GRID)(np.full(100, 1e-12), at_one=True)) == 0.0).any()


def test_at_one_a_number_is_shifted_by_half_a_unit_there() -> None:
    """Also one that is on the grid: what is rounded is erf, whose grid is another."""
    exact = np.full(1000, float(np.finfo("float32").eps))
    moved = (np.asarray(rounding("float32", SHIFT)(exact, at_one=True)) - exact) / float(np.finfo("float32").eps)
    assert 0.45 < np.abs(moved).max() <= 0.5
    assert 0.2 < np.abs(moved).mean() < 0.3


# Arrays that make such errors.

EXACT_OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "negative": lambda x: -x,
    "abs": np.abs,
    "sign": np.sign,
    "maximum": lambda x: np.maximum(x, 0.1),
    "minimum": lambda x: np.minimum(x, x[::-1]),
    "where": lambda x: np.where(x > 0, x, -0.3),
    "concatenate": lambda x: np.concatenate([x, np.ones((1, 4)), x], axis=0),
    "stack": lambda x: np.stack([x, x]),
    "split": lambda x: np.split(x, 3)[1],
    "reshape": lambda x: x.reshape(4, 3),
    "np.reshape": lambda x: np.reshape(x, (2, 6)),
    "transpose": lambda x: x.T,
    "broadcast_to": lambda x: np.broadcast_to(x, (2, 3, 4)),
    "index": lambda x: x[..., None, 0],
    "slice": lambda x: x[1:, ::2],
    "max": lambda x: x.max(axis=1, keepdims=True),
    "np.max": lambda x: np.max(x, axis=0),
    "take_along_axis": lambda x: np.take_along_axis(x, np.array([[0], [3], [1]]), axis=1),
    "copy": lambda x: x.copy(),
    "real": lambda x: x.real,
    "astype": lambda x: x.astype("float64"),
}


@BOTH_KINDS
@pytest.mark.parametrize("operation", EXACT_OPERATIONS.values(), ids=EXACT_OPERATIONS)
def test_exact_operations_are_left_alone_and_stay_noisy(operation: Callable[[Any], Any], to_grid: bool) -> None:
    x = normal(3, 4)
    result = operation(observe(x, rounding("float32", to_grid)))
    np.testing.assert_array_equal(result, operation(x))
    assert isinstance(result, Noisy)
    assert not np.array_equal(result * 0.3, operation(x) * 0.3)


@pytest.mark.parametrize("compare", [np.less, np.equal, np.isfinite, np.signbit], ids=lambda each: each.__name__)
def test_comparisons_are_exact(compare: np.ufunc) -> None:
    x = normal(3, 4)
    operands = [0.0] if compare.nin == 2 else []
    result = compare(observe(x, rounding()), *operands)
    assert result.dtype == bool
    np.testing.assert_array_equal(result, compare(x, *operands))


ROUNDING_OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "add": lambda x: x + 0.1,
    "from the right": lambda x: 0.1 + x,
    "multiply": lambda x: x * x,
    "divide": lambda x: x / 0.7,
    "power": lambda x: x**3,
    "sqrt": lambda x: np.sqrt(x * x + 1),
    "exp": np.exp,
    "log1p": lambda x: np.log1p(x * x),
    "tanh": np.tanh,
    "ndtr": ndtr,
    "erf": erf,
    "xlogy": lambda x: xlogy(x, x * x),
    "sum": lambda x: x.sum(),
    "np.sum": lambda x: np.sum(x, axis=0),
    "mean": lambda x: x.mean(axis=1, keepdims=True),
    "var": lambda x: x.var(axis=0),
    "cumsum": lambda x: np.cumsum(x, axis=1),
    "matmul": lambda x: x @ x.T,
    "matmul from the right": lambda x: np.ones((2, 3)) @ x,
    "dot": lambda x: np.dot(x, x.T),
    "einsum": lambda x: np.einsum("ij,ij->i", x, x),
    "outer": lambda x: np.outer(x, x),
    "norm": np.linalg.norm,
    "in place": lambda x: _added_in_place(x),
}


def _added_in_place(x: Any) -> Any:
    total = x.copy()
    total += 0.1
    return total


@BOTH_KINDS
@pytest.mark.parametrize("operation", ROUNDING_OPERATIONS.values(), ids=ROUNDING_OPERATIONS)
def test_rounding_operations_are_perturbed_and_stay_noisy(operation: Callable[[Any], Any], to_grid: bool) -> None:
    x = normal(3, 4)
    exact = np.asarray(operation(x))
    result = operation(observe(x, rounding("float32", to_grid)))
    assert isinstance(result, Noisy)
    assert result.shape == exact.shape
    assert (np.asarray(result) != exact).all()
    np.testing.assert_allclose(np.asarray(result), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "total", [lambda x: x.sum(), lambda x: x @ np.ones(3), lambda x: np.cumsum(x)[-1:]], ids=["sum", "matmul", "cumsum"]
)
def test_operands_of_sums_are_perturbed_as_well_as_the_result(total: Callable[[Any], Any]) -> None:
    terms = np.array([1e8, 1.0, -1e8])
    errors = [np.abs(np.asarray(total(observe(terms, rounding(seed=seed)))) - 1.0).max() for seed in range(20)]
    assert 1.0 < np.mean(errors) < 20.0


def test_operands_of_other_operations_are_not_perturbed() -> None:
    x = observe(np.array([1e8]), rounding())
    assert ((x - (1e8 - 1.0)) - 1.0).item() == pytest.approx(0.0, abs=1e-6)


def test_integers_and_complex_numbers_are_untouched() -> None:
    x = observe(normal(3, 4), rounding())
    places = np.argmax(x, axis=1)
    assert places.dtype == np.int64
    np.testing.assert_array_equal(places, normal(3, 4).argmax(axis=1))
    turned = x * 1j
    assert turned.dtype == complex
    np.testing.assert_array_equal(turned, normal(3, 4) * 1j)


def test_observing_leaves_the_array_and_its_numbers() -> None:
    x = normal(4).astype("float32")
    noisy = observe(x, rounding())
    assert (noisy.dtype, noisy.rounding.dtype) == (np.float64, np.float32)
    np.testing.assert_array_equal(noisy, x)
    noisy[0] = 7.0
    assert x[0] != 7.0


# Sums whose terms can be added in an order that leaves the range.

LARGE = np.array([40_000.0, 40_000.0, -40_000.0])


def added(array: Array) -> Array:
    return array.sum(axis=0)


def multiplied(array: Array) -> Array:
    return np.ones(3) @ array


def added_in_place(array: Array) -> Array:
    total = np.zeros_like(array[:1])
    np.add.at(total, np.zeros(3, int), array)
    return total[0]


@pytest.mark.parametrize("summed", [added, multiplied, added_in_place])
def test_a_sum_that_some_order_takes_out_of_the_range_is_lost(summed: Callable[[Array], Array]) -> None:
    """40,000 + 40,000 is beyond float16, though the sum of all three is not; 40,000 - 40,000 and half of all is not."""
    columns = np.stack([LARGE, LARGE * [1.0, 0.0, 1.0], LARGE * 0.5], axis=1)
    found = np.asarray(summed(observe(columns, rounding("float16"))))
    np.testing.assert_array_equal(np.isnan(found), [True, False, False])
    assert np.isfinite(np.asarray(summed(observe(columns, rounding("float32"))))).all()
