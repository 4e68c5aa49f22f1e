"""The walk through a worked example: its JSON and its rendering."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gradproof.draw.examples import EXAMPLES, Example, Expected
from gradproof.model.adapter import Adapter, AdapterError, Forward
from gradproof.model.network import Input, Network, Node
from gradproof.reference import LAYERS, NumpyReference
from gradproof.show.walk import Walk, render_walk, walk
from helpers.examples import close, forgotten_derivative, missed, outputs_of, run


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
