"""What the sigmoid example is there to show: saturation, what a backward pass costs, and common mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest

from gradproof.draw.examples import EXAMPLES, descend
from gradproof.model.adapter import Adapter
from gradproof.model.network import Input, Network, Node
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.activations import sigmoid_forward
from gradproof.reference.linear import LinearOperands, linear_backward, linear_forward
from gradproof.reference.regression import half_squared_error_backward, half_squared_error_forward
from helpers.examples import forgotten_derivative, missed, outputs_of, run

Arrays = Mapping[str, np.ndarray]


SIGMOID = EXAMPLES["sigmoid_2_2_1"]
BIASES = ("b1", "b2")
AFTER_ONE_STEP = {"prediction": np.array([[0.7655284420715094]]), "loss": np.array(0.027488455738706764)}


def missed_after_a_step(adapter: Adapter, values: Arrays) -> set[str]:
    return missed(AFTER_ONE_STEP, outputs_of(adapter, SIGMOID.network, values), SIGMOID.expected.tolerance)


def test_sigmoid_one_step(adapter: Adapter) -> None:
    after = descend(adapter, SIGMOID.network, SIGMOID.values, learning_rate=0.5, held=BIASES)
    assert missed_after_a_step(adapter, after) == set()


def test_sigmoid_a_prediction_that_equals_its_target_teaches_nothing(adapter: Adapter) -> None:
    prediction = outputs_of(adapter, SIGMOID.network, SIGMOID.values)["prediction"]
    outputs, gradients = run(adapter, SIGMOID.network, {**SIGMOID.values, "y": prediction})
    assert outputs["loss"] == 0
    assert set(gradients) == set(SIGMOID.network.differentiable)
    assert {name for name, gradient in gradients.items() if gradient.any()} == {"loss"}


def test_sigmoid_saturated_hidden_units_throttle_the_delta(adapter: Adapter) -> None:
    def passed_on(values: Arrays) -> np.ndarray:
        _, gradients = run(adapter, SIGMOID.network, values)
        return gradients["z1"] / gradients["a"]

    assert (passed_on(SIGMOID.values) > 0.2).all()
    assert (passed_on({**SIGMOID.values, "b1": np.array([12.0, -12.0])}) < 2e-5).all()


def test_sigmoid_a_saturated_output_learns_nothing_from_the_largest_error(adapter: Adapter) -> None:
    hopeless = {**SIGMOID.values, "b2": np.array([20.0]), "y": np.array([[0.0]])}
    _, gradients = run(adapter, SIGMOID.network, hopeless)
    assert gradients["prediction"] == pytest.approx(1, abs=1e-8)
    assert 0 < np.abs(gradients["z2"]).max() < 1e-8


def tower(depth: int, batch: int = 1) -> tuple[Network, dict[str, np.ndarray]]:
    """`depth` copies of sigmoid_2_2_1's hidden layer, one on another, with weights of their own."""
    nodes, source = [], "x"
    values = {"x": np.repeat(SIGMOID.values["x"], batch, axis=0), "y": np.ones((batch, 2))}
    for level in range(1, depth + 1):
        weight, bias = f"W{level}", f"b{level}"
        values |= {weight: SIGMOID.values["W1"], bias: SIGMOID.values["b1"]}
        parameters = {"weight": weight, "bias": bias}
        linear = Node.of(f"z{level}", LAYERS["linear"], source, parameters=parameters, options={"features": 2})
        nodes += [linear, Node.of(f"a{level}", LAYERS["sigmoid"], f"z{level}")]
        source = f"a{level}"
    nodes.append(Node.of("loss", LAYERS["half_squared_error"], source, "y"))
    return Network((Input("x", (batch, 2)), Input("y", (batch, 2))), tuple(nodes)), values


def test_sigmoid_depth_compounds_the_throttling(adapter: Adapter) -> None:
    depth = 6
    _, gradients = run(adapter, *tower(depth))
    deltas = [np.abs(gradients[f"z{level}"]).max() for level in range(1, depth + 1)]
    # A sigmoid passes on at most a quarter, and the columns of W1 add up to at most a half.
    largest_share = 0.25 * SIGMOID.values["W1"].sum(axis=0).max()
    assert all(0 < earlier <= largest_share * later for earlier, later in pairwise(deltas))
    assert deltas[0] < 1e-4 * deltas[-1]


class Counted(np.ndarray):
    """An array that counts the elementary array operations it takes part in."""

    operations: ClassVar[int] = 0

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        Counted.operations += 1
        plain = [np.asarray(each) if isinstance(each, Counted) else each for each in inputs]
        return np.asarray(getattr(ufunc, method)(*plain, **options)).view(Counted)


def operations(depth: int) -> tuple[int, int]:
    """How many array operations the forward and the backward pass of a tower take."""
    network, values = tower(depth)
    Counted.operations = 0
    forward = NumpyReference().forward(network, {name: v.view(Counted) for name, v in values.items()}, "float64")
    forwards = Counted.operations
    NumpyReference().backward(forward, np.ones(()).view(Counted))
    return forwards, Counted.operations - forwards


def test_the_backward_pass_costs_about_one_more_forward_pass() -> None:
    counts = [operations(depth) for depth in (1, 2, 4, 8, 16)]
    assert all(0.5 <= backward / forward <= 1.5 for forward, backward in counts)
    # Linear in depth, although a tower of depth 16 has 16 times as many weights.
    (first_forward, first_backward), *_, (last_forward, last_backward) = counts
    assert last_forward < 16 * first_forward
    assert last_backward < 16 * first_backward


def distinct_arrays(held: Any) -> dict[int, np.ndarray]:
    if isinstance(held, np.ndarray):
        return {id(held): held}
    parts = held.values() if isinstance(held, Mapping) else held if isinstance(held, tuple | list) else ()
    return {key: array for part in parts for key, array in distinct_arrays(part).items()}


def numbers_kept(depth: int, batch: int) -> int:
    """How many numbers the forward pass of a tower keeps for the backward pass, parameters apart."""
    network, values = tower(depth, batch)
    forward = NumpyReference().forward(network, values, "float64")
    parameters = {id(values[name]) for name in network.parameters}
    return sum(array.size for key, array in distinct_arrays(forward.tape).items() if key not in parameters)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_memory_grows_with_the_number_of_activations(batch: int) -> None:
    kept = [numbers_kept(depth, batch) for depth in range(1, 6)]
    activations_per_level = 2 * 2 * batch
    assert [later - earlier for earlier, later in pairwise(kept)] == [activations_per_level] * 4


def flipped_sign(dout: np.ndarray, cache: Any) -> dict[str, np.ndarray]:
    return {name: -gradient for name, gradient in half_squared_error_backward(dout, cache).items()}


def early_update(dout: np.ndarray, kept: LinearOperands) -> dict[str, np.ndarray]:
    """Sends the delta back through weights that have already taken their step."""
    right = linear_backward(dout, kept)
    return right | {"x": linear_backward(dout, kept._replace(weight=kept.weight - 0.5 * right["weight"]))["x"]}


STATED = frozenset(SIGMOID.expected.gradients)
MISTAKES = {
    "derivative of the activation dropped": ({"sigmoid": (sigmoid_forward, forgotten_derivative)}, STATED),
    "sign of the error flipped": ({"half_squared_error": (half_squared_error_forward, flipped_sign)}, STATED),
    "weights updated before all gradients are computed": (
        {"linear": (linear_forward, early_update)},
        {"z1", "W1", "b1"},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_sigmoid_common_mistakes_change_the_numbers(mistake: str) -> None:
    rows, upstream = MISTAKES[mistake]
    mistaken = NumpyReference(rows=rows)
    outputs, gradients = run(mistaken, SIGMOID.network, SIGMOID.values)
    assert missed(SIGMOID.expected.forward, outputs, SIGMOID.expected.tolerance) == set()
    assert missed(SIGMOID.expected.gradients, gradients, SIGMOID.expected.tolerance) == upstream
    after = descend(mistaken, SIGMOID.network, SIGMOID.values, learning_rate=0.5, held=BIASES)
    assert missed_after_a_step(mistaken, after) == {"prediction", "loss"}


def test_sigmoid_recomputing_activations_from_changed_weights_changes_the_numbers(adapter: Adapter) -> None:
    """The fourth mistake: nothing is cached, so the hidden layer's gradient comes from a second forward pass."""
    right = descend(adapter, SIGMOID.network, SIGMOID.values, learning_rate=0.5, held=BIASES)
    readout_moved = descend(adapter, SIGMOID.network, SIGMOID.values, learning_rate=0.5, held=("W1", *BIASES))
    after = descend(adapter, SIGMOID.network, readout_moved, learning_rate=0.5, held=("W2", *BIASES))
    assert missed({"W1": right["W1"], "W2": right["W2"]}, after, SIGMOID.expected.tolerance) == {"W1"}
    assert missed_after_a_step(adapter, after) == {"prediction", "loss"}
