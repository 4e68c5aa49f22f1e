"""What four of the worked examples are there to show: signals, paths, updates, and a boundary that bends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest

from gradproof.draw.examples import EXAMPLES, RING_SAMPLES, descend
from gradproof.model.adapter import Adapter, Forward
from gradproof.model.network import Network
from helpers.examples import close, outputs_of, run

Arrays = Mapping[str, np.ndarray]


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
