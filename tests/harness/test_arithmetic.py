"""Which arithmetic a layer has in a coarse dtype: told from what an adapter gives, and never mistaken for a fault."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gradproof.model.case import Case
from gradproof.model.options import Options
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference import LAYERS
from gradproof.verdict.equations import EVERY
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.kinks import one_node
from gradproof.verdict.noise import observe, rounded_inside
from gradproof.verdict.running import run
from helpers.examining import EACH_HALF, examined, wrong
from helpers.half import Half, Nearest, alone, found_class

Array = np.ndarray[Any, Any]


# Telling the classes apart.

ROUNDING_LAYERS = ["sigmoid", "softmax", "layer_norm", "gelu"]
STORING_LAYERS = ["tanh", "sigmoid", "softmax"]


@EACH_HALF
@pytest.mark.parametrize("layer", [*ROUNDING_LAYERS, "tanh", "linear"])
def test_an_adapter_that_rounds_its_results_once_is_found_inside(layer: str, dtype: str) -> None:
    options = {"features": 4} if layer == "linear" else {}
    case = alone(layer, dtype, **options)
    assert found_class(Half("inside"), case) == "inside"
    assert examined(Half("inside"), case, demanded="inside").agrees


@EACH_HALF
@pytest.mark.parametrize("layer", STORING_LAYERS)
def test_an_adapter_that_rounds_what_it_stores_is_found_stored(layer: str, dtype: str) -> None:
    case = alone(layer, dtype)
    assert found_class(Half("stored"), case) == "stored"
    assert examined(Half("stored"), case).agrees


@EACH_HALF
@pytest.mark.parametrize("layer", ROUNDING_LAYERS)
def test_an_adapter_that_rounds_every_operation_is_found_every(layer: str, dtype: str) -> None:
    case = alone(layer, dtype)
    assert found_class(Half("every"), case) == "every"
    assert examined(Half("every"), case).agrees


def test_rounding_everything_may_show_no_more_than_rounding_what_is_stored() -> None:
    """Of tanh's backward pass, 1 - y^2, the digits that y has lost are all that shows: the finest class is told."""
    assert found_class(Half("every"), alone("tanh")) == "stored"


def coarse_backward(dout: Array, cache: Any) -> Mapping[str, Array]:
    nearest = Nearest("bfloat16")
    return LAYERS["softmax"].backward(observe(np.asarray(dout), nearest), rounded_inside(cache, nearest))


def test_what_backward_rounds_is_seen_where_forward_is_fine() -> None:
    row = LAYERS["softmax"]
    assert found_class(Half("inside", {"softmax": (row.forward, row.backward)}), alone("softmax")) == "inside"
    assert found_class(Half("inside", {"softmax": (row.forward, coarse_backward)}), alone("softmax")) != "inside"


# Sums.


def summing_in(dtype: str) -> Half:
    """Right in all but that sums are kept in this dtype, one term after another."""
    row = LAYERS["reduce_sum"]

    def forward(x: Array, **options: Any) -> tuple[Array, Any]:
        exact, cache = row.forward(x, **options)
        kept = np.add.accumulate(np.asarray(x).astype(dtype), axis=-1)[..., -1]
        return kept.astype(float).reshape(exact.shape), cache

    return Half("inside", {"reduce_sum": (forward, row.backward)})


@pytest.mark.parametrize("count", [1000, 10_000])
def test_long_sums_tell_what_they_are_kept_in(count: int) -> None:
    case = alone("reduce_sum", "bfloat16", (3, count), axes=(1,))
    assert found_class(summing_in("float32"), case) == "inside"
    assert found_class(summing_in("bfloat16"), case) == "every"
    assert examined(summing_in("float32"), case, demanded="inside").agrees
    assert wrong(examined(summing_in("bfloat16"), case, demanded="inside")) == {value_of("out"): "arithmetic"}


def test_a_sum_that_stands_still_is_wrong_in_every_class() -> None:
    """256 and 1 are 256 in bfloat16."""
    case = alone("reduce_sum", "bfloat16", (1, 10_000), axes=(1,))
    ones = Case(case.network, "bfloat16", {"x": np.ones((1, 10_000), "bfloat16")}, case.cotangent)
    (total,) = run(summing_in("bfloat16"), ones, 60.0).got[value_of("out")]
    assert float(total) == 256.0
    assert wrong(examined(summing_in("bfloat16"), ones)) == {value_of("out"): "value"}
    assert examined(summing_in("float32"), ones, demanded="inside").agrees


BEYOND = [[40_000.0, 40_000.0, -40_000.0]]
"""Their sum is in the range of float16, that of the first two is not."""


@pytest.mark.parametrize(
    ("numbers", "spoilt", "every", "agrees"),
    [
        (BEYOND, np.inf, True, True),
        (BEYOND, np.inf, False, False),
        (BEYOND, 1.25, False, False),
        ([[10_000.0, 10_000.0, -5_000.0]], np.inf, True, False),
        ([[10_000.0, 10_000.0, -5_000.0]], 1.25, True, False),
    ],
)
def test_a_sum_that_leaves_the_range_on_the_way_excuses_nothing_where_it_need_not(
    numbers: list[list[float]], spoilt: float, every: bool, agrees: bool
) -> None:
    row = LAYERS["reduce_sum"]

    def forward(x: Array, **options: Any) -> tuple[Array, Any]:
        out, cache = row.forward(np.asarray(x), **options)
        return out * spoilt, cache

    case = one_node(row, {"axes": (1,), "keepdims": False}, {"x": numbers}, "float16")
    subject = Subject(Half("inside", {"reduce_sum": (forward, row.backward)}), {})
    (node,) = case.network.nodes
    if every:
        subject.classes.known[node.layer.name, node.options, case.dtype] = EVERY
    found = examine(subject, case)
    assert found.agrees is agrees
    assert [culprit.node for culprit in found.culprits] == ([] if agrees else [node])


# Faults are no arithmetic.


def scaled(layer: str, argument: str, factor: float) -> Half:
    """Right but for one element of one gradient."""
    row = LAYERS[layer]

    def backward(dout: Array, cache: Any) -> Mapping[str, Array]:
        terms = {name: np.array(each) for name, each in row.backward(dout, cache).items()}
        terms[argument].flat[3] *= factor
        return terms

    return Half("inside", {layer: (row.forward, backward)})


SCALED: list[tuple[str, str, Options]] = [
    ("linear", "weight", {"features": 4, "use_bias": False}),
    ("linear", "x", {"features": 4, "use_bias": False}),
    ("layer_norm", "x", {"affine": False}),
    ("softmax", "x", {}),
    ("sigmoid", "x", {}),
    ("tanh", "x", {}),
]


@EACH_HALF
@pytest.mark.parametrize(("layer", "argument", "options"), SCALED, ids=lambda each: str(each))
def test_three_percent_in_one_element_of_a_gradient_are_caught(
    layer: str, argument: str, options: Options, dtype: str
) -> None:
    case = alone(layer, dtype, **options)
    tensor = "x" if argument == "x" else f"{argument}0"
    for factor in (1.03, 0.97):
        adapter = scaled(layer, argument, factor)
        assert wrong(examined(adapter, case)) == {gradient_of(tensor): "gradient"}
        assert found_class(adapter, case) == "inside"
    assert examined(scaled(layer, argument, 1.0), case, demanded="inside").agrees


def test_errors_to_one_side_are_what_tells_a_fault_from_a_coarse_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """In size, 3 % of one element are what bfloat16 may lose where every operation rounds."""
    case = alone("linear", features=4, use_bias=False)
    adapter = scaled("linear", "weight", 1.03)
    monkeypatch.setattr("gradproof.verdict.arithmetic._one_sided", lambda roundings: False)
    assert found_class(adapter, case) == "every"
    assert examined(adapter, case).agrees


def test_a_fault_that_fits_in_no_class_tells_none() -> None:
    case = alone("softmax")
    adapter = scaled("softmax", "x", -1.0)
    assert found_class(adapter, case) == "inside"
    assert wrong(examined(adapter, case)) == {gradient_of("x"): "gradient"}


# What is demanded.


@EACH_HALF
def test_a_class_coarser_than_demanded_is_a_disagreement_of_its_own_kind(dtype: str) -> None:
    case = alone("softmax", dtype)
    every, stored = Half("every"), Half("stored")
    assert set(wrong(examined(every, case, demanded="inside")).values()) == {"arithmetic"}
    assert set(wrong(examined(every, case, demanded="stored")).values()) == {"arithmetic"}
    assert examined(every, case, demanded="every").agrees
    assert set(wrong(examined(stored, case, demanded="inside")).values()) == {"arithmetic"}
    assert examined(stored, case, demanded="stored").agrees
    assert examined(Half("inside"), case, demanded="inside").agrees


def test_a_known_class_does_not_hide_what_is_demanded() -> None:
    """The second case is judged by the finest class again, not by what the first has taught."""
    subject = Subject(Half("every"), {}, demanded="inside")
    for _ in range(2):
        found = examine(subject, alone("softmax"))
        assert set(wrong(found).values()) == {"arithmetic"}
        assert [culprit.node.name for culprit in found.culprits] == ["out"]


def test_what_is_shown_is_by_how_much_the_finer_class_is_missed() -> None:
    case = alone("softmax")
    (check,) = (
        check for check in examined(Half("every"), case, demanded="inside").checks if check.key == value_of("out")
    )
    assert check.kind == "arithmetic"
    assert check.noise_units > 100.0


def test_a_wrong_number_is_no_matter_of_arithmetic() -> None:
    assert wrong(examined(scaled("softmax", "x", -1.0), alone("softmax"), demanded="inside")) == {
        gradient_of("x"): "gradient"
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fine_dtypes_have_one_class(dtype: str) -> None:
    subject = Subject(Half("every"), {}, demanded="inside")
    assert examine(subject, alone("softmax", dtype)).agrees
    assert subject.classes.known == {}
