"""The page of trust: its figures come from what it is given, and a miss is told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gradproof.draw.joining import Surroundings, ordinary_parts
from gradproof.reference import LAYERS, NumpyReference
from gradproof.run.results import Report
from gradproof.trust import measure as trust
from gradproof.trust import mutants, sums
from gradproof.trust.accuracy import GOAL, accuracy
from gradproof.trust.faults import FAULTS, Fault
from gradproof.trust.measure import Catch, catch, catch_deep, faults_section, main
from gradproof.trust.mutants import mutants_of, read_equivalents
from gradproof.trust.sections import SectionError, write_section

EXP = accuracy(LAYERS["exp"], {})
SURROUNDINGS = Surroundings(ordinary_parts(1))
ROOT = Path(__file__).parents[2]
PAGE = """# Page

<!-- faults -->
<!-- /faults -->

<!-- mutants -->
old
<!-- /mutants -->
<!-- digits -->
<!-- /digits -->
<!-- sums -->
<!-- /sums -->
<!-- graded -->
<!-- /graded -->
<!-- factors -->
<!-- /factors -->
"""


def test_a_planted_fault_is_caught() -> None:
    found = catch(FAULTS["gelu_density_missing"], seed=1)
    assert found.right
    assert found.blamed == {"gelu"}
    assert 1 <= found.report.networks <= trust.NETWORKS


@pytest.mark.parametrize(
    "fault",
    [
        Fault("none", "tanh", "nothing is wrong", NumpyReference),
        Fault("elsewhere", "tanh", "another layer is wrong", FAULTS["elu_sign_flipped"].make),
    ],
    ids=lambda fault: fault.name,
)
def test_what_is_not_there_is_not_caught(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "NETWORKS", 20)
    assert not catch(fault, seed=1).right


@pytest.mark.parametrize("name", ["gelu_density_missing", "wrong_dtype", "relu_cotangent_overwritten"])
def test_a_planted_fault_is_caught_in_thirty_nodes_too(name: str) -> None:
    found = catch_deep(catch(FAULTS[name], seed=1), SURROUNDINGS, seed=1)
    assert len(found.examinations) == trust.BURIALS + trust.DRAWN
    assert all(len(each.case.network.nodes) > 20 for each in found.examinations)
    assert found.right
    assert found.shown == found.blamed_right
    assert not any(each.agrees for each in found.examinations[: trust.BURIALS])


def test_a_fault_that_is_missed_or_blamed_on_another_layer_in_thirty_nodes_is_not_right() -> None:
    caught = catch(FAULTS["gelu_density_missing"], seed=1)
    found = catch_deep(caught, SURROUNDINGS, seed=1)
    assert not replace(found, fault=replace(caught.fault, layer="tanh")).right
    assert not replace(found, examinations=()).right
    sound = catch_deep(replace(caught, fault=replace(caught.fault, make=NumpyReference)), SURROUNDINGS, seed=1)
    assert (sound.shown, sound.right) == ([], False)
    mixed = replace(found, examinations=(*found.examinations, *sound.examinations))
    assert mixed.right
    missed = Catch(caught.fault, Report(1, (), {}, {}), 9.0)
    assert not catch_deep(missed, SURROUNDINGS, seed=1).right


def test_the_section_tells_what_was_found() -> None:
    caught = catch(FAULTS["elu_sign_flipped"], seed=1)
    slow = replace(catch(FAULTS["mae_magnitude"], seed=1), seconds=1000.0)
    slow.report.networks = 77
    missed = Catch(FAULTS["mse_batch_mean"], Report(1, (), {}, {}), 9.0)
    deep = [catch_deep(each, SURROUNDINGS, 1) for each in (caught, slow, missed)]
    text = faults_section([caught, slow, missed], deep, seed=5).replace("\n", " ")
    assert "2 of 3 were caught, and blamed on the right layer alone wherever they showed" in text
    shown = sum(len(each.shown) for each in deep)
    assert f"showed in {shown} of these 12, and were blamed right in {shown}." in text
    assert "seed 5" in text
    assert "2 of 3 were caught within 200 networks" in text
    assert "the slowest was `mae_magnitude` with 77 networks" in text
    median = (caught.report.networks + 77) / 2
    assert f"the median took {median:g} networks" in text


def test_a_section_replaces_its_own_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    write_section(page, "mutants", "new\n")
    assert page.read_text() == PAGE.replace("old\n", "\nnew\n\n")
    write_section(page, "mutants", "\\1 newer")
    assert page.read_text() == PAGE.replace("old\n", "\n\\1 newer\n\n")


@pytest.mark.parametrize("text", ["# Page\n", None], ids=["no place", "no page"])
def test_a_page_without_the_place_is_refused(text: str | None, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    with pytest.raises(SectionError, match=r"no place for soak: it needs a line <!-- soak --> and"):
        write_section(page, "soak", "text")


def test_the_command_writes_its_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = {"elu_sign_flipped": FAULTS["elu_sign_flipped"]}
    monkeypatch.setattr(trust, "FAULTS", planted)
    monkeypatch.setattr(trust.accuracy, "DEFINITIONS", {"exp": None})
    monkeypatch.setattr(trust.accuracy, "accuracies_of", lambda name: iter([EXP]))
    monkeypatch.setattr(trust.sums, "all_digits", lambda seed: iter([sums.Digits("mse", 3, 1.25, 2.5, True)]))
    page = tmp_path / "trust.md"
    page.write_text(PAGE)
    assert main(["--page", str(page)]) == 0
    assert capsys.readouterr().out == "trust: planted=1 caught=1 caught_in_30_nodes=1\n"
    assert "1 of 1 were caught" in page.read_text()
    assert "| exp | " in page.read_text()
    assert "1 of 1 layers agree" in page.read_text()
    assert "| mse | 3 | 1.2 | 2.5 |" in page.read_text()
    monkeypatch.setattr(trust.accuracy, "accuracies_of", lambda name: iter([replace(EXP, gradient=GOAL + 0.1)]))
    assert main(["--page", str(page)]) == 1
    assert capsys.readouterr().err.endswith("lacks digits of its exact definition: exp\n")
    monkeypatch.setattr(trust.accuracy, "accuracies_of", lambda name: iter([EXP]))
    monkeypatch.setattr(trust, "NETWORKS", 5)
    monkeypatch.setitem(planted, "none", Fault("none", "tanh", "nothing is wrong", NumpyReference))
    assert main(["--page", str(page)]) == 1
    told = capsys.readouterr()
    assert told.out == "trust: planted=2 caught=1 caught_in_30_nodes=1\n"
    assert "missed in 30 nodes, or blamed on another layer: none\n" in told.err
    page.write_text("# Page\n")
    assert main(["--page", str(page)]) == 2


def test_mutants_write_theirs(tmp_path: Path) -> None:
    page = tmp_path / "trust.md"
    page.write_text(PAGE)
    tanh = ["--function", "activations.tanh_backward", "--networks", "20", "--processes", "1", "--page", str(page)]
    assert mutants.main(tanh) == 0
    count = len(mutants_of("activations.tanh_backward"))
    assert f"    mutants: made={count} killed={count} equivalent=0 survived=0\n" in page.read_text()
    assert f"{count} of the {count} are told too" in page.read_text().replace("\n", " ")
    assert "seed 1, 20 networks per layer" in page.read_text()


def test_the_page_that_is_kept_is_about_today_s_faults_and_proofs() -> None:
    text = (ROOT / "docs" / "trust.md").read_text()
    assert f"of {len(FAULTS)} were caught" in text.replace("\n", " ")
    made, killed, equivalent, survived = map(
        int, re.findall(r"made=(\d+) killed=(\d+) equivalent=(\d+) survived=(\d+)", text)[0]
    )
    assert equivalent == len(read_equivalents())
    assert made == killed + equivalent + survived
    assert survived == text.count("- survived: ")
    (told, shown) = map(int, re.findall(r"In about 30 nodes: (\d+) of the (\d+) are told too", text)[0])
    assert told == killed
    assert shown == made - equivalent
