"""What a known divergence excuses, and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradproof.model.case import Case
from gradproof.model.network import Input
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.walk import Row
from gradproof.verdict.divergence import Divergence, explanation
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.kinks import one_node
from helpers.divergences import READ, Diverging, examined_with, softplus_row
from helpers.networks import case_of, network, node

Array = np.ndarray[Any, Any]


def softplus_case(x: Any, dtype: str = "float64") -> Case:
    """A softplus of these numbers; the cotangent grows from 0.5 to 1.5."""
    of = network(Input("x", np.shape(x)), node("out", "softplus", "x"))
    return case_of(of, dtype, np.linspace(0.5, 1.5, np.size(x)).reshape(np.shape(x)), x=x)


ABOVE = [[1.0, 21.0], [-3.0, 22.0]]


def test_an_entry_explains_what_it_describes() -> None:
    examination = examined_with(softplus_case(ABOVE), READ)
    assert not examination.agrees
    assert examination.known
    assert [culprit.divergence for culprit in examination.culprits] == [READ]
    assert not examined_with(softplus_case(ABOVE)).known


def spoilt(where: Callable[[Array], Array], factor: float) -> Row:
    """The identity above 20, and a value that is wrong elsewhere too."""
    return softplus_row(value=lambda out, x: np.where(where(x), out * factor, np.where(x > 20, x, out)))


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        (replace(READ, layer="silu"), None),
        (replace(READ, between=(21.5, 30.0)), None),
        (replace(READ, between=(20.0, 21.5)), None),
        (replace(READ, kinds=("gradient",)), None),
        (replace(READ, kinds=("nonfinite",)), None),
        (replace(READ, max_relative_error=1e-13), None),
        (READ, spoilt(lambda x: x == 1.0, 1.0 + 1e-9)),
        (READ, spoilt(lambda x: x == 21.0, 1.0 + 2e-6)),
        (READ, spoilt(lambda x: x == 22.0, np.nan)),
        (READ, softplus_row(slope=lambda dx, x: np.where(x < 0, 0.0, dx))),
    ],
    ids=[
        *("another layer", "below its location", "above its location", "another kind", "not finite alone"),
        *("a smaller error", "an error elsewhere", "a bigger error", "not finite", "a gradient elsewhere"),
    ],
)
def test_an_entry_explains_nothing_else(entry: Divergence, row: Row | None) -> None:
    examination = examined_with(softplus_case(ABOVE), entry, row=row)
    assert not examination.agrees
    assert not examination.known
    assert [culprit.divergence for culprit in examination.culprits] == [None]


def test_bounds_are_included() -> None:
    row = softplus_row(value=lambda out, x: out * (1.0 + 1e-8))
    case = softplus_case([20.0, 25.0])
    assert examined_with(case, replace(READ, between=(20.0, 25.0)), row=row).known
    assert not examined_with(case, replace(READ, between=(20.0, 24.9)), row=row).known
    assert not examined_with(case, replace(READ, between=(20.1, 25.0)), row=row).known


@pytest.mark.parametrize(("relative", "absolute", "known"), [(0.0, 2e-9, True), (0.0, 1e-9, False), (1e-10, 0, True)])
def test_an_error_is_bounded_by_a_share_and_a_number(relative: float, absolute: float, known: bool) -> None:
    entry = replace(READ, max_relative_error=relative, max_absolute_error=absolute)
    row = softplus_row(value=lambda out, x: out + 1.5e-9 * (x > 20))
    assert examined_with(softplus_case(ABOVE), entry, row=row).known is known


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_cotangent_that_is_not_finite_does_not_count(lost: float) -> None:
    case = softplus_case([21.0, 1.0, 22.0])
    case = replace(case, cotangent=np.array([0.5, lost, 1.5]))
    row = softplus_row(slope=lambda dx, x: dx + 1e-9 * (x > 20))
    known = replace(READ, kinds=("gradient",), max_relative_error=0.0, max_absolute_error=1e-9)
    assert examined_with(case, known, row=row).known
    assert not examined_with(case, replace(known, max_absolute_error=5e-10), row=row).known


def test_both_kinds_of_tensor_are_explained_where_both_are_named() -> None:
    row = softplus_row(slope=lambda dx, x: np.where(x > 20, dx * (1 + 1e-8), dx))
    assert examined_with(softplus_case(ABOVE), READ, row=row).known
    assert not examined_with(softplus_case(ABOVE), replace(READ, kinds=("value",)), row=row).known


def test_what_is_not_finite_is_explained_where_that_is_named() -> None:
    row = softplus_row(slope=lambda dx, x: np.where(x > 20, np.nan, dx))
    assert examined_with(softplus_case(ABOVE), replace(READ, kinds=("nonfinite",)), row=row).known
    assert not examined_with(softplus_case(ABOVE), READ, row=row).known


def test_several_entries_explain_together() -> None:
    first, second = replace(READ, between=(20.5, 21.5)), replace(READ, between=(21.5, 23.0))
    assert not examined_with(softplus_case(ABOVE), first).known
    assert not examined_with(softplus_case(ABOVE), second).known
    both = examined_with(softplus_case(ABOVE), replace(READ, layer="silu"), first, second)
    assert both.known
    assert both.culprits[0].divergence == first


@pytest.mark.parametrize(
    "spoil", [lambda x: None, lambda x: x[None], lambda x: x.astype("float32")], ids=["missing", "shape", "dtype"]
)
def test_no_entry_explains_a_tensor_of_the_wrong_structure(spoil: Callable[[Array], Any]) -> None:
    class Misshapen(Diverging):
        def backward(self, forward: Any, cotangent: Array) -> dict[str, Any]:
            gradients = super().backward(forward, cotangent)
            return {**gradients, "x": spoil(gradients["x"])}

    everything = replace(READ, kinds=("value", "gradient", "nonfinite"), max_relative_error=1e300)
    assert not examine(Subject(Misshapen(), {}, (everything,)), softplus_case(ABOVE)).known


def test_nothing_wrong_needs_no_entry() -> None:
    assert examined_with(softplus_case([1.0, 2.0]), READ).culprits == ()
    assert explanation([READ], []) is None


def test_a_reduced_loss_is_located_by_any_of_its_elements() -> None:
    """Its one value has no place of its own."""
    layer = LAYERS["mse"]
    of = network(Input("x", (3,)), Input("target", (3,)), node("out", "mse", "x", "target"))
    case = case_of(of, "float64", 1.5, x=[0.0, 1.0, 5.0], target=np.zeros(3))
    row = (lambda x, target, reduction: _off(layer.forward(x, target, reduction=reduction)), layer.backward)
    subject = Subject(NumpyReference(rows={"mse": row}), {})
    entry = replace(READ, layer="mse", between=(4.0, 6.0), kinds=("value",))
    assert examine(replace(subject, divergences=(entry,)), case).known
    assert not examine(replace(subject, divergences=(replace(entry, between=(6.0, 7.0)),)), case).known


def _off(result: tuple[Array, Any]) -> tuple[Array, Any]:
    return result[0] * (1.0 + 1e-9), result[1]


ROWS_OF = [[0.0, 0.0, 0.0], [0.0, -8.0, 0.5], [3.0, 3.0, 3.0]]
STATISTICS = {
    ("magnitude", 8.0, 9.0): [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
    ("peak", 0.0, 0.0): [[1, 1, 1], [0, 0, 0], [0, 0, 0]],
    ("peak", 8.0, 8.0): [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    ("range", 0.0, 0.0): [[1, 1, 1], [0, 0, 0], [1, 1, 1]],
    ("range", 8.5, 8.5): [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    ("variance", 0.0, 0.0): [[1, 1, 1], [0, 0, 0], [1, 1, 1]],
    ("variance", 15.0, 16.0): [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    ("largest product", 8.0, 8.0): [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    ("largest product", 27.0, 27.0): [[0, 0, 0], [0, 0, 0], [1, 1, 1]],
    ("smallest product", 0.0, 1.0): [[0, 0, 0], [0, 0, 0], [1, 1, 1]],
}


@pytest.mark.parametrize(("statistic", "low", "high"), STATISTICS)
def test_a_slice_is_located_by_its_statistic(statistic: str, low: float, high: float) -> None:
    held = np.array(STATISTICS[statistic, low, high], bool)
    case = one_node(LAYERS["reduce_sum"], {"axes": (1,)}, {"x": ROWS_OF}, "float64")
    entry = replace(READ, layer="reduce_sum", between=(low, high), statistic=statistic, along="axes")
    assert (entry.located(case, (3, 3)) == held).all()
    if statistic != "magnitude":
        assert (entry.located(case, (3,)) == held[:, 0]).all()


def test_a_slice_may_have_several_axes() -> None:
    case = one_node(LAYERS["reduce_sum"], {"axes": (0, 1)}, {"x": ROWS_OF}, "float64")
    entry = replace(READ, layer="reduce_sum", between=(11.0, 11.0), statistic="range", along="axes")
    assert entry.located(case, ())
    assert not replace(entry, between=(8.5, 8.5)).located(case, ())


def test_an_option_may_tell_how_many_of_the_last_axes_a_slice_has() -> None:
    case = one_node(LAYERS["layer_norm"], {"axes": 1}, {"x": ROWS_OF}, "float64")
    entry = replace(READ, layer="layer_norm", between=(8.5, 8.5), statistic="range", along="axes")
    assert entry.located(case, (3, 3)).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    whole = one_node(LAYERS["layer_norm"], {"axes": 2}, {"x": ROWS_OF}, "float64")
    assert replace(entry, between=(11.0, 11.0)).located(whole, (3, 3)).all()
    assert not entry.located(whole, (3, 3)).any()


def test_an_entry_may_be_located_by_the_cotangent() -> None:
    case = softplus_case([21.0, 22.0])  # cotangents 0.5 and 1.5
    row = softplus_row(slope=lambda dx, x: dx * (1.0 + 1e-8))
    entry = replace(READ, argument="cotangent", kinds=("gradient",))
    assert examined_with(case, replace(entry, between=(0.5, 2.0)), row=row).known
    assert not examined_with(case, replace(entry, between=(1.0, 2.0)), row=row).known
    assert examined_with(case, replace(entry, between=(1.5, 1.5), statistic="largest"), row=row).known


def test_an_entry_may_be_located_by_the_output() -> None:
    """A gradient's element is located where it is a part of such an output."""
    layer, options = LAYERS["lp_pool"], {"p": 1, "kernel": 2, "stride": 2}
    case = one_node(layer, options, {"x": [[[1.0, -1.0, 3.0, 4.0]]]}, "float64")
    entry = replace(READ, layer="lp_pool", argument="output", between=(0.0, 0.0), kinds=("gradient",))
    assert entry.located(case, (1, 1, 2)).tolist() == [[[True, False]]]
    assert entry.located(case, (1, 1, 4)).tolist() == [[[True, True, False, False]]]
    for part, known in ((slice(0, 2), True), (slice(1, 3), False)):
        row = layer.forward, _with_nothing_in(part)
        examination = examine(
            Subject(NumpyReference(rows={"lp_pool": row}), {}, (replace(entry, max_relative_error=1.0),)), case
        )
        assert not examination.agrees
        assert examination.known is known


def _with_nothing_in(part: slice) -> Callable[..., Any]:
    def backward(dout: Array, cache: Any) -> dict[str, Array]:
        dx = np.array(LAYERS["lp_pool"].backward(dout, cache)["x"])
        dx[..., part] = 0.0
        return {"x": dx}

    return backward


def test_a_product_too_small_for_the_dtype_is_no_zero() -> None:
    case = one_node(LAYERS["reduce_sum"], {"axes": (1,)}, {"x": [[1e-200, 1e-200], [0.0, 1.0]]}, "float64")
    entry = replace(READ, layer="reduce_sum", between=(0.0, 1e-300), statistic="smallest product", along="axes")
    assert entry.located(case, (2,)).tolist() == [True, False]
