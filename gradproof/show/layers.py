"""The table of layers, with what each adapter says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.table import Table
from rich.text import Text

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.model.adapter import Adapter, supported
from gradproof.model.dtypes import DTYPES
from gradproof.model.layer import Kink, Layer
from gradproof.model.options import Option, Shape
from gradproof.reference import LAYERS
from gradproof.verdict.judging import Subject, probe

SCHEMA = 1

PROBED_CASES, PROBED_SEED = 2, 1
"""Drawn cases of every layer on which the class of its arithmetic is found out, and what they hang on."""

Classes = Mapping[str, Mapping[str, str]]
"""Adapter -> layer -> class of its arithmetic."""


def origin(adapter: Adapter, layer: Layer) -> str:
    """ "native", "composed", or the reason why the adapter cannot run the layer."""
    if hasattr(adapter, "origin"):
        return str(adapter.origin(layer))
    shapes = layer.example_shapes(layer.defaults)
    answers = [supported(adapter, layer, layer.defaults, dtype, shapes) for dtype in DTYPES]
    if True in answers:
        return "native"
    return next((answer for answer in answers if isinstance(answer, str)), "not supported")


def arithmetic_of(adapter: Adapter, dtype: str, layers: Iterable[str]) -> dict[str, str]:
    """Layer -> the coarsest class of arithmetic that it needs on some drawn cases of it alone, in this dtype."""
    subject = Subject(adapter, {})
    for name in layers:
        drawn: list[Drawn] = []
        draw_each(drawn.append, PROBED_CASES, PROBED_SEED, [name], 1)
        for each in drawn:
            if subject.supports(each.network, dtype):
                subject.classes.of(each.case(dtype), partial(probe, subject))
    return subject.classes.by_layer(dtype)


def layers_to_json(adapters: Mapping[str, Adapter | str], classes: Classes | None = None) -> dict[str, Any]:
    """The table as data.

    adapters: name -> adapter, or the reason why it cannot be loaded. classes: of the arithmetic, where it was probed.
    """
    return {"schema": SCHEMA, "layers": [_layer(layer, adapters, classes or {}) for layer in LAYERS.values()]}


def _layer(layer: Layer, adapters: Mapping[str, Adapter | str], classes: Classes) -> dict[str, Any]:
    found = {name: known[layer.name] for name, known in classes.items() if layer.name in known}
    return {
        "name": layer.name,
        "kind": layer.kind,
        "family": layer.family,
        "options": {option.name: describe(option, layer.example_shape) for option in layer.options},
        "kinks": [{"name": kink.name, "point": _point(kink), "valid": list(kink.valid)} for kink in layer.kinks],
        "adapters": {
            name: adapter if isinstance(adapter, str) else origin(adapter, layer) for name, adapter in adapters.items()
        },
        **({"arithmetic": found} if classes else {}),
    }


def _point(kink: Kink) -> float | str:
    """A number, or the words for what depends on options."""
    return kink.point if isinstance(kink.point, float) and not kink.ties else kink.place


def describe(option: Option, shape: Shape) -> str:
    domain = option.domain.describe(shape)
    return domain if option.default is None else f"{domain}; default {option.default!r}"


def layers_markdown(adapters: Mapping[str, Adapter | str]) -> str:
    """One row per family, with the layers that an adapter composes from primitives or cannot run."""
    layers = layers_to_json(adapters)["layers"]
    shown = [name for name in adapters if any(each["adapters"][name] != "native" for each in layers)]
    lines = ["| family | layers |" + "".join(f" not native in {name} |" for name in shown)]
    lines.append("|---" * (2 + len(shown)) + "|")
    for family in dict.fromkeys(each["family"] for each in layers):
        members = [each for each in layers if each["family"] == family]
        cells = [family, ", ".join(f"`{each['name']}`" for each in members)]
        cells += [_not_native(members, name) for name in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _not_native(layers: Sequence[Mapping[str, Any]], adapter: str) -> str:
    """The layers that are composed, and those that cannot be run with the reason why."""
    told = {each["name"]: each["adapters"][adapter] for each in layers}
    composed = ", ".join(name for name, origin in told.items() if origin == "composed")
    others = [f"{name} ({origin})" for name, origin in told.items() if origin not in ("native", "composed")]
    return "; ".join([*([f"composed: {composed}"] if composed else []), *others])


def layers_table(adapters: Mapping[str, Adapter | str], classes: Classes | None = None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("layer", "kind", "family", "options", "kinks", *adapters):
        table.add_column(Text(column), no_wrap=column == "layer", overflow="fold")
    for row in layers_to_json(adapters, classes)["layers"]:
        table.add_row(*map(Text, _cells(row, tuple(adapters))))
    return table


def _cells(row: Mapping[str, Any], adapters: Sequence[str]) -> tuple[str, ...]:
    kinks = ", ".join(f"{kink.name} ({kink.place})" for kink in LAYERS[row["name"]].kinks)
    classes = row.get("arithmetic", {})
    origins = (", ".join(filter(None, (row["adapters"][name], classes.get(name)))) for name in adapters)
    return (row["name"], row["kind"], row["family"], ", ".join(row["options"]), kinks, *origins)
