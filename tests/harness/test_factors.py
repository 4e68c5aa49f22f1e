"""Planted factors: they stand where they are said to, and the table comes from what was told."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gradproof.model.adapter import AdapterError
from gradproof.reference import LAYERS, NumpyReference
from gradproof.trust import factors
from gradproof.trust.factors import FACTOR, Found, look, main, measured, outcome, planted, scaled, shows
from gradproof.trust.rounded import RoundedOnce
from gradproof.verdict.kinks import first_gradient, one_node


@pytest.mark.parametrize(("layer", "place"), [("gelu", "x"), ("linear", "x"), ("relu", None), ("add", None)])
def test_a_factor_does_not_show_where_numbers_are_handed_on(layer: str, place: str | None) -> None:
    assert shows(layer, "bfloat16", 1) == place


def test_as_many_layers_as_asked_for_are_off_and_the_same_for_a_seed() -> None:
    where = planted("bfloat16", 3, 4)
    assert len(where) == 4
    assert where == planted("bfloat16", 3, 4) != planted("bfloat16", 4, 4)
    assert all(shows(layer, "bfloat16", 3) == place for layer, place in where.items())


def test_the_factor_is_in_one_gradient() -> None:
    case = one_node(LAYERS["gelu"], {}, 0.5, "float64")
    right, off = (first_gradient(NumpyReference(rows=rows), case) for rows in ({}, {"gelu": scaled("gelu", "x")}))
    assert np.array_equal(off, FACTOR * right)
    assert scaled("gelu", "x")[0] is LAYERS["gelu"].forward


def test_what_is_planted_is_found_and_nothing_where_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "check", partial(factors.check, layers=["gelu"], max_nodes=3))
    off = look(RoundedOnce(rows={"gelu": scaled("gelu", "x")}), "bfloat16", 11, 40, {"gelu": "x"})
    assert (off.missed, off.others) == ([], [])
    right = look(RoundedOnce(), "bfloat16", 11, 40, {"gelu": "x"})
    assert (right.missed, right.blamed) == (["gelu"], frozenset())


def test_the_table_tells_what_was_missed_and_what_was_told_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Found("rounded", "bfloat16", {"gelu": "x", "silu": "x"}, frozenset({"gelu"})),
        Found("torch", "float16", {}, frozenset({"huber"})),
    ]
    lines = outcome(found, 7, 300).splitlines()
    assert lines[4:] == ["| rounded | bfloat16 | 2 | 1 | silu | none |", "| torch | float16 | 0 | 0 | none | huber |"]
    page = tmp_path / "page.md"
    page.write_text("<!-- factors -->\n<!-- /factors -->\n")
    monkeypatch.setattr(factors, "measured", lambda *arguments: found)
    assert main(["--seed", "7", "--page", str(page)]) == 0
    assert outcome(found, 7, 300) in page.read_text()
    assert "| silu | none |" in capsys.readouterr().out


def test_every_half_precision_and_framework_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "look", lambda adapter, dtype, *rest: (getattr(adapter, "name", adapter), dtype))
    monkeypatch.setattr(factors, "planted", lambda dtype, seed: {"gelu": "x"})
    expected = [(name, dtype) for dtype in ("bfloat16", "float16") for name in ("rounded", "torch", "jax")]
    assert measured(1) == expected


def test_a_framework_that_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*arguments: object) -> None:
        raise AdapterError("adapter 'torch' needs torch")

    monkeypatch.setattr(factors, "measured", missing)
    assert main([]) == 2
    assert "error: adapter 'torch' needs torch" in capsys.readouterr().err
