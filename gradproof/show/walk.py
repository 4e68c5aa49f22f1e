"""One forward and one backward sweep of a worked example, layer by layer, by several adapters side by side."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradproof.draw.examples import Arrays, Example
from gradproof.model.adapter import Adapter, AdapterError, message_of, supported
from gradproof.model.network import Node
from gradproof.reference import NumpyReference

REFERENCE = NumpyReference.name

VALUE_WIDTH = 34  # three numbers of six digits
DIFFERENCE_WIDTH = 7
OFF_BY = "off by: the largest absolute difference from the reference"

# Adapter name -> the array that it gives, None where it gives none.
Sides = Mapping[str, np.ndarray | None]


@dataclass(frozen=True, eq=False)
class ForwardStep:
    """A node's output."""

    node: Node
    values: Sides


@dataclass(frozen=True, eq=False)
class BackwardStep:
    """The cotangent that arrives at a node, and the gradients of the parameters that are complete after it.

    A shared parameter is listed at the last of its readers that the backward sweep meets.
    """

    node: Node
    cotangents: Sides
    parameters: Mapping[str, Sides]


@dataclass(frozen=True, eq=False)
class Walk:
    """Both sweeps.

    adapters: name -> version, the reference first.
    forward, backward: one step per node, in the order in which each sweep meets them.
    inputs: input name -> gradient, for floating inputs.
    """

    example: Example
    dtype: str
    adapters: Mapping[str, str]
    forward: tuple[ForwardStep, ...]
    backward: tuple[BackwardStep, ...]
    inputs: Mapping[str, Sides]

    def to_json(self) -> dict[str, Any]:
        """The walk in JSON's types: arrays as nested lists, a missing one as null."""
        return {
            "schema": 1,
            "example": self.example.name,
            "summary": self.example.summary,
            "network": str(self.example.network),
            "dtype": self.dtype,
            "adapters": dict(self.adapters),
            "forward": [
                {"node": step.node.name, "layer": step.node.layer.name, "values": _lists(step.values)}
                for step in self.forward
            ],
            "backward": [
                {
                    "node": step.node.name,
                    "layer": step.node.layer.name,
                    "cotangents": _lists(step.cotangents),
                    "parameters": {name: _lists(sides) for name, sides in step.parameters.items()},
                }
                for step in self.backward
            ],
            "inputs": {name: _lists(sides) for name, sides in self.inputs.items()},
        }


def walk(example: Example, adapters: Iterable[Adapter] = (), dtype: str = "float64") -> Walk:
    """Run the example once through the reference and once through each adapter.

    dtype: what the adapters run in. The values are rounded to it first; the reference takes the rounded
        values and stays in float64. An adapter named "reference" is not run a second time.

    Raises AdapterError where an adapter does not support one of the layers.
    """
    network = example.network
    values = {name: value.astype(dtype) for name, value in example.values.items()}
    others = [adapter for adapter in adapters if adapter.name != REFERENCE]
    for adapter in others:
        _check_support(adapter, example, dtype)
    sweeps = {REFERENCE: _sweep(NumpyReference(), example, values, "float64")}
    sweeps |= {adapter.name: _sweep(adapter, example, values, dtype) for adapter in others}

    def outputs(name: str) -> Sides:
        return {side: forward.get(name) for side, (forward, _) in sweeps.items()}

    def gradients(name: str) -> Sides:
        return {side: backward.get(name) for side, (_, backward) in sweeps.items()}

    def completed(node: Node) -> dict[str, Sides]:
        return {name: gradients(name) for _, name in node.parameters if network.consumers[name][0][0] == node.name}

    return Walk(
        example=example,
        dtype=dtype,
        adapters={adapter.name: adapter.version() for adapter in (NumpyReference(), *others)},
        forward=tuple(ForwardStep(node, outputs(node.name)) for node in network.nodes),
        backward=tuple(BackwardStep(node, gradients(node.name), completed(node)) for node in reversed(network.nodes)),
        inputs={each.name: gradients(each.name) for each in network.inputs if each.domain.differentiable},
    )


def _check_support(adapter: Adapter, example: Example, dtype: str) -> None:
    for node in example.network.nodes:
        shapes = [example.network.shapes[name] for name in node.inputs]
        answer = supported(adapter, node.layer, dict(node.options), dtype, shapes)
        if answer is not True:
            why = f" ({answer})" if answer else ""
            raise AdapterError(
                f"{adapter.name} does not support {node.layer.name} in {dtype}{why}, which {example.name} needs; "
                "walk it with another adapter or dtype"
            )


def _sweep(adapter: Adapter, example: Example, values: Arrays, dtype: str) -> tuple[Arrays, Arrays]:
    try:
        forward = adapter.forward(example.network, {name: value.astype(dtype) for name, value in values.items()}, dtype)
        return forward.outputs, adapter.backward(forward, example.cotangent.astype(dtype))
    except Exception as error:
        raise AdapterError(f"adapter {adapter.name!r} fails on {example.name}: {message_of(error)}") from error


def _lists(sides: Sides) -> dict[str, Any]:
    return {side: None if array is None else array.tolist() for side, array in sides.items()}


def render_walk(walk: Walk) -> Group:
    """Two tables for a rich Console: the reference's numbers, and how far each other adapter is from them."""
    sweeps = (("Forward sweep", "value", _forward_rows(walk)), ("Backward sweep", "gradient", _backward_rows(walk)))
    return Group(
        Text(walk.example.name, style="bold"),
        Text(walk.example.summary),
        Text(f"\n{walk.example.network}"),
        Text(", ".join(f"{name} ({version})" for name, version in walk.adapters.items()) + f"; {walk.dtype}"),
        *(Padding(_table(walk, *sweep), (1, 0, 0, 0)) for sweep in sweeps),
        Text(OFF_BY if len(walk.adapters) > 1 else ""),
    )


@dataclass(frozen=True, eq=False)
class _Row:
    """One line of a table; a new group is set off from the one before."""

    name: str
    sides: Sides
    layer: str = ""
    formula: str = ""
    starts_group: bool = True


def _forward_rows(walk: Walk) -> Iterator[_Row]:
    for step in walk.forward:
        yield _Row(step.node.name, step.values, step.node.layer.name, _formula(step.node.layer.forward))


def _backward_rows(walk: Walk) -> Iterator[_Row]:
    for step in walk.backward:
        yield _Row(step.node.name, step.cotangents, step.node.layer.name, _formula(step.node.layer.backward))
        for name, sides in step.parameters.items():
            yield _Row(f"  {name}", sides, starts_group=False)
    for index, (name, sides) in enumerate(walk.inputs.items()):
        yield _Row(name, sides, layer="input", starts_group=index == 0)


def _formula(function: Callable[..., Any]) -> str:
    """The formula that stands in the first line of a layer function's docstring."""
    first, *_ = (inspect.getdoc(function) or "").splitlines() or [""]
    return first.partition(" Shapes:")[0].removesuffix(".")


def _table(walk: Walk, title: str, quantity: str, rows: Iterable[_Row]) -> Table:
    others = [name for name in walk.adapters if name != REFERENCE]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.HORIZONTALS)
    table.add_column("node", no_wrap=True)
    table.add_column("layer and formula")
    table.add_column(quantity, max_width=VALUE_WIDTH)
    for name in others:
        table.add_column(f"{name}\noff by", justify="right", min_width=DIFFERENCE_WIDTH)
    for row in rows:
        if row.starts_group:
            table.add_section()
        explanation = Text.assemble((row.layer, "bold"), "\n" if row.formula else "", row.formula)
        expected = row.sides[REFERENCE]
        differences = [Text(_difference(expected, row.sides[name])) for name in others]
        table.add_row(Text(row.name), explanation, Text(_numbers(expected)), *differences)
    return table


def _numbers(array: np.ndarray | None) -> str:
    """Six significant digits, one line per row of a matrix; adding zero takes the sign from -0."""
    if array is None:
        return "missing"
    rows = array.reshape(-1, array.shape[-1] if array.ndim else 1)
    return "\n".join("  ".join(f"{number + 0.0:.6g}" for number in row) for row in rows)


def _difference(expected: np.ndarray | None, got: np.ndarray | None) -> str:
    """The largest absolute difference, or what keeps the arrays from being compared."""
    if expected is None or got is None:
        return "missing"
    if got.shape != expected.shape:
        return f"shape {list(got.shape)}"
    largest = float(np.abs(expected - got).max())
    return f"{largest:.1e}" if largest else "0"
