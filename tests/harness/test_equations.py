"""The local equations of a run: what each tensor must be, given the numbers that the adapter itself had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from gradproof.model.case import Case
from gradproof.model.dtypes import HALF
from gradproof.model.layer import index_domain
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import OptionValue
from gradproof.model.tensors import Role, Tensor, gradient_of, tensors, value_of
from gradproof.reference import LAYERS, PRECISE, NumpyReference
from gradproof.reference.algorithms import Algorithm
from gradproof.verdict.agreement import TensorCheck, judge
from gradproof.verdict.equations import ARITHMETICS, EVERY, INSIDE, STORED, Equations, usable
from gradproof.verdict.judging import Subject

Array = np.ndarray[Any, Any]
Got = dict[str, Any]


def node(name: str, layer: str, *inputs: str, parameters: str = "", **options: OptionValue) -> Node:
    """A node; its parameters are written "slot:name slot:name"."""
    pairs = dict(pair.split(":") for pair in parameters.split())
    return Node.of(name, LAYERS[layer], *inputs, parameters=pairs, options=options)


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


# "h" has three readers, one of which reads it twice; "w" has two.
FAN = Network(
    (Input("x", (2, 3)),),
    (
        node("h", "linear", "x", parameters="weight:w", features=3, use_bias=False),
        node("square", "multiply", "h", "h"),
        node("bent", "tanh", "h"),
        node("sum", "add", "square", "bent"),
        node("line", "linear", "sum", parameters="weight:w", features=3, use_bias=False),
        node("out", "subtract", "line", "h"),
    ),
)


def fan_case(dtype: str = "float64", cotangent: Any = None, **values: Any) -> Case:
    numbers = {"x": normal(2, 3), "w": normal(3, 3, seed=2)} | values
    seed = normal(2, 3, seed=3) if cotangent is None else cotangent
    return Case(FAN, dtype, {k: np.asarray(v, dtype) for k, v in numbers.items()}, np.asarray(seed, dtype))


def run(of: Case, adapter: NumpyReference | None = None) -> Got:
    adapter = adapter or NumpyReference()
    forward = adapter.forward(of.network, of.values, of.dtype)
    gradients = adapter.backward(forward, of.cotangent)
    return tensors(forward.outputs, {name: gradients[name] for name in of.network.differentiable})


def equations(of: Case, got: Mapping[str, Any], fused: bool = False) -> Equations:
    return Equations(of, got, NumpyReference(rows=PRECISE), NumpyReference(), fused)


def checks(of: Case, got: Mapping[str, Any]) -> dict[str, TensorCheck]:
    return {each.key: judge(each, got.get(each.key), of.dtype) for each in equations(of, got)}


def wrong(of: Case, got: Mapping[str, Any]) -> dict[str, str]:
    return {key: check.kind for key, check in checks(of, got).items() if check.kind}


# What each tensor must be.


def test_there_is_an_equation_for_every_tensor_in_the_order_of_the_sweeps() -> None:
    of = fan_case()
    found = equations(of, run(of))
    values = [value_of(each.name) for each in FAN.nodes]
    back = [gradient_of(each.name) for each in reversed(FAN.nodes)]
    assert [each.key for each in found] == [*values, *back, gradient_of("x"), gradient_of("w")]
    assert gradient_of("w") in found
    assert gradient_of("other") not in found
    assert found[gradient_of("w")].key == gradient_of("w")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_right_run_satisfies_them_all(dtype: str) -> None:
    of = fan_case(dtype)
    assert wrong(of, run(of)) == {}


def test_an_equation_holds_the_adapters_own_numbers() -> None:
    """Whatever they are: h is not x w here."""
    of = fan_case()
    own = run(of) | {value_of("h"): normal(2, 3, seed=8), gradient_of("square"): normal(2, 3, seed=9)}
    found = equations(of, own)
    np.testing.assert_array_equal(found[value_of("square")].expected, own[value_of("h")] ** 2)
    np.testing.assert_array_equal(found[value_of("bent")].expected, np.tanh(own[value_of("h")]))
    np.testing.assert_array_equal(found[value_of("h")].expected, of.values["x"] @ of.values["w"].T)
    terms = [
        own[gradient_of("square")] * own[value_of("h")],
        own[gradient_of("square")] * own[value_of("h")],
        own[gradient_of("bent")] * (1.0 - np.tanh(own[value_of("h")]) ** 2),
        -own[gradient_of("out")],
    ]
    np.testing.assert_allclose(found[gradient_of("h")].expected, sum(terms), rtol=1e-12)
    np.testing.assert_allclose(found[gradient_of("h")].size, sum(map(np.abs, terms)), rtol=1e-12)


def test_the_parts_of_a_sum_are_its_readers_once_for_each_time_they_read() -> None:
    of = fan_case()
    found = equations(of, run(of))

    def parts(key: Tensor) -> list[str]:
        return [equation.node.name for equation, _ in found[key].parts]

    assert parts(gradient_of("h")) == ["square", "square", "bent", "out"]
    assert len({argument for _, argument in found[gradient_of("h")].parts[:2]}) == 2
    assert parts(gradient_of("w")) == ["h", "line"]
    assert parts(gradient_of("x")) == ["h"]
    assert [(e.node.name, argument) for e, argument in found[value_of("square")].parts] == [("square", None)]
    assert (parts(gradient_of("out")), found[gradient_of("out")].expected.tolist()) == ([], of.cotangent.tolist())


def test_the_terms_of_a_node_are_those_of_its_own_pair() -> None:
    of = fan_case()
    own = run(of)
    square = equations(of, own).by_node["square"]
    np.testing.assert_array_equal(square.dout, own[gradient_of("square")])
    np.testing.assert_array_equal(square.reads["h"], own[value_of("h")])
    assert len(square.terms) == 2
    for term in square.terms.values():
        np.testing.assert_array_equal(term, own[gradient_of("square")] * own[value_of("h")])


def spoilt(layer: str, forward: bool = False) -> NumpyReference:
    """The reference, one layer of which is off by 1 part in 10,000."""
    row = LAYERS[layer]

    def wrong_forward(*arrays: Array, **options: Any) -> tuple[Array, Any]:
        out, cache = row.forward(*arrays, **options)
        return out * out.dtype.type(1.0001), cache

    def wrong_backward(dout: Array, cache: Any) -> Mapping[str, Array]:
        return {name: each * each.dtype.type(1.0001) for name, each in row.backward(dout, cache).items()}

    pair: Any = (wrong_forward, row.backward) if forward else (row.forward, wrong_backward)
    return NumpyReference(rows={layer: pair})


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("adapter", "keys"),
    [
        (spoilt("tanh", forward=True), {value_of("bent")}),
        (spoilt("tanh"), {gradient_of("h")}),
        (spoilt("subtract"), {gradient_of("line"), gradient_of("h")}),
        (spoilt("multiply", forward=True), {value_of("square")}),
        (spoilt("add"), {gradient_of("square"), gradient_of("bent")}),
        (spoilt("linear"), {gradient_of("x"), gradient_of("w"), gradient_of("sum")}),
    ],
    ids=["tanh forward", "tanh", "subtract", "multiply forward", "add", "linear"],
)
def test_an_error_breaks_the_equation_where_it_is_made_and_no_other(
    adapter: NumpyReference, keys: set[str], dtype: str
) -> None:
    """All that follows from a wrong number follows rightly."""
    of = fan_case(dtype)
    assert set(wrong(of, run(of, adapter))) == keys


SUMS: dict[str, Callable[[Equations], Array]] = {
    "one reading of two is lost": lambda e: -next(iter(e.by_node["square"].terms.values())),
    "a reader is lost": lambda e: -e.by_node["bent"].terms["x"],
    "a reader counts twice": lambda e: e.by_node["bent"].terms["x"],
    "a sign is wrong": lambda e: -2.0 * e.by_node["bent"].terms["x"],
}


@pytest.mark.parametrize("change", SUMS.values(), ids=SUMS)
def test_a_wrong_sum_breaks_its_own_equation(change: Callable[[Equations], Array]) -> None:
    of = fan_case()
    own = run(of)
    own[gradient_of("h")] = own[gradient_of("h")] + change(equations(of, own))
    assert gradient_of("h") in wrong(of, own)


def test_a_use_of_a_shared_parameter_that_is_lost_breaks_its_equation() -> None:
    of = fan_case()
    own = run(of)
    own[gradient_of("w")] = own[gradient_of("w")] - equations(of, own).by_node["h"].terms["weight"]
    assert wrong(of, own) == {gradient_of("w"): "gradient"}


def test_a_cotangent_that_is_not_the_given_one_is_wrong() -> None:
    of = fan_case()
    other = fan_case(cotangent=of.cotangent * 1.5)
    assert wrong(of, run(other)) == {gradient_of("out"): "gradient"}


def test_integers_have_no_gradient_and_reach_the_layer_as_they_are() -> None:
    network = Network(
        (Input("x", (2, 3)), Input("target", (2,), index_domain(3))),
        (node("h", "tanh", "x"), node("out", "cross_entropy", "h", "target")),
    )
    values = {"x": normal(2, 3), "target": np.array([2, 0])}
    of = Case(network, "float64", values, np.array(1.5))
    found = equations(of, run(of))
    assert gradient_of("target") not in found
    assert found.by_node["out"].reads["target"].dtype == np.int64
    assert wrong(of, run(of)) == {}


# What is not there.


NOT_THERE: dict[str, Any] = {
    "None": None,
    "another shape": np.ones((3, 2)),
    "no array": [[1.0, 2.0]],
    "integers": np.ones((2, 3), int),
}


@pytest.mark.parametrize("given", NOT_THERE.values(), ids=NOT_THERE)
def test_a_value_that_is_not_there_makes_open_what_depends_on_it(given: Any) -> None:
    of = fan_case()
    own = run(of) | {value_of("square"): given}
    found = equations(of, own)
    assert {each.key for each in found if each.open} == {value_of("sum"), gradient_of("square"), gradient_of("bent")}
    assert wrong(of, own).keys() == {value_of("square")}
    own |= {value_of("h"): given}
    assert {each.key for each in equations(of, own) if each.open} == {
        value_of("square"),
        value_of("bent"),
        value_of("out"),
        value_of("sum"),
        gradient_of("line"),
        gradient_of("square"),
        gradient_of("bent"),
        gradient_of("h"),
    }


@pytest.mark.parametrize("given", NOT_THERE.values(), ids=NOT_THERE)
def test_a_gradient_that_is_not_there_makes_open_what_its_node_sends_back(given: Any) -> None:
    of = fan_case()
    own = run(of) | {gradient_of("sum"): given}
    found = equations(of, own)
    assert {each.key for each in found if each.open} == {gradient_of("bent"), gradient_of("square")}
    assert wrong(of, own).keys() == {gradient_of("sum")}


def test_what_is_open_is_neither_right_nor_wrong() -> None:
    of = fan_case()
    own = run(of) | {gradient_of("sum"): None, gradient_of("bent"): 5.0 * normal(2, 3)}
    found = checks(of, own)
    assert (found[gradient_of("bent")].kind, found[gradient_of("bent")].unverifiable) == (None, 6)
    own[gradient_of("sum")] = run(of)[gradient_of("sum")]
    assert checks(of, own)[gradient_of("bent")].kind == "gradient"


def test_what_is_not_there_is_taken_to_be_right_further_on() -> None:
    """So that the numbers behind it are of a sensible size."""
    of = fan_case()
    own = run(of)
    found = equations(of, own | {value_of("square"): None, gradient_of("sum"): None})
    np.testing.assert_array_equal(found.by_node["sum"].reads["square"], own[value_of("h")] ** 2)
    np.testing.assert_allclose(found[gradient_of("bent")].expected, own[gradient_of("sum")], rtol=1e-12)


def test_another_dtype_is_a_fault_of_its_own_and_numbers_to_go_on_with() -> None:
    of = fan_case()
    own = run(of)
    own[value_of("square")] = own[value_of("square")].astype("float32")
    found = wrong(of, own)
    assert found[value_of("square")] == "dtype"
    assert not any(each.open for each in equations(of, own))


def test_numbers_of_the_right_shape_are_usable() -> None:
    assert usable(np.ones((2, 3)), (2, 3))
    assert usable(np.float32(1.0), ())
    assert usable(np.ones(2, "bfloat16"), (2,))
    assert not usable(np.ones(2), (3,))
    assert not usable(np.ones(2, int), (2,))
    assert not usable(1.0, ())
    assert not usable(None, ())


# More digits than were given.


def test_a_fused_adapter_may_go_on_with_more_digits_than_it_gives() -> None:
    """(x + 1000) - 1000, computed with all digits, the sum between them given rounded."""
    network = Network(
        (Input("x", (5,)), Input("c", (1,))), (node("h", "add", "x", "c"), node("out", "subtract", "h", "c"))
    )
    x, c, ones = normal(5).astype("float32"), np.array([1000.0], "float32"), np.ones(5, "float32")
    of = Case(network, "float32", {"x": x, "c": c}, ones)
    own = run(of)
    for fused in (False, True):
        assert judge(equations(of, own, fused)[value_of("out")], own[value_of("out")], "float32").kind is None
    assert (own[value_of("out")] != x).all()
    assert judge(equations(of, own)[value_of("out")], x, "float32").kind == "value"
    assert judge(equations(of, own, fused=True)[value_of("out")], x, "float32").kind is None


@pytest.mark.parametrize("dtype", HALF)
def test_fused_widens_the_floor_of_what_reads_a_node(dtype: str) -> None:
    of = fan_case(dtype)
    exact = run(fan_case("float64", **of.exact_values, cotangent=of.cotangent.astype(float)))
    own = {key: array.astype(dtype) for key, array in exact.items()}
    plain, fused = equations(of, own), equations(of, own, fused=True)
    ratio = {each.key: fused[each.key].floor(8, {}).spread.mean() for each in plain if each.parts}
    for key in ratio:
        ratio[key] /= plain[key].floor(8, {}).spread.mean()
    assert min(ratio[value_of("square")], ratio[gradient_of("h")]) > 100.0
    assert ratio[value_of("h")] == 1.0


def test_an_adapter_says_that_it_is_fused() -> None:
    class Fused(NumpyReference):
        fused = True

    of = fan_case("float32")
    own = run(of)
    plain, fused = (Subject(each, {}).equations(of, own) for each in (NumpyReference(), Fused()))
    assert fused[value_of("square")].floor(8, {}).spread.mean() > plain[value_of("square")].floor(8, {}).spread.mean()
    np.testing.assert_array_equal(
        plain[value_of("square")].floor(8, {}).spread, equations(of, own)[value_of("square")].floor(8, {}).spread
    )


# NaN and infinities.


@pytest.mark.parametrize("given", [np.nan, np.inf, -np.inf])
def test_what_is_computed_from_numbers_that_are_not_finite_is_told(given: float) -> None:
    of = fan_case(x=np.array([[given, 1.0, 2.0], [0.5, -1.0, 0.25]]))
    own = run(of)
    found = equations(of, own)
    assert {each.key for each in found if each.finite} == {gradient_of("out")}
    assert wrong(of, own) == {}
    # The other row of the batch has met none of it.
    for key in (value_of("h"), value_of("square"), value_of("out"), gradient_of("h")):
        spoilt_row = {key: own[key] * np.array([[1.0], [1.001]])}
        assert key in wrong(of, own | spoilt_row)


def test_a_cotangent_that_is_not_finite_spoils_gradients_only() -> None:
    of = fan_case(cotangent=np.array([[np.inf, 1.0, 2.0], [0.5, -1.0, 0.25]]))
    own = run(of)
    found = equations(of, own)
    assert all(each.finite for each in found if each.key.role is Role.VALUE)
    assert not found[gradient_of("line")].finite
    assert wrong(of, own) == {}


def test_a_value_that_is_nan_has_no_derivative() -> None:
    """What a framework's relu hands back at NaN is its own affair."""
    network = Network((Input("x", (3,)),), (node("n", "tanh", "x"), node("out", "relu", "n")))
    of = Case(network, "float64", {"x": np.array([1.5, 2.0, 3.0])}, np.array([0.5, -1.5, 2.0]))
    own = run(of)
    nan = own[value_of("n")] * [np.nan, 1.0, 1.0]
    own |= {value_of("n"): nan, value_of("out"): nan}
    statement = equations(of, own)[gradient_of("n")]
    assert (statement.undefined.tolist(), statement.finite) == ([True, False, False], False)
    for slope in (0.0, 1.0, 7.0, np.nan):
        check = judge(statement, np.array([slope, -1.5, 2.0]), "float64")
        assert check.kind is None
    assert judge(statement, np.array([7.0, -1.5, 2.0]), "float64").unverifiable == 1
    assert judge(statement, np.array([0.0, -1.5, 2.1]), "float64").kind == "gradient"


@pytest.mark.parametrize(("layer", "options"), [("sort", {}), ("top_k", {"k": 3})])
def test_in_an_order_nan_has_no_place(layer: str, options: dict[str, OptionValue]) -> None:
    """Frameworks put it first or last; where the others then lie, and whose gradients they get, hangs on it."""
    network = Network((Input("x", (3,)),), (node("n", "tanh", "x"), node("out", layer, "n", **options)))
    of = Case(network, "float64", {"x": np.array([1.5, 2.0, 3.0])}, np.ones(3))
    right, own = run(of), run(of)
    own |= {value_of("n"): own[value_of("n")] * [np.nan, 1.0, 1.0]}
    for key in (value_of("out"), gradient_of("n")):
        assert np.all(equations(of, own)[key].undefined)
        assert not np.any(equations(of, right)[key].undefined)


def test_a_nan_that_the_adapter_makes_is_wrong_where_it_makes_it() -> None:
    of = fan_case()
    own = run(of)
    own[value_of("bent")] = own[value_of("bent")] * np.array([[np.nan, 1.0, 1.0]] * 2)
    assert wrong(of, own)[value_of("bent")] == "nonfinite"


def test_behind_an_overflow_the_equations_go_on_with_what_the_adapter_has() -> None:
    """1 / (x x) is 0 where x x is infinite, whatever it would be in float64."""
    network = Network((Input("x", (2,)),), (node("h", "multiply", "x", "x"), node("out", "reciprocal", "h")))
    of = Case(network, "float32", {"x": np.array([1e25, 2.0], "float32")}, np.ones(2, "float32"))
    own = run(of)
    assert (own[value_of("h")][0], own[value_of("out")][0]) == (np.inf, 0.0)
    assert {key: check.unverifiable for key, check in checks(of, own).items()}[value_of("out")] == 0
    assert wrong(of, own) == {}
    spoilt_value = own | {value_of("out"): np.array([1e-3, 0.25], "float32")}
    assert wrong(of, spoilt_value) == {value_of("out"): "value"}


# The classes of arithmetic.


@pytest.mark.parametrize("dtype", HALF)
def test_only_every_rounds_single_operations_to_a_coarse_dtype(dtype: str) -> None:
    found = {name: each.operations(np.dtype(dtype)) for name, each in ARITHMETICS.items()}
    assert found == {"inside": np.float32, "stored": np.float32, "every": np.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_in_fine_dtypes_operations_round_to_the_dtype(dtype: str) -> None:
    assert {each.operations(np.dtype(dtype)) for each in (INSIDE, STORED, EVERY)} == {np.dtype(dtype)}


def test_classes_are_those_of_the_readers_one_by_one() -> None:
    of = fan_case("bfloat16")
    exact = run(fan_case("float64", **of.exact_values, cotangent=of.cotangent.astype(float)))
    statement = equations(of, {key: array.astype("bfloat16") for key, array in exact.items()})[gradient_of("w")]
    fine, one, both = (
        statement.floor(8, classes).spread.mean() for classes in ({}, {"h": EVERY}, {"h": EVERY, "line": EVERY})
    )
    assert fine < 0.01 * one
    assert one < both


def test_another_formula_has_a_floor_of_its_own() -> None:
    """1 - tanh^2 keeps no digit at 10, in float32."""
    network = Network((Input("x", (2,)),), (node("out", "tanh", "x"),))
    of = Case(network, "float32", {"x": np.array([10.0, 0.5], "float32")}, np.ones(2, "float32"))
    precise = Algorithm("precise", PRECISE["tanh"])
    statement = equations(of, run(of))[gradient_of("x")]
    textbook, other = (statement.floor(8, {}, rows).spread[0] for rows in ({}, {"out": precise}))
    assert other < 1e-3 * textbook
    np.testing.assert_array_equal(statement.floor(8, {}).spread[0], textbook)


# Fused programs.


def chain(*layers: str) -> Case:
    """x[6] through these layers."""
    names = ["x", *(f"h{k}" for k in range(len(layers)))]
    options = {"reshape": {"shape": (2, 3)}, "reduce_var": {"axes": (0,), "ddof": 1}}
    nodes = [
        node(name, layer, source, **options.get(layer, {}))  # type: ignore[arg-type]
        for name, layer, source in zip(names[1:], layers, names, strict=False)
    ]
    network = Network((Input("x", (6,)),), tuple(nodes))
    return Case(
        network, "float32", {"x": normal(6).astype("float32")}, normal(*network.shapes[names[-1]]).astype("float32")
    )


def spread(of: Case, key: Tensor, fused: bool) -> Array:
    """How far rounding can move a tensor."""
    equations = Equations(of, run(of), NumpyReference(), NumpyReference(), fused)
    return equations[key].floor(8, {}).spread


@pytest.mark.parametrize("layers", [("exp", "abs"), ("exp", "reshape", "abs"), ("exp", "reshape", "flatten", "abs")])
def test_a_fused_program_may_go_on_with_another_value_than_it_gave(layers: tuple[str, ...]) -> None:
    """That of abs is exact but for what it reads, which may have been rounded otherwise; through a reshape, too."""
    last = value_of(f"h{len(layers) - 1}")
    assert not spread(chain(*layers), last, fused=False).any()
    assert spread(chain(*layers), last, fused=True).all()


@pytest.mark.parametrize("layers", [("identity", "exp"), ("identity", "reshape", "exp")])
def test_a_fused_program_may_go_on_with_another_gradient_than_it_gave(layers: tuple[str, ...]) -> None:
    assert not spread(chain(*layers), gradient_of("x"), fused=False).any()
    assert spread(chain(*layers), gradient_of("x"), fused=True).all()


def test_what_was_given_to_a_fused_program_is_no_other_in_it() -> None:
    assert not spread(chain("identity"), value_of("h0"), fused=True).any()
    assert not spread(chain("identity"), gradient_of("x"), fused=True).any()
