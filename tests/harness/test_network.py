"""The Network value: equality, the one-line rendering, and what is derived from it."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import pytest

from gradproof.model.layer import REAL, UNIT, index_domain
from gradproof.model.network import Input, Network
from helpers.networks import X, Y, linear, network, node


def residual(features: int = 3) -> Network:
    return network(
        X,
        Input("target", (2, 3)),
        linear("h", "x", features=features),
        node("active", "tanh", "h"),
        node("sum", "add", "x", "active"),
        node("loss", "mse", "sum", "target", reduction="sum"),
    )


def classifier() -> Network:
    return network(
        X,
        Input("target", (2,), index_domain(4)),
        linear("logits", "x", features=4),
        node("loss", "cross_entropy", "logits", "target"),
    )


# A value.


def test_equal_networks_are_equal_and_hash_alike() -> None:
    assert residual() == residual()
    assert hash(residual()) == hash(residual())
    assert len({residual(), residual(), classifier()}) == 2


@pytest.mark.parametrize(
    "other",
    [
        network(X, node("a", "softmax", "x", axis=0)),
        network(X, node("other", "softmax", "x")),
        network(X, node("a", "log_softmax", "x")),
        network(Input("x", (2, 4)), node("a", "softmax", "x")),
        network(Input("x", (2, 3), UNIT), node("a", "softmax", "x")),
        network(Input("other", (2, 3)), node("a", "softmax", "other")),
        network(X, node("first", "tanh", "x"), node("a", "softmax", "first")),
    ],
    ids=["option", "node name", "layer", "shape", "domain", "input name", "another node"],
)
def test_networks_that_differ_are_unequal(other: Network) -> None:
    assert other != network(X, node("a", "softmax", "x"))


def test_a_given_default_equals_an_omitted_one() -> None:
    assert network(X, node("a", "softmax", "x", axis=-1)) == network(X, node("a", "softmax", "x"))


def test_the_order_of_given_options_does_not_matter() -> None:
    assert node("a", "layer_norm", "x", affine=False, axes=2) == node("a", "layer_norm", "x", axes=2, affine=False)


def test_what_is_derived_does_not_change_equality() -> None:
    used, fresh = residual(), residual()
    assert (str(used), used.differentiable[0]) == (str(residual()), "x")
    assert vars(used).keys() > vars(fresh).keys()
    assert used == fresh
    assert hash(used) == hash(fresh)


def test_a_network_cannot_be_changed() -> None:
    each = residual()
    with pytest.raises(FrozenInstanceError):
        each.nodes = ()  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        each.nodes[0].name = "other"  # type: ignore[misc]


def test_a_network_survives_pickling() -> None:
    copied = pickle.loads(pickle.dumps(residual()))
    assert copied == residual()
    assert hash(copied) == hash(residual())


# One line.

RENDERED: dict[str, tuple[Network, str]] = {
    "one node": (network(X, node("out", "relu", "x")), "x[2,3] -> relu"),
    "a chain": (
        network(X, linear("h", "x", "1", 4), node("a", "tanh", "h"), linear("out", "a", "2", 2)),
        "x[2,3] -> linear(4) -> tanh -> linear(2)",
    ),
    "a residual branch": (
        residual(),
        "x[2,3] -> linear(3) -> tanh as active; x -> add(active) -> mse(target[2,3], reduction=sum)",
    ),
    "a fan-out": (
        network(X, node("h", "tanh", "x"), node("a", "silu", "h"), node("out", "subtract", "h", "a")),
        "x[2,3] -> tanh as h; h -> silu as a; h -> subtract(a)",
    ),
    "two branches": (
        network(
            X,
            Y,
            node("a", "tanh", "x"),
            node("b", "relu", "a"),
            node("c", "sigmoid", "y"),
            node("out", "concatenate", "b", "c", "a", axis=0),
        ),
        "x[2,3] -> tanh as a; a -> relu as b; y[2,3] -> sigmoid as c; b -> concatenate(c, a, axis=0)",
    ),
    "the second argument flows in": (
        network(X, Y, node("a", "tanh", "x"), node("out", "subtract", "y", "a")),
        "x[2,3] -> tanh as a; y[2,3] -> subtract(a)",
    ),
    "an input twice": (network(X, node("out", "multiply", "x", "x")), "x[2,3] -> multiply(x)"),
    "a node twice": (
        network(X, node("h", "tanh", "x"), node("out", "multiply", "h", "h")),
        "x[2,3] -> tanh as h; h -> multiply(h)",
    ),
    "a shared weight": (
        network(X, linear("h", "x"), node("a", "tanh", "h"), linear("out", "a")),
        "x[2,3] -> linear(3, weight:w, bias:b) -> tanh -> linear(3, weight:w, bias:b)",
    ),
    "a weight shared alone": (
        network(
            X,
            linear("h", "x"),
            node("out", "linear", "h", parameters="weight:w bias:other", features=3),
        ),
        "x[2,3] -> linear(3, weight:w) -> linear(3, weight:w)",
    ),
    "a parameter in two slots": (
        network(X, node("out", "layer_norm", "x", parameters="weight:p bias:p")),
        "x[2,3] -> layer_norm(weight:p, bias:p)",
    ),
    "several inputs": (
        network(
            X,
            Input("row", (3,)),
            Input("scale", ()),
            node("sum", "add", "x", "row"),
            node("out", "multiply", "scale", "sum"),
        ),
        "x[2,3] -> add(row[3]) as sum; scale[] -> multiply(sum)",
    ),
    "class indices": (classifier(), "x[2,3] -> linear(4) -> cross_entropy(target[2])"),
    "a required option of several numbers": (
        network(X, node("out", "reshape", "x", shape=(3, 2))),
        "x[2,3] -> reshape((3,2))",
    ),
    "options off their defaults": (
        network(X, node("out", "layer_norm", "x", axes=2, eps=1e-3, affine=False)),
        "x[2,3] -> layer_norm(axes=2, eps=0.001, affine=False)",
    ),
    "options at their defaults": (
        network(X, node("out", "layer_norm", "x", axes=1, eps=1e-5, parameters="weight:g bias:h")),
        "x[2,3] -> layer_norm",
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_one_line(name: str) -> None:
    each, line = RENDERED[name]
    assert str(each) == line


# What is derived.


def test_shapes_of_everything_in_a_residual_network() -> None:
    assert residual().shapes == {
        "x": (2, 3),
        "target": (2, 3),
        "w": (3, 3),
        "b": (3,),
        "h": (2, 3),
        "active": (2, 3),
        "sum": (2, 3),
        "loss": (),
    }


def test_parameters_in_order_of_first_use() -> None:
    each = network(X, linear("h", "x", "2", 4), linear("g", "h", "1", 3), linear("out", "g", "2", 4))
    assert list(each.parameters.items()) == [("w2", (4, 3)), ("b2", (4,)), ("w1", (3, 4)), ("b1", (3,))]


def test_differentiable_names_leave_out_class_indices() -> None:
    assert classifier().differentiable == ("x", "w", "b", "logits", "loss")
    assert residual().differentiable == ("x", "target", "w", "b", "h", "active", "sum", "loss")


def test_consumers_name_the_argument_or_slot_that_reads() -> None:
    each = network(X, node("a", "multiply", "x", "x"), node("out", "layer_norm", "a", parameters="weight:p bias:p"))
    assert each.consumers == {
        "x": (("a", "a"), ("a", "b")),
        "a": (("out", "x"),),
        "p": (("out", "weight"), ("out", "bias")),
        "out": (),
    }


def test_sources_number_the_inputs_of_a_variadic_layer() -> None:
    assert node("out", "concatenate", "x", "y", "x").sources == (("x0", "x"), ("x1", "y"), ("x2", "x"))
    assert linear("h", "x").sources == (("x", "x"), ("weight", "w"), ("bias", "b"))


def test_keywords_are_the_options_that_do_more_than_decide_shapes() -> None:
    assert node("a", "layer_norm", "x", affine=False).keywords == {"axes": 1, "eps": 1e-5}
    assert linear("h", "x").keywords == {}


def test_domains() -> None:
    each = network(X, Input("target", (2, 3), UNIT), node("p", "sigmoid", "x"), node("loss", "bce", "p", "target"))
    assert {name: each.domain(name) for name in each.shapes} == {"x": REAL, "target": UNIT, "p": UNIT, "loss": REAL}
    assert classifier().domain("target") == index_domain(4)
    assert classifier().domain("w") == REAL


def test_the_last_node_is_the_output() -> None:
    assert residual().output == "loss"


def test_node_finds_by_name() -> None:
    assert residual().node("active") == node("active", "tanh", "h")


# One node alone.


def test_alone_makes_inputs_of_what_the_node_reads() -> None:
    alone, stands_for = residual().alone("sum")
    assert alone == network(X, Input("active", (2, 3)), node("sum", "add", "x", "active"))
    assert stands_for == {"x": "x", "active": "active"}


def test_alone_keeps_parameters_and_options() -> None:
    alone, stands_for = residual().alone("h")
    assert alone == network(X, linear("h", "x"))
    assert stands_for == {"x": "x", "w": "w", "b": "b"}
    assert residual().alone("loss")[0] == network(
        Input("sum", (2, 3)), Input("target", (2, 3)), node("loss", "mse", "sum", "target", reduction="sum")
    )


def test_alone_keeps_domains() -> None:
    each = network(X, Input("t", (2, 3), UNIT), node("p", "sigmoid", "x"), node("loss", "bce", "p", "t"))
    assert each.alone("loss")[0].inputs == (Input("p", (2, 3), UNIT), Input("t", (2, 3), UNIT))
    assert classifier().alone("loss")[0].inputs[1] == Input("target", (2,), index_domain(4))


def test_alone_gives_each_argument_an_input_to_itself() -> None:
    alone, stands_for = network(X, node("h", "tanh", "x"), node("out", "multiply", "h", "h")).alone("out")
    assert alone == network(Input("h", (2, 3)), Input("h as b", (2, 3)), node("out", "multiply", "h", "h as b"))
    assert stands_for == {"h": "h", "h as b": "h"}


def test_alone_gives_each_part_of_a_concatenation_an_input_to_itself() -> None:
    alone, stands_for = network(X, node("out", "concatenate", "x", "x", "x")).alone("out")
    assert str(alone) == "x[2,3] -> concatenate(x as x1[2,3], x as x2[2,3])"
    assert stands_for == {"x": "x", "x as x1": "x", "x as x2": "x"}


def test_alone_gives_each_slot_a_parameter_to_itself() -> None:
    alone, stands_for = network(X, node("out", "layer_norm", "x", parameters="weight:p bias:p")).alone("out")
    assert alone.nodes[0].parameters == (("weight", "p"), ("bias", "p as bias"))
    assert alone.parameters == {"p": (3,), "p as bias": (3,)}
    assert stands_for == {"x": "x", "p": "p", "p as bias": "p"}


@pytest.mark.parametrize("name", RENDERED)
def test_every_node_can_stand_alone(name: str) -> None:
    each, _ = RENDERED[name]
    for inner in each.nodes:
        alone, stands_for = each.alone(inner.name)
        (only,) = alone.nodes
        assert (only.name, only.layer, only.options) == (inner.name, inner.layer, inner.options)
        assert tuple((argument, stands_for[own]) for argument, own in only.sources) == inner.sources
        assert len({own for _, own in only.sources}) == len(inner.sources)
        assert {own: each.shapes[source] for own, source in stands_for.items()} | {
            inner.name: each.shapes[inner.name]
        } == alone.shapes
