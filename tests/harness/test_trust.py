"""The page of trust: its figures come from what it is given, and a miss is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradproof import trust
from gradproof.accuracy import accuracy
from gradproof.faults import FAULTS, Fault
from gradproof.mutants import Outcome, mutants_of, read_equivalents
from gradproof.reference import LAYERS, NumpyReference
from gradproof.trust import Catch, catch, main, page

TANH = mutants_of("activations.tanh_backward")
EXP = accuracy(LAYERS["exp"], {})
ROOT = Path(__file__).parents[2]


def test_a_planted_fault_is_caught() -> None:
    found = catch(FAULTS["gelu_density_missing"], seed=1)
    assert found.blamed
    assert 1 <= found.networks <= trust.NETWORKS


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
    assert not catch(fault, seed=1).blamed


def test_the_page_tells_what_was_found() -> None:
    catches = [
        Catch(FAULTS["elu_sign_flipped"], 3, 0.5, True),
        Catch(FAULTS["mse_batch_mean"], 9, 1.5, True),
        Catch(FAULTS["mae_magnitude"], 200, 9.0, False),
    ]
    text = page(catches, [Outcome(TANH[0], 1), Outcome(TANH[1], None)], [EXP], seed=5)
    assert "seed 5" in text
    assert "2 of 3 were caught within 200 networks" in text.replace("\n", " ")
    assert "median took 6 networks and 1.00 s, the slowest was `mse_batch_mean` with 9" in text.replace("\n", " ")
    assert "    mutants: made=2 killed=1 equivalent=0 survived=1\n" in text
    assert f"- survived: `{TANH[1].function}`, {TANH[1].mistake}: `{TANH[1].mutated}`" in text
    assert "| exp | " in text


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "FAULTS", {"elu_sign_flipped": FAULTS["elu_sign_flipped"]})
    monkeypatch.setattr(trust.mutants, "backward_functions", lambda: {TANH[0].function: LAYERS["tanh"].backward})
    monkeypatch.setattr(trust.mutants, "NETWORKS", 5)
    monkeypatch.setattr(trust.accuracy, "accuracies", lambda: iter([EXP]))
    output = tmp_path / "trust.md"
    assert main(["--output", str(output)]) == 0
    text = output.read_text()
    assert "1 of 1 were caught" in text
    assert f"made={len(TANH)} killed={len(TANH)} equivalent=0 survived=0" in text


def test_the_page_that_is_kept_is_about_today_s_faults_and_proofs() -> None:
    text = (ROOT / "docs" / "trust.md").read_text()
    assert f"of {len(FAULTS)} were caught" in text.replace("\n", " ")
    made, killed, equivalent, survived = map(
        int, re.findall(r"made=(\d+) killed=(\d+) equivalent=(\d+) survived=(\d+)", text)[0]
    )
    assert equivalent == len(read_equivalents())
    assert made == killed + equivalent + survived
    assert survived == text.count("- survived: ")
