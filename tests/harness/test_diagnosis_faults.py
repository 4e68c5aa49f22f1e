"""Every planted fault of a named kind gets its name, in small networks and in large ones, and no other fault does."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from itertools import count

import pytest

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.run.check import check
from gradproof.run.results import Report
from gradproof.trust.faults import FAULTS, KERNEL_FAULTS, KIND_FAULTS, Fault
from gradproof.verdict.diagnosis import PATHS, Diagnosis
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.hypotheses import HYPOTHESES
from gradproof.verdict.judging import Subject
from gradproof.verdict.rows import rows

NAMED = {name: fault for name, fault in FAULTS.items() if fault.named}
NAMES = {*HYPOTHESES, *(name for name, _, _ in PATHS)}
SEED = 7


@cache
def report_of(fault: Fault) -> Report:
    """The first networks of its layer, up to one on which the fault shows.

    Not in a node that reads one tensor twice: all of what it sends there is wrong, and its terms cannot be told apart.
    """
    for seed in count(SEED):
        report = check(
            [fault.make()],
            networks=200,
            seed=seed,
            dtypes=["float64"],
            layers=[fault.layer] if fault.layer else [],
            failures=None,
            timeout=0.5,
            stop_at_first=True,
        )
        guilty = [culprit.node for examination, _ in report.examinations for culprit in examination.culprits]
        if not any(len({source for _, source in node.sources}) < len(node.sources) for node in guilty):
            return report
    raise AssertionError("unreachable")


def diagnoses(examination: Examination) -> list[Diagnosis]:
    """Of every culprit, or of the sum where there is none."""
    return [culprit.diagnosis for culprit in examination.culprits] or [examination.diagnosis]


def found(report: Report) -> list[Diagnosis]:
    return [each for examination, _ in report.examinations for each in diagnoses(examination)]


# Every curated fault.


@pytest.mark.parametrize("fault", NAMED.values(), ids=NAMED)
def test_every_fault_of_a_named_kind_is_named(fault: Fault) -> None:
    named = [each.names for each in found(report_of(fault))]
    assert named
    for names in named:
        assert fault.named in names, names


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in {*NAMED, "hangs"}])
def test_a_fault_of_no_named_kind_is_not_named(name: str) -> None:
    for diagnosis in found(report_of(FAULTS[name])):
        assert not diagnosis
        assert str(diagnosis) == ""


def test_every_hypothesis_is_the_name_of_a_fault() -> None:
    assert {fault.named for fault in NAMED.values()} == NAMES
    assert len(NAMES) > 40


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_hypothesis_is_stated_of_faults_of_other_kinds(name: str) -> None:
    """But where both give the same numbers: half is 1/N where N = 2, two elements flipped are shifted, a query that
    sees nothing has the gradient 0."""
    same = {
        frozenset(pair)
        for pair in (
            ("factor 2", "factor 1/N too many"),
            ("factor 2", "mask scale missing"),
            ("factor 2", "ddof"),
            ("factor 1/N too many", "mask scale missing"),
            ("factor 1/N too many", "ddof"),
            ("halves exchanged", "flipped"),
            ("halves exchanged", "shifted"),
            ("mask missing", "another causal mask"),
            ("zero", "another causal mask"),
        )
    }
    others = [fault for fault in NAMED.values() if fault.named not in (None, name)]
    stated = {fault.named for fault in others for each in found(report_of(fault)) if name in each.names}
    assert {each for each in stated if each and frozenset((each, name)) not in same} == set()


def test_most_faults_get_one_name() -> None:
    alone = [fault for fault in NAMED.values() if all(len(each.names) == 1 for each in found(report_of(fault)))]
    assert len(alone) >= 0.85 * len(NAMED)


def test_advice_is_a_sentence_that_says_what_to_check() -> None:
    advice = [*(each.advice for each in HYPOTHESES.values()), *(text for _, _, text in PATHS)]
    assert len(set(advice)) == len(advice)
    for text in advice:
        assert ": check " in text
        assert 40 <= len(text) <= 130
        assert not text.endswith(".")


def test_covered_hypotheses_exist() -> None:
    assert {name for each in HYPOTHESES.values() for name in each.covers} <= set(HYPOTHESES)
    assert not any(each.name in each.covers for each in HYPOTHESES.values())


# Large networks.

LARGE = ("tanh_derivative_at_input", "linear_weight_transposed", "layer_norm_first_term")


class Enough(BaseException):
    """No Exception: that would be a failing example."""


@pytest.mark.parametrize("name", LARGE)
def test_in_networks_of_up_to_30_nodes_the_faulty_layer_alone_is_named(name: str) -> None:
    fault = FAULTS[name]
    sizes: list[int] = []
    named: list[str] = []

    def examine_one(drawn: Drawn) -> None:
        if len(drawn.network.nodes) < 13:
            return
        examination = examine(Subject(fault.make(), {}), drawn.case("float64"))
        if examination.agrees:
            return
        sizes.append(len(drawn.network.nodes))
        assert {culprit.node.layer.name for culprit in examination.culprits} == {fault.layer}
        guilty = {culprit.node.name for culprit in examination.culprits}
        assert {row.node for row in rows(examination) if row.culprit} <= guilty
        named.extend(each for culprit in examination.culprits for each in culprit.diagnosis.names)
        if len(sizes) == 2:
            raise Enough

    assert fault.layer
    with suppress(Enough):
        draw_each(examine_one, 200, SEED, [fault.layer], 30)
    assert len(sizes) == 2
    assert named.count(fault.named or "") >= 2


def test_the_faults_of_new_kinds_are_curated_too() -> None:
    for fault in (*KIND_FAULTS, *KERNEL_FAULTS):
        assert fault.named
        assert FAULTS[fault.name] is fault
