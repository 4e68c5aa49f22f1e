"""The samples of the noise, the floor that is made of them, and the classes of arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest

from gradproof.model.case import Case
from gradproof.model.dtypes import HALF, VALID_DTYPES, limits
from gradproof.model.network import Input, Network, Node
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference import LAYERS, NumpyReference
from gradproof.verdict.agreement import MANY_RUNS
from gradproof.verdict.equations import EVERY, INSIDE, PEAK, STORED, Arithmetic
from gradproof.verdict.kinks import one_node
from gradproof.verdict.noise import Noisy, Rounding, observe, rounded_inside
from helpers.networks import case_of, node
from helpers.noise import CHAIN, GRID, SHIFT, chain_case, equations_of, floor, normal, rounding

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


@pytest.mark.parametrize("arithmetic", [INSIDE, STORED, EVERY], ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", VALID_DTYPES)
def test_the_same_index_gives_the_same_samples(dtype: str, arithmetic: Arithmetic) -> None:
    of = chain_case(dtype)
    classes = {each.name: arithmetic for each in CHAIN.nodes}
    few_first, many_first = equations_of(of), equations_of(of)
    for statement in few_first:
        other = many_first[statement.key]
        many = other.floor(16, classes).spread
        np.testing.assert_array_equal(statement.floor(4, classes).spread, other.floor(4, classes).spread)
        np.testing.assert_array_equal(statement.floor(16, classes).spread, many)


def test_samples_differ_from_each_other() -> None:
    floors = [floor(chain_case(), value_of("out"), count).spread for count in (1, 2, 3, 4)]
    assert len({each.tobytes() for each in floors}) == 4


def test_nodes_draw_errors_of_their_own() -> None:
    """Those of two readers of one tensor would else add up as if they were one."""
    network = Network(
        (Input("x", (50,)), Input("c", (1,))),
        (node("h", "multiply", "x", "c"), node("g", "multiply", "x", "c"), node("out", "subtract", "h", "g")),
    )
    of = equations_of(case_of(network, "float32", x=normal(50), c=[1.0 / 3.0]))
    h, g = (of.by_node[name].samples(4, INSIDE) for name in ("h", "g"))
    for (one, _), (other, _) in zip(h, g, strict=True):
        assert (np.asarray(one) != np.asarray(other)).any()


def test_both_kinds_of_rounding_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[bool] = []
    made = Rounding.__init__

    def recording(self: Rounding, *arguments: Any, to_grid: bool, **others: Any) -> None:
        kinds.append(to_grid)
        made(self, *arguments, to_grid=to_grid, **others)

    monkeypatch.setattr(Rounding, "__init__", recording)
    floor(chain_case(), value_of("out"), 6)
    # One of what the operations round to, one of the case's own dtype.
    assert kinds == [SHIFT, SHIFT, GRID, GRID] * 3


def test_the_floor_grows_with_the_unit() -> None:
    single, double = (floor(chain_case(dtype), gradient_of("w"), 16).spread.mean() for dtype in ("float32", "float64"))
    ratio = np.finfo("float32").eps / np.finfo("float64").eps
    assert 0.05 * ratio < single / double < ratio


def test_the_floor_is_the_mean_deviation_or_a_share_of_the_largest() -> None:
    of = equations_of(chain_case())
    statement = of[value_of("out")]
    found = statement.floor(MANY_RUNS, {}).spread
    samples = [np.asarray(out) for out, _ in of.by_node["out"].samples(MANY_RUNS, INSIDE)]
    deviations = np.abs(np.stack(samples) - statement.expected)
    np.testing.assert_array_equal(found, np.maximum(deviations.mean(axis=0), deviations.max(axis=0) / PEAK))


def test_the_floor_of_a_sum_is_that_of_all_its_terms() -> None:
    """Added up in each run, for the terms cancel."""
    network = Network(
        (Input("x", (3,)), Input("c", (1,))),
        (node("h", "multiply", "x", "c"), node("g", "multiply", "x", "c"), node("out", "subtract", "h", "g")),
    )
    of = equations_of(case_of(network, "float32", x=normal(3), c=[1e6 / 3.0]))
    found = of[gradient_of("x")].floor(4, {}).spread
    runs = zip(of.by_node["h"].samples(4, INSIDE), of.by_node["g"].samples(4, INSIDE), strict=True)
    ((_, first), (_, second)) = of[gradient_of("x")].parts
    sums = np.stack([np.asarray(h[str(first)] + g[str(second)]) for (_, h), (_, g) in runs])
    assert np.abs(of[gradient_of("x")].expected).max() < 1.0
    np.testing.assert_allclose(found, np.abs(sums - of[gradient_of("x")].expected).mean(axis=0), rtol=1e-12)
    assert (found > 1e-4).all()


class Recording(NumpyReference):
    """The reference, which keeps what its nodes read."""

    given: Arrays

    def run_node(self, node: Node, known: Arrays) -> tuple[Array, Any]:
        self.given = known
        return super().run_node(node, known)


def test_indices_reach_the_reference_as_they_are() -> None:
    of = one_node(LAYERS["cross_entropy"], {}, 0.5, "float32", (2, 3))
    reference = Recording()
    equations_of(of, reference)[value_of("cross_entropy")].floor(1, {})
    assert isinstance(reference.given["x"], Noisy)
    assert reference.given["target"] is of.exact_values["target"]
    assert reference.given["target"].dtype == np.int64


def test_floors_count_what_overflows() -> None:
    network = Network((Input("x", (2,)),), (node("out", "multiply", "x", "x"),))
    found = floor(case_of(network, "float32", x=[1e30, 1.0]), value_of("out"))
    assert found.lost.tolist() == [True, False]
    assert found.spread[0] == 0.0
    assert found.spread[1] > 0.0


# The classes of arithmetic.


def saturating_case(dtype: str) -> Case:
    network = Network((Input("x", (64,)),), (node("out", "tanh", "x"),))
    return case_of(network, dtype, cotangent=np.ones(64), x=np.linspace(1.0, 2.0, 64))


@pytest.mark.parametrize("dtype", HALF)
def test_inside_rounds_to_float32_and_every_to_the_dtype(dtype: str) -> None:
    ratio = float(limits(dtype).eps) / float(limits("float32").eps)
    inside, every = (floor(saturating_case(dtype), value_of("out"), 16, each).spread.mean() for each in (INSIDE, EVERY))
    assert 0.3 * ratio < every / inside < 3.0 * ratio


@pytest.mark.parametrize("dtype", HALF)
def test_stored_rounds_what_forward_keeps_and_nothing_else(dtype: str) -> None:
    """1 - y^2 near saturation depends on the digits of y, the value does not."""
    of = saturating_case(dtype)
    value, gradient = (
        {each.name: floor(of, key, 16, each).spread for each in (INSIDE, STORED, EVERY)}
        for key in (value_of("out"), gradient_of("x"))
    )
    np.testing.assert_allclose(value["stored"].mean(), value["inside"].mean(), rtol=0.5)
    assert gradient["stored"].mean() > 100.0 * gradient["inside"].mean()
    assert gradient["stored"].mean() < gradient["every"].mean()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_in_fine_dtypes_all_but_stored_is_the_same(dtype: str) -> None:
    inside, every = (floor(saturating_case(dtype), gradient_of("x"), 8, each).spread for each in (INSIDE, EVERY))
    np.testing.assert_array_equal(inside, every)


def test_what_is_kept_is_rounded_in_place() -> None:
    error = rounding("bfloat16", GRID)
    kept = (normal(100), [np.arange(3), "sum", None], observe(normal(4), rounding()))
    array, (places, *others), noisy = rounded_inside(kept, error)
    np.testing.assert_array_equal(array, array.astype("bfloat16").astype(float))
    assert (array != normal(100)).any()
    np.testing.assert_array_equal(places, np.arange(3))
    assert others == ["sum", None]
    assert isinstance(noisy, Noisy)
    assert noisy.rounding.dtype == np.float32
    np.testing.assert_array_equal(noisy, np.asarray(noisy).astype("bfloat16").astype(float))


@pytest.mark.parametrize("to_grid", [SHIFT, GRID])
def test_what_is_kept_is_not_rounded_again_where_the_dtype_holds_it(to_grid: bool) -> None:
    """An input among it, which nobody rounds: else it would excuse an error in what is computed from it."""
    held = normal(100).astype("bfloat16").astype(float)
    np.testing.assert_array_equal(rounded_inside(held, rounding("bfloat16", to_grid)), held)
    assert (rounded_inside(held * (1.0 + 2.0**-12), rounding("bfloat16", to_grid)) != held * (1.0 + 2.0**-12)).any()


class Kept(NamedTuple):
    x: Array
    axis: int


def test_what_is_kept_by_name_stays_so() -> None:
    found = rounded_inside(Kept(normal(100), 1), rounding("bfloat16", GRID))
    assert (type(found), found.axis) == (Kept, 1)
    assert (found.x != normal(100)).any()
