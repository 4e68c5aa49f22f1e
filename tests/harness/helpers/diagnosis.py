"""Networks and faulty rows for the tests of diagnosis."""

from __future__ import annotations

from functools import cache
from typing import Any

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.trust.faults import FAULTS


@cache
def drawn_of(layer: str) -> Drawn:
    """A network of this layer alone; the first ones drawn are the simplest."""
    drawn: list[Drawn] = []
    draw_each(drawn.append, 3, 7, [layer], 1)
    return drawn[-1]


def rows_of(*names: str) -> dict[str, Any]:
    """Layer -> pair of functions, of the planted faults of these names."""
    return {layer: row for name in names for layer, row in vars(FAULTS[name].make())["_rows"].items()}
