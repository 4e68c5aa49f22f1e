"""The reference as an adapter in half precision, which computes with all digits and rounds its results alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradproof.model.case import upcast
from gradproof.model.layer import Layer
from gradproof.model.network import Node
from gradproof.model.options import Options
from gradproof.reference import NumpyReference
from gradproof.reference.walk import Row

Array = np.ndarray[Any, Any]


class RoundedOnce(NumpyReference):
    """Every value, and every term of a gradient, is computed in float64 from rounded numbers, and rounded once.

    rows: layer -> (forward, backward) in place of the table's own.
    """

    name = "rounded"

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool:
        return True

    def run_node(self, node: Node, known: Mapping[str, Array]) -> tuple[Array, Any]:
        return super().run_node(node, {name: upcast(np.asarray(each)) for name, each in known.items()})

    def row(self, node: Node) -> Row:
        forward, backward = super().row(node)
        return forward, lambda dout, cache: backward(upcast(dout), cache)
