"""Every script in docs/findings.md runs as it stands, alone, and is short."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

FINDINGS = (Path(__file__).parents[2] / "docs" / "findings.md").read_text()
MOST_LINES = 10
SCRIPTS = [
    "\n".join(line[4:] for line in block.splitlines())
    for block in re.findall(r"(?:^    .*\n)+", FINDINGS, re.MULTILINE)
]

RUNNER = """
import importlib, json, os, sys, tempfile, traceback

def run(script):
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    process = os.fork()
    if not process:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        code = 0
        try:
            exec(compile(script, "script", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    status = os.waitpid(process, 0)[1]
    for each in (out, err):
        each.seek(0)
    return os.waitstatus_to_exitcode(status), *(each.read().decode(errors="replace") for each in (out, err))

importlib.import_module(sys.argv[1])
for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
"""
"""A process that imports the framework once and runs each script in a fork of its own, in which nothing has happened.
Nothing is printed before the first script, so that no fork prints it again."""


class Ended(NamedTuple):
    """How a script ended: the exit code, or the signal below 0; what it printed, and what it complained of."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def run_with() -> Iterator[Callable[[str, str], Ended]]:
    """Runs a script, the second argument, with a framework, the first."""
    with ExitStack() as processes:

        @cache
        def runner(framework: str) -> subprocess.Popen[str]:
            pipe = subprocess.PIPE
            command = [sys.executable, "-c", RUNNER, framework]
            return processes.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))

        def run(framework: str, script: str) -> Ended:
            process = runner(framework)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(script) + "\n")
            process.stdin.flush()
            return Ended(*json.loads(process.stdout.readline()))

        yield run


def test_there_is_a_script_for_every_finding() -> None:
    assert len(SCRIPTS) == len(re.findall(r"^## (?!Pinned)", FINDINGS, re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: re.findall(r"import (\w+)", script)[0])
def test_the_script_runs(run_with: Callable[[str, str], Ended], script: str) -> None:
    framework = re.findall(r"import (\w+)", script)[0]
    pytest.importorskip(framework, reason=f"needs pip install 'gradproof[{framework}]'")
    assert len(script.splitlines()) <= MOST_LINES
    ended = run_with(framework, script)
    fatal = re.search(r"# aborts: (.*)", script)
    if fatal:
        assert ended.code == -signal.SIGABRT
        assert fatal[1] in ended.err
    else:
        assert ended.code == 0, ended.err
        assert ended.out.strip()
