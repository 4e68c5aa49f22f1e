"""The table of layers, with what each adapter says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from gradproof.adapter import Adapter, supported
from gradproof.case import DTYPES
from gradproof.layer import Layer, Option
from gradproof.reference import LAYERS

SCHEMA = 1


def origin(adapter: Adapter, layer: Layer) -> str:
    """ "native", "composed", or the reason why the adapter cannot run the layer."""
    if hasattr(adapter, "origin"):
        return str(adapter.origin(layer))
    options = {option.name: option.default for option in layer.options if option.default is not None}
    can_run = any(supported(adapter, layer, options, dtype) for dtype in DTYPES)
    return "native" if can_run else "not supported"


def layers_to_json(adapters: Mapping[str, Adapter | str]) -> dict[str, Any]:
    """The table as data. adapters: name -> adapter, or the reason why it cannot be loaded."""
    return {"schema": SCHEMA, "layers": [_layer(layer, adapters) for layer in LAYERS.values()]}


def _layer(layer: Layer, adapters: Mapping[str, Adapter | str]) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "family": layer.family,
        "options": {option.name: describe(option) for option in layer.options},
        "kinks": [{"name": kink.name, "point": kink.point, "valid": list(kink.valid)} for kink in layer.kinks],
        "adapters": {
            name: adapter if isinstance(adapter, str) else origin(adapter, layer) for name, adapter in adapters.items()
        },
    }


def describe(option: Option) -> str:
    domain = option.domain.describe((2, 3))
    return domain if option.default is None else f"{domain}; default {option.default!r}"


def layers_table(adapters: Mapping[str, Adapter | str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("layer", "kind", "family", "options", "kinks", *adapters):
        table.add_column(Text(column))
    for row in layers_to_json(adapters)["layers"]:
        table.add_row(*map(Text, _cells(row, tuple(adapters))))
    return table


def _cells(row: Mapping[str, Any], adapters: Sequence[str]) -> tuple[str, ...]:
    kinks = ", ".join(f"{kink['name']} ({kink['point']})" for kink in row["kinks"])
    origins = (row["adapters"][adapter] for adapter in adapters)
    return (row["name"], row["kind"], row["family"], ", ".join(row["options"]), kinks, *origins)
