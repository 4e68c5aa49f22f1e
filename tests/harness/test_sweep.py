"""The reference's own sweep over a network, and one node alone with the numbers of that sweep."""

from __future__ import annotations

import numpy as np

from gradproof.model.case import Case
from gradproof.model.network import Input, Node
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference.walk import Conventions
from gradproof.verdict.sweep import Sweep, alone_as_the_sweep_has_it
from helpers.examining import EACH_DTYPE
from helpers.networks import SIX, TWICE, network, node, ordinary

# One node alone.


def alone_in(of: Case, each: Node, conventions: Conventions) -> Case:
    return alone_as_the_sweep_has_it(Sweep(of, conventions), of, each)


@EACH_DTYPE
def test_a_node_alone_gets_the_references_numbers_rounded(dtype: str) -> None:
    of = ordinary(SIX, dtype)
    sweep = Sweep(of, {})
    alone = alone_in(of, SIX.node("gated"), {})
    assert [each.name for each in alone.network.nodes] == ["gated"]
    assert (alone.dtype, alone.seed) == (dtype, of.seed)
    for name in ("gate", "rise"):
        np.testing.assert_array_equal(alone.values[name], sweep.outputs[name].astype(dtype))
    np.testing.assert_array_equal(alone.cotangent, sweep.gradients["gated"].astype(dtype))


def test_a_node_alone_gets_the_given_arrays_as_they_are() -> None:
    of = ordinary(SIX)
    alone = alone_in(of, SIX.node("line"), {})
    assert set(alone.values) == {"x", "w", "b"}
    assert all(alone.values[name] is of.values[name] for name in alone.values)
    loss = alone_in(of, SIX.node("loss"), {})
    np.testing.assert_array_equal(loss.cotangent, of.cotangent)


def test_a_tensor_that_is_read_twice_becomes_two_inputs() -> None:
    of = ordinary(TWICE)
    alone = alone_in(of, TWICE.nodes[0], {})
    assert len(alone.network.inputs) == 2
    for value in alone.values.values():
        np.testing.assert_array_equal(value, of.values["x"])


def test_a_node_alone_follows_the_conventions() -> None:
    kinked = network(Input("x", (3,)), node("a", "relu", "x"), node("b", "relu", "a"))
    of = Case(kinked, "float64", {"x": np.array([0.0, -1.0, 2.0])}, np.array([1.5, 2.5, -0.5]))
    cotangents = {
        weight: alone_in(of, kinked.node("a"), {"relu": {"at_zero": weight}}).cotangent for weight in (0.0, 1.0)
    }
    np.testing.assert_array_equal(cotangents[0.0], [0.0, 0.0, -0.5])
    np.testing.assert_array_equal(cotangents[1.0], [1.5, 2.5, -0.5])


def test_numbers_beyond_the_dtype_are_infinite_alone() -> None:
    of = network(Input("x", (2,)), node("huge", "multiply", "x", "x"), node("out", "tanh", "huge"))
    given = Case(of, "float32", {"x": np.array([1e30, 0.5], "float32")}, np.array([1.5, 0.5], "float32"))
    alone = alone_in(given, of.node("out"), {})
    assert np.isinf(alone.values["huge"]).tolist() == [True, False]


# The whole sweep.


def test_a_sweep_has_every_value_and_every_gradient() -> None:
    sweep = Sweep(ordinary(SIX), {})
    assert list(sweep.outputs) == [each.name for each in SIX.nodes]
    assert list(sweep.gradients)[:6] == [each.name for each in reversed(SIX.nodes)]
    assert set(sweep.gradients) == set(SIX.differentiable)
    assert set(sweep.expected) == {value_of(name) for name in sweep.outputs} | {
        gradient_of(name) for name in sweep.gradients
    }
