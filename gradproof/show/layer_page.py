"""All that somebody who writes a row, or a backward pass, must know of one layer: from its docstrings and the table."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress

from gradproof.model.adapter import Adapter
from gradproof.model.layer import Argument, Domain, Layer, ShapeError
from gradproof.model.options import OptionValue, Shape
from gradproof.show.layers import describe, origin


def layer_page(layer: Layer, adapters: Mapping[str, Adapter | str]) -> str:
    """The page of a layer in plain text. adapters: name -> adapter, or the reason why it cannot be loaded."""
    parts = [
        f"{layer.name}: {layer.kind}, {layer.family}",
        f"row({_signature(layer)})\n\nA row of an adapter is called so: the arrays in order, all else by its name.",
        _documentation(layer.forward),
        f"Backward: {_documentation(layer.backward)}",
        *(_section(title, lines) for title, lines in _sections(layer, adapters)),
    ]
    return "\n\n".join(part for part in parts if part)


def _documentation(function: object) -> str:
    # A pair may be a partial of another function, whose docstring it then has.
    return inspect.getdoc(getattr(function, "func", function)) or ""


def _signature(layer: Layer) -> str:
    options = dict(layer.defaults)
    shapes = layer.example_shapes(options)
    arrays = ["*arrays"] if layer.variadic else [each.name for each in layer.arguments if each.when is None]
    named = [
        *layer.keyword_arguments,
        *layer.parameters(shapes, options),
        *(o.name for o in layer.options if not o.structural),
    ]
    return ", ".join([*arrays, *(["*", *named] if named and not layer.variadic else named)])


def _sections(layer: Layer, adapters: Mapping[str, Adapter | str]) -> Iterator[tuple[str, list[str]]]:
    options = dict(layer.defaults)
    shapes = layer.example_shapes(options)
    example = ", ".join(str(list(shape)) for shape in shapes)
    yield "Arrays", [_array(each, layer.example_shape, options) for each in layer.arguments]
    parameters = layer.parameters(shapes, options)
    yield (
        f"Parameters, with the defaults and inputs of shape {example}",
        [f"{slot} {list(shape)}" for slot, shape in parameters.items()],
    )
    yield "Parameters, with other options", _other_parameters(layer, parameters)
    yield "Output, with the same", [f"{list(layer.output_shape(shapes, options))}, {_numbers(layer.codomain)}"]
    yield "Options", [f"{each.name}: {describe(each, layer.example_shape)}" for each in layer.options]
    yield (
        "Kinks, where a framework chooses (weight of the right-hand derivative)",
        [f"{each.name}: at {each.place}, from {each.valid[0]:g} to {each.valid[1]:g}" for each in layer.kinks],
    )
    yield "Numbers that are drawn beside ordinary ones", [f"{each:g}" for each in layer.edges]
    yield (
        "Adapters",
        [f"{name}: {each if isinstance(each, str) else origin(each, layer)}" for name, each in adapters.items()],
    )


def _other_parameters(layer: Layer, usual: Mapping[str, Shape]) -> list[str]:
    """The names, and the option with which each is there."""
    found: dict[str, str] = {}
    for option in layer.options:
        for value in option.domain.choices(layer.example_shape):
            options = layer.defaults | {option.name: value}
            with suppress(ShapeError):  # these options do not fit the shape
                for slot in layer.parameters(layer.example_shapes(options), options):
                    found.setdefault(slot, f"{slot}, with {option.name}={value!r}")
    return [line for slot, line in found.items() if slot not in usual]


def _array(argument: Argument, shape: Shape, options: dict[str, OptionValue]) -> str:
    asked = "" if argument.when is None else ", where the options ask for it"
    return f"{argument.name}: {_numbers(argument.domain(shape, options))}{asked}"


def _numbers(domain: Domain) -> str:
    extra = "".join(f", or {each}" for each in domain.extra)
    words = {
        "real": "any numbers",
        "unit": "numbers from 0 to 1",
        "positive": "numbers above 0",
        "sign": "-1 or 1",
        "index": f"integers from {domain.low} to {domain.classes - 1}{extra}, as int64",
    }
    constant = ", without a gradient" if domain.constant else ""
    return words[domain.kind] + constant


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) if lines else ""
