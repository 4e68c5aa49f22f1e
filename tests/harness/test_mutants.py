"""Mutants: made from the syntax tree, told from the original, and a judge that can also miss one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from gradproof.reference import LAYERS
from gradproof.trust import mutants
from gradproof.trust.mutants import (
    Mutant,
    Outcome,
    backward_functions,
    judge,
    judge_all,
    layers_of,
    main,
    mutants_of,
    summary,
    trials_of,
)

TANH = "activations.tanh_backward"
LINEAR = "linear.linear_backward"


def test_every_backward_function_has_mutants() -> None:
    assert {layer for name in backward_functions() for layer in layers_of(name)} == set(LAYERS)
    made = {name: len(mutants_of(name)) for name in backward_functions()}
    assert [name for name, count in made.items() if not count] == []
    assert sum(made.values()) >= 800


def test_the_mistakes_of_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "backward_functions", lambda: {"here.gelu_backward": gelu_backward})
    found = {(each.mistake, each.mutated) for each in mutants_of("here.gelu_backward")}
    assert found >= {
        ("operator swapped", "return {'x': dout * (below - x * density)}"),
        ("operand dropped", "return {'x': dout * below}"),
        ("operand dropped", "return {'x': below + x * density}"),
        ("sign flipped", "return {'x': -(dout * (below + x * density))}"),
        ("wrong cached value", "return {'x': dout * (dout + x * density)}"),
        ("constant shifted", "density = np.exp(-1.5 * x * x) / math.sqrt(2.0 * math.pi)"),
    }


def gelu_backward(dout, cache):  # type: ignore[no-untyped-def]
    x, below = cache
    density = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return {"x": dout * (below + x * density)}


def test_fields_of_the_cache_are_taken_for_each_other_by_name_or_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "backward_functions", lambda: {"here.fields_backward": fields_backward})
    found = {each.mutated for each in mutants_of("here.fields_backward") if each.mistake == "wrong cached value"}
    assert found == {
        "slope = x * x + weight * kept.scale",
        "slope = dout * weight + weight * kept.scale",
        "slope = dout * x + kept.scale * kept.scale",
        "slope = dout * x + weight * kept.inner",
        "return {'x': slope * dout.size}",
    }


def fields_backward(dout, kept):  # type: ignore[no-untyped-def]
    x, weight = kept.x, kept.weight
    slope = dout * x + weight * kept.scale
    return {"x": slope * kept.inner.size}


def test_a_sum_may_be_overwritten_or_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "backward_functions", lambda: {"here.added_backward": added_backward})
    found = {(each.mistake, each.mutated) for each in mutants_of("here.added_backward")}
    assert {("overwritten, not added to", "total = dout"), ("added with the wrong sign", "total -= dout")} <= found


def added_backward(dout, cache):  # type: ignore[no-untyped-def]
    total = cache
    total += dout
    return {"x": total}


def test_each_mutant_is_another_function_and_none_is_the_original() -> None:
    for name in (TANH, LINEAR):
        sources = [each.source for each in mutants_of(name)]
        assert len(set(sources)) == len(sources)
    cache = LAYERS["tanh"].forward(np.array([0.5, -1.0]))[1]
    dout = np.array([1.5, -2.0])
    expected = LAYERS["tanh"].backward(dout, cache)["x"]
    found = [each.compiled()(dout, cache)["x"] for each in mutants_of(TANH)]
    assert all(not np.allclose(each, expected) for each in found)


def test_the_trees_are_left_whole() -> None:
    assert mutants_of(LINEAR) == mutants_of(LINEAR)


def test_a_diff_shows_the_changed_line() -> None:
    mutant = next(each for each in mutants_of(TANH) if each.mistake == "sign flipped")
    assert f"+    {mutant.mutated}\n" in mutant.diff()
    assert mutant.diff().startswith(f"--- {TANH}\n+++ sign flipped\n")


@pytest.mark.parametrize("function", [TANH, "margins.hinge_backward", "normalization.weight_norm_backward"])
def test_mutants_are_told_from_the_original(function: str) -> None:
    _, survived = summary(judge_all(function, networks=60, seed=1), mutants.read_equivalents())
    assert [each.diff() for each in survived] == []


def test_a_judge_without_cases_tells_nothing() -> None:
    outcomes = [judge(each, {"tanh": []}) for each in mutants_of(TANH)]
    line, survived = summary(outcomes, {})
    assert line == f"mutants: made={len(outcomes)} killed=0 equivalent=0 survived={len(outcomes)}"
    assert len(survived) == len(outcomes)


def test_a_proof_excuses_the_mutant_it_names_alone() -> None:
    one, other = (Mutant("f", "sign flipped", line, line) for line in ("return -x", "return -y"))
    line, survived = summary(
        [Outcome(one, None, None), Outcome(other, None, None), Outcome(one, 3, 1)], {("f", "return -x"): "even"}
    )
    assert line == "mutants: made=3 killed=1 equivalent=1 survived=1"
    assert survived == [other]


def test_what_shows_in_small_networks_alone_has_survived_and_no_proof_excuses_it() -> None:
    mutant = Mutant("f", "sign flipped", "return -x", "return -x")
    line, survived = summary([Outcome(mutant, 3, None), Outcome(mutant, 3, 0)], {("f", "return -x"): "even"})
    assert line == "mutants: made=2 killed=1 equivalent=0 survived=1"
    assert survived == [mutant]


def test_a_mutant_is_told_again_where_its_network_is_buried(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = trials_of("tanh", 5, seed=1)
    for trial in trials:
        assert all(len(case.network.nodes) > 20 for case in trial.buried)
        assert len(trial.buried) == mutants.BURIALS
    flipped = next(each for each in mutants_of(TANH) if each.mistake == "sign flipped")
    assert judge(flipped, {"tanh": trials}) == Outcome(flipped, 1, 1)
    monkeypatch.setattr(mutants, "BURIALS", 0)
    assert judge(flipped, {"tanh": trials_of("tanh", 5, seed=1)}) == Outcome(flipped, 1, None)


def test_the_probe_of_a_kink_tells_without_any_network() -> None:
    outcomes = [judge(each, {"relu": []}) for each in mutants_of("piecewise.relu_backward")]
    assert {(each.networks, each.deep) for each in outcomes} >= {(1, 0)}


def test_every_proof_names_a_mutant() -> None:
    made = {(each.function, each.mutated) for name in backward_functions() for each in mutants_of(name)}
    assert mutants.read_equivalents().keys() <= made


def test_the_command_ends_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    survivors = tmp_path / "survivors.diff"
    arguments = ["--function", TANH, "--networks", "5", "--processes", "1", "--survivors", str(survivors)]
    assert main(arguments) == 0
    count = len(mutants_of(TANH))
    assert capsys.readouterr().out == f"mutants: made={count} killed={count} equivalent=0 survived=0\n"
    assert not survivors.exists()


def test_survivors_are_written_down(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutants, "read_equivalents", dict)
    survivors = tmp_path / "survivors.diff"
    hinge = ["--function", "margins.hinge_backward", "--networks", "5", "--processes", "1"]
    assert main([*hinge, "--survivors", str(survivors)]) == 1
    assert "+    return {'x': -g / target, 'target': -g * x}\n" in survivors.read_text()
    assert " survived=0" not in capsys.readouterr().out


def test_an_interrupt_ends_in_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*jobs: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(mutants, "tracked", interrupted)
    page = tmp_path / "page.md"
    assert main(["--function", TANH, "--networks", "5", "--processes", "1", "--page", str(page)]) == 130
    assert capsys.readouterr() == ("", "interrupted after 0 mutants; nothing was written\n")
    assert not page.exists()


def test_an_unknown_function_is_refused_with_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--function", "tanh"])
    assert f"unknown function 'tanh'; valid: {next(iter(backward_functions()))}, " in capsys.readouterr().err
