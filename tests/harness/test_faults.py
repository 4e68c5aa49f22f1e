"""Every planted fault is found, the layer that makes it is named, and nothing is found where nothing is planted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import Adapter, Forward
from gradproof.model.dtypes import DTYPES
from gradproof.model.network import Network
from gradproof.reference import LAYERS, NumpyReference
from gradproof.run.check import check
from gradproof.run.results import Report
from gradproof.trust.faults import FAULTS, MISBEHAVIOUR, ROW_FAULTS, SORTS, WALK_FAULTS, Fault
from gradproof.trust.measure import NETWORKS, TIMEOUT, catch
from gradproof.verdict.agreement import TensorCheck

SEED = 7

EACH_FAULT = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


def checked(adapter: Adapter, layer: str | None = None) -> Report:
    """layer: draw only networks with this one, as somebody would who works on it."""
    layers = [layer] if layer else []
    return check(
        [adapter], networks=NETWORKS, seed=SEED, layers=layers, failures=None, timeout=TIMEOUT, stop_at_first=True
    )


@EACH_FAULT
def test_every_fault_is_found_and_its_layer_is_named(fault: Fault) -> None:
    caught = catch(fault, SEED)
    report = caught.report
    assert not report.agrees
    assert report.networks <= NETWORKS
    assert caught.right
    culprits = [each for each in report.disagreements if each.culprit]
    assert culprits
    kinds = {each.kind for each in culprits}
    assert "composition" not in kinds if fault.layer else kinds <= {"composition", "crash", "reused_buffer"}
    assert report.known == []


def test_the_unspoilt_reference_agrees_on_the_same_networks() -> None:
    report = checked(NumpyReference())
    assert report.disagreements == []
    assert report.agrees
    assert report.networks == NETWORKS
    for dtype in DTYPES:
        tally = report.tallies["reference", dtype]
        assert tally.networks == NETWORKS
        assert tally.unverifiable_share < 0.1


@pytest.mark.parametrize(("kind", "fault"), MISBEHAVIOUR.items(), ids=MISBEHAVIOUR)
def test_misbehaviour_gets_its_kind_of_verdict(kind: str, fault: Fault) -> None:
    report = checked(fault.make(), fault.layer)
    assert kind in {each.kind for each in report.disagreements if each.culprit}
    blamed = {key for each, _ in report.examinations for culprit in each.culprits for key in culprit.keys}
    wrong: list[TensorCheck] = [check for each, _ in report.examinations for check in each.wrong]
    assert kind in {check.kind for check in wrong if check.key in blamed}


@pytest.mark.parametrize("fault", WALK_FAULTS, ids=lambda fault: fault.name)
def test_faults_between_layers_show_where_tensors_are_read_twice(fault: Fault) -> None:
    report = checked(fault.make())
    for examination, _ in report.examinations:
        assert any(len(readers) > 1 for readers in examination.case.network.consumers.values())


def test_there_are_faults_of_every_sort() -> None:
    assert len(ROW_FAULTS) >= 20
    assert len(WALK_FAULTS) >= 2
    kinds = {"nonfinite", "missing", "shape", "dtype", "crash", "timeout", "mutated_input", "nondeterministic"}
    kinds |= {"memory", "global_state", "view", "reused_buffer"}
    assert set(MISBEHAVIOUR) == kinds
    assert len(FAULTS) == sum(map(len, SORTS)) >= 75


def test_faults_are_in_layers_of_the_table() -> None:
    spoilt = {fault.layer for fault in FAULTS.values()} - {None}
    assert spoilt <= set(LAYERS)
    assert len(spoilt) > 15


def test_names_are_unique_and_faults_are_found_by_them() -> None:
    names = [fault.name for sort in SORTS for fault in sort]
    assert len(set(names)) == len(names)
    assert all(FAULTS[name].name == name for name in names)
    assert all(re.fullmatch(r"[a-z0-9_]+(e-\d+[a-z0-9_]*)?", name) for name in names)


def test_mistakes_are_told_in_a_sentence_each() -> None:
    mistakes = [fault.mistake for fault in FAULTS.values()]
    assert len(set(mistakes)) == len(mistakes)
    for mistake in mistakes:
        assert 10 <= len(mistake) <= 100
        assert not mistake.endswith(".")
        assert "\n" not in mistake
        assert "  " not in mistake


@EACH_FAULT
def test_every_call_makes_an_adapter_of_its_own(fault: Fault) -> None:
    first, second = fault.make(), fault.make()
    assert first is not second
    assert isinstance(first, NumpyReference)


class Forgiving(NumpyReference):
    """A planted fault whose gradients are put right on their way out: what is then left to find?"""

    def backward(self, forward: Forward, cotangent: np.ndarray) -> dict[str, Any]:
        network: Network = forward.tape[0]
        values: Mapping[str, np.ndarray] = forward.tape[2]
        given = {name: values[name] for name in (*(each.name for each in network.inputs), *network.parameters)}
        right = NumpyReference()
        return right.backward(right.forward(network, given, str(cotangent.dtype)), cotangent)


def test_a_fault_that_is_put_right_is_not_found() -> None:
    """So that it is the gradients that give a fault away."""
    row = (LAYERS["tanh"].forward, lambda dout, out: {"x": dout})
    assert not checked(NumpyReference(rows={"tanh": row}), "tanh").agrees
    assert checked(Forgiving(rows={"tanh": row}), "tanh").agrees
