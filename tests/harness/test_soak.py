"""The soak: it counts what it examines, goes on where it stopped, survives its processes, and can find something."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from gradproof.trust import soak
from gradproof.trust.sections import TRUST_PAGE
from gradproof.trust.soak import Journal, JournalError, main
from gradproof.trust.soak_outcome import DRAWS, NOTHING, Distribution, Outcome, Plan

ROOT = Path(__file__).parents[2]
QUICK = ["--adapter", "reference", "--dtype", "float64", "--processes", "1"]

WRONG = """
from gradproof.reference import NumpyReference

class Wrong(NumpyReference):
    name = "wrong"
    def backward(self, forward, cotangent):
        return {name: 1.5 * gradient for name, gradient in super().backward(forward, cotangent).items()}
"""

DYING = """
import os
from pathlib import Path
from gradproof.reference import NumpyReference

class Dying(NumpyReference):
    name = "dying"
    def forward(self, network, values, dtype):
        marks = Path(__file__).parent
        if len(network.nodes) > 3 and len(list(marks.glob("*.died"))) < int((marks / "deaths").read_text()):
            (marks / f"{os.getpid()}.died").touch()
            os._exit(9)
        return super().forward(network, values, dtype)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(soak, "QUICK_TO_COMPILE", {})
    monkeypatch.setattr(soak, "CHUNK", 8)


def closing_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_quantiles_are_right_to_within_a_bin() -> None:
    drawn = np.random.default_rng(0).lognormal(size=4000)
    found = Distribution()
    for each in drawn:
        found.add(float(each))
    for share in (0.5, 0.99, 0.999):
        assert found.quantile(share) == pytest.approx(np.quantile(drawn, share), rel=0.13)
        assert found.quantile(share) >= np.quantile(drawn, share, method="lower")
    assert found.largest == drawn.max() == found.quantile(1.0)


def test_distributions_add_up_and_are_written_down() -> None:
    one, other, both = Distribution(), Distribution(), Distribution()
    for i, units in enumerate((0.0, 1e-9, 0.3, 7.0, 12.0)):
        both.add(units)
        (one if i % 2 else other).add(units)
    one.merge(other)
    assert one == both == Distribution.from_json(json.loads(json.dumps(both.to_json())))
    assert Distribution().quantile(0.5) == 0.0
    assert both.counts[NOTHING] == 2


def test_a_plan_draws_the_same_networks_again_and_others_for_another_seed() -> None:
    def drawn(seed: int, chunk: int) -> list[str]:
        return [f"{each} {dtype}" for each, dtype in Plan(seed=seed).networks(chunk, 3 * DRAWS)]

    assert drawn(1, 0) == drawn(1, 0)
    assert not set(drawn(1, 0)) & set(drawn(2, 0))
    assert not set(drawn(1, 0)) & set(drawn(1, 1))


def test_graphs_are_shared_by_some_sets_of_numbers_and_dtypes_take_turns() -> None:
    networks = list(Plan().networks(0, 5 * DRAWS))
    for i in range(0, len(networks), DRAWS):
        same = networks[i : i + DRAWS]
        assert len({each.network for each, _ in same}) == 1
        assert len({each.seed for each, _ in same}) == DRAWS
        assert len({dtype for _, dtype in same}) == 1
    assert {dtype for _, dtype in networks} == set(Plan().dtypes)
    assert [each.seed for each, _ in Plan().networks(0, 3)] == [each.seed for each, _ in networks[:3]]


def test_it_ends_in_one_line_and_goes_on_where_it_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*QUICK, "--networks", "12"]) == 0
    first = closing_line(capsys)
    gradients = int(first.split()[2].partition("=")[2])
    assert first == f"soak: networks=12 gradients={gradients} false_alarms=0"
    assert gradients > 12
    assert main([*QUICK, "--networks", "20"]) == 0
    further = closing_line(capsys)
    # The first eight are not examined again: with nobody to examine them, they are still there.
    monkeypatch.setattr(soak, "soak", lambda plan, todo, processes: iter(()))
    assert main([*QUICK, "--networks", "20"]) == 0
    assert closing_line(capsys) == further
    assert main([*QUICK, "--networks", "20", "--fresh"]) == 0
    assert closing_line(capsys) == "soak: networks=0 gradients=0 false_alarms=0"


def test_what_is_found_does_not_hang_on_how_often_it_was_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    for networks in ("8", "16", "24"):
        assert main([*QUICK, "--networks", networks]) == 0
    by_and_by = closing_line(capsys)
    assert main([*QUICK, "--networks", "24", "--fresh"]) == 0
    assert closing_line(capsys) == by_and_by


def test_every_tensor_that_agrees_is_counted_once(tmp_path: Path) -> None:
    assert main([*QUICK, "--networks", "16"]) == 0
    lines = (tmp_path / soak.JOURNAL).read_text().splitlines()
    found = Outcome()
    for line in lines[1:]:
        found.merge(Outcome.from_json(json.loads(line)["outcome"]))
    where = "reference float64"
    measured = found.distribution("reference", "float64").counts.total()
    assert 0 < measured + found.within[where] <= found.tensors[where]
    assert found.elements[where] > found.tensors[where] > found.gradients
    assert 0 <= found.unverifiable[where] < found.elements[where]


def test_ctrl_c_keeps_what_is_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(plan: Plan, todo: Mapping[int, int], processes: int | None) -> Iterator[tuple[int, Outcome]]:
        yield 0, Outcome(networks=8, gradients=31)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(soak, "soak", stopped)
        assert main([*QUICK, "--networks", "16"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "soak: networks=8 gradients=31 false_alarms=0\n"
    assert "the same command goes on from" in captured.err
    assert main([*QUICK, "--networks", "16"]) == 0
    assert "networks=16 " in closing_line(capsys)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: "", "is no journal of a soak: move it away"),
        (lambda text: "hello\n", "is no journal of a soak"),
        (lambda text: text.replace('"seed": 1', '"seed": 2'), "another seed: --fresh starts anew"),
        (lambda text: text.replace('"code": "', '"code": "x'), "another code: --fresh"),
    ],
    ids=["empty", "no journal", "another seed", "other code"],
)
def test_a_journal_of_something_else_is_left_alone(
    spoil, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    assert main([*QUICK, "--networks", "8"]) == 0
    journal = tmp_path / soak.JOURNAL
    journal.write_text(spoil(journal.read_text()))
    before = journal.read_text()
    assert main([*QUICK, "--networks", "8"]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert journal.read_text() == before


def test_a_line_cut_short_by_a_kill_is_examined_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", {"seed": 1})
    journal.begin({0: Outcome(networks=8)})
    journal.add(1, Outcome(networks=8, gradients=3))
    assert journal.read() == {0: Outcome(networks=8), 1: Outcome(networks=8, gradients=3)}
    text = (tmp_path / "journal").read_text()
    (tmp_path / "journal").write_text(text[:-10])
    assert journal.read() == {0: Outcome(networks=8)}
    with pytest.raises(JournalError, match="another seed"):
        Journal(tmp_path / "journal", {"seed": 2}).read()


def test_a_wrong_adapter_is_an_alarm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    arguments = ["--adapter", "wrong.py:Wrong", "--dtype", "float64", "--processes", "1", "--networks", "8"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert not captured.out.endswith("false_alarms=0\n")
    assert "false alarm: wrong float64: " in captured.err
    assert list((tmp_path / "gradproof-failures").glob("wrong-float64-*.json"))


def test_a_process_that_dies_takes_nothing_along(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "deaths").write_text("1")
    arguments = ["--adapter", "dying.py:Dying", "--dtype", "float64", "--processes", "1", "--networks", "24"]
    assert main(arguments) == 0
    assert "networks=24 " in closing_line(capsys)
    assert len(list(tmp_path.glob("*.died"))) == 1


def test_a_chunk_whose_process_always_dies_is_given_up_and_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "TRIES", 0)
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "deaths").write_text("1000")
    arguments = ["--adapter", "dying.py:Dying", "--dtype", "float64", "--processes", "1", "--networks", "16"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "soak: networks=0 gradients=0 false_alarms=2\n"
    assert "chunk 0 of seed 1: its process died 1 times" in captured.err.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "tensorflow"], "unknown adapter 'tensorflow'; valid adapters: "),
        (["--dtype", "int8"], "unknown dtype 'int8'; valid dtypes: float64, "),
    ],
)
def test_what_is_unknown_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / soak.JOURNAL).exists()


def test_no_networks_are_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*QUICK, "--networks", "0"])


def test_the_page_tells_the_distribution(tmp_path: Path) -> None:
    page = tmp_path / "trust.md"
    page.write_text("<!-- soak -->\n<!-- /soak -->\n")
    assert main([*QUICK, "--networks", "24", "--page", str(page)]) == 0
    text = page.read_text()
    assert "\nsoak: networks=24 gradients=" in text
    assert "the threshold is 8 for all" in text
    assert "| reference float64 | " in text
    lines = (tmp_path / soak.JOURNAL).read_text().splitlines()
    layers = {layer for line in lines[1:] for _, _, layer, _ in json.loads(line)["outcome"]["units"]}
    assert layers
    assert all(f"\n| {layer} | " in text for layer in layers)


def test_a_short_soak_of_the_frameworks(tmp_path: Path) -> None:
    for framework in ("torch", "jax", "optax", "flax"):
        pytest.importorskip(framework, reason="needs pip install 'gradproof[torch,jax]'")
    arguments = ["--networks", "16", "--seed", "3", "--dtype", "float32", "--dtype", "bfloat16", "--processes", "1"]
    command = [sys.executable, "-m", "gradproof.trust.soak", *arguments]
    found = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("soak: networks=16 gradients=")
    assert found.stdout.endswith(" false_alarms=0\n")


def test_the_page_that_is_kept_tells_of_a_soak_of_every_dtype() -> None:
    text = (ROOT / TRUST_PAGE).read_text()
    networks, gradients = map(
        int, re.findall(r"^soak: networks=(\d+) gradients=(\d+) false_alarms=\d+$", text, re.M)[0]
    )
    assert gradients > networks >= 1000
    for adapter in Plan().adapters:
        for dtype in Plan().dtypes:
            assert f"\n| {adapter} {dtype} | " in text


def test_a_chunk_that_once_could_not_be_drawn_is() -> None:
    """One of its networks asked for a sequence of length zero."""
    assert len(list(Plan(seed=610001).networks(182, 100))) == 100
