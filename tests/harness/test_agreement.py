"""When tensors agree: what is structurally wrong, how an error is counted in noise units, and when that is too much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradproof import agreement
from gradproof.agreement import (
    FEW_RUNS,
    ILL_CONDITIONED,
    LOOSE_THRESHOLD,
    MANY_RUNS,
    SUFFICIENT,
    THRESHOLD,
    TensorCheck,
    compare,
)
from gradproof.case import Case
from gradproof.drawing import Drawn
from gradproof.examination import Subject, examine
from gradproof.network import Input, Network, Node
from gradproof.noise import Floor, NoiseSamples
from gradproof.reference import LAYERS, NumpyReference

Array = np.ndarray[Any, Any]

KEY = "gradient:x"
EACH_DTYPE = pytest.mark.parametrize("dtype", ["float64", "float32"])


@dataclass
class GivenFloor(NoiseSamples):
    """A floor that is simply stated, and the counts of runs that were asked for.

    spread, few: of many and (where it differs) of few runs. overflows: flat indices of unverifiable elements.
    given_finite: what the case gives.
    """

    given_finite = True

    spread: Any = 0.0
    few: Any = None
    overflows: Sequence[int] = ()
    counts: list[int] = field(default_factory=list)

    def floor(self, key: str, expected: Array, count: int) -> Floor:
        self.counts.append(count)
        spread = self.few if self.few is not None and count == FEW_RUNS else self.spread
        lost = np.isin(np.arange(expected.size), self.overflows).reshape(expected.shape)
        return Floor(np.where(lost, 0.0, np.broadcast_to(spread, expected.shape)), lost)


def checked(expected: Any, got: Any, samples: NoiseSamples | None = None, dtype: str = "float64") -> TensorCheck:
    """The check of one tensor; lists become arrays in the dtype."""
    wanted = np.asarray(expected, np.float64)
    given = np.asarray(got, dtype) if isinstance(got, (list, float)) else got
    (check,) = compare({KEY: wanted}, {KEY: given}, samples or GivenFloor(), dtype)
    return check


# Structure.


def test_identical_tensors_agree_without_any_run() -> None:
    samples = GivenFloor()
    check = checked([1.0, -2.0], [1.0, -2.0], samples)
    assert (check.kind, check.noise_units, check.max_error, check.evidence) == (None, 0.0, 0.0, None)
    assert samples.counts == []


def test_a_tensor_that_is_not_there_is_missing() -> None:
    (check,) = compare({KEY: np.ones(2)}, {}, GivenFloor(), "float64")
    assert (check.kind, check.expected, check.got) == ("missing", "an array", "None")
    assert check.noise_units == np.inf


def test_none_is_missing() -> None:
    assert checked([1.0], None).kind == "missing"


def test_a_tensor_that_nobody_asked_for_is_named() -> None:
    extra = {KEY: np.ones(2), "gradient:b": np.zeros((2, 3)), "gradient:a": None}
    checks = compare({KEY: np.ones(2)}, extra, GivenFloor(), "float64")
    assert [(check.key, check.kind, check.got) for check in checks] == [
        (KEY, None, 1.0),
        ("gradient:a", "missing", "not asked for"),
        ("gradient:b", "missing", "not asked for"),
    ]
    assert checks[2].shape == (2, 3)


@pytest.mark.parametrize("odd", [[[1.0], [2.0, 3.0]], object(), "text"], ids=["ragged list", "object", "text"])
def test_a_tensor_that_nobody_asked_for_may_be_anything(odd: Any) -> None:
    (check,) = compare({}, {"gradient:odd": odd}, GivenFloor(), "float64")
    assert (check.key, check.kind) == ("gradient:odd", "missing")


@pytest.mark.parametrize("other", [[1.0, 2.0], 1.0, "text", memoryview(b"ab")], ids=lambda each: type(each).__name__)
def test_what_is_no_array_is_of_the_wrong_type(other: Any) -> None:
    (check,) = compare({KEY: np.array([1.0, 2.0])}, {KEY: other}, GivenFloor(), "float64")
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
        wrong = checked(3.0, scalar, GivenFloor(), dtype)
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
    (check,) = compare({key: np.ones(2)}, {key: np.array([1.0, 2.0])}, GivenFloor(), "float64")
    assert check.kind == kind


# Numbers that are not finite.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_where_the_reference_is(bad: float) -> None:
    check = checked([1.0, 2.0, 3.0], [1.0, bad, 3.0], GivenFloor(1.0))
    assert (check.kind, check.index, check.noise_units) == ("nonfinite", (1,), np.inf)
    assert check.got == pytest.approx(bad, nan_ok=True)
    assert check.evidence is not None
    assert check.evidence.wrong.tolist() == [False, True, False]


def test_no_floor_excuses_nan() -> None:
    assert checked([1.0, 1.0], [1.0, np.nan], GivenFloor(1e300)).kind == "nonfinite"


def test_a_nan_does_not_hide_a_wrong_number() -> None:
    check = checked([1.0, 2.0, 3.0], [1.0, np.nan, 4.0])
    assert check.kind == "nonfinite"
    assert check.evidence is not None
    assert check.evidence.wrong.tolist() == [False, True, True]


@pytest.mark.parametrize("got", [np.nan, np.inf, -np.inf, 0.0])
def test_nothing_is_said_where_the_dtype_overflows(got: float) -> None:
    check = checked([1.0, np.inf], [1.0, got], GivenFloor(overflows=[1]))
    assert (check.kind, check.unverifiable) == (None, 1)


def test_an_overflow_excuses_no_other_element() -> None:
    check = checked([1.0, np.inf, 5.0], [1.0, np.nan, 6.0], GivenFloor(1e-16, overflows=[1]))
    assert (check.kind, check.index, check.unverifiable) == ("gradient", (2,), 1)
    assert check.evidence is not None
    assert check.evidence.wrong.tolist() == [False, False, True]


def test_a_tensor_may_be_unverifiable_as_a_whole() -> None:
    check = checked([1.0, 2.0], [np.nan, -5.0], GivenFloor(overflows=[0, 1]))
    assert (check.kind, check.unverifiable, check.noise_units, check.ill_conditioned) == (None, 2, 0.0, 0)


def test_unverifiable_elements_do_not_enter_the_mean_floor() -> None:
    """The third element alone is as far off as a mean of three would allow."""
    wanted, got = [np.inf, 0.0, 0.0], [0.0, 0.0, 33.0]
    assert checked(wanted, got, GivenFloor([1e9, 1.0, 1.0], overflows=[0])).kind == "gradient"


# Counting.


def at_units(units: float, spread: float = 1.0) -> TensorCheck:
    """The check of an element whose error is so many noise units; own and mean floor are the same."""
    return checked([0.0, 0.0], [units * 2.0 * spread, 0.0], GivenFloor(spread))


@pytest.mark.parametrize("spread", [1e-290, 1e-12, 1.0, 1e250])
def test_one_threshold_serves_every_magnitude(spread: float) -> None:
    assert at_units(THRESHOLD * 0.999, spread).kind is None
    assert at_units(THRESHOLD * 1.001, spread).kind == "gradient"


def test_noise_units_are_the_error_over_four_terms() -> None:
    """The element's floor, the mean floor, one rounding of the value, and the smallest normal number."""
    rounding = 0.5 * float(np.finfo("float32").eps) * 2.0**33
    smallest = float(np.finfo("float32").smallest_normal)
    small = checked([0.0, 2.0**33], [100.0, 2.0**33], GivenFloor([1.0, 2.0]), "float32")
    assert small.noise_units == 100.0 / (1.0 + 1.5 + smallest)
    large = checked([0.0, 2.0**33], [0.0, 2.0**33 + 2.0**20], GivenFloor([1.0, 2.0]), "float32")
    assert large.noise_units == 2.0**20 / (2.0 + 1.5 + rounding + smallest)


@EACH_DTYPE
def test_some_roundings_of_the_value_need_no_run(dtype: str) -> None:
    samples = GivenFloor()
    unit = 0.5 * np.finfo(dtype).eps
    assert checked([1.0], [1.0 + (SUFFICIENT - 1.0) * unit], samples, dtype).kind is None
    assert samples.counts == []
    assert checked([1.0], [1.0 + (SUFFICIENT + 2.0) * unit], samples, dtype).kind is None
    assert samples.counts == [FEW_RUNS, MANY_RUNS]


def test_the_mean_floor_of_the_tensor_carries_an_element_without_one() -> None:
    floor = GivenFloor([0.0, 2.0])
    assert checked([0.0, 0.0], [15.0, 0.0], floor).kind is None
    assert checked([0.0, 0.0], [17.0, 0.0], floor).kind == "gradient"


@pytest.mark.parametrize("scale", [1e-12, 1e-30, 1e-200])
def test_an_error_of_all_of_a_tiny_value_is_wrong(scale: float) -> None:
    """What an absolute tolerance lets pass."""
    expected = scale * np.array([1.0, 2.0, 3.0])
    for got in (np.zeros(3), 2.0 * expected, -expected):
        np.testing.assert_allclose(got, expected, atol=1e-8)
        assert checked(expected, got, GivenFloor(1e-16 * scale)).kind == "gradient"


def test_one_tiny_element_that_is_wrong_beside_a_large_one() -> None:
    assert checked([1e-12, 1.0], [0.0, 1.0], GivenFloor([1e-28, 1e-16])).kind == "gradient"


def test_nan_that_both_sides_would_replace_by_zero_is_wrong() -> None:
    """What nan_to_num hides."""
    assert checked([0.0, 1.0], [np.nan, 1.0], GivenFloor(1.0)).kind == "nonfinite"


def test_an_error_whose_mean_vanishes_is_wrong() -> None:
    """What a comparison of means hides."""
    assert checked([1.0, 2.0], [2.0, 1.0]).kind == "gradient"


def test_the_worst_element_is_the_one_with_the_most_noise_units() -> None:
    """Not the one with the largest error: that one's floor is higher still."""
    expected = np.array([[1.0, 1000.0], [3.0, 4.0]])
    got = expected + [[0.0, 500.0], [200.0, 0.001]]
    check = checked(expected, got, GivenFloor([[0.0, 10.0], [0.0, 0.0]]))
    assert (check.index, check.expected, check.got, check.max_error) == ((1, 0), 3.0, 203.0, 200.0)
    assert check.noise_units == pytest.approx(80.0)


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
    samples = GivenFloor(spread=1e-9, few=1.0)
    assert checked([0.0], [1.9 * SUFFICIENT], samples).kind is None
    assert samples.counts == [FEW_RUNS]


def test_many_runs_may_explain_what_few_do_not() -> None:
    samples = GivenFloor(spread=1.0, few=1e-9)
    check = checked([0.0], [2.0], samples)
    assert (check.kind, check.noise_units) == (None, 1.0)
    assert samples.counts == [FEW_RUNS, MANY_RUNS]


def test_many_runs_decide_where_few_were_in_doubt() -> None:
    samples = GivenFloor(spread=0.1, few=1.0)
    check = checked([0.0], [1.5 * SUFFICIENT * 2.0], samples)
    assert (check.kind, check.noise_units) == ("gradient", pytest.approx(120.0))
    assert samples.counts == [FEW_RUNS, MANY_RUNS]


def test_an_overflow_that_only_many_runs_meet_counts() -> None:
    class Late(GivenFloor):
        def floor(self, key: str, expected: Array, count: int) -> Floor:
            self.overflows = [0] if count == MANY_RUNS else []
            return super().floor(key, expected, count)

    check = checked([1.0, 1.0], [np.nan, 1.0], Late(1e-16))
    assert (check.kind, check.unverifiable) == (None, 1)


# Ill-conditioning.


def test_where_the_floor_is_a_share_of_the_magnitude_the_loose_threshold_holds() -> None:
    floor = 2.0 * ILL_CONDITIONED
    bearable, too_much = (1.0 + units * 2.0 * floor for units in (0.99 * LOOSE_THRESHOLD, 1.01 * LOOSE_THRESHOLD))
    ill = checked([1.0, 1.0], [bearable, 1.0], GivenFloor(floor))
    assert (ill.kind, ill.ill_conditioned) == (None, 2)
    assert ill.noise_units > THRESHOLD
    wrong = checked([1.0, 1.0], [too_much, 1.0], GivenFloor(floor))
    assert (wrong.kind, wrong.ill_conditioned) == ("gradient", 2)


def test_just_below_that_share_the_threshold_holds() -> None:
    floor = 0.99 * ILL_CONDITIONED
    check = checked([1.0, 1.0], [1.0 + 1.01 * THRESHOLD * 2.0 * floor, 1.0], GivenFloor(floor))
    assert (check.kind, check.ill_conditioned) == ("gradient", 0)


def test_zeros_with_a_floor_are_not_ill_conditioned() -> None:
    check = checked([0.0, 0.0], [1.01 * THRESHOLD * 2.0, 0.0], GivenFloor(1.0))
    assert (check.kind, check.ill_conditioned) == ("gradient", 0)


def test_unverifiable_elements_are_not_counted_twice() -> None:
    check = checked([1.0, 1.0, np.inf], [5.0, 1.0, np.nan], GivenFloor(0.2, overflows=[2]))
    assert (check.unverifiable, check.ill_conditioned) == (1, 2)


def test_numbers_near_the_end_of_the_range_are_compared() -> None:
    """Warnings are errors in this suite: the mean of such numbers must not overflow."""
    expected = np.array([1.5e308, 1.5e308])
    assert checked(expected, expected * [1.0, 1.1], GivenFloor(1e292)).kind == "gradient"


def test_floors_near_the_end_of_the_range_hide_nothing() -> None:
    floor = GivenFloor([1e308, 1.7e308, 1.0])
    assert checked([1e308, 1e308, 1.0], [1e308, 1e308, np.nan], floor).kind == "nonfinite"


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
    quick = GivenFloor(floors)
    at_once = checked(expected, got, quick)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "SUFFICIENT", -1.0)
        in_full = checked(expected, got, GivenFloor(floors))
    if not quick.counts:
        assert in_full.kind is None
        assert in_full.noise_units <= at_once.noise_units
    assert at_once.kind == in_full.kind


def test_both_outcomes_of_the_first_test_occur() -> None:
    """So that the property above is about something."""
    counts = []
    for steps in (4.0, 12.0):
        samples = GivenFloor(0.0)
        checked([1.0], [1.0 + steps * 0.5 * np.finfo(float).eps], samples)
        counts.append(len(samples.counts))
    assert counts == [0, 2]


# With true samples.


def wide_network() -> Network:
    nodes = (
        Node.of("h", LAYERS["linear"], "x", parameters={"weight": "w"}, options={"features": 4, "use_bias": False}),
        Node.of("s", LAYERS["softmax"], "h"),
        Node.of("out", LAYERS["layer_norm"], "s", options={"affine": False}),
    )
    return Network((Input("x", (3, 4)),), nodes)


def drawn_case(dtype: str, network: Network | None = None) -> Case:
    return Drawn(network or wide_network(), seed=5, edge_share=0.0, scale=1.0).case(dtype)


@EACH_DTYPE
@pytest.mark.parametrize("share", [1e-3, -1.0])
def test_an_error_in_any_tensor_of_a_true_case_is_found(dtype: str, share: float) -> None:
    case = drawn_case(dtype)
    oracle = Oracle(case, {})
    right = {key: array.astype(dtype) for key, array in oracle.expected.items()}
    assert all(check.kind is None for check in compare(oracle.expected, right, oracle.samples, dtype))
    for key, array in right.items():
        spoilt = {**right, key: array * np.array(1.0 + share, dtype)}
        wrong = [check.key for check in compare(oracle.expected, spoilt, oracle.samples, dtype) if check.kind]
        assert wrong == [key]


def test_the_same_error_at_a_tiny_scale_is_found() -> None:
    """Gradients of 1e-12 that are off by 100 %."""
    case = drawn_case("float64")
    tiny = Case(case.network, case.dtype, case.values, 1e-12 * case.cotangent)
    oracle = Oracle(tiny, {})
    got = {**oracle.expected, "gradient:w": 2.0 * oracle.expected["gradient:w"]}
    np.testing.assert_allclose(got["gradient:w"], oracle.expected["gradient:w"], atol=1e-8)
    assert [check.key for check in compare(oracle.expected, got, oracle.samples, "float64") if check.kind] == [
        "gradient:w"
    ]


def test_the_dtypes_overflow_is_unverifiable_and_the_rest_is_verified() -> None:
    network = Network((Input("x", (3,)),), (Node.of("out", LAYERS["multiply"], "x", "x"),))
    values = {"x": np.array([1e30, 2.0, 3.0], "float32")}
    case = Case(network, "float32", values, np.ones(3, "float32"))
    examination = examine(Subject(NumpyReference(), {}), case)
    assert {check.key: (check.kind, check.unverifiable) for check in examination.checks} == {
        "value:out": (None, 1),
        "gradient:out": (None, 0),
        "gradient:x": (None, 0),
    }


@dataclass
class GivenInfinity(GivenFloor):
    given_finite = False


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_how_far_a_nan_spreads_is_not_laid_down(lost: float) -> None:
    assert checked([0.0, 1.0], [lost, 1.0]).kind == "nonfinite"
    check = checked([0.0, 1.0], [lost, 1.0], GivenInfinity())
    assert (check.kind, check.unverifiable) == (None, 1)
    assert checked([0.0, 1.0], [lost, 1.1], GivenInfinity()).kind == "gradient"


@pytest.mark.parametrize(("number", "finite"), [(1.0, True), (np.nan, False), (np.inf, False), (1e39, False)])
def test_what_is_given_may_not_be_finite_in_the_dtype(number: float, finite: bool) -> None:
    network = Network((Input("x", (2,)),), (Node.of("out", LAYERS["tanh"], "x"),))
    with np.errstate(over="ignore"):
        values, cotangent = np.array([0.5, number], "float32"), np.array([1.0, number], "float32")
    fine = np.ones(2, "float32")
    for case in (Case(network, "float32", {"x": values}, fine), Case(network, "float32", {"x": fine}, cotangent)):
        assert case.under({}).samples.given_finite is finite


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
