"""What adapters built on a table have in common.

An adapter's table has one row per layer: a forward function in the framework's own terms, called as
row(*arrays, **optional, **parameters, **options): the layer's arguments in order, then all else by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from gradproof.model.layer import Layer
from gradproof.model.network import Node
from gradproof.model.options import Options

Row = Callable[..., Any]


@dataclass(frozen=True)
class Composed:
    """Marks a row that is put together from primitives, because the framework has no function for the layer."""

    row: Row

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        return self.row(*arrays, **options)


@dataclass(frozen=True)
class Unsupported:
    """Stands in a table for a layer that the framework cannot compute, and says why."""

    reason: str

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        raise NotImplementedError(self.reason)


class TableAdapter:
    """Which layers a table has, and how a node is called.

    A subclass sets `name` and `rows`, and names in `lacking` the layers that it cannot run in a coarse dtype.
    """

    name: str
    rows: Mapping[str, Row]
    lacking: Mapping[str, Collection[str]] = MappingProxyType({})

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool | str:
        row = self.rows.get(layer.name)
        if isinstance(row, Unsupported):
            return row.reason
        return row is not None and layer.name not in self.lacking.get(dtype, ())

    def origin(self, layer: Layer) -> str:
        """ "native", "composed", or the reason why the layer cannot be run."""
        if layer.name not in self.rows:
            return "no row in the adapter's table"
        row = self.rows[layer.name]
        if isinstance(row, Unsupported):
            return row.reason
        return "composed" if isinstance(row, Composed) else "native"

    def with_rows(self, rows: Mapping[str, Row]) -> Self:
        """The same adapter with other rows for some layers; its name tells which."""
        changed = copy(self)
        changed.rows = {**self.rows, **rows}
        changed.name = "+".join([self.name, *rows])
        return changed

    def call(self, node: Node, known: Mapping[str, Any]) -> Any:
        """The node's output, given the arrays computed so far."""
        arrays, by_name = node.bind(known)
        return self.rows[node.layer.name](*arrays, **by_name, **node.keywords)


def is_floating(value: np.ndarray) -> bool:
    return value.dtype.kind not in "iu"
