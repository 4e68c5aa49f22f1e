"""Progress: lines on a pipe, now and then; a bar on a terminal; and the work itself goes through unchanged."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from gradproof.show import progress as module
from gradproof.show.progress import progress, tracked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_pipe_gets_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(50, "networks") as advance:
        for done in range(1, 50):
            clock[0] += 1.0
            advance(done, "networks, 2 false alarms")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [f"{n} of 50 networks, 2 false alarms, {n} s" for n in (10, 20, 30, 40)]


def test_quick_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(
        module, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=100, _environ={})
    )
    with progress(4, "networks", done=1) as advance:
        advance(3, "networks, 1 disagree")
    assert "3/4" in shown.getvalue()
    assert "networks, 1 disagree" in shown.getvalue()
