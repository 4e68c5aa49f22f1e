"""The noise floor: what a perturbed array does, that no layer escapes it, and that every ingredient is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy.special import erf, ndtr, xlogy

from gradproof.draw.drawing import draw_each
from gradproof.model.adapter import Adapter
from gradproof.model.case import Case
from gradproof.model.dtypes import HALF, VALID_DTYPES, limits
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import OptionValue
from gradproof.reference import LAYERS, PRECISE, NumpyReference
from gradproof.reference.linear import LinearOperands
from gradproof.verdict import agreement, equations, noise
from gradproof.verdict.agreement import FEW_RUNS, MANY_RUNS, judge
from gradproof.verdict.equations import EVERY, INSIDE, PEAK, STORED, Arithmetic, Equations, Floor
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.kinks import one_node
from gradproof.verdict.noise import Noisy, Rounding, observe, rounded_inside, tensors
from gradproof.verdict.sweep import Sweep

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

SHIFT, GRID = False, True
BOTH_KINDS = pytest.mark.parametrize("to_grid", [SHIFT, GRID], ids=["shift", "grid"])
EACH_DTYPE = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
COARSE_DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])


def rounding(dtype: str = "float32", to_grid: bool = SHIFT, seed: int = 0) -> Rounding:
    return Rounding(np.dtype(dtype), np.random.default_rng(seed), to_grid)


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def node(name: str, layer: str, *inputs: str, parameters: str = "", **options: OptionValue) -> Node:
    """A node; its parameters are written "slot:name slot:name"."""
    pairs = dict(pair.split(":") for pair in parameters.split())
    return Node.of(name, LAYERS[layer], *inputs, parameters=pairs, options=options)


def case(network: Network, dtype: str, cotangent: Any = None, **values: Any) -> Case:
    """A case on these numbers; the cotangent is drawn where none is given."""
    seed = normal(*network.shapes[network.output]) if cotangent is None else cotangent
    return Case(network, dtype, {k: np.asarray(v, dtype) for k, v in values.items()}, np.asarray(seed, dtype))


def examined(adapter: Adapter, of: Case) -> Examination:
    return examine(Subject(adapter, {}), of)


def disagreeing(adapter: Adapter, of: Case) -> list[str]:
    """The tensors whose equations do not hold."""
    forward = adapter.forward(of.network, {name: value.copy() for name, value in of.values.items()}, of.dtype)
    got = tensors(forward.outputs, adapter.backward(forward, of.cotangent.copy()))
    every = Subject(adapter, {}).equations(of, got)
    return [each.key for each in every if judge(each, got[each.key], of.dtype).kind]


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


# No layer escapes: derived from the table.

CASES_PER_LAYER = 8


@cache
def cases_of(layer: str) -> tuple[Case, ...]:
    """The layer alone in float32, with drawn options and shapes, and generic numbers."""
    found: list[Case] = []
    draw_each(
        lambda drawn: found.append(replace(drawn, edge_share=0.0, scale=1.0).case("float32")),
        CASES_PER_LAYER,
        seed=3,
        layers=[layer],
        max_nodes=1,
    )
    return tuple(found)


def results(reference: NumpyReference, network: Network, values: Arrays, cotangent: Array, dtype: str) -> Arrays:
    forward = reference.forward(network, values, dtype)
    gradients = reference.backward(forward, cotangent)
    return tensors(forward.outputs, {name: gradients[name] for name in network.differentiable})


def perturbed(reference: NumpyReference, of: Case, seed: int) -> Arrays:
    error = rounding("float32", seed=seed)
    values = {name: observe(v, error) if v.dtype == np.float64 else v for name, v in of.exact_values.items()}
    return results(reference, of.network, values, observe(of.cotangent, error), "float64")


def dropped(reference: NumpyReference, of: Case) -> set[str]:
    """The tensors that are not noisy, or do not move where float32 arithmetic rounds."""
    exact = results(reference, of.network, of.exact_values, of.cotangent.astype(float), "float64")
    coarse = results(reference, of.network, of.values, of.cotangent, "float32")
    runs = [perturbed(reference, of, seed) for seed in range(3)]

    def moves(key: str) -> bool:
        moved = np.any([np.asarray(run[key]) != exact[key] for run in runs], axis=0)
        return bool((moved | (coarse[key] == exact[key])).all())

    return {key for key in exact if not (all(isinstance(run[key], Noisy) for run in runs) and moves(key))}


@pytest.mark.parametrize("layer", LAYERS)
def test_noise_reaches_every_result_of_every_layer(layer: str) -> None:
    for of in cases_of(layer):
        assert dropped(NumpyReference(), of) == set(), of.network


def test_float32_arithmetic_rounds_in_most_layers() -> None:
    """So that the test above has something to ask for."""
    moving = set()
    for layer in LAYERS:
        for of in cases_of(layer):
            exact = results(NumpyReference(), of.network, of.exact_values, of.cotangent.astype(float), "float64")
            coarse = results(NumpyReference(), of.network, of.values, of.cotangent, "float32")
            moving |= {layer for key in exact if not np.array_equal(exact[key], coarse[key])}
    assert len(moving) > 0.7 * len(LAYERS)


def _tanh_of_plain_arrays(x: Array) -> tuple[Array, Array]:
    out = np.tanh(np.asarray(x))
    return out, out


def _tanh_of_python_numbers(x: Array) -> tuple[Array, Array]:
    out = np.array([math.tanh(each) for each in x.ravel()]).reshape(x.shape)
    return out, out


def _tanh_observed_again(x: Array) -> tuple[Array, Array]:
    """Noisy, but the rounding of tanh itself is lost."""
    out = np.tanh(np.asarray(x))
    return (observe(out, x.rounding) if isinstance(x, Noisy) else out), out


def _plain_gradient(dout: Array, out: Array) -> dict[str, Array]:
    return {"x": np.asarray(dout * (1.0 - out * out))}


TANH = LAYERS["tanh"]
DROPPING = {
    "a plain array": ((_tanh_of_plain_arrays, TANH.backward), {"value:h1"}),
    "Python's numbers": ((_tanh_of_python_numbers, TANH.backward), {"value:h1"}),
    "the noise of one operation": ((_tanh_observed_again, TANH.backward), {"value:h1"}),
    "a plain gradient": ((TANH.forward, _plain_gradient), {"gradient:x0"}),
}


@pytest.mark.parametrize(("row", "lost"), DROPPING.values(), ids=DROPPING)
def test_a_layer_that_drops_the_noise_is_caught(row: Any, lost: set[str]) -> None:
    assert dropped(NumpyReference(rows={"tanh": row}), cases_of("tanh")[0]) == lost


# Samples.

CHAIN = Network(
    (Input("x", (4, 3)),),
    (
        node("h", "linear", "x", parameters="weight:w bias:b", features=5),
        node("s", "softmax", "h"),
        node("out", "layer_norm", "s", affine=False),
    ),
)


def chain_case(dtype: str = "float32") -> Case:
    return case(CHAIN, dtype, x=normal(4, 3), w=normal(5, 3, seed=2), b=normal(5, seed=3))


def equations_of(of: Case, textbook: NumpyReference | None = None, fused: bool = False) -> Equations:
    """The equations of a run that is right, every tensor rounded once."""
    exact = results(NumpyReference(rows=PRECISE), of.network, of.exact_values, of.cotangent.astype(float), "float64")
    with np.errstate(over="ignore"):
        got = {key: np.asarray(array).astype(of.dtype) for key, array in exact.items()}
    return Equations(of, got, NumpyReference(rows=PRECISE), textbook or NumpyReference(), fused)


def floor(of: Case, key: str, count: int = FEW_RUNS, arithmetic: Arithmetic = INSIDE) -> Floor:
    """The floor of one tensor whose readers, and whose node, all have this arithmetic."""
    return equations_of(of)[key].floor(count, {each.name: arithmetic for each in of.network.nodes})


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
    floors = [floor(chain_case(), "value:out", count).spread for count in (1, 2, 3, 4)]
    assert len({each.tobytes() for each in floors}) == 4


def test_nodes_draw_errors_of_their_own() -> None:
    """Those of two readers of one tensor would else add up as if they were one."""
    network = Network(
        (Input("x", (50,)), Input("c", (1,))),
        (node("h", "multiply", "x", "c"), node("g", "multiply", "x", "c"), node("out", "subtract", "h", "g")),
    )
    of = equations_of(case(network, "float32", x=normal(50), c=[1.0 / 3.0]))
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
    floor(chain_case(), "value:out", 6)
    # One of what the operations round to, one of the case's own dtype.
    assert kinds == [SHIFT, SHIFT, GRID, GRID] * 3


def test_the_floor_grows_with_the_unit() -> None:
    single, double = (floor(chain_case(dtype), "gradient:w", 16).spread.mean() for dtype in ("float32", "float64"))
    ratio = np.finfo("float32").eps / np.finfo("float64").eps
    assert 0.05 * ratio < single / double < ratio


def test_the_floor_is_the_mean_deviation_or_a_share_of_the_largest() -> None:
    of = equations_of(chain_case())
    statement = of["value:out"]
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
    of = equations_of(case(network, "float32", x=normal(3), c=[1e6 / 3.0]))
    found = of["gradient:x"].floor(4, {}).spread
    runs = zip(of.by_node["h"].samples(4, INSIDE), of.by_node["g"].samples(4, INSIDE), strict=True)
    ((_, first), (_, second)) = of["gradient:x"].parts
    sums = np.stack([np.asarray(h[str(first)] + g[str(second)]) for (_, h), (_, g) in runs])
    assert np.abs(of["gradient:x"].expected).max() < 1.0
    np.testing.assert_allclose(found, np.abs(sums - of["gradient:x"].expected).mean(axis=0), rtol=1e-12)
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
    equations_of(of, reference)["value:cross_entropy"].floor(1, {})
    assert isinstance(reference.given["x"], Noisy)
    assert reference.given["target"] is of.exact_values["target"]
    assert reference.given["target"].dtype == np.int64


def test_floors_count_what_overflows() -> None:
    network = Network((Input("x", (2,)),), (node("out", "multiply", "x", "x"),))
    found = floor(case(network, "float32", x=[1e30, 1.0]), "value:out")
    assert found.lost.tolist() == [True, False]
    assert found.spread[0] == 0.0
    assert found.spread[1] > 0.0


# The classes of arithmetic.


def saturating_case(dtype: str) -> Case:
    network = Network((Input("x", (64,)),), (node("out", "tanh", "x"),))
    return case(network, dtype, cotangent=np.ones(64), x=np.linspace(1.0, 2.0, 64))


@pytest.mark.parametrize("dtype", HALF)
def test_inside_rounds_to_float32_and_every_to_the_dtype(dtype: str) -> None:
    ratio = float(limits(dtype).eps) / float(limits("float32").eps)
    inside, every = (floor(saturating_case(dtype), "value:out", 16, each).spread.mean() for each in (INSIDE, EVERY))
    assert 0.3 * ratio < every / inside < 3.0 * ratio


@pytest.mark.parametrize("dtype", HALF)
def test_stored_rounds_what_forward_keeps_and_nothing_else(dtype: str) -> None:
    """1 - y^2 near saturation depends on the digits of y, the value does not."""
    of = saturating_case(dtype)
    value, gradient = (
        {each.name: floor(of, key, 16, each).spread for each in (INSIDE, STORED, EVERY)}
        for key in ("value:out", "gradient:x")
    )
    np.testing.assert_allclose(value["stored"].mean(), value["inside"].mean(), rtol=0.5)
    assert gradient["stored"].mean() > 100.0 * gradient["inside"].mean()
    assert gradient["stored"].mean() < gradient["every"].mean()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_in_fine_dtypes_all_but_stored_is_the_same(dtype: str) -> None:
    inside, every = (floor(saturating_case(dtype), "gradient:x", 8, each).spread for each in (INSIDE, EVERY))
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


class Kept(NamedTuple):
    x: Array
    axis: int


def test_what_is_kept_by_name_stays_so() -> None:
    found = rounded_inside(Kept(normal(100), 1), rounding("bfloat16", GRID))
    assert (type(found), found.axis) == (Kept, 1)
    assert (found.x != normal(100)).any()


# Every ingredient is needed: with it the case below agrees, without it there is a false alarm, or a wrong floor.

Patch = Callable[[pytest.MonkeyPatch], None]


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
    return NumpyReference(), case(network, "float32", [[large], [1.0], [-large]], **ones)


def _linear_in_order(x: Array, weight: Array) -> tuple[Array, LinearOperands]:
    return (x[..., None, :] * weight).cumsum(axis=-1)[..., -1], LinearOperands(x, weight, biased=False)


def cancelling_product() -> tuple[Adapter, Case]:
    """The same terms inside a matrix product, added up one after another."""
    network = Network(
        (Input("x", (1, 3)),), (node("out", "linear", "x", parameters="weight:w", features=1, use_bias=False),)
    )
    adapter = NumpyReference(rows={"linear": (_linear_in_order, LAYERS["linear"].backward)})
    return adapter, case(network, "float32", x=[[1e8, 1.0, -1e8]], w=np.ones((1, 3)))


def sum_in_order(count: int, seed: int) -> tuple[Adapter, Case]:
    """Numbers that add up to nearly nothing, in one row."""
    network = Network(
        (Input("x", (1, count)),), (node("out", "linear", "x", parameters="weight:w", features=1, use_bias=False),)
    )
    x = normal(1, count, seed=seed).astype("float32")
    x[0, -1] -= x.sum(dtype=float)
    adapter = NumpyReference(rows={"linear": (_linear_in_order, LAYERS["linear"].backward)})
    return adapter, case(network, "float32", x=x, w=np.ones((1, count)), cotangent=[[1.0]])


def small_differences() -> tuple[Adapter, Case]:
    """Numbers that differ in few of their digits, less their mean."""
    network = Network((Input("x", (4, 5)),), (node("out", "layer_norm", "x", affine=False),))
    return NumpyReference(), case(network, "float32", x=1000.0 + normal(4, 5))


def sum_of_the_dtypes_own_numbers() -> tuple[Adapter, Case]:
    """Terms and total are exact in float32, but not what lies between: 2^24 + 1 is 2^24."""
    return cancelling_sum(2.0**24)


def squares_beyond_the_range() -> tuple[Adapter, Case]:
    """The root of the mean of the squares is in float32's range, they are not."""
    network = Network((Input("x", (2, 2)),), (node("out", "rms_norm", "x", affine=False),))
    return NumpyReference(), case(network, "float32", x=[[1e30, 2e30], [1.0, 2.0]])


def _flushing_rms_norm(x: Array, **options: Any) -> tuple[Array, Any]:
    flushed = np.where(x * x < np.finfo(x.dtype).smallest_normal, x.dtype.type(0.0), x)
    return LAYERS["rms_norm"].forward(flushed, **options)


def flushed_squares() -> tuple[Adapter, Case]:
    """Subnormal numbers on the way, which some hardware takes for zero."""
    network = Network((Input("x", (2, 2)),), (node("out", "rms_norm", "x", affine=False, eps=0.0),))
    adapter = NumpyReference(rows={"rms_norm": (_flushing_rms_norm, LAYERS["rms_norm"].backward)})
    return adapter, case(network, "float32", x=[[1e-20, 2e-20], [1.0, 2.0]])


def _gelu_by_erf(x: Array) -> tuple[Array, Any]:
    below = x.dtype.type(0.5) * (x.dtype.type(1.0) + erf(x * x.dtype.type(math.sqrt(0.5))))
    return x * below, (x, below)


def gelu_far_below() -> tuple[Adapter, Case]:
    """Frameworks take the distribution function as (1 + erf) / 2, which keeps few digits far below zero."""
    network = Network((Input("x", (20,)),), (node("out", "gelu", "x"),))
    adapter = NumpyReference(rows={"gelu": (_gelu_by_erf, LAYERS["gelu"].backward)})
    return adapter, case(network, "float32", x=np.linspace(-5.0, -4.0, 20))


def saturated() -> tuple[Adapter, Case]:
    """The textbook's 1 - tanh(x)^2 is 0 from x = 19 on, where 4 exp(-2 x) is meant."""
    network = Network((Input("x", (1,)),), (node("out", "tanh", "x"),))
    return NumpyReference(), case(network, "float64", x=[30.0])


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
    (expected,) = equations_of(of)["gradient:x"].expected
    assert expected == pytest.approx(float(of.cotangent[0]) * 4.0 * math.exp(-60.0), rel=1e-15)
    assert adapter.backward(adapter.forward(of.network, of.values, of.dtype), of.cotangent)["x"] == 0.0
    assert examined(adapter, of).agrees


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_the_root_of_squares_would_be_a_wrong_floor(scale: float) -> None:
    network = Network((Input("x", (5,)), Input("c", (1,))), (node("out", "multiply", "x", "c"),))
    statement = equations_of(case(network, "float64", x=normal(5), c=[scale]))["value:out"]
    spread = statement.floor(8, {}).spread
    unit = np.finfo("float64").eps * np.abs(statement.expected)
    assert ((0.1 * unit < spread) & (spread < 2.0 * unit)).all()
    with np.errstate(all="ignore"):
        assert set(spread**2) <= {0.0, np.inf}


def test_unverifiable_elements_are_counted() -> None:
    lost = examined(*squares_beyond_the_range()).checks
    assert {check.key: check.unverifiable for check in lost} == {"value:out": 2, "gradient:out": 0, "gradient:x": 2}


# Whole sweeps.


def cancelling_chain() -> tuple[Adapter, Case]:
    """(x + 1000) - 1000 keeps four digits."""
    network = Network(
        (Input("x", (5,)), Input("c", (1,))), (node("h", "add", "x", "c"), node("out", "subtract", "h", "c"))
    )
    return NumpyReference(), case(network, "float32", x=normal(5), c=[1000.0])


def test_errors_add_up_over_a_sweep_and_in_no_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, of = cancelling_chain()
    got = adapter.forward(of.network, of.values, of.dtype).outputs["out"]
    assert Sweep(of, {}).off("value:out", got) is None
    without_noise(monkeypatch)
    assert disagreeing(adapter, of) == []
    assert Sweep(of, {}).off("value:out", got) is not None


def test_a_sweep_expects_what_the_reference_computes() -> None:
    of = chain_case()
    exact = results(NumpyReference(rows=PRECISE), CHAIN, of.exact_values, of.cotangent.astype(float), "float64")
    found = Sweep(of, {}).expected
    assert found.keys() == exact.keys()
    for key, array in exact.items():
        np.testing.assert_array_equal(found[key], array)


def test_a_sweeps_floor_grows_on_the_way() -> None:
    found = Sweep(chain_case(), {})
    size = {key: found.floor(key).spread.mean() / np.abs(found.expected[key]).mean() for key in found.expected}
    assert size["gradient:out"] <= np.finfo("float32").eps
    assert (
        size["gradient:w"]
        > 2.0 * floor(chain_case(), "gradient:w", 16).spread.mean() / np.abs(found.expected["gradient:w"]).mean()
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
    assert found.floor("value:out").lost.tolist() == [[True, True], [False, False]]
    expected = found.expected["value:out"]
    assert found.off("value:out", expected * [[5.0], [1.0]]) is None
    assert found.off("value:out", expected * [[1.0], [5.0]]) is not None
