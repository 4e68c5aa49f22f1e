"""Faults between the layers: in how paths meet, how parameters are shared, what a tape keeps, and the cotangent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gradproof.draw.drawing import Drawn
from gradproof.model.adapter import Adapter, Forward
from gradproof.model.network import Input, Network, Node
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference import LAYERS, NumpyReference
from gradproof.show.report import headline
from gradproof.trust.faults import FAULTS
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.rows import rows
from gradproof.verdict.running import SECOND_PASS
from helpers.frameworks import load

Array = np.ndarray[Any, Any]


def node(name: str, layer: str, *inputs: str, **slots: str) -> Node:
    options = {"features": 3, "use_bias": False} if layer == "linear" else {}
    return Node.of(name, LAYERS[layer], *inputs, parameters=slots, options=options)


X = Input("x", (2, 3))

SHARED = Network(
    (X,),
    (
        node("first", "linear", "x", weight="w"),
        node("bent", "gelu", "first"),
        node("second", "linear", "bent", weight="w"),
        node("gated", "multiply", "second", "bent"),
    ),
)
"""One parameter twice, and one output read twice."""


def examined(adapter: Adapter, network: Network = SHARED, dtype: str = "float64") -> Examination:
    case = Drawn(network, seed=3, edge_share=0.0, scale=1.0).case(dtype)
    return examine(Subject(adapter, {}), case)


def wrong(examination: Examination) -> dict[str, str | None]:
    return {check.key: check.kind for check in examination.wrong}


def blamed(examination: Examination) -> list[str]:
    return [culprit.node.name for culprit in examination.culprits]


def named(examination: Examination) -> list[tuple[str, str]]:
    """The tensors that are shown as where the fault is."""
    return [(row.check.key.name, row.verdict) for row in rows(examination) if row.culprit]


@pytest.mark.parametrize(
    ("fault", "tensors"),
    [
        ("fan_out_path_dropped", ["bent", "w"]),
        ("fan_out_path_doubled", ["bent", "w"]),
        ("shared_parameter_overwritten", ["w"]),
    ],
)
def test_what_adds_up_wrongly_is_named_and_no_layer_is_blamed(fault: str, tensors: list[str]) -> None:
    found = examined(FAULTS[fault].make())
    assert blamed(found) == []
    assert named(found) == [(tensor, "composition") for tensor in tensors]


def test_an_overwritten_parameter_spoils_nothing_else() -> None:
    assert wrong(examined(FAULTS["shared_parameter_overwritten"].make())) == {gradient_of("w"): "gradient"}


def test_a_tape_that_adds_up_is_to_blame_and_no_layer() -> None:
    found = examined(FAULTS["tape_adds_up"].make())
    assert set(wrong(found).values()) == {"nondeterministic"}
    assert blamed(found) == []
    # Twice the given cotangent is what nobody computed; twice all else follows from it.
    assert named(found) == [("gated", "composition")]
    for check in found.wrong:
        assert check.got == pytest.approx(2.0 * check.expected)
    assert "the first backward pass agrees; in the network, d " in headline(found)
    assert headline(found).partition(" (")[0].endswith(f"in {SECOND_PASS}")


def test_a_layer_that_overwrites_its_cache_is_blamed() -> None:
    found = examined(FAULTS["gelu_cache_overwritten"].make())
    assert blamed(found) == ["bent"]
    assert {row.check.key.name for row in rows(found) if row.culprit} == {"first"}
    assert set(wrong(found).values()) == {"nondeterministic"}
    assert headline(found).startswith("reference float64: gelu (node bent) is wrong: d first at [")
    assert headline(found).partition(" (node bent)")[2].partition(" noise units)")[0].count(SECOND_PASS) == 1


class SecondTime(NumpyReference):
    """What is given out the second time on one tape is changed."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self._change = change
        self._seen: list[Forward] = []

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Any]:
        gradients = super().backward(forward, cotangent)
        again = any(each is forward for each in self._seen)
        self._seen.append(forward)
        return self._change(gradients) if again else gradients


def raising(gradients: Mapping[str, Array]) -> Mapping[str, Array]:
    raise SystemExit("no more")


@pytest.mark.parametrize(
    "change",
    [
        lambda gradients: {},
        lambda gradients: {**gradients, "w": None},
        lambda gradients: {**gradients, "w": gradients["w"].astype(np.float32)},
        lambda gradients: {**gradients, "w": gradients["w"][None]},
        lambda gradients: {**gradients, "w": gradients["w"] * np.nan},
        lambda gradients: {**gradients, "w": np.zeros_like(gradients["w"])},
        lambda gradients: {**gradients, "more": gradients["w"]},
    ],
)
def test_whatever_is_wrong_the_second_time_is_found(change: Any) -> None:
    found = examined(SecondTime(change))
    assert not found.agrees
    assert all(check.second_pass for check in found.wrong)


@pytest.mark.parametrize(
    "change",
    [
        lambda gradients: dict(reversed(gradients.items())),
        lambda gradients: {
            name: gradient if name == "gated" else gradient * (1.0 + 2e-16) for name, gradient in gradients.items()
        },
    ],
)
def test_rounding_may_differ_the_second_time(change: Any) -> None:
    assert examined(SecondTime(change)).agrees


def test_a_tape_that_says_that_it_serves_once_is_no_fault() -> None:
    assert examined(SecondTime(raising)).agrees


def test_what_is_wrong_at_once_is_no_matter_of_the_second_pass() -> None:
    found = examined(FAULTS["gelu_density_missing"].make())
    assert not any(check.second_pass for check in found.checks)


class OwnCotangent(NumpyReference):
    """The cotangent is replaced, for every network."""

    def __init__(self, replaced: Any) -> None:
        super().__init__()
        self._replaced = replaced

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Any]:
        return super().backward(forward, self._replaced(cotangent))


@pytest.mark.parametrize("replaced", [np.ones_like, lambda dout: np.full_like(dout, dout.flat[0])])
def test_a_cotangent_that_is_ignored_shows_from_the_output_on(replaced: Any) -> None:
    """All that follows from another cotangent is right for it: the node that was given the right one is named."""
    found = examined(OwnCotangent(replaced))
    assert blamed(found) == ["gated"]
    assert named(found) == [("gated", "WRONG HERE")]


@pytest.mark.parametrize("fault", ["cross_entropy_first_cotangent", "mse_cotangent_ignored"])
def test_a_layer_that_ignores_its_cotangent_is_blamed(fault: str) -> None:
    layer = LAYERS[str(FAULTS[fault].layer)]
    target = Input("target", (2,), layer.arguments[1].domain((2, 3), layer.defaults))
    target = target if layer.name == "cross_entropy" else Input("target", (2, 3))
    loss = Node.of("loss", layer, "bent", "target", options={"reduction": "none"})
    network = Network((X, target), (node("bent", "tanh", "x"), loss))
    found = examined(FAULTS[fault].make(), network)
    assert blamed(found) == ["loss"]


def test_inputs_that_are_written_to_are_told() -> None:
    network = Network((X,), (node("bent", "relu", "x"),))
    found = examined(FAULTS["writes_to_its_input"].make(), network)
    assert wrong(found)[value_of("x")] == "mutated_input"
    assert blamed(found) == ["bent"]


def test_a_cotangent_that_is_overwritten_on_the_way_is_told() -> None:
    network = Network((X,), (node("bent", "relu", "x"),))
    found = examined(FAULTS["relu_cotangent_overwritten"].make(), network)
    assert wrong(found)[gradient_of("bent")] == "gradient"
    assert blamed(found) == ["bent"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_second_backward_pass_of_a_framework_agrees(framework: str, dtype: str) -> None:
    pytest.importorskip(framework, reason=f"needs pip install 'gradproof[{framework}]'")
    assert examined(load(framework), dtype=dtype).agrees


def test_a_tape_of_torch_that_is_not_retained_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="needs pip install 'gradproof[torch]'")
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *each, **options: grad(*each, **options | {"retain_graph": False})
    )
    assert examined(load("torch")).agrees
