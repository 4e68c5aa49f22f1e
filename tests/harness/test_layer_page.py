"""The page of a layer: what it says is how rows are called."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gradproof.cli import USAGE, main
from gradproof.draw.drawing import Drawn, draw_each
from gradproof.reference import LAYERS, NumpyReference
from gradproof.show.layer_page import layer_page

EACH_LAYER = pytest.mark.parametrize("name", LAYERS)


def signature(page: str) -> tuple[list[str], list[str]]:
    """The arrays in order, and what is passed by name."""
    (line,) = re.findall(r"^row\((.*)\)$", page, re.MULTILINE)
    parts = line.split(", ")
    star = parts.index("*") if "*" in parts else 1 if parts[0] == "*arrays" else len(parts)
    return parts[:star], [part for part in parts[star:] if part != "*"]


@EACH_LAYER
def test_rows_are_called_as_the_page_says(name: str) -> None:
    page = layer_page(LAYERS[name], {})
    arrays, named = signature(page)
    drawn: list[Drawn] = []
    draw_each(drawn.append, 6, 3, [name], 1)
    for each in drawn:
        (node,) = each.network.nodes
        given, by_name = node.bind(each.case("float64").values)
        assert arrays == ["*arrays"] or len(given) == len(arrays)
        slots = {slot for slot, _ in node.parameters}
        assert {*by_name, *node.keywords} - slots <= {*named}
        others = set(re.findall(r"^  (\w+), with \w+=", page, re.MULTILINE))
        assert {slot for slot in slots if not slot.endswith(("_reverse", "_proj_weight"))} <= {*named} | others


@EACH_LAYER
def test_the_page_tells_what_the_table_has(name: str) -> None:
    layer = LAYERS[name]
    page = layer_page(layer, {"reference": NumpyReference(), "other": "not installed"})
    told: list[Any] = [*layer.arguments, *layer.options, *layer.kinks]
    assert [each.name for each in told if f"  {each.name}: " not in page] == []
    assert page.startswith(f"{name}: {layer.kind}, {layer.family}\n")
    assert "  reference: native" in page
    assert "  other: not installed" in page
    assert "Backward: " in page


def test_the_command_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "relu", "gelu", "--adapter", "reference"]) == 0
    shown = capsys.readouterr().out
    assert "relu: activation, activations\n\nrow(x)\n" in shown
    assert "  at_zero: at 0, from 0 to 1\n" in shown
    assert "gelu: activation, activations\n" in shown


def test_an_unknown_name_is_refused_with_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "rellu"]) == USAGE
    assert capsys.readouterr().err.startswith("gradproof: unknown layer 'rellu'; valid layers: identity, tanh, ")
