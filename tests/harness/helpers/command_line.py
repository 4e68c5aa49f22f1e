"""Running the command line, in this process or in one of its own, and what is asked of its output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np

from gradproof.cli import USAGE

VERSION = f"NumPy {np.__version__}"

BOTH = ("--adapter", "adapters_here.py:Right", "--adapter", "adapters_here.py:Wrong")


@dataclass(frozen=True)
class Result:
    """The exit code of a command, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of standard output, with single spaces."""
        return [" ".join(line.split()) for line in self.out.splitlines()]


Command = Callable[..., Result]


def process(*arguments: str, **environment: str) -> Result:
    """Run a command in a process of its own, into a pipe."""
    done = subprocess.run(
        [sys.executable, "-m", "gradproof", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def check(gradproof: Command, adapter: str, *arguments: str) -> Result:
    """A check of one of adapters_here.py in float64, with a seed."""
    return gradproof(
        "check", "--adapter", f"adapters_here.py:{adapter}", "--dtype", "float64", "--seed", "1", *arguments
    )


def valid_json(path: str | Path) -> Any:
    """What the file holds, read as other programs would: without Python's Infinity and NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def single_spaced(text: str) -> str:
    """The text with single spaces, in one line."""
    return " ".join(text.split())


def refused(result: Result, message: str) -> bool:
    """Whether it said this, in one line on standard error, and nothing else."""
    return (result.code, result.err, result.out) == (USAGE, f"gradproof: {message}\n", "")


def refused_in_one_line(result: Result, *parts: str) -> None:
    """Demand that it is refused in one line on standard error, which holds these parts."""
    assert result.code == USAGE
    assert re.fullmatch(r"gradproof: .+\n", result.err), result.err
    assert [part for part in parts if part not in result.err] == []


def not_installed(entry: EntryPoint) -> Any:
    """Instead of EntryPoint.load: the frameworks are missing."""
    if entry.name in ("torch", "jax"):
        raise ModuleNotFoundError(f"No module named {entry.name!r}", name=entry.name)
    module, _, attribute = entry.value.partition(":")
    return getattr(sys.modules[module], attribute)
