"""Kinks: which derivative each adapter chooses there, and which choices are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import Forward
from gradproof.model.case import Case
from gradproof.model.dtypes import DTYPES
from gradproof.model.layer import Kink, Layer
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import Options
from gradproof.model.tensors import gradient_of
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.common import one_sided
from gradproof.reference.walk import Row
from gradproof.run.check import Run, check, replay
from gradproof.run.results import Report
from gradproof.verdict import kinks
from gradproof.verdict.divergence import Divergence
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.kinks import one_node, probe, probed_subject
from helpers.frameworks import load

Array = np.ndarray[Any, Any]

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


KINKS = [(layer, kink) for layer in LAYERS.values() for kink in layer.kinks]
EACH_KINK = pytest.mark.parametrize(
    ("layer", "kink"), KINKS, ids=[f"{layer.name}-{kink.name}" for layer, kink in KINKS]
)
MET = [(layer, kink) for layer, kink in KINKS if layer.name in ("relu", "leaky_relu", "elu", "mae")]
EACH_KINK_MET = pytest.mark.parametrize(("layer", "kink"), MET, ids=[layer.name for layer, _ in MET])


def at_kink(layer: Layer, kink: Kink, dtype: str = "float64") -> Case:
    case, _, _ = probe(layer, kink, dtype)
    return case


def extrapolated(layer: Layer, kink: Kink, weight: float) -> Row:
    """The layer's pair with a derivative at the kink that need not lie between the one-sided ones."""

    def forward(*arrays: Array, **options: Any) -> tuple[Array, Any]:
        sides = [layer.forward(*arrays, **options | {kink.name: side}) for side in (0.0, 1.0)]
        return sides[0][0], [cache for _, cache in sides]

    def backward(dout: Array, caches: Any) -> dict[str, Array]:
        left, right = (layer.backward(dout, cache) for cache in caches)
        return {name: left[name] + weight * (right[name] - left[name]) for name in left}

    return forward, backward


# The built-in adapters, measured.

CONVENTIONS = {
    "reference": {
        "relu": {"at_zero": 0.0},
        "leaky_relu": {"at_zero": 0.0},
        "elu": {"at_zero": 0.0},
        "mae": {"at_target": 0.5},
    },
    "torch": {
        "relu": {"at_zero": 0.0},
        "leaky_relu": {"at_zero": 0.0},
        "elu": {"at_zero": 0.0},
        "mae": {"at_target": 0.5},
    },
    "jax": {
        "relu": {"at_zero": 0.0},
        "leaky_relu": {"at_zero": 1.0},
        "elu": {"at_zero": 0.0},
        "mae": {"at_target": 1.0},
    },
}


@EACH_DTYPE
@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_built_in_adapters_choose_as_measured(name: str, dtype: str) -> None:
    subject, outside = probed_subject(load(name), dtype)
    chosen = {layer: dict(weights) for layer, weights in subject.conventions.items()}
    assert {layer: chosen[layer] for layer in CONVENTIONS[name]} == CONVENTIONS[name]
    supported = {layer.name for layer, _ in KINKS if load(name).supports(layer, layer.defaults, dtype)}
    assert set(chosen) == supported
    assert outside == []


def test_the_reference_chooses_its_defaults() -> None:
    subject, _ = probed_subject(NumpyReference(), "float64")
    chosen = [
        (layer, name, weight) for layer, weights in subject.conventions.items() for name, weight in weights.items()
    ]
    assert sorted(chosen) == sorted((layer.name, kink.name, kink.default) for layer, kink in KINKS)


# Another valid choice.


def on_the_kink(dtype: str = "float32") -> Case:
    """Relu's zeros go on into leaky_relu and elu, and one of them meets its target."""
    nodes = (
        Node.of("a", LAYERS["relu"], "x"),
        Node.of("b", LAYERS["leaky_relu"], "a", options={"negative_slope": 0.2}),
        Node.of("c", LAYERS["elu"], "b", options={"alpha": 0.5}),
        Node.of("loss", LAYERS["mae"], "c", "target", options={"reduction": "none"}),
    )
    network = Network((Input("x", (5,)), Input("target", (5,))), nodes)
    x = np.array([0.0, -1.0, 2.0, 0.0, 0.0], dtype)
    cotangent = np.array([0.5, -1.5, 2.0, 0.75, 3.0], dtype)
    return Case(network, dtype, {"x": x, "target": np.array([0.0, 2.0, 5.0, 1.0, -1.0], dtype)}, cotangent)


@EACH_DTYPE
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
@EACH_KINK_MET
def test_another_valid_choice_agrees_and_is_reported(layer: Layer, kink: Kink, weight: float, dtype: str) -> None:
    adapter = NumpyReference(conventions={layer.name: {kink.name: weight}})
    report = replay(on_the_kink(dtype), [adapter])
    assert report.conventions["reference"][dtype][layer.name][kink.name] == weight
    assert report.agrees


@EACH_DTYPE
@pytest.mark.parametrize("weight", [1 / 3, 0.625])
def test_a_valid_choice_need_not_be_a_round_number(weight: float, dtype: str) -> None:
    report = replay(on_the_kink(dtype), [NumpyReference(conventions={"relu": {"at_zero": weight}})])
    assert report.conventions["reference"][dtype]["relu"]["at_zero"] == pytest.approx(weight, abs=6e-3)
    assert report.agrees


@EACH_DTYPE
@EACH_KINK
def test_every_kink_is_probed(layer: Layer, kink: Kink, dtype: str) -> None:
    """An adapter that chooses each end of the valid set is understood."""

    class Chooser(NumpyReference):
        def supports(self, other: Layer, options: Options, dtype: str) -> bool:
            return other is layer

    for weight in kink.valid:
        subject, outside = probed_subject(Chooser({layer.name: {kink.name: weight}}), dtype)
        assert subject.conventions[layer.name][kink.name] == pytest.approx(weight, abs=1e-5)
        assert outside == []


@EACH_DTYPE
@pytest.mark.parametrize("weight", [-0.25, 1.75])
@EACH_KINK
def test_a_choice_outside_disagrees_at_every_kink(layer: Layer, kink: Kink, weight: float, dtype: str) -> None:
    """Also where the floor is as large as the step of the derivative, because rounding may leave the kink."""
    rows = {layer.name: extrapolated(layer, kink, weight)}
    _, outside = probed_subject(NumpyReference(rows=rows), dtype, layers=[layer.name])
    (examination,) = [each for each in outside if each.case.network.nodes[0].layer is layer]
    assert not examination.agrees
    assert not examination.known
    assert [(culprit.node.layer, culprit.divergence) for culprit in examination.culprits] == [(layer, None)]


def test_ties_are_taken_by_the_first_the_last_or_all() -> None:
    ties = Kink("ties", point=0.0, default=0.0, ties=True)
    assert [weight for weight in (0.0, 0.25, 0.5, 0.75, 1.0) if ties.allows(weight, 1e-5)] == [0.0, 0.5, 1.0]


@EACH_KINK_MET
def test_without_its_convention_the_same_adapter_disagrees(layer: Layer, kink: Kink) -> None:
    """So that the agreement above is the convention's doing."""
    other = 1.0 if kink.default != 1.0 else 0.0
    adapter = NumpyReference(conventions={layer.name: {kink.name: other}})
    examination = examine(Subject(adapter, {}), on_the_kink())
    assert [culprit.node.layer.name for culprit in examination.culprits] == [layer.name]


def test_a_convention_excuses_nothing_off_the_kink() -> None:
    def backward(dout: Array, cache: tuple[Array, float]) -> dict[str, Array]:
        return {"x": dout * np.where(np.abs(cache[0]) < 1.5, 0.5, cache[0] > 0)}

    adapter = NumpyReference(rows={"relu": (LAYERS["relu"].forward, backward)})
    report = replay(on_the_kink(), [adapter])
    assert report.conventions["reference"]["float32"]["relu"] == {"at_zero": 0.5}
    assert {each.layer for each in report.disagreements if each.culprit} == {"relu"}


def test_conventions_are_those_of_each_dtype() -> None:
    class Undecided(NumpyReference):
        def forward(self, network: Network, values: Any, dtype: str) -> Forward:
            self._conventions = {"relu": {"at_zero": 1.0 if dtype == "float32" else 0.5}}
            return super().forward(network, values, dtype)

    report = check([Undecided()], networks=5, layers=["relu"], seed=1, failures=None)
    assert {dtype: report.conventions["reference"][dtype]["relu"]["at_zero"] for dtype in DTYPES} == {
        "float64": 0.5,
        "float32": 1.0,
    }
    assert report.agrees


# A choice that is none.


def relu_with(at_zero: Any) -> Row:
    """Relu with this derivative at zero: a number, or one per element."""

    def backward(dout: Array, cache: tuple[Array, float]) -> dict[str, Array]:
        x, _ = cache
        return {"x": (dout * one_sided(x, 0.0, 1.0, np.resize(at_zero, x.shape))).astype(dout.dtype)}

    return LAYERS["relu"].forward, backward


INVALID = {
    "beyond the right-hand derivative": 2.0,
    "beyond the left-hand derivative": -0.01,
    "not a number": np.nan,
    "infinite": np.inf,
    "another one for each element": [0.0, 1.0],
    "almost a valid one": 1.0005,
}


@EACH_DTYPE
@pytest.mark.parametrize("at_zero", INVALID.values(), ids=INVALID)
def test_an_invalid_choice_disagrees_and_the_layer_is_named(at_zero: Any, dtype: str) -> None:
    subject, outside = probed_subject(NumpyReference(rows={"relu": relu_with(at_zero)}), dtype)
    assert "relu" not in subject.conventions
    (examination,) = outside
    assert not examination.agrees
    assert [culprit.node.layer.name for culprit in examination.culprits] == ["relu"]


@pytest.mark.parametrize("at_zero", INVALID.values(), ids=INVALID)
def test_an_invalid_choice_is_found_where_no_network_meets_it(at_zero: Any) -> None:
    run = Run({"reference": NumpyReference(rows={"relu": relu_with(at_zero)})}, ["float64"])
    run.prepare()
    run.probe()
    report = run.report
    assert not report.agrees
    assert {each.layer for each in report.disagreements} == {"relu"}
    assert "relu" not in report.conventions["reference"]["float64"]


def test_a_network_that_meets_an_invalid_choice_disagrees() -> None:
    report = replay(on_the_kink(), [NumpyReference(rows={"relu": relu_with(2.0)})])
    culprits = {(each.network, each.layer) for each in report.disagreements if each.culprit}
    assert culprits >= {(str(on_the_kink().network), "relu")}
    assert {layer for _, layer in culprits} == {"relu"}


class Broken(NumpyReference):
    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        raise RuntimeError("no gradient today")


def test_an_adapter_that_fails_at_its_kinks_is_examined_there() -> None:
    subject, outside = probed_subject(Broken(), "float64")
    assert subject.conventions == {}
    assert [examination.checks[0].kind for examination in outside] == ["crash"] * len(KINKS)


# Where there is no freedom.


def elu_with_half(dout: Array, cache: tuple[Array, float, float]) -> dict[str, Array]:
    """One half at zero, whatever alpha is."""
    x, alpha, _ = cache
    return {"x": dout * np.where(x == 0, 0.5, np.where(x > 0, 1.0, alpha * np.exp(np.minimum(x, 0.0))))}


def elu_case(alpha: float) -> Case:
    return one_node(LAYERS["elu"], {"alpha": alpha}, 0.0, "float64")


def test_where_the_function_is_differentiable_there_is_no_choice() -> None:
    """With alpha = 1, elu has a derivative at zero; one half is a valid choice with alpha = 1/2 alone."""
    adapter = NumpyReference(rows={"elu": (LAYERS["elu"].forward, elu_with_half)})
    assert replay(elu_case(0.5), [adapter]).agrees
    report = replay(elu_case(1.0), [adapter])
    assert {(each.layer, each.expected, each.got) for each in report.disagreements if each.culprit} == {
        ("elu", 1.75, 0.875)
    }


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_no_convention_moves_a_derivative_that_exists(weight: float) -> None:
    adapter = NumpyReference(conventions={"elu": {"at_zero": weight}})
    assert replay(elu_case(1.0), [adapter]).agrees


# What is probed.


class Small(NumpyReference):
    """An adapter that has but one of the layers, with some of its options."""

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool:
        return layer.name == "mae" and dtype == "float64"


def test_only_kinks_of_supported_layers_are_probed() -> None:
    assert set(probed_subject(Small(), "float64")[0].conventions) == {"mae"}
    subject, outside = probed_subject(Small(), "float32")
    assert (subject.conventions, outside) == ({}, [])


@EACH_DTYPE
@EACH_KINK
def test_a_case_on_the_kink_has_every_element_on_it(layer: Layer, kink: Kink, dtype: str) -> None:
    case = at_kink(layer, kink, dtype)
    assert [node.layer for node in case.network.nodes] == [layer]
    point = kink.at(dict(case.network.nodes[0].options))
    for each in case.network.inputs:
        if each.domain.differentiable:
            expected = point if isinstance(point, float) else point[each.name]
            assert (case.values[each.name] == np.asarray(expected, dtype)).all()
    assert case.cotangent.size == 1 or np.ptp(case.cotangent) > 0


def test_the_report_of_a_check_holds_the_conventions_of_every_layer_that_occurred() -> None:
    report: Report = check([NumpyReference()], networks=20, seed=1, failures=None)
    (layers, *_) = (tally.layers for tally in report.tallies.values())
    every = {
        layer.name: {kink.name: kink.default for kink in layer.kinks} for layer, _ in KINKS if layer.name in layers
    }
    assert 0 < len(every) < len({layer.name for layer, _ in KINKS})
    assert report.to_json()["conventions"] == {"reference": dict.fromkeys(DTYPES, every)}


@pytest.mark.parametrize(("layers", "stale"), [(["relu"], []), (["softplus"], ["softplus"]), ([], ["softplus"])])
def test_known_divergences_of_other_layers_than_those_asked_for_need_not_show(
    layers: list[str], stale: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Divergence(
        layer="softplus",
        dtypes=("float64",),
        argument="x",
        between=(20.0, 30.0),
        kinds=("value",),
        versions=("",),
        witness={"x": 25.0},
        reason="linear above 20",
        link="",
    )
    monkeypatch.setattr(kinks, "divergences_of", lambda adapter: [gone])
    run = Run({"reference": NumpyReference()}, ["float64"])
    run.prepare(layers)
    run.examine_case(one_node(LAYERS["relu"], {}, 0.5, "float64"))
    assert run.report.stale == []
    run.examine_case(one_node(LAYERS["softplus"], {}, 0.5, "float64"))
    assert [each.divergence.layer for each in run.report.stale] == stale


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_kink_excuses_nothing_beside_it(dtype: str) -> None:
    """At x = 1 rounding may take the whole gradient away; the others' are certain."""
    layer = LAYERS["hinge"]

    def too_large(dout: Any, cache: Any) -> dict[str, Any]:
        return {name: 1.5 * gradient for name, gradient in layer.backward(dout, cache).items()}

    x = [1.0, 0.5, 0.3, -1.0]
    case = one_node(layer, {"reduction": "mean"}, {"x": x, "target": [1.0] * 4}, dtype)
    found = examine(Subject(NumpyReference(rows={"hinge": (layer.forward, too_large)}), {}), case)
    assert gradient_of("x") in {check.key for check in found.wrong}
