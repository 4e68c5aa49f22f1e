"""How the command line writes: to pipes, in colours, and its help."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from gradproof.cli import AGREEMENT, DISAGREEMENT
from gradproof.draw.examples import EXAMPLES
from helpers.command_line import BOTH, Command, process, single_spaced

pytestmark = pytest.mark.usefixtures("workplace")

COMMANDS = ("check", "layers", "replay", "walk")


def test_the_version_is_told() -> None:
    result = process("--version")
    assert (result.code, result.out, result.err) == (AGREEMENT, f"gradproof {version('gradproof')}\n", "")


# Output


def test_a_pipe_gets_no_escape_codes_and_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    directory = "/".join(["a-rather-long-directory"] * 5)
    arguments = ("check", *BOTH, "--layer", "tanh", "--networks", "2", "--seed", "1", "--failures", directory)
    result = process(*arguments, TERM="xterm-256color")
    assert result.code == DISAGREEMENT
    assert "\x1b" not in result.out + result.err
    assert "…" not in result.out
    again = [line for line in result.lines if line.startswith("replay: ")]
    assert again
    for line in again:
        assert re.fullmatch(rf"replay: gradproof replay {directory}/\S+\.json --adapter adapters_here\.py:Wrong", line)


def test_no_color(monkeypatch: pytest.MonkeyPatch, gradproof: Command) -> None:
    arguments = ("check", *BOTH, "--layer", "tanh", "--networks", "2", "--seed", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1;31m" in gradproof(*arguments).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert re.findall(r"\x1b\[[\d;]*3\d", gradproof(*arguments).out) == []


def test_a_reader_that_leaves_early_changes_no_verdict() -> None:
    """`gradproof layers | head -1` must not look like a disagreement."""
    with subprocess.Popen(
        [sys.executable, "-m", "gradproof", "layers", "--adapter", "reference"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stdout
        assert running.stderr
        running.stdout.close()
        messages = running.stderr.read()
        running.wait(timeout=60)
    assert running.returncode != DISAGREEMENT
    assert messages == b""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_lists_its_options(gradproof: Command, command: str) -> None:
    result = gradproof(command, "--help")
    assert (result.code, result.err) == (0, "")
    options = {"--json FILE", "--jax-cache DIRECTORY", "--adapter A"}
    if command == "check":
        options |= {"--networks N", "--seed S", "--dtype D", "--layer L", "--max-nodes N", "--timeout SECONDS"}
        options |= {"-x, --exitfirst", "--failures DIRECTORY"}
    if command in ("check", "replay"):
        options |= {"--isolation, --no-isolation", "--memory GIB"}
    assert {option for option in options if option not in result.out} == set()
    positional = {"replay": "SPEC.json", "walk": "EXAMPLE"}.get(command, "")
    assert positional in result.out


def test_help_lists_the_commands_and_examples(gradproof: Command) -> None:
    result = gradproof("--help")
    assert (result.code, result.err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^    {command} +\S", result.out, re.MULTILINE)
    assert "examples:\n  gradproof check " in result.out


def test_help_of_walk_names_the_examples(gradproof: Command) -> None:
    text = single_spaced(gradproof("walk", "--help").out)
    assert all(name in text for name in EXAMPLES)


def test_the_defaults_that_help_tells_are_those_that_hold(gradproof: Command) -> None:
    text = single_spaced(gradproof("check", "--help").out)
    for told in ("how many (default 300)", "(default 8)", "(default 60)", "(default gradproof-failures)"):
        assert told in text
