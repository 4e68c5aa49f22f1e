"""The worked examples: their numbers, what they are there to show, and the walk through them."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from itertools import combinations, pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

from gradproof.draw.examples import EXAMPLES, RING_SAMPLES, Example, Expected, UnknownExampleError, descend, example
from gradproof.model.adapter import Adapter, AdapterError, Forward
from gradproof.model.network import Input, Network, Node
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.activations import sigmoid_forward
from gradproof.reference.linear import LinearOperands, linear_backward, linear_forward
from gradproof.reference.regression import half_squared_error_backward, half_squared_error_forward
from gradproof.show.walk import Walk, render_walk, walk

Arrays = Mapping[str, np.ndarray]

FRAMEWORKS = {"reference": (), "torch": ("torch",), "jax": ("jax", "optax", "platformdirs")}


def load(name: str) -> Adapter:
    for module in FRAMEWORKS[name]:
        pytest.importorskip(module, reason=f"{name} is not installed: pip install 'gradproof[{name}]'")
    (entry,) = entry_points(group="gradproof.adapters", name=name)
    return entry.load()()


@pytest.fixture(scope="module", params=FRAMEWORKS)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return load(request.param)


def run(adapter: Adapter, network: Network, values: Arrays) -> tuple[Arrays, Arrays]:
    """Node outputs and gradients in float64."""
    forward = adapter.forward(network, values, "float64")
    return forward.outputs, adapter.backward(forward, np.ones(network.shapes[network.output]))


def outputs_of(adapter: Adapter, network: Network, values: Arrays) -> Arrays:
    return adapter.forward(network, values, "float64").outputs


def missed(stated: Arrays, got: Arrays, tolerance: float) -> set[str]:
    """The names whose stated numbers are not met."""
    return {
        name
        for name, numbers in stated.items()
        if got[name].shape != numbers.shape or not (np.abs(got[name] - numbers) <= tolerance).all()
    }


def close(expected: float | list[Any] | np.ndarray) -> Any:
    return pytest.approx(np.asarray(expected) if isinstance(expected, list) else expected, rel=0, abs=1e-15)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_stated_number_is_met(adapter: Adapter, name: str) -> None:
    example = EXAMPLES[name]
    outputs, gradients = run(adapter, example.network, example.values)
    expected = example.expected
    assert missed(expected.forward, outputs, expected.tolerance) == set()
    assert missed(expected.gradients, gradients, expected.tolerance) == set()


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_number_that_is_off_in_the_last_digits_is_missed(name: str) -> None:
    example = EXAMPLES[name]
    _, gradients = run(NumpyReference(), example.network, example.values)
    off = {name: gradient + 3 * example.expected.tolerance for name, gradient in gradients.items()}
    assert missed(example.expected.gradients, off, example.expected.tolerance) == set(example.expected.gradients)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_record_is_complete(name: str) -> None:
    example = EXAMPLES[name]
    network = example.network
    assert example.name == name
    assert set(example.values) == {each.name for each in network.inputs} | set(network.parameters)
    for source, value in example.values.items():
        assert (value.shape, value.dtype) == (network.shapes[source], np.float64)
        assert not value.flags.writeable
    assert set(network.parameters) <= set(example.expected.gradients)
    assert {"prediction", "loss"} <= set(example.expected.forward)
    assert example.cotangent.shape == ()


def test_descent_moves_all_parameters_but_those_held() -> None:
    example = EXAMPLES["tanh_2_3_1"]
    _, gradients = run(NumpyReference(), example.network, example.values)
    after = descend(NumpyReference(), example.network, example.values, learning_rate=0.1, held=("b1", "b2"))
    for name, value in example.values.items():
        step = 0.1 * gradients[name] if name in ("W1", "W2") else 0.0
        np.testing.assert_array_equal(after[name], value - step)


# tanh_2_3_1


def test_tanh_loss_rounds_to_the_original(adapter: Adapter) -> None:
    example = EXAMPLES["tanh_2_3_1"]
    outputs = outputs_of(adapter, example.network, example.values)
    assert round(float(outputs["loss"]), 4) == 0.0075


def test_tanh_the_first_unit_has_the_strongest_learning_signal(adapter: Adapter) -> None:
    example = EXAMPLES["tanh_2_3_1"]
    outputs, gradients = run(adapter, example.network, example.values)
    readout = gradients["prediction"] @ example.values["W2"]
    gate = 1 - outputs["h1"] ** 2
    assert gradients["z1"] == close(readout * gate)
    assert np.argsort(-np.abs(gradients["z1"][0])).tolist() == [0, 2, 1]
    # The gate alone favours the third unit: it is the readout weight that puts the first one ahead.
    assert np.argmax(gate) == 2


def test_tanh_row_norms_are_the_deltas_times_the_length_of_the_input(adapter: Adapter) -> None:
    example = EXAMPLES["tanh_2_3_1"]
    _, gradients = run(adapter, example.network, example.values)
    norms = np.linalg.norm(gradients["W1"], axis=1)
    assert norms == close([0.0256023911975820571, 0.0153614347185492343, 0.0214921870734710244])
    assert norms == close(np.abs(gradients["z1"][0]) * math.sqrt(1.25))


def test_tanh_one_update_moves_the_prediction_towards_the_target(adapter: Adapter) -> None:
    example = EXAMPLES["tanh_2_3_1"]
    after = descend(adapter, example.network, example.values, learning_rate=0.1)
    outputs = outputs_of(adapter, example.network, after)
    # From an evaluation of the same formulas with 40 digits.
    assert outputs["prediction"] == close([[0.150749662049309004]])
    assert outputs["loss"] == close(0.00492531479166318665)


# sigmoid_2_2_1

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


def forgotten_derivative(dout: np.ndarray, out: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": dout}


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


# relu_2_3_1

RELU = EXAMPLES["relu_2_3_1"]
Edges = dict[str, list[tuple[str, float]]]


def relu_numbers() -> tuple[list[float], list[float], float]:
    """z1, h and yhat in plain Python."""
    (x,), W1, b1 = (RELU.values[name].tolist() for name in ("x", "W1", "b1"))  # noqa: N806
    (W2,), (b2,) = (RELU.values[name].tolist() for name in ("W2", "b2"))  # noqa: N806
    z1 = [sum(w * each for w, each in zip(row, x, strict=True)) + b for row, b in zip(W1, b1, strict=True)]
    h = [max(z, 0.0) for z in z1]
    z2 = sum(w * each for w, each in zip(W2, h, strict=True)) + b2
    return z1, h, 1 / (1 + math.exp(-z2))


def relu_factors() -> tuple[float, float, list[float]]:
    """The local derivatives dL/dyhat, dyhat/dz and the ReLU gates."""
    z1, _, yhat = relu_numbers()
    y = RELU.values["y"].item()
    return -y / yhat + (1 - y) / (1 - yhat), yhat * (1 - yhat), [float(z > 0) for z in z1]


def test_relu_factors_multiply_to_the_gradients(adapter: Adapter) -> None:
    _, h, _ = relu_numbers()
    dloss_dyhat, dyhat_dz, gates = relu_factors()
    (w,), (x,) = RELU.values["W2"].tolist(), RELU.values["x"].tolist()
    dloss_dz = dloss_dyhat * dyhat_dz
    dloss_dh = [dloss_dz * each for each in w]
    deltas = [each * gate for each, gate in zip(dloss_dh, gates, strict=True)]
    products = {
        "prediction": [[dloss_dyhat]],
        "z2": [[dloss_dz]],
        "W2": [[dloss_dz * each for each in h]],
        "b2": [dloss_dz],
        "h": [dloss_dh],
        "z1": [deltas],
        "W1": [[delta * each for each in x] for delta in deltas],
        "b1": deltas,
    }
    _, gradients = run(adapter, RELU.network, RELU.values)
    for name, product in products.items():
        assert gradients[name] == close(product), name


def relu_edges() -> Edges:
    """Every scalar of the network -> the scalars that read it, each with its local derivative."""
    dloss_dyhat, dyhat_dz, gates = relu_factors()
    (x,), (w,), first = RELU.values["x"].tolist(), RELU.values["W2"].tolist(), RELU.values["W1"].tolist()
    edges: Edges = {"z2": [("yhat", dyhat_dz)], "yhat": [("loss", dloss_dyhat)]}
    for unit, gate in enumerate(gates):
        edges |= {f"z1[{unit}]": [(f"h[{unit}]", gate)], f"h[{unit}]": [("z2", w[unit])]}
    for feature, each in enumerate(x):
        edges[f"x[{feature}]"] = [(f"z1[{unit}]", row[feature]) for unit, row in enumerate(first)]
        edges |= {f"W1[{unit},{feature}]": [(f"z1[{unit}]", each)] for unit in range(3)}
    return edges


def path_products(edges: Edges, start: str) -> Iterator[float]:
    """The product of the local derivatives along each path to the loss."""
    if start == "loss":
        yield 1.0
    for reader, derivative in edges.get(start, ()):
        for rest in path_products(edges, reader):
            yield derivative * rest


def test_relu_gradients_are_sums_over_all_paths(adapter: Adapter) -> None:
    edges = relu_edges()
    _, gradients = run(adapter, RELU.network, RELU.values)
    for unit, feature in np.ndindex(3, 2):
        products = list(path_products(edges, f"W1[{unit},{feature}]"))
        assert len(products) == 1
        assert gradients["W1"][unit, feature] == close(sum(products))
    for feature in range(2):
        products = list(path_products(edges, f"x[{feature}]"))
        assert len(products) == 3
        assert gradients["x"][0, feature] == close(sum(products))


def test_relu_descent_makes_the_loss_fall_and_the_prediction_approach_one(adapter: Adapter) -> None:
    checkpoints = [RELU.values]
    for _ in range(4):
        checkpoints.append(descend(adapter, RELU.network, checkpoints[-1], learning_rate=0.1, steps=50))
    reached = [outputs_of(adapter, RELU.network, values) for values in checkpoints]
    assert all(later["loss"] < earlier["loss"] for earlier, later in pairwise(reached))
    assert all(later["prediction"] > earlier["prediction"] for earlier, later in pairwise(reached))
    assert 0.95 < reached[-1]["prediction"].item() < 1
    for name in ("W1", "b1"):
        np.testing.assert_array_equal(checkpoints[-1][name][1], RELU.values[name][1])
    assert checkpoints[-1]["W2"][0, 1] == RELU.values["W2"][0, 1]


def test_relu_the_inactive_unit_gets_exactly_zero(adapter: Adapter) -> None:
    outputs, gradients = run(adapter, RELU.network, RELU.values)
    assert (outputs["h"][0] == 0).tolist() == [False, True, False]
    incoming = {"z1": gradients["z1"][0], "b1": gradients["b1"], "W2": gradients["W2"][0]}
    for name, gradient in incoming.items():
        assert (gradient == 0).tolist() == [False, True, False], name
    assert (gradients["W1"] == 0).tolist() == [[False, False], [True, True], [False, False]]
    assert gradients["h"][0, 1] != 0


# squared_error_2_2_1

SQUARED_ERROR = EXAMPLES["squared_error_2_2_1"]


def test_squared_error_chain_for_each_weight(adapter: Adapter) -> None:
    x1, x2, w1, w2, w3, w4 = (SQUARED_ERROR.values[name].item() for name in ("x1", "x2", "w1", "w2", "w3", "w4"))
    outputs, gradients = run(adapter, SQUARED_ERROR.network, SQUARED_ERROR.values)
    assert outputs["prediction"] == close([[0.7]])
    assert outputs["loss"] == close(0.09)
    dloss_dyhat = -2 * (1.0 - 0.7)
    chains = {
        "prediction": dloss_dyhat,
        "w1": dloss_dyhat * w3 * x1,
        "w2": dloss_dyhat * w4 * x2,
        "w3": dloss_dyhat * (w1 * x1),
        "w4": dloss_dyhat * (w2 * x2),
    }
    for name, chain in chains.items():
        assert gradients[name] == close([[chain]]), name


def test_squared_error_updates_shrink_the_loss(adapter: Adapter) -> None:
    network, values = SQUARED_ERROR.network, SQUARED_ERROR.values
    _, gradients = run(adapter, network, values)
    once = descend(adapter, network, values, learning_rate=0.1)
    for name in network.parameters:
        assert once[name] == close(values[name] - 0.1 * gradients[name])
    assert outputs_of(adapter, network, once)["loss"] < 0.07
    often = descend(adapter, network, once, learning_rate=0.1, steps=99)
    assert outputs_of(adapter, network, often)["loss"] < 1e-12


# decision_boundary_2d

BOUNDARY = EXAMPLES["decision_boundary_2d"]
LABELS = [sample["y"].item() for sample in RING_SAMPLES]


class Counting:
    """Another adapter, with its forward and backward passes counted."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.name = adapter, adapter.name
        self.forwards = self.backwards = 0

    def version(self) -> str:
        return self.adapter.version()

    def supports(self, *arguments: Any) -> bool:
        return self.adapter.supports(*arguments)

    def forward(self, network: Network, values: Arrays, dtype: str) -> Forward:
        self.forwards += 1
        return self.adapter.forward(network, values, dtype)

    def backward(self, forward: Forward, cotangent: np.ndarray) -> Arrays:
        self.backwards += 1
        return self.adapter.backward(forward, cotangent)


def classify(adapter: Adapter, values: Arrays) -> list[float]:
    predictions = [outputs_of(adapter, BOUNDARY.network, {**values, **sample})["prediction"] for sample in RING_SAMPLES]
    return [float(prediction.item() > 0.5) for prediction in predictions]


def test_no_straight_line_parts_the_two_classes() -> None:
    """An affine function's mean over a class is its value at the class's mean, and the means coincide."""
    points = np.concatenate([sample["x"] for sample in RING_SAMPLES])
    inner = np.array(LABELS) == 1
    assert 0 < inner.sum() < len(inner)
    np.testing.assert_allclose(points[inner].mean(axis=0), points[~inner].mean(axis=0), atol=1e-15)


def test_boundary_different_samples_give_different_gradients(adapter: Adapter) -> None:
    gradients = [run(adapter, BOUNDARY.network, {**BOUNDARY.values, **sample})[1] for sample in RING_SAMPLES]
    for one, other in combinations(gradients, 2):
        assert np.abs(one["W1"] - other["W1"]).max() > 1e-3


def test_boundary_bends_until_the_set_is_classified(adapter: Adapter) -> None:
    assert classify(adapter, BOUNDARY.values) != LABELS
    values = dict(BOUNDARY.values)
    for _ in range(20):
        for sample in RING_SAMPLES:
            values = descend(adapter, BOUNDARY.network, values | sample, learning_rate=0.2)
    assert classify(adapter, values) == LABELS


def test_boundary_the_input_gradient_of_the_same_pass_points_to_a_higher_loss(adapter: Adapter) -> None:
    counting = Counting(adapter)
    for sample in RING_SAMPLES:
        values = {**BOUNDARY.values, **sample}
        outputs, gradients = run(counting, BOUNDARY.network, values)
        along, against = (
            outputs_of(adapter, BOUNDARY.network, {**values, "x": values["x"] + step * gradients["x"]})["loss"]
            for step in (0.1, -0.1)
        )
        assert against < outputs["loss"] < along
    assert counting.backwards == len(RING_SAMPLES)


def probe(adapter: Adapter, values: Arrays, name: str, index: tuple[int, ...], step: float) -> float:
    """The loss with one weight moved."""
    moved = values[name].copy()
    moved[index] += step
    return float(outputs_of(adapter, BOUNDARY.network, {**values, name: moved})["loss"])


def test_boundary_one_backward_pass_gives_what_takes_a_probe_per_weight(adapter: Adapter) -> None:
    step = 1e-6
    backprop, probing = Counting(adapter), Counting(adapter)
    outputs, gradients = run(backprop, BOUNDARY.network, BOUNDARY.values)
    for name, shape in BOUNDARY.network.parameters.items():
        for index in np.ndindex(shape):
            slope = (probe(probing, BOUNDARY.values, name, index, step) - float(outputs["loss"])) / step
            assert gradients[name][index] == pytest.approx(slope, rel=0, abs=2e-6)
    assert (backprop.forwards, backprop.backwards) == (1, 1)
    assert (probing.forwards, probing.backwards) == (8 + 4 + 4 + 1, 0)


# by name


def test_an_unknown_example_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownExampleError) as raised:
        example("tanh")
    assert str(raised.value) == (
        "unknown example 'tanh'; valid examples: "
        "tanh_2_3_1, sigmoid_2_2_1, relu_2_3_1, squared_error_2_2_1, decision_boundary_2d"
    )
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_found_by_name(name: str) -> None:
    assert example(name) is EXAMPLES[name]


def test_importing_the_examples_imports_no_framework() -> None:
    code = (
        "import sys, gradproof.draw.examples, gradproof.show.walk; print(sorted({'torch', 'jax'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"


# the walk


class Faulty(NumpyReference):
    """tanh's derivative is dropped."""

    name = "faulty"

    def __init__(self) -> None:
        super().__init__(rows={"tanh": (LAYERS["tanh"].forward, forgotten_derivative)})


class Silent(NumpyReference):
    """Gives no gradient for W1, and one of the wrong shape for b1."""

    name = "silent"

    def backward(self, forward: Forward, cotangent: np.ndarray) -> dict[str, np.ndarray]:
        gradients = super().backward(forward, cotangent)
        return {name: gradient for name, gradient in gradients.items() if name != "W1"} | {"b1": np.zeros((3, 1))}


class TanhOnly(NumpyReference):
    name = "tanh-only"

    def supports(self, layer: Any, options: Any, dtype: str) -> bool:
        return layer.name == "tanh"


def rendered(walk: Walk) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(render_walk(walk))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", EXAMPLES)
def test_walk_json_follows_the_network(adapter: Adapter, name: str) -> None:
    example = EXAMPLES[name]
    report = json.loads(json.dumps(walk(example, [adapter]).to_json()))
    order = [(node.name, node.layer.name) for node in example.network.nodes]
    sides = {"reference", adapter.name}
    assert (report["schema"], report["example"], report["dtype"]) == (1, name, "float64")
    assert report["network"] == str(example.network)
    assert report["adapters"] == {"reference": f"NumPy {np.__version__}", adapter.name: adapter.version()}
    assert [(step["node"], step["layer"]) for step in report["forward"]] == order
    assert [(step["node"], step["layer"]) for step in report["backward"]] == order[::-1]
    listed = [parameter for step in report["backward"] for parameter in step["parameters"]]
    assert sorted(listed) == sorted(example.network.parameters)
    assert list(report["inputs"]) == [each.name for each in example.network.inputs]
    assert all(set(step["values"]) == sides for step in report["forward"])
    assert all(set(step["cotangents"]) == sides for step in report["backward"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_walk_json_holds_the_stated_numbers_of_every_side(adapter: Adapter, name: str) -> None:
    example = EXAMPLES[name]
    report = walk(example, [adapter]).to_json()
    for side in report["adapters"]:
        values = {step["node"]: np.array(step["values"][side]) for step in report["forward"]}
        gradients = {step["node"]: np.array(step["cotangents"][side]) for step in report["backward"]}
        for tensors in (report["inputs"], *(step["parameters"] for step in report["backward"])):
            gradients |= {tensor: np.array(sides[side]) for tensor, sides in tensors.items()}
        assert set(gradients) == set(example.network.differentiable)
        assert missed(example.expected.forward, values, example.expected.tolerance) == set()
        assert missed(example.expected.gradients, gradients, example.expected.tolerance) == set()


def test_walk_lists_a_shared_parameter_where_its_gradient_is_complete() -> None:
    parameters = {"weight": "W", "bias": "b"}
    linear = LAYERS["linear"]
    network = Network(
        (Input("x", (1, 2)), Input("y", (1, 2))),
        (
            Node.of("first", linear, "x", parameters=parameters, options={"features": 2}),
            Node.of("second", linear, "first", parameters=parameters, options={"features": 2}),
            Node.of("loss", LAYERS["mse"], "second", "y"),
        ),
    )
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=network.shapes[name]) for name in ("x", "y", "W", "b")}
    shared = Example("shared", "One weight, used twice.", network, values, Expected({}, {}))
    steps = {step.node.name: step for step in walk(shared).backward}
    assert list(steps) == ["loss", "second", "first"]
    assert {name: list(step.parameters) for name, step in steps.items()} == {
        "loss": [],
        "second": [],
        "first": ["W", "b"],
    }
    _, gradients = run(NumpyReference(), network, values)
    np.testing.assert_array_equal(steps["first"].parameters["W"]["reference"], gradients["W"])


def test_walk_in_float32_rounds_the_values_first_and_keeps_the_reference_in_float64(adapter: Adapter) -> None:
    seen = walk(EXAMPLES["tanh_2_3_1"], [adapter], "float32")
    step = seen.forward[0]
    assert step.values["reference"].dtype == np.float64
    rounded = {name: value.astype("float32").astype("float64") for name, value in EXAMPLES["tanh_2_3_1"].values.items()}
    expected = outputs_of(NumpyReference(), EXAMPLES["tanh_2_3_1"].network, rounded)["z1"]
    np.testing.assert_array_equal(step.values["reference"], expected)
    if adapter.name != "reference":
        assert step.values[adapter.name].dtype == np.float32


def test_walk_shows_where_a_faulty_adapter_departs() -> None:
    seen = walk(EXAMPLES["tanh_2_3_1"], [Faulty()])
    apart = {
        step.node.name: np.abs(step.cotangents["reference"] - step.cotangents["faulty"]).max() for step in seen.backward
    }
    assert {name for name, difference in apart.items() if difference == 0} == {"loss", "prediction", "h1"}
    assert apart["z1"] == close(0.03055383674397696 - 0.02289947484173428)
    lines = {line.split()[0]: line.split()[-1] for line in rendered(seen).splitlines() if line.strip()}
    assert (lines["h1"], lines["z1"], lines["x"]) == ("0", "7.7e-03", "6.5e-03")


def test_walk_shows_missing_and_misshapen_gradients() -> None:
    seen = walk(EXAMPLES["tanh_2_3_1"], [Silent()])
    (step,) = [step for step in seen.to_json()["backward"] if step["node"] == "z1"]
    assert step["parameters"]["W1"]["silent"] is None
    lines = [" ".join(line.split()) for line in rendered(seen).splitlines()]
    assert "W1 -0.0114497 0.0228995 missing" in lines
    assert any(line.startswith("b1 ") and line.endswith(" shape [3, 1]") for line in lines)


def test_walk_refuses_an_adapter_that_lacks_a_layer() -> None:
    with pytest.raises(AdapterError) as raised:
        walk(EXAMPLES["tanh_2_3_1"], [TanhOnly()])
    assert str(raised.value) == (
        "tanh-only does not support linear in float64, which tanh_2_3_1 needs; walk it with another adapter or dtype"
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_walk_renders_within_100_columns_and_without_escapes_in_a_pipe(name: str) -> None:
    text = rendered(walk(EXAMPLES[name], [Faulty(), Silent()]))
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "…" not in text
    assert text.index("Forward sweep") < text.index("Backward sweep")
    for node in EXAMPLES[name].network.nodes:
        assert text.count(f"\n  {node.name} ") == 2
