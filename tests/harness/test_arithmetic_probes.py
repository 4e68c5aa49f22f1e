"""How the class of a layer's arithmetic is found out: what is probed, what is remembered, and each node for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import Forward
from gradproof.model.case import Case, jittered, redrawn, upcast
from gradproof.model.layer import index_domain
from gradproof.model.network import Input, Network, Node
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference import LAYERS
from gradproof.verdict import judging
from gradproof.verdict.agreement import judge
from gradproof.verdict.arithmetic import FEWEST_PROBES, MOST_PROBES, PATIENT_PROBES, Classes, Evidence, Probe
from gradproof.verdict.equations import EVERY, INSIDE, STORED, Arithmetic
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.noise import observe
from helpers.examining import EACH_HALF, culprits, examined, guilty_layers, wrong
from helpers.half import Half, Nearest, alone, found_class, probe
from helpers.networks import case_of, chain, normal

Array = np.ndarray[Any, Any]


SOFTMAX = alone("softmax").network.nodes[0]
"""A node whose class is asked for where only its layer and options count."""


# What is remembered.


def test_a_layer_that_needs_none_is_not_probed() -> None:
    subject = Subject(Half("inside"), {})
    assert examine(subject, alone("softmax")).agrees
    assert subject.classes.known == {}


def test_what_was_found_serves_the_next_case() -> None:
    adapter = Half("every")
    subject = Subject(adapter, {})
    assert examine(subject, alone("softmax")).agrees
    assert subject.classes.by_layer("bfloat16") == {"softmax": "every"}
    assert subject.classes.already(SOFTMAX, "bfloat16") is EVERY
    before = adapter.runs
    assert examine(subject, alone("softmax")).agrees
    assert adapter.runs == before + 1


def test_options_and_dtypes_have_classes_of_their_own() -> None:
    classes = Classes()
    classes.of(alone("softmax", "bfloat16"), probe(Half("every")))
    classes.of(alone("softmax", "bfloat16", axis=0), probe(Half("inside")))
    assert classes.by_layer("bfloat16") == {"softmax": "every"}
    assert classes.by_layer("float16") == {}
    assert classes.already(SOFTMAX, "float16") is INSIDE
    assert classes.already(alone("softmax", axis=0).network.nodes[0], "bfloat16") is INSIDE
    assert sorted(each.name for each in classes.known.values()) == ["every", "inside"]


def test_the_class_is_the_coarsest_that_was_ever_needed() -> None:
    classes, case = Classes(), alone("softmax")
    found = [classes.of(case, probe(Half(each))).name for each in ("inside", "stored", "every", "inside")]
    assert found == ["inside", "stored", "every", "every"]


@pytest.mark.parametrize(
    ("classes", "demanded", "allowed"),
    [
        ([], "inside", True),
        ([INSIDE, INSIDE], "inside", True),
        ([INSIDE, STORED], "inside", False),
        ([STORED], "stored", True),
        ([EVERY, INSIDE], "stored", False),
        ([EVERY, STORED], "every", True),
    ],
)
def test_none_may_be_coarser_than_demanded(classes: list[Arithmetic], demanded: str, allowed: bool) -> None:
    assert Classes.allow(classes, demanded) is allowed


def needed(probes: list[Case], tried: Probe, least: Arithmetic = INSIDE) -> Arithmetic:
    evidence = Evidence(probes[0].network.nodes[0], least)
    evidence.gather(probes, tried)
    return evidence.needed


def test_a_run_that_fails_tells_no_class() -> None:
    probes = [alone("softmax")] * 3
    assert needed(probes, lambda case: None) is INSIDE
    assert needed(probes, lambda case: None, STORED) is STORED
    cases = [redrawn(alone("softmax"), seed) for seed in range(16)]
    tried = probe(Half("every"))
    assert needed(cases, lambda case: None if case in cases[::2] else tried(case)) is EVERY


@pytest.mark.parametrize(("shape", "count"), [((2,), MOST_PROBES), ((1000,), FEWEST_PROBES)])
def test_small_tensors_are_probed_more_often(shape: tuple[int, ...], count: int) -> None:
    adapter = Half("inside")
    case = alone("tanh", "bfloat16", shape)
    classes = Classes()
    classes.of(case, probe(adapter))
    assert adapter.runs == 2 * count
    classes.of(case, probe(adapter))
    assert adapter.runs == 3 * count


def test_numbers_near_the_cases_own_are_probed() -> None:
    """x - mean loses digits in bfloat16 where all are near 100, and hardly any where they are ordinary."""

    def cancelling(x: Array, **options: Any) -> tuple[Array, Any]:
        out, cache = LAYERS["layer_norm"].forward(x, **options)
        if np.abs(x).min() > 50.0:
            out = LAYERS["layer_norm"].forward(observe(x, Nearest("bfloat16")), **options)[0]
        return np.asarray(out), cache

    adapter = Half("inside", {"layer_norm": (cancelling, LAYERS["layer_norm"].backward)})
    case = alone("layer_norm", affine=False)
    assert found_class(adapter, case) == "inside"
    far = Case(
        case.network, "bfloat16", {"x": (100.0 + 5.0 * upcast(case.values["x"])).astype("bfloat16")}, case.cotangent
    )
    assert found_class(adapter, far) == "every"


def test_probes_keep_to_the_domain_and_to_integers() -> None:
    """Each is a case of the same network, else it could not be run."""
    network = Network(
        (Input("x", (4, 3)), Input("target", (4,), index_domain(3))),
        (Node.of("out", LAYERS["cross_entropy"], "x", "target"),),
    )
    values = {"x": np.ones((4, 3), "bfloat16"), "target": np.array([0, 2, 1, 0])}
    case = Case(network, "bfloat16", values, np.array(1.0, "bfloat16"))
    for other in (redrawn(case, 1), jittered(case, 1)):
        np.testing.assert_array_equal(other.values["target"], values["target"])
        assert (other.values["x"] != values["x"]).any()
    near = upcast(jittered(case, 1).values["x"])
    assert ((near >= 0.89) & (near <= 1.11)).all()
    assert found_class(Half("inside"), case) == "inside"


# In a network.


def test_each_node_is_judged_by_its_own_class() -> None:
    """One layer that rounds everywhere widens no floor but its own."""
    of = chain("tanh", "softmax", "sigmoid", shape=(8, 16))
    case = case_of(of, "bfloat16", normal(8, 16, seed=2), x=normal(8, 16))
    softmax = LAYERS["softmax"]

    def coarse(x: Array, **options: Any) -> tuple[Array, Any]:
        out, _ = softmax.forward(observe(x, Nearest("bfloat16")), **options)
        return np.asarray(out), softmax.forward(x, **options)[1]

    right: dict[str, Any] = {"softmax": (coarse, softmax.backward)}
    subject = Subject(Half("inside", right), {})
    assert examine(subject, case).agrees
    assert subject.classes.by_layer("bfloat16") == {"softmax": "every"}

    def off(x: Array) -> tuple[Array, Any]:
        out, cache = LAYERS["tanh"].forward(x)
        return out * np.where(np.arange(16) == 3, 1.03, 1.0), cache

    found = examined(Half("inside", right | {"tanh": (off, LAYERS["tanh"].backward)}), case)
    assert culprits(found) == ["h1"]
    assert set(wrong(found)) == {value_of("h1")}


class InCompany(Half):
    """Rounds its results once when a layer is run alone, and every operation in a network: another kernel is chosen."""

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        self.arithmetic = "every" if len(network.nodes) > 1 else "inside"
        return super().forward(network, values, dtype)


def in_company(layer: str, dtype: str = "bfloat16", shape: Sequence[int] = (8, 16)) -> Case:
    """The layer behind another, on ordinary numbers."""
    of = chain("identity", layer, shape=tuple(shape))
    draw = np.random.default_rng(1).normal
    return Case(of, dtype, {"x": draw(size=shape).astype(dtype)}, draw(size=of.shapes[of.output]).astype(dtype))


@pytest.mark.parametrize("layer", ["sigmoid", "softmax", "gelu"])
def test_a_class_that_shows_in_a_network_alone_is_found_there(layer: str) -> None:
    found = Subject(InCompany("every"), {})
    assert examine(found, in_company(layer)).agrees
    assert found.classes.by_layer("bfloat16")[layer] == "every"
    strict = examined(InCompany("every"), in_company(layer), demanded="inside")
    assert guilty_layers(strict) == [layer]
    assert set(wrong(strict).values()) == {"arithmetic"}


class WrongInCompany(Half):
    """Scales the gradient of softmax where another layer stands beside it."""

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        row = LAYERS["softmax"]
        wrong = (row.forward, lambda dout, cache: {"x": 1.03 * row.backward(np.asarray(dout), cache)["x"]})
        self._rows = {"softmax": wrong} if len(network.nodes) > 1 else {}
        return super().forward(network, values, dtype)


@EACH_HALF
def test_a_fault_that_shows_in_a_network_alone_is_no_class(dtype: str) -> None:
    found = examined(WrongInCompany("inside"), in_company("softmax", dtype))
    assert wrong(found) == {gradient_of("h1"): "gradient"}
    assert guilty_layers(found) == ["softmax"]


# A class allows what is finer.


@pytest.mark.parametrize(("rounded", "right"), [("stored", True), ("every", False)])
def test_a_layer_of_a_coarse_class_may_round_less_often(
    rounded: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What every operation rounds may be the same number in all runs, and the floor of the coarser class the lower."""

    def judge_without_the_coarsest(statement: Any, got: Any, dtype: str, classes: Any = None, *more: Any) -> Any:
        known = {name: INSIDE if each is EVERY else each for name, each in (classes or {}).items()}
        return judge(statement, got, dtype, known, *more)

    case = alone("softmax")
    subject = Subject(Half(rounded), {})
    (node,) = case.network.nodes
    subject.classes.known[node.layer.name, node.options, case.dtype] = EVERY
    assert examine(subject, case).agrees
    monkeypatch.setattr(judging, "judge", judge_without_the_coarsest)
    assert examine(subject, case).agrees is right


# Patience.


class Seldom(Half):
    """Rounds every operation in one run of a hundred, and its results alone in the others."""

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        self.arithmetic = "every" if self.runs % 100 == 99 else "inside"
        return super().forward(network, values, dtype)


def test_a_class_that_shows_seldom_is_found_with_patience_and_looked_for_once() -> None:
    adapter, classes, case = Seldom("inside"), Classes(), alone("softmax")
    assert classes.of(case, probe(adapter)).name == "inside"
    assert classes.patiently(case, probe(adapter)).name == "every"
    runs = adapter.runs
    assert 100 <= runs <= 2 * MOST_PROBES + PATIENT_PROBES
    assert classes.patiently(case, probe(adapter)).name == "every"
    assert adapter.runs == runs
