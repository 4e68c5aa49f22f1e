"""Where the tests of the harness work: in an empty directory, with adapters in files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.isolation import forget_modules_in, gone, last_child


@pytest.fixture
def own_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty directory; after the test, none of the processes is left."""
    monkeypatch.chdir(tmp_path)
    yield
    forget_modules_in(tmp_path)
    if Path("pid").exists() and last_child() != os.getpid():
        assert gone(last_child())
