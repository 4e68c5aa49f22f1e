"""How far long work has come, on standard error: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int, str], None]
"""Told how much is done in all, and what of."""

Item = TypeVar("Item")


@contextmanager
def progress(total: int, what: str, done: int = 0) -> Iterator[Advance]:
    """Yields what is to be called as the work goes on. what: what is counted. done: of an earlier run."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda done, what: bar.update(task, completed=done, description=what)


def _lines(total: int) -> Advance:
    started = last = time.monotonic()

    def advance(done: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(f"{done} of {total} {what}, {now - started:.0f} s", file=sys.stderr, flush=True)

    return advance


def tracked(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items, telling how many of them are done."""
    with progress(total, what) as advance:
        for done, item in enumerate(items, 1):
            yield item
            advance(done, what)
