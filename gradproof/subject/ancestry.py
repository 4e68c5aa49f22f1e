"""Where an adapter is written, and what it is made from: an adapter inherits what is known of rows that it keeps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradproof.model.adapter import Adapter


@dataclass(frozen=True)
class Ancestor:
    """A class that an adapter is made from.

    file: in which it is written. replaced: the layers whose rows the adapter has from elsewhere.
    """

    file: Path
    replaced: frozenset[str]


def ancestry(adapter: Adapter) -> tuple[Ancestor, ...]:
    """The adapter's own class first, then those that it is made from; of several in one file the first."""
    known: tuple[Ancestor, ...] | None = getattr(adapter, "ancestry", None)
    return tuple(_ancestors(adapter)) if known is None else known  # one in another process tells its own


def _ancestors(adapter: Adapter) -> Iterator[Ancestor]:
    seen: set[Path] = set()
    for each in type(adapter).__mro__:
        file = None
        with suppress(TypeError, OSError):  # what is built in, or was typed into a console, has no file
            file = Path(inspect.getfile(each)).absolute()
        if file is not None and file not in seen:
            seen.add(file)
            yield Ancestor(file, _replaced(getattr(adapter, "rows", None), getattr(each, "rows", None)))


def _replaced(rows: Any, before: Any) -> frozenset[str]:
    """The layers that have another row now."""
    if not (isinstance(rows, Mapping) and isinstance(before, Mapping)):
        return frozenset()
    return frozenset(layer for layer, row in rows.items() if before.get(layer) is not row)
