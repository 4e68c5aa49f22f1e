"""gradproof prove: what holds is told in a line, what does not with the case, the check and the error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradproof import prove
from gradproof.cli import AGREEMENT, DISAGREEMENT, USAGE, main
from gradproof.reference import LAYERS


def test_a_right_layer_is_proven(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["prove", "relu", "tanh", "--json", str(tmp_path / "proofs.json")]) == AGREEMENT
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines[:2]] == ["relu: proven", "tanh: proven"]
    assert lines[-1] == "2 of 2 layers proven"
    told = json.loads((tmp_path / "proofs.json").read_text())
    assert [(each["layer"], each["refutations"]) for each in told["layers"]] == [("relu", []), ("tanh", [])]


def wrong(name: str, change: Any) -> Any:
    layer = LAYERS[name]
    return replace(layer, backward=lambda dout, cache: change(layer.backward(dout, cache)))


@pytest.mark.parametrize(
    ("change", "checks"),
    [
        (lambda g: {"x": g["x"] * (1.0 + 1e-12)}, {"complex step"}),
        (lambda g: {"x": g["x"] * 1.5}, {"complex step", "differences"}),
        (lambda g: {"y": g["x"]}, {"structure"}),
        (lambda g: {"x": g["x"] + 1e-3}, {"linear in the cotangent"}),
        (lambda g: {"x": np.full_like(g["x"], np.nan)}, {"complex step", "differences"}),
        (lambda g: 1 / 0, {"structure"}),
    ],
    ids=["a factor of 1 + 1e-12", "a factor", "another name", "not linear", "NaN", "raises"],
)
def test_a_wrong_backward_function_is_refuted(change: Any, checks: set[str]) -> None:
    proof = prove(wrong("tanh", change))
    assert not proof.holds
    assert checks <= {each.check for each in proof.refutations}
    assert all(each.case.startswith("tanh()") and each.message for each in proof.refutations)


def test_a_layer_that_no_case_fits_is_not_proven() -> None:
    proof = prove(replace(LAYERS["tanh"], ranks=(5, 5)))
    assert (proof.cases, proof.refutations, proof.holds) == (0, (), False)


def test_what_is_refuted_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "tanh", wrong("tanh", lambda g: {"x": 1.5 * g["x"]}))
    assert main(["prove", "tanh", "relu"]) == DISAGREEMENT
    shown = capsys.readouterr().out
    assert "tanh: NOT PROVEN, " in shown
    assert ": complex step: dx: off by " in shown
    assert shown.endswith("1 of 2 layers proven\n")


def test_an_unknown_layer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "tann"]) == USAGE
    assert capsys.readouterr().err.startswith("gradproof: unknown layer 'tann'; valid layers: ")
