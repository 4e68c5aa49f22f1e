"""The command line with adapters in processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gradproof.cli import AGREEMENT, DISAGREEMENT, USAGE
from gradproof.model.spec import save_case
from gradproof.run.check import replay
from gradproof.run.results import Report
from helpers.isolation import WITH, gone, last_child, mine

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="adapters have processes of their own on Unix alone"),
    pytest.mark.usefixtures("own_processes"),
]


def gradproof(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gradproof", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


CHECK = ("check", "--adapter", "mine.py:Mine", "--dtype", "float64", "--layer", "tanh", "--seed", "1")


def read(path: str) -> Any:
    return json.loads(Path(path).read_text())


def test_the_other_networks_and_the_other_adapter_are_examined() -> None:
    mine("ctypes.string_at(0)")
    options = ("--adapter", "mine.py:Right", "--max-nodes", "2", "--networks", "3", "--json", "report.json")
    with gradproof(*CHECK, *options) as running:
        output, errors = running.communicate(timeout=100)
    assert running.returncode == DISAGREEMENT, errors
    report = read("report.json")
    kinds = {(each["adapter"], each["layer"], each["kind"], each["got"]) for each in report["disagreements"]}
    assert kinds == {("mine", "tanh", "crash", "the process was ended by SIGSEGV")}
    assert report["networks"] == 3
    for adapter in ("mine", "right"):
        assert re.search(rf"^{adapter} +float64 +3 ", output, re.MULTILINE)
    assert "mine float64: tanh (node h1) is wrong: crash: the process was ended by SIGSEGV" in output
    assert "Traceback" not in errors
    assert len(list(Path("gradproof-failures").iterdir())) >= 3


def test_what_an_adapter_prints_is_no_output() -> None:
    mine("print('noise'); os.write(1, b'more noise'); return gradients", loading="print('loud')")
    with gradproof(*CHECK, "--networks", "2") as running:
        output, errors = running.communicate(timeout=100)
    assert running.returncode == AGREEMENT
    assert "noise" not in output
    assert "loud" not in output
    assert all(word in errors for word in ("loud", "noise", "more noise"))


def test_without_isolation_the_adapter_is_in_this_process() -> None:
    mine("print('noise'); return gradients")
    with gradproof(*CHECK, "--networks", "2", "--no-isolation") as running:
        output, _ = running.communicate(timeout=100)
        assert running.returncode == AGREEMENT
    assert "noise" in output
    assert int(Path("pid").read_text()) == running.pid


def test_a_crash_without_isolation_ends_the_run() -> None:
    """What isolation is for."""
    mine("os._exit(3)")
    with gradproof(*CHECK, "--networks", "2", "--no-isolation") as running:
        output, _ = running.communicate(timeout=100)
    assert (running.returncode, output) == (3, "")


def test_the_memory_that_is_allowed_can_be_set() -> None:
    mine("return gradients")
    with gradproof(*CHECK, "--networks", "2", "--memory", "0.001") as running:
        _, errors = running.communicate(timeout=100)
    assert running.returncode == USAGE
    assert "adapter 'mine.py:Mine' cannot be loaded: took more than 0.001 GiB of memory" in errors


def test_replay_is_isolated_too() -> None:
    request = mine("os._exit(3)")
    report: Report = replay(WITH, [request])
    assert {each.kind for each in report.disagreements} == {"crash"}
    save_case(WITH, Path("."), "spec")
    with gradproof("replay", "spec.json", "--adapter", request) as running:
        output, _ = running.communicate(timeout=100)
    assert running.returncode == DISAGREEMENT
    assert "crash: the process ended with exit code 3" in output


HANGING = """
    if not pathlib.Path('gradproof-failures').exists():
        os._exit(3)
    pathlib.Path('hangs').touch()
    ctypes.PyDLL(None).sleep(60)
"""
"""Ends at the first network with a tanh, hangs in C at the second, and holds the interpreter's lock."""


def hanging(*options: str) -> subprocess.Popen[str]:
    """A check whose adapter hangs by now."""
    mine(HANGING)
    running = gradproof(*CHECK, "--max-nodes", "1", *options)
    deadline = time.monotonic() + 60.0
    while not Path("hangs").exists() and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return running


def test_an_interrupt_ends_a_hanging_adapter_and_keeps_what_was_found() -> None:
    with hanging("--json", "report.json") as running:
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=30)
    assert running.returncode == DISAGREEMENT
    assert "interrupted: 1 tensor disagrees: " in output
    assert "Traceback" not in errors
    report = read("report.json")
    assert report["interrupted"] is True
    assert [each["kind"] for each in report["disagreements"]] == ["crash"]
    assert gone(last_child())


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_killed_run_takes_its_children_along_and_leaves_its_specs() -> None:
    with hanging() as running:
        running.kill()
        running.communicate(timeout=30)
        assert gone(last_child())
    (spec,) = Path("gradproof-failures").glob("*.json")
    assert read(str(spec))["schema"] == 1
