"""The noise floor: what a perturbed array does, that no layer escapes it, and that every ingredient is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy.special import erf, ndtr, xlogy

from gradproof import agreement, noise
from gradproof.adapter import Adapter, Forward
from gradproof.agreement import compare
from gradproof.case import Case
from gradproof.drawing import draw_each
from gradproof.dtypes import VALID_DTYPES, limits
from gradproof.examination import Examination, Subject, examine
from gradproof.kinks import one_node
from gradproof.layer import UNIT, OptionValue
from gradproof.network import Input, Network, Node
from gradproof.noise import NoiseSamples, Noisy, Rounding, observe, tensors
from gradproof.reference import LAYERS, PRECISE, NumpyReference

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
    """The tensors of the whole network that disagree, before its layers are looked at one by one."""
    forward = adapter.forward(of.network, {name: value.copy() for name, value in of.values.items()}, of.dtype)
    got = tensors(forward.outputs, adapter.backward(forward, of.cotangent.copy()))
    return [check.key for check in compare(expected_of(of), got, samples_of(of), of.dtype) if check.kind]


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
    assert set(rounded) == {0.0, smallest / 2}
    assert 0.4 < (rounded == 0.0).mean() < 0.6
    kept = rounding(dtype, to_grid)(np.full(100, smallest))
    np.testing.assert_allclose(kept, smallest, rtol=float(limits(dtype).eps), atol=0)


@BOTH_KINDS
def test_at_one_rounds_as_a_number_near_one_does(to_grid: bool) -> None:
    """To one of the neighbours on the grid there, which may be 1 itself: (1 + erf) / 2 is 0 far below 0."""
    exact = np.full(1000, 1e-6)
    rounded = np.asarray(rounding("float32", to_grid)(exact, at_one=True))
    np.testing.assert_array_equal((1.0 + rounded).astype("float32").astype(float), 1.0 + rounded)
    assert set(np.round((rounded - exact) / np.finfo("float32").eps, 1)) <= {-0.4, 0.6}
    assert (np.asarray(rounding("float32", to_grid)(np.full(100, 1e-12), at_one=True)) == 0.0).any()


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


def samples_of(of: Case, reference: NumpyReference | None = None) -> NoiseSamples:
    cotangent = of.cotangent.astype(float)
    return NoiseSamples(reference or NumpyReference(), of.network, of.exact_values, cotangent, of.dtype)


def expected_of(of: Case) -> Arrays:
    return results(NumpyReference(rows=PRECISE), of.network, of.exact_values, of.cotangent.astype(float), "float64")


@pytest.mark.parametrize("dtype", VALID_DTYPES)
def test_the_same_index_gives_the_same_samples(dtype: str) -> None:
    of = chain_case(dtype)
    expected = expected_of(of)
    few_first, many_first = samples_of(of), samples_of(of)
    for key, array in expected.items():
        many = many_first.floor(key, array, 16).spread
        np.testing.assert_array_equal(few_first.floor(key, array, 4).spread, many_first.floor(key, array, 4).spread)
        np.testing.assert_array_equal(few_first.floor(key, array, 16).spread, many)


def test_samples_differ_from_each_other() -> None:
    of = chain_case()
    array = expected_of(of)["value:out"]
    floors = [samples_of(of).floor("value:out", array, count).spread for count in (1, 2, 3, 4)]
    assert len({floor.tobytes() for floor in floors}) == 4


def test_both_kinds_of_rounding_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[bool] = []
    made = Rounding.__init__

    def recording(self: Rounding, dtype: Any, generator: Any, to_grid: bool) -> None:
        kinds.append(to_grid)
        made(self, dtype, generator, to_grid)

    monkeypatch.setattr(Rounding, "__init__", recording)
    of = chain_case()
    samples_of(of).floor("value:out", expected_of(of)["value:out"], 6)
    assert kinds == [SHIFT, GRID] * 3


def test_the_floor_grows_with_the_unit() -> None:
    floors = {}
    for dtype in ("float32", "float64"):
        of = chain_case(dtype)
        floors[dtype] = samples_of(of).floor("gradient:w", expected_of(of)["gradient:w"], 16).spread.mean()
    ratio = np.finfo("float32").eps / np.finfo("float64").eps
    assert 0.05 * ratio < floors["float32"] / floors["float64"] < ratio


class Recording(NumpyReference):
    """The reference, which keeps what its forward pass was given."""

    given: Arrays

    def forward(self, network: Network, values: Arrays, dtype: str) -> Forward:
        self.given = values
        return super().forward(network, values, dtype)


def test_indices_reach_the_reference_as_they_are() -> None:
    of = one_node(LAYERS["cross_entropy"], {}, 0.5, "float32", (2, 3))
    reference = Recording()
    samples_of(of, reference).floor("value:cross_entropy", expected_of(of)["value:cross_entropy"], 1)
    assert isinstance(reference.given["x"], Noisy)
    assert reference.given["target"] is of.exact_values["target"]
    assert reference.given["target"].dtype == np.int64


def test_floors_count_what_overflows() -> None:
    network = Network((Input("x", (2,)),), (node("out", "multiply", "x", "x"),))
    of = case(network, "float32", x=[1e30, 1.0])
    floor = samples_of(of).floor("value:out", expected_of(of)["value:out"], 4)
    assert floor.overflows.tolist() == [True, False]
    assert floor.spread[0] == 0.0
    assert floor.spread[1] > 0.0


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

    def patched(self: Rounding, dtype: Any, generator: Any, to_grid: bool) -> None:
        made(self, dtype, generator, to_grid)
        vars(self).update(values)

    return lambda patch: patch.setattr(Rounding, "__init__", patched)


def with_precise_samples(patch: pytest.MonkeyPatch) -> None:
    made = NoiseSamples.__init__

    def patched(self: NoiseSamples, reference: NumpyReference, *others: Any) -> None:
        made(self, NumpyReference(rows=PRECISE), *others)

    patch.setattr(NoiseSamples, "__init__", patched)


def with_constant(module: Any, name: str, value: Any) -> Patch:
    return lambda patch: patch.setattr(module, name, value)


def cancelling_sum(large: float = 1e8) -> tuple[Adapter, Case]:
    """A bias whose gradient is 1, the sum of much larger terms."""
    network = Network((Input("x", (3, 1)),), (node("out", "linear", "x", parameters="weight:w bias:b", features=1),))
    ones = {"x": np.ones((3, 1)), "w": np.ones((1, 1)), "b": np.zeros(1)}
    return NumpyReference(), case(network, "float32", [[large], [1.0], [-large]], **ones)


def _linear_in_order(x: Array, weight: Array) -> tuple[Array, Any]:
    return (x[..., None, :] * weight).cumsum(axis=-1)[..., -1], (x, weight, False)


def cancelling_product() -> tuple[Adapter, Case]:
    """The same terms inside a matrix product, added up one after another."""
    network = Network(
        (Input("x", (1, 3)),), (node("out", "linear", "x", parameters="weight:w", features=1, use_bias=False),)
    )
    adapter = NumpyReference(rows={"linear": (_linear_in_order, LAYERS["linear"].backward)})
    return adapter, case(network, "float32", x=[[1e8, 1.0, -1e8]], w=np.ones((1, 3)))


def cancelling_chain() -> tuple[Adapter, Case]:
    """(x + 1000) - 1000 keeps four digits."""
    network = Network(
        (Input("x", (5,)), Input("c", (1,))), (node("h", "add", "x", "c"), node("out", "subtract", "h", "c"))
    )
    return NumpyReference(), case(network, "float32", x=normal(5), c=[1000.0])


def colliding_numbers() -> tuple[Adapter, Case]:
    """Two numbers that are the same once they are rounded have no spread to divide by."""
    network = Network(
        (Input("x", (1, 2)), Input("big", (1, 2))),
        (node("h", "add", "x", "big"), node("out", "layer_norm", "h", affine=False, eps=0.0)),
    )
    return NumpyReference(), case(network, "float32", x=[[0.2, 0.3]], big=np.full((1, 2), 2.0**24))


def sum_of_the_dtypes_own_numbers() -> tuple[Adapter, Case]:
    """Terms and total are exact in float32, but not what lies between: 2^24 + 1 is 2^24."""
    return cancelling_sum(2.0**24)


def square_beyond_the_range() -> tuple[Adapter, Case]:
    network = Network((Input("x", (2,)),), (node("out", "multiply", "x", "x"),))
    return NumpyReference(), case(network, "float32", x=[1e30, 2.0])


def _flushing_product(a: Array, b: Array) -> tuple[Array, Any]:
    out = a * b
    return np.where(np.abs(out) < np.finfo(out.dtype).smallest_normal, out.dtype.type(0.0), out), (a, b)


def flushed_product() -> tuple[Adapter, Case]:
    """A subnormal number on the way, which some hardware takes for zero, grows back to an ordinary one."""
    network = Network(
        (Input("x", (3,)), Input("up", (1,))),
        (node("small", "multiply", "x", "x"), node("h", "multiply", "small", "up"), node("out", "multiply", "h", "up")),
    )
    adapter = NumpyReference(rows={"multiply": (_flushing_product, LAYERS["multiply"].backward)})
    return adapter, case(network, "float32", x=[1e-20, 2e-20, 1.0], up=[1e20])


def nearly_certain() -> tuple[Adapter, Case]:
    """Softmax rounds to 1 or to the number below it; few runs do not see both in all of forty rows."""
    network = Network(
        (Input("x", (40, 2)), Input("target", (40, 2), UNIT)),
        (node("p", "softmax", "x"), node("out", "bce", "p", "target", reduction="none")),
    )
    x = np.stack([np.linspace(16.8, 17.0, 40), np.zeros(40)], axis=1)
    return NumpyReference(), case(network, "float32", x=x, target=np.full((40, 2), 0.5))


def collapsed_row() -> tuple[Adapter, Case]:
    """Numbers that differ by less than the spacing at 2^24: one rounding makes the row constant, most do not."""
    network = Network(
        (Input("x", (1, 20)), Input("big", (1, 20))),
        (node("h", "add", "x", "big"), node("out", "layer_norm", "h", affine=False)),
    )
    x = np.linspace(0.5, 0.9, 20)[None]
    return NumpyReference(), case(network, "float32", x=x, big=np.full((1, 20), 2.0**24))


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
    "every operation is perturbed": (without_noise, cancelling_chain),
    "the operands of sums": (without_operand_noise, cancelling_sum),
    "the operands of matrix products": (without_operand_noise, cancelling_product),
    "rounding to the grid": (with_one_kind(SHIFT), colliding_numbers),
    "relative shifts": (with_one_kind(GRID), sum_of_the_dtypes_own_numbers),
    # The cast to the grid overflows by itself.
    "the dtype's range": (with_attributes(largest=math.inf, to_grid=False), square_beyond_the_range),
    "the smallest normal number": (with_attributes(smallest_normal=0.0), flushed_product),
    "escalation": (with_constant(agreement, "MANY_RUNS", agreement.FEW_RUNS), nearly_certain),
    "the verdict of ill-conditioning": (
        with_constant(agreement, "LOOSE_THRESHOLD", agreement.THRESHOLD),
        collapsed_row,
    ),
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
    (expected,) = of.under({}).expected["gradient:x"]
    assert expected == pytest.approx(float(of.cotangent[0]) * 4.0 * math.exp(-60.0), rel=1e-15)
    assert adapter.backward(adapter.forward(of.network, of.values, of.dtype), of.cotangent)["x"] == 0.0
    assert examined(adapter, of).agrees


def test_honest_errors_that_add_up_are_no_fault_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, of = cancelling_chain()
    without_noise(monkeypatch)
    assert disagreeing(adapter, of) == ["value:out"]
    found = examined(adapter, of)
    assert (found.agrees, found.culprits) == (True, ())
    assert {check.key: check.ill_conditioned for check in found.checks}["value:out"] == 5


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_the_root_of_squares_would_be_a_wrong_floor(scale: float) -> None:
    network = Network((Input("x", (5,)), Input("c", (1,))), (node("out", "multiply", "x", "c"),))
    of = case(network, "float64", x=normal(5), c=[scale])
    expected = expected_of(of)["value:out"]
    samples = samples_of(of)
    spread = samples.floor("value:out", expected, 8).spread
    unit = np.finfo("float64").eps * np.abs(expected)
    assert ((0.1 * unit < spread) & (spread < 2.0 * unit)).all()
    with np.errstate(all="ignore"):
        # The spread of the first run is its deviation alone.
        square = samples.floor("value:out", 1.01 * expected, 1).spread ** 2
    assert set(square) <= {0.0, np.inf}


def test_ill_conditioned_and_unverifiable_elements_are_counted() -> None:
    ill = examined(*collapsed_row()).checks
    assert {check.key: check.ill_conditioned for check in ill}["gradient:h"] == 20
    lost = examined(*square_beyond_the_range()).checks
    assert {check.key: check.unverifiable for check in lost} == {"value:out": 1, "gradient:out": 0, "gradient:x": 0}
