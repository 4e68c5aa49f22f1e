"""What the command line says of a request that it cannot serve."""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from gradproof.cli import USAGE
from gradproof.draw.examples import EXAMPLES
from gradproof.reference import LAYERS
from gradproof.subject.registry import adapter_names
from helpers.command_line import Command, check, not_installed, process, refused, refused_in_one_line

pytestmark = pytest.mark.usefixtures("workplace")

HOW_TO_ADD = "package.module:Class or path/to/file.py:Class"
UNKNOWN = {
    "adapter": f"unknown adapter 'nope'; valid adapters: {', '.join(adapter_names())}, or {HOW_TO_ADD}",
    "layer": f"unknown layer 'nope'; valid layers: {', '.join(LAYERS)}",
    "dtype": "unknown dtype 'nope'; valid dtypes: float64, float32, bfloat16, float16",
    "example": f"unknown example 'nope'; valid examples: {', '.join(EXAMPLES)}",
    "spec": "nope: cannot be read: No such file or directory",
}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("check", "--adapter", "nope"), "adapter"),
        (("check", "--adapter", "reference", "--layer", "nope"), "layer"),
        (("check", "--adapter", "reference", "--layer", "gelu", "--layer", "nope"), "layer"),
        (("check", "--adapter", "reference", "--dtype", "nope"), "dtype"),
        (("layers", "--adapter", "nope"), "adapter"),
        (("walk", "nope"), "example"),
        (("walk", "tanh_2_3_1", "--adapter", "nope"), "adapter"),
        (("replay", "nope"), "spec"),
    ],
)
def test_an_unknown_name_is_told_with_the_valid_ones(gradproof: Command, arguments: tuple[str, ...], what: str) -> None:
    assert refused(gradproof(*arguments), UNKNOWN[what])


@pytest.mark.parametrize("command", [("check",), ("replay", "spec.json")])
def test_an_unknown_class_of_arithmetic_is_refused_with_the_valid_ones(
    gradproof: Command, command: tuple[str, ...]
) -> None:
    check(gradproof, "Wrong", "--layer", "tanh", "-x", "--failures", "specs")
    (spec,) = Path("specs").iterdir()
    spec.rename("spec.json")
    result = gradproof(*command, "--adapter", "reference", "--arithmetic", "outside")
    assert refused(result, "unknown arithmetic 'outside'; valid arithmetics: inside, stored, every")


def test_a_bad_spec_is_told_in_one_line(gradproof: Command) -> None:
    Path("spec.json").write_text('{"schema": 7}')
    assert refused(
        gradproof("replay", "spec.json"), "spec.json: spec has schema 7; this version of gradproof reads schema 1"
    )


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("nothing.py:Mine", f"no file 'nothing.py'; expected {HOW_TO_ADD}"),
        ("nothing:Mine", f"cannot import 'nothing': No module named 'nothing'; expected {HOW_TO_ADD}"),
        ("broken.py:Mine", "broken.py cannot be imported: ZeroDivisionError: division by zero"),
        ("empty.py:Mine", "empty.py has no class 'Mine'; its classes: none"),
        (
            "adapters_here.py:Incomplete",
            "adapter 'adapters_here.py:Incomplete' is no adapter: it lacks version, supports, backward",
        ),
        ("adapters_here.py:Unmade", "adapter 'adapters_here.py:Unmade' cannot be made: RuntimeError: no device"),
    ],
)
def test_an_adapter_that_cannot_be_had(gradproof: Command, adapter: str, message: str) -> None:
    Path("broken.py").write_text("1 / 0\n")
    Path("empty.py").write_text("")
    assert refused(gradproof("check", "--adapter", adapter), message)


def test_a_module_that_does_not_import(gradproof: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(".")
    Path("broken.py").write_text("1 / 0\n")
    refused_in_one_line(gradproof("check", "--adapter", "broken:Mine"), "'broken'", "division by zero")


def test_two_adapters_of_the_same_name(gradproof: Command) -> None:
    adapters = ("--adapter", "adapters_here.py:Right", "--adapter", "./adapters_here.py:Right")
    message = "two of the adapters are named 'right'; give each a name of its own"
    assert refused(gradproof("check", *adapters), message)


@pytest.mark.parametrize("command", [("check",), ("check", "--adapter", "torch"), ("layers", "--adapter", "torch")])
def test_a_framework_that_is_not_installed(
    gradproof: Command, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(EntryPoint, "load", not_installed)
    message = "adapter 'torch' needs torch, which is not installed: pip install 'gradproof[torch]'"
    assert refused(gradproof(*command), message)


WITHOUT_TORCH = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
"""


def test_a_framework_that_is_really_not_there(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = process("check", "--adapter", "torch", PYTHONPATH=path)
    message = "adapter 'torch' needs torch, which is not installed: pip install 'gradproof[torch]'"
    assert refused(result, message)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--networks", "0", "expected an integer of at least 1, got '0'"),
        ("--networks", "-3", "expected an integer of at least 1, got '-3'"),
        ("--networks", "1e3", "expected an integer of at least 1, got '1e3'"),
        ("--networks", "many", "expected an integer of at least 1, got 'many'"),
        ("--max-nodes", "0", "expected an integer of at least 1, got '0'"),
        ("--seed", "-1", "expected an integer of at least 0, got '-1'"),
        ("--seed", "1.5", "expected an integer of at least 0, got '1.5'"),
        ("--timeout", "0", "expected a number of seconds above 0, got '0'"),
        ("--timeout", "inf", "expected a number of seconds above 0, got 'inf'"),
        ("--timeout", "nan", "expected a number of seconds above 0, got 'nan'"),
        ("--timeout", "soon", "expected a number of seconds above 0, got 'soon'"),
        ("--memory", "-1", "expected a number above 0, got '-1'"),
    ],
)
def test_a_bad_number(gradproof: Command, option: str, value: str, expected: str) -> None:
    result = gradproof("check", option, value)
    assert result.code == USAGE
    assert result.err.splitlines()[-1].startswith("gradproof check: error: argument ")
    assert result.err.splitlines()[-1].endswith(f"{option}: {expected}")


@pytest.mark.parametrize("arguments", [(), ("chekc",), ("walk",), ("replay",), ("check", "--netwroks", "3")])
def test_a_bad_command_line(gradproof: Command, arguments: tuple[str, ...]) -> None:
    result = gradproof(*arguments)
    assert (result.code, result.out) == (USAGE, "")
    assert "usage: gradproof" in result.err


UNWRITABLE = [
    ("nowhere/report.json", "No such file or directory"),
    (".", "Is a directory"),
    ("adapters_here.py/report.json", "Not a directory"),
]


@pytest.mark.parametrize(("path", "reason"), UNWRITABLE)
@pytest.mark.parametrize("command", [("check", "--networks", "1"), ("layers",), ("walk", "tanh_2_3_1")])
def test_json_that_cannot_be_written(gradproof: Command, command: tuple[str, ...], path: str, reason: str) -> None:
    result = gradproof(*command, "--adapter", "adapters_here.py:Marks", "--json", path)
    assert refused(result, f"cannot write {path!r}: {reason}")


def test_json_that_cannot_be_written_is_told_before_the_run(gradproof: Command) -> None:
    result = check(gradproof, "Marks", "--networks", "1", "--json", "nowhere/report.json")
    assert result.code == USAGE
    assert not Path("was-run").exists()


def test_a_run_that_cannot_start_leaves_the_old_json_alone(gradproof: Command) -> None:
    Path("report.json").write_text("{}")
    assert gradproof("check", "--adapter", "nope", "--json", "report.json").code == USAGE
    assert Path("report.json").read_text() == "{}"


def test_failures_that_cannot_be_written(gradproof: Command) -> None:
    result = check(gradproof, "Wrong", "--layer", "tanh", "--networks", "2", "--failures", "adapters_here.py")
    refused_in_one_line(result, "adapters_here.py")
