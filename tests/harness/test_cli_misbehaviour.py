"""The command line with adapters that misbehave, and with a user who interrupts it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gradproof.cli import AGREEMENT, DISAGREEMENT, INTERRUPTED
from helpers.command_line import VERSION, Command, Result, check, process, refused_in_one_line, valid_json

pytestmark = pytest.mark.usefixtures("workplace")

# Adapters that misbehave


def tally(result: Result, adapter: str) -> list[str]:
    """The counts after adapter and dtype: networks, gradients, wrong, known."""
    (row,) = (line for line in result.lines if re.match(rf"{adapter}( {VERSION})? float64 \d", line))
    return row.partition(" float64 ")[2].split()[:4]


def test_an_adapter_that_fails_does_not_stop_the_others(gradproof: Command) -> None:
    options = ("--networks", "60", "--json", "both.json", "--adapter", "adapters_here.py:Right")
    both = check(gradproof, "Spoilt", *options)
    assert both.code == DISAGREEMENT
    alone = check(gradproof, "Right", "--networks", "60", "--json", "alone.json")
    assert alone.code == AGREEMENT
    assert tally(both, "right") == tally(alone, "right")
    assert tally(alone, "right")[0] == "60"
    assert tally(both, "spoilt")[0] == "60"
    assert int(tally(both, "spoilt")[2]) > 3
    text = Path("both.json").read_text()
    kinds = {each["kind"] for each in json.loads(text)["disagreements"]}
    assert {"crash", "missing", "nonfinite"} <= kinds


def test_what_an_adapter_raises_is_shown_as_it_is(gradproof: Command) -> None:
    text = Path("adapters_here.py").read_text().replace('"no softmax"', r'"[i] of [/x]\n is\n [bold]bad"')
    Path("adapters_here.py").write_text(text)
    result = check(gradproof, "Spoilt", "--layer", "softmax", "--max-nodes", "1", "--networks", "1")
    assert result.code == DISAGREEMENT
    line = text[: text.index("raise RuntimeError")].count("\n") + 1
    assert result.lines[0] == (
        "spoilt float64: softmax (node h1) is wrong: crash: RuntimeError: [i] of [/x] is [bold]bad "
        f"(adapters_here.py:{line} in backward)"
    )
    assert f"is [bold]bad (adapters_here.py:{line} in backward) WRONG HERE: crash" in result.lines[4]


def test_an_adapter_that_exits_is_no_agreement(gradproof: Command) -> None:
    result = check(gradproof, "Exits", "--networks", "6")
    assert result.code != AGREEMENT


def test_an_adapter_without_a_version_is_refused(gradproof: Command) -> None:
    refused_in_one_line(check(gradproof, "NoVersion", "--networks", "1"), "no version")


def test_an_adapter_that_cannot_tell_what_it_supports_is_refused(gradproof: Command) -> None:
    refused_in_one_line(check(gradproof, "NoSupports", "--networks", "1"), "cannot tell")


def test_what_an_adapter_lacks_is_told(gradproof: Command) -> None:
    result = check(gradproof, "Small", "--networks", "12", "--json", "report.json")
    unsupported = 12 - int(tally(result, "small")[0])
    assert unsupported > 0
    assert f"small float64: {unsupported} networks not run, for it lacks one of their layers: " in result.out
    assert valid_json("report.json")["unsupported"] == {"small": {"float64": unsupported}}


def test_a_replay_of_what_an_adapter_lacks_is_no_agreement(gradproof: Command) -> None:
    check(gradproof, "Wrong", "--layer", "tanh", "-x", "--failures", "specs")
    (spec,) = Path("specs").iterdir()
    text = spec.read_text().replace('"tanh"', '"gelu"')
    spec.write_text(text)
    result = gradproof("replay", str(spec), "--adapter", "adapters_here.py:Small")
    assert "small float64: no network was examined" in result.lines
    assert result.code != AGREEMENT


# Ctrl-C


def test_an_interrupt_shows_and_writes_what_was_found_so_far(gradproof: Command) -> None:
    result = check(gradproof, "Interrupted", "--networks", "300", "--json", "report.json")
    assert result.code == INTERRUPTED
    assert re.match(r"interrupted: agreement: [34] networks, [1-9]\d* gradients compared in ", result.lines[-1])
    assert tally(result, "interrupted")[0] == "3"
    report = valid_json("report.json")
    assert report["interrupted"] is True
    assert report["networks"] in (3, 4)
    assert report["gradients_compared"] == int(tally(result, "interrupted")[1])


def test_an_interrupt_after_a_disagreement(gradproof: Command) -> None:
    wrong = ("--adapter", "adapters_here.py:Wrong", "--layer", "tanh")
    result = check(gradproof, "Interrupted", *wrong, "--networks", "300", "--json", "report.json")
    assert result.code == DISAGREEMENT
    assert re.match(r"interrupted: \d+ tensors? disagrees?: ", result.lines[-1])
    assert valid_json("report.json")["interrupted"] is True


def test_an_interrupt_before_anything_was_examined(gradproof: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradproof.subject.isolation.load_adapter", interrupt)
    result = gradproof("check", "--adapter", "reference")
    assert (result.code, result.out, result.err) == (INTERRUPTED, "", "gradproof: interrupted\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_real_signal(name: str) -> None:
    command = ("check", "--adapter", "adapters_here.py:Signalled", "--dtype", "float64", "--json", "report.json")
    result = process(*command, SIGNAL=name)
    assert result.code == INTERRUPTED
    assert result.lines[-1].startswith("interrupted: agreement: ")
    assert "Traceback" not in result.err
    assert valid_json("report.json")["interrupted"] is True
