"""The reference as an adapter: its walk over whole networks, against central differences of the whole network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gradproof.model.layer import UNIT, index_domain
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import OptionValue
from gradproof.reference import LAYERS, NumpyReference

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

STEP = 2.0**-13
X = Input("x", (2, 3))


def node(name: str, layer: str, *inputs: str, parameters: str = "", **options: OptionValue) -> Node:
    """A node; its parameters are written "slot:name slot:name"."""
    pairs = dict(pair.split(":") for pair in parameters.split())
    return Node.of(name, LAYERS[layer], *inputs, parameters=pairs, options=options)


def linear(name: str, source: str, parameters: str, features: int) -> Node:
    return node(name, "linear", source, parameters=parameters, features=features, use_bias="bias" in parameters)


def network(*parts: Input | Node) -> Network:
    inputs = tuple(part for part in parts if isinstance(part, Input))
    return Network(inputs, tuple(part for part in parts if isinstance(part, Node)))


NETWORKS: dict[str, Network] = {
    "chain": network(
        X,
        Input("target", (2, 2)),
        linear("hidden", "x", "weight:w1 bias:b1", 4),
        node("active", "tanh", "hidden"),
        linear("prediction", "active", "weight:w2 bias:b2", 2),
        node("loss", "half_squared_error", "prediction", "target"),
    ),
    "fan-out": network(
        X,
        linear("h", "x", "weight:w", 3),
        node("left", "tanh", "h"),
        node("right", "softplus", "h"),
        node("out", "subtract", "left", "right"),
    ),
    "fan-out of three, joined at once": network(
        X,
        node("h", "tanh", "x"),
        node("a", "sigmoid", "h"),
        node("b", "silu", "h"),
        node("out", "concatenate", "h", "a", "b", axis=0),
    ),
    "residual": network(
        X,
        linear("h", "x", "weight:w bias:b", 3),
        node("active", "gelu", "h"),
        node("sum", "add", "x", "active"),
        node("out", "layer_norm", "sum", parameters="weight:scale bias:shift"),
    ),
    "the input squared": network(X, node("out", "multiply", "x", "x")),
    "the input cubed": network(X, node("square", "multiply", "x", "x"), node("out", "multiply", "square", "x")),
    "a node twice in one loss": network(
        X, node("h", "tanh", "x"), node("s", "sigmoid", "h"), node("out", "mse", "s", "h")
    ),
    "a node three times in one concatenation": network(
        X, node("h", "tanh", "x"), node("out", "concatenate", "h", "h", "h")
    ),
    "an input minus itself": network(X, node("out", "subtract", "x", "x")),
    "a weight in two nodes": network(
        X,
        linear("first", "x", "weight:w bias:b", 3),
        node("active", "tanh", "first"),
        linear("out", "active", "weight:w bias:b", 3),
    ),
    "a weight in two branches": network(
        X,
        Input("y", (4, 3)),
        linear("of_x", "x", "weight:w", 2),
        linear("of_y", "y", "weight:w", 2),
        node("out", "concatenate", "of_x", "of_y", axis=0),
    ),
    "a parameter in two slots": network(X, node("out", "layer_norm", "x", parameters="weight:p bias:p")),
    "a parameter in two slots of two layers": network(
        X,
        linear("h", "x", "weight:w bias:p", 3),
        node("out", "layer_norm", "h", parameters="weight:p bias:p"),
    ),
    "several inputs": network(
        X,
        Input("row", (3,)),
        Input("column", (2, 1)),
        node("sum", "add", "x", "row"),
        node("scaled", "multiply", "column", "sum"),
        node("out", "concatenate", "scaled", "column", axis=1),
    ),
    "diamond of diamonds": network(
        X,
        node("top", "tanh", "x"),
        node("a", "sigmoid", "top"),
        node("b", "multiply", "top", "a"),
        node("middle", "add", "a", "b"),
        node("c", "softplus", "middle"),
        node("d", "multiply", "middle", "top"),
        node("out", "subtract", "c", "d"),
    ),
    "classes": network(
        X,
        Input("target", (2,), index_domain(4)),
        linear("logits", "x", "weight:w bias:b", 4),
        node("loss", "cross_entropy", "logits", "target"),
    ),
    "probabilities": network(
        X,
        Input("target", (2, 3), UNIT),
        node("p", "sigmoid", "x"),
        node("loss", "bce", "p", "target", reduction="sum"),
    ),
    "a loss inside": network(
        X,
        Input("target", (2, 3)),
        node("error", "mse", "x", "target"),
        node("out", "multiply", "error", "x"),
    ),
}

EACH_NETWORK = pytest.mark.parametrize("each", NETWORKS.values(), ids=list(NETWORKS))


def drawn(each: Network, dtype: str = "float64") -> Arrays:
    rng = np.random.default_rng(20240229)
    draw = {
        "real": lambda given: rng.normal(size=given.shape).astype(dtype),
        "unit": lambda given: rng.uniform(0.1, 0.9, given.shape).astype(dtype),
        "index": lambda given: rng.integers(0, given.domain.classes, given.shape),
    }
    values = {given.name: draw[given.domain.kind](given) for given in each.inputs}
    return values | {name: rng.normal(size=shape).astype(dtype) for name, shape in each.parameters.items()}


def cotangent_of(each: Network, dtype: str = "float64") -> Array:
    return np.random.default_rng(7).normal(size=each.shapes[each.output]).astype(dtype)


def gradients_of(each: Network, values: Mapping[str, Array], adapter: NumpyReference | None = None) -> Arrays:
    adapter = adapter or NumpyReference()
    return adapter.backward(adapter.forward(each, values, "float64"), cotangent_of(each))


def cut(each: Network, name: str) -> Network:
    """What follows a node, which becomes an input."""
    given = (*each.inputs, Input(name, each.shapes[name], each.domain(name)))
    needed, kept = {each.output}, []
    for later in reversed(each.nodes):
        if later.name in needed and later.name != name:
            needed.update(later.inputs)
            kept.append(later)
    return Network(tuple(one for one in given if one.name in needed), tuple(reversed(kept)))


def by_differences(each: Network, values: Mapping[str, Array], name: str) -> Array:
    """The gradient of sum(cotangent * output), one element at a time, at a step and at half of it, extrapolated."""

    def total(index: tuple[int, ...], step: float) -> float:
        moved = values[name].copy()
        moved[index] += step
        outputs = NumpyReference().forward(each, dict(values) | {name: moved}, "float64").outputs
        return float((cotangent_of(each) * outputs[each.output]).sum())

    def slope(index: tuple[int, ...], step: float) -> float:
        return (total(index, step) - total(index, -step)) / (2.0 * step)

    gradient = np.empty(values[name].shape)
    for index in np.ndindex(gradient.shape):
        gradient[index] = (4.0 * slope(index, STEP / 2) - slope(index, STEP)) / 3.0
    return gradient


def assert_close(got: Array, wanted: Array, name: str) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9, err_msg=name)


def assert_follows_differences(each: Network, gradients: Mapping[str, Array]) -> None:
    values = drawn(each)
    for name in (*(one.name for one in each.inputs if one.domain.floating), *each.parameters):
        assert_close(gradients[name], by_differences(each, values, name), name)
    outputs = NumpyReference().forward(each, values, "float64").outputs
    for name in (inner.name for inner in each.nodes[:-1]):
        after = cut(each, name)
        assert_close(gradients[name], by_differences(after, values | {name: outputs[name]}, name), name)
    np.testing.assert_array_equal(gradients[each.output], cotangent_of(each))


@EACH_NETWORK
def test_gradients_follow_differences(each: Network) -> None:
    assert_follows_differences(each, gradients_of(each, drawn(each)))


@EACH_NETWORK
def test_one_gradient_per_differentiable_name(each: Network) -> None:
    gradients = gradients_of(each, drawn(each))
    assert set(gradients) == set(each.differentiable)
    assert {name: gradient.shape for name, gradient in gradients.items()} == {
        name: each.shapes[name] for name in each.differentiable
    }


@EACH_NETWORK
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_dtype_asked_for_is_the_dtype_returned(each: Network, dtype: str) -> None:
    reference = NumpyReference()
    forward = reference.forward(each, drawn(each, dtype), dtype)
    gradients = reference.backward(forward, cotangent_of(each, dtype))
    assert list(forward.outputs) == [one.name for one in each.nodes]
    for name, array in (*forward.outputs.items(), *gradients.items()):
        assert (type(array), array.dtype) == (np.ndarray, dtype), name


@EACH_NETWORK
def test_float32_rounds_what_float64_gives(each: Network) -> None:
    narrow = drawn(each, "float32")
    reference = NumpyReference()
    gradients = reference.backward(reference.forward(each, narrow, "float32"), cotangent_of(each, "float32"))
    wide = gradients_of(each, narrow)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, wide[name], rtol=1e-4, atol=1e-5, err_msg=name)


@EACH_NETWORK
def test_nothing_is_written_to(each: Network) -> None:
    values, cotangent = drawn(each), np.asarray(cotangent_of(each))
    given = copy.deepcopy((values, cotangent))
    reference = NumpyReference()
    first = copy.deepcopy(reference.backward(reference.forward(each, values, "float64"), cotangent))
    assert_identical(values | {"cotangent": cotangent}, given[0] | {"cotangent": given[1]})
    for array in (*values.values(), cotangent):
        array.flags.writeable = False
    assert_identical(reference.backward(reference.forward(each, values, "float64"), cotangent), first)


@EACH_NETWORK
def test_backward_can_be_repeated(each: Network) -> None:
    """Also with another cotangent and another forward pass in between, and the tape belongs to one forward pass."""
    reference, values, cotangent = NumpyReference(), drawn(each), cotangent_of(each)
    tape = reference.forward(each, values, "float64")
    first = copy.deepcopy(reference.backward(tape, cotangent))
    other = {name: value if value.dtype == np.int64 else 0.5 * value for name, value in values.items()}
    reference.backward(reference.forward(each, other, "float64"), cotangent)
    reference.backward(tape, -3.0 * cotangent)
    assert_identical(reference.backward(tape, cotangent), first)


def assert_identical(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_a_square_by_hand() -> None:
    each = NETWORKS["the input squared"]
    values = drawn(each)
    np.testing.assert_array_equal(gradients_of(each, values)["x"], 2.0 * values["x"] * cotangent_of(each))


def test_an_input_minus_itself_by_hand() -> None:
    each = NETWORKS["an input minus itself"]
    np.testing.assert_array_equal(gradients_of(each, drawn(each))["x"], np.zeros((2, 3)))


def test_a_shared_weight_adds_up_what_separate_weights_get() -> None:
    shared = NETWORKS["a weight in two branches"]
    of_x, of_y, out = shared.nodes
    apart = Network(shared.inputs, (of_x, linear("of_y", "y", "weight:other", 2), out))
    values = drawn(shared)
    separate = gradients_of(apart, values | {"other": values["w"]})
    together = gradients_of(shared, values)
    assert of_y.parameters == of_x.parameters
    np.testing.assert_allclose(together["w"], separate["w"] + separate["other"], rtol=1e-15, atol=1e-15)


RELU = network(X, node("out", "relu", "x"))
MAE = network(X, Input("target", (2, 3)), node("out", "mae", "x", "target", reduction="none"))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_conventions_choose_the_derivative_at_a_kink(weight: float) -> None:
    cotangent, at_kink = cotangent_of(RELU), {"x": np.zeros((2, 3))}
    relu = gradients_of(RELU, at_kink, NumpyReference(conventions={"relu": {"at_zero": weight}}))
    np.testing.assert_array_equal(relu["x"], weight * cotangent)
    mae = gradients_of(
        MAE, at_kink | {"target": np.zeros((2, 3))}, NumpyReference(conventions={"mae": {"at_target": weight}})
    )
    np.testing.assert_array_equal(mae["x"], (2.0 * weight - 1.0) * cotangent)


def test_conventions_of_one_layer_leave_the_others() -> None:
    values = {"x": np.zeros((2, 3))}
    default = gradients_of(RELU, values)
    assert_identical(gradients_of(RELU, values, NumpyReference(conventions={"elu": {"at_zero": 1.0}})), default)
    chosen = gradients_of(RELU, values, NumpyReference(conventions={"relu": {"at_zero": 1.0}}))
    assert not np.array_equal(chosen["x"], default["x"])


def test_conventions_change_nothing_away_from_the_kink() -> None:
    values = drawn(RELU)
    chosen = gradients_of(RELU, values, NumpyReference(conventions={"relu": {"at_zero": 1.0}}))
    assert_identical(chosen, gradients_of(RELU, values))


def identity_like_tanh(dout: Array, cache: Array) -> Arrays:
    return {"x": dout}


def test_rows_replace_one_layer_wherever_it_stands() -> None:
    each, values = NETWORKS["fan-out"], drawn(NETWORKS["fan-out"])
    wrong = NumpyReference(rows={"tanh": (LAYERS["tanh"].forward, identity_like_tanh)})
    planted, right = gradients_of(each, values, wrong), gradients_of(each, values)
    cotangent = cotangent_of(each)
    np.testing.assert_allclose(planted["h"] - right["h"], cotangent * np.tanh(values["x"] @ values["w"].T) ** 2)
    for name in ("left", "right", "out"):
        np.testing.assert_array_equal(planted[name], right[name], err_msg=name)
    assert not np.allclose(planted["w"], right["w"])
    assert_identical(gradients_of(each, values), right)


def test_rows_replace_the_forward_function_too() -> None:
    each, values = NETWORKS["fan-out"], drawn(NETWORKS["fan-out"])
    pair = (lambda x: (2.0 * x, None), lambda dout, cache: {"x": 2.0 * dout})
    outputs = NumpyReference(rows={"tanh": pair}).forward(each, values, "float64").outputs
    np.testing.assert_array_equal(outputs["left"], 2.0 * outputs["h"])


def test_differences_refuse_a_wrong_row() -> None:
    each = NETWORKS["fan-out"]
    wrong = NumpyReference(rows={"tanh": (LAYERS["tanh"].forward, identity_like_tanh)})
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_follows_differences(each, gradients_of(each, drawn(each), wrong))


def overwriting_gradients(each: Network, values: Arrays) -> Arrays:
    """A walk that keeps what the last reader sends instead of adding up: the fan-out mistake."""
    known, caches = dict(values), {}
    for one in each.nodes:
        parameters = {slot: known[name] for slot, name in one.parameters}
        arrays = [known[source] for source in one.inputs]
        known[one.name], caches[one.name] = one.layer.forward(*arrays, **parameters, **one.keywords)
    gradients = {each.output: cotangent_of(each)}
    for one in reversed(each.nodes):
        local = one.layer.backward(gradients[one.name], caches[one.name])
        gradients |= {source: local[argument] for argument, source in one.sources if argument in local}
    return gradients


BRANCHING = [name for name, each in NETWORKS.items() if any(len(readers) > 1 for readers in each.consumers.values())]


@pytest.mark.parametrize("name", BRANCHING)
def test_differences_refuse_a_walk_that_does_not_add_up(name: str) -> None:
    each = NETWORKS[name]
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_follows_differences(each, overwriting_gradients(each, drawn(each)))


def test_that_walk_is_right_where_nothing_branches() -> None:
    each = NETWORKS["chain"]
    assert "chain" not in BRANCHING
    assert_follows_differences(each, overwriting_gradients(each, drawn(each)))


class Observed(np.ndarray[Any, Any]):
    """An array that says which universal functions it went through."""

    seen: list[str] = []  # noqa: RUF012

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        self.seen.append(ufunc.__name__)
        plain = [each.view(np.ndarray) if isinstance(each, Observed) else each for each in inputs]
        return np.asarray(getattr(ufunc, method)(*plain, **options)).view(Observed)


def test_subclasses_of_arrays_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Observed, "seen", [])
    each = NETWORKS["a weight in two nodes"]
    values = {name: value.view(Observed) for name, value in drawn(each).items()}
    reference = NumpyReference()
    forward = reference.forward(each, values, "float64")
    assert {"matmul", "add", "tanh"} <= set(Observed.seen)
    assert all(isinstance(output, Observed) for output in forward.outputs.values())
    gradients = reference.backward(forward, cotangent_of(each).view(Observed))
    assert all(isinstance(gradient, Observed) for gradient in gradients.values())
    for name, gradient in gradients_of(each, drawn(each)).items():
        np.testing.assert_array_equal(gradients[name].view(np.ndarray), gradient, err_msg=name)


def test_overflow_stays_silent() -> None:
    """Warnings are errors in this suite, so that this fails if one escapes."""
    each = NETWORKS["the input cubed"]
    values = {"x": np.full((2, 3), 1e200)}
    reference = NumpyReference()
    forward = reference.forward(each, values, "float64")
    assert np.isposinf(forward.outputs["out"]).all()
    assert np.isinf(reference.backward(forward, np.full((2, 3), 1e200))["x"]).all()


def test_it_introduces_itself() -> None:
    reference = NumpyReference()
    assert (reference.name, reference.version()) == ("reference", f"NumPy {np.__version__}")
    assert all(reference.supports(layer, {}, "float32") for layer in LAYERS.values())
