"""The places where tests work, the command line, and the built-in adapters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradproof.cli import main
from gradproof.model.adapter import Adapter
from helpers.command_line import Command, Result
from helpers.frameworks import FRAMEWORKS, load
from helpers.isolation import forget_modules_in, gone, last_child


@pytest.fixture
def own_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty directory; after the test, none of the processes is left."""
    monkeypatch.chdir(tmp_path)
    yield
    forget_modules_in(tmp_path)
    if Path("pid").exists() and last_child() != os.getpid():
        assert gone(last_child())


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty directory with adapters_here.py, and wide lines."""
    shutil.copy(Path(__file__).parent / "helpers" / "adapters_here.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")
    for name in ("NO_COLOR", "FORCE_COLOR", "GRADPROOF_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    yield
    forget_modules_in(tmp_path)


@pytest.fixture
def gradproof(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, adapters too."""

    def run(*arguments: str) -> Result:
        runs = arguments[:1] in (("check",), ("replay",))
        try:
            code = main((*arguments, "--no-isolation") if runs else arguments)
        except SystemExit as exit_:  # argparse
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module", params=FRAMEWORKS)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    """Each of the built-in adapters."""
    return load(request.param)
