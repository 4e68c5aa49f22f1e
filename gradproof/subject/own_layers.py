"""Layers of one's own: table rows, and adapters' rows for them, from a file or an installed package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from gradproof.model.adapter import Adapter, message_of
from gradproof.model.layer import Layer
from gradproof.reference import LAYERS
from gradproof.subject.modules import module_from_file

GROUP = "gradproof.layers"
"""The entry points of packages that bring layers: each names a module."""

ANY = "any"
"""Stands for an adapter's name in ROWS: a row of functions and operators that every framework has."""

EXPECTED = f"a Python file, or an entry point of the group {GROUP!r}, with LAYERS = (Layer(...), ...)"


class OwnLayersError(ValueError):
    """Layers that cannot be had; one line that says what was given and what was expected."""


@dataclass(frozen=True)
class OwnLayers:
    """What one file or package brought. rows: adapter -> layer -> forward function."""

    layers: tuple[Layer, ...]
    rows: Mapping[str, Mapping[str, Any]]


_loaded: dict[str, OwnLayers] = {}
"""Where from -> what was loaded, in order."""


def load_layers(source: str | Path) -> tuple[Layer, ...]:
    """Add the layers of a file, or of an installed package's entry point, to the table.

    The module has LAYERS, a tuple of `Layer`, and may have ROWS: adapter -> layer -> forward function in its
    framework's terms, with "any" for one that is the same in all. Asked for again, it changes nothing.

    Raises OwnLayersError where there is no such module, it cannot be imported, or a name is taken.
    """
    name = str(Path(source).absolute()) if str(source).endswith(".py") else str(source)
    if name in _loaded:
        return _loaded[name].layers
    module = _module(name)
    layers, rows = getattr(module, "LAYERS", None), getattr(module, "ROWS", {})
    if not isinstance(layers, tuple | list) or not all(isinstance(each, Layer) for each in layers):
        raise OwnLayersError(f"{source} has no layers; expected {EXPECTED}")
    if not isinstance(rows, Mapping) or not all(isinstance(each, Mapping) for each in rows.values()):
        raise OwnLayersError(f"{source}: ROWS must be a mapping, adapter -> layer -> function, got {rows!r}")
    for layer in layers:
        if layer.name in LAYERS:
            raise OwnLayersError(f"{source}: there is a layer named {layer.name!r} already; give yours another name")
    LAYERS.update({layer.name: layer for layer in layers})
    _loaded[name] = OwnLayers(tuple(layers), {adapter: dict(each) for adapter, each in rows.items()})
    return tuple(layers)


def load_installed_layers() -> None:
    """Add the layers of every installed package that brings some."""
    for each in entry_points(group=GROUP):
        load_layers(each.name)


def loaded_layers() -> tuple[str, ...]:
    """What was loaded so far, for another process to load too."""
    return tuple(_loaded)


def give_own_rows(adapter: Adapter) -> None:
    """Give an adapter that is a table the rows that came with the layers, where it has none."""
    before = getattr(adapter, "rows", None)
    if not isinstance(before, Mapping) or not _loaded:
        return
    names = [ANY, *(vars(each).get("name") for each in reversed(type(adapter).__mro__))]
    rows: dict[str, Any] = {}
    for brought in _loaded.values():
        for name in names:
            rows |= brought.rows.get(name, {}) if isinstance(name, str) else {}
    adapter.rows = {**rows, **before}  # type: ignore[attr-defined]


def _module(name: str) -> Any:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise OwnLayersError(f"no file {name!r}; expected {EXPECTED}")
        try:
            return module_from_file(path)
        except (Exception, SystemExit) as error:
            raise OwnLayersError(f"{name} cannot be imported: {message_of(error)}") from error
    known = {each.name: each for each in entry_points(group=GROUP)}
    if name not in known:
        raise OwnLayersError(f"unknown layers {name!r}; installed: {', '.join(known) or 'none'}; expected {EXPECTED}")
    try:
        return known[name].load()
    except Exception as error:
        raise OwnLayersError(f"layers {name!r} cannot be imported: {message_of(error)}") from error
