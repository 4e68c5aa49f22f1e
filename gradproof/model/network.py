"""Networks: directed acyclic graphs of layers, as values that can be hashed, printed and stored."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from gradproof.model.layer import REAL, Domain, Layer, ShapeError
from gradproof.model.options import Options, OptionValue, Shape

T = TypeVar("T")


class NetworkError(ValueError):
    """A network that cannot be run; the message names the node and says why."""


@dataclass(frozen=True)
class Input:
    """An array that the network is given: data, a target, or (for one node alone) another node's output."""

    name: str
    shape: Shape
    domain: Domain = REAL


@dataclass(frozen=True)
class Node:
    """One use of a layer.

    inputs: the names of the inputs and nodes it reads, one per argument; a name may stand twice.
    options: (name, value) pairs in the table's order, defaults included.
    parameters: (slot, parameter name) pairs; nodes that name the same parameter share it.
    """

    name: str
    layer: Layer
    inputs: tuple[str, ...]
    options: tuple[tuple[str, OptionValue], ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        layer: Layer,
        *inputs: str,
        parameters: Mapping[str, str] | None = None,
        options: Options | None = None,
    ) -> Node:
        """A node with its options completed. Raises NetworkError for an unknown or missing option."""
        try:
            completed = layer.complete(options or {})
        except ValueError as error:
            raise NetworkError(f"node {name!r} ({layer.name}): {error}") from None
        return cls(name, layer, inputs, tuple(completed.items()), tuple((parameters or {}).items()))

    @property
    def keywords(self) -> dict[str, OptionValue]:
        """The options that forward functions receive: all but the structural ones."""
        structural = {option.name for option in self.layer.options if option.structural}
        return {name: value for name, value in self.options if name not in structural}

    @cached_property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """(argument, tensor) pairs, first the inputs, then the parameters."""
        arguments = self.layer.arguments_for(len(self.inputs), dict(self.options))
        named = tuple((argument.name, source) for argument, source in zip(arguments, self.inputs, strict=True))
        return named + self.parameters

    def bind(self, known: Mapping[str, T]) -> tuple[list[T], dict[str, T]]:
        """What the layer's functions are called with: arguments in order, then optional ones and parameters by name."""
        by_name = {*self.layer.keyword_arguments, *(slot for slot, _ in self.parameters)}
        in_order = [known[source] for name, source in self.sources if name not in by_name]
        return in_order, {name: known[source] for name, source in self.sources if name in by_name}


@dataclass(frozen=True)
class Network:
    """A DAG of nodes in forward order; the last node is the output.

    Raises NetworkError, naming the node, unless every name is unique, every input exists and stands
    earlier, shapes and options fit, shared parameters agree in shape, and everything reaches the output.
    """

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise NetworkError("a network needs at least one node")
        self._check_names()
        self._check_order()
        self._check_reached(set(self.shapes))

    def _check_names(self) -> None:
        names = [each.name for each in self.inputs] + [node.name for node in self.nodes]
        names += sorted({parameter for node in self.nodes for _, parameter in node.parameters})
        for name in names:
            if names.count(name) > 1:
                raise NetworkError(f"the name {name!r} stands for more than one input, node or parameter")

    def _check_order(self) -> None:
        seen = {each.name for each in self.inputs}
        later = {node.name for node in self.nodes}
        for node in self.nodes:
            for source in node.inputs:
                if source in seen:
                    continue
                if source not in later:
                    raise NetworkError(f"node {node.name!r}: its input {source!r} is neither an input nor a node")
                self._check_cycles()
                raise NetworkError(
                    f"node {node.name!r}: its input {source!r} stands later; list nodes in forward order"
                )
            seen.add(node.name)

    def _check_cycles(self) -> None:
        try:
            graphlib.TopologicalSorter({node.name: node.inputs for node in self.nodes}).prepare()
        except graphlib.CycleError as error:
            cycle = list(reversed(error.args[1]))
            raise NetworkError(f"node {cycle[0]!r} reads its own output, a cycle: {' <- '.join(cycle)}") from None

    def _check_reached(self, names: set[str]) -> None:
        reached = {self.output}
        for node in reversed(self.nodes):
            if node.name in reached:
                reached.update(source for _, source in node.sources)
        for name in sorted(names - reached):
            raise NetworkError(f"{name!r} does not reach the output {self.output!r}, so it has no gradient")

    @property
    def output(self) -> str:
        return self.nodes[-1].name

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of every input, parameter and node output."""
        shapes = {each.name: each.shape for each in self.inputs}
        for node in self.nodes:
            try:
                shapes[node.name], parameters = self._infer(node, shapes)
            except ValueError as error:
                raise NetworkError(f"node {node.name!r} ({node.layer.name}): {error}") from None
            for name, shape in parameters:
                if shapes.setdefault(name, shape) != shape:
                    raise NetworkError(
                        f"node {node.name!r} ({node.layer.name}): the shared parameter {name!r} has shape "
                        f"{list(shapes[name])} elsewhere, and must have {list(shape)} here"
                    )
        return shapes

    def _infer(self, node: Node, shapes: Mapping[str, Shape]) -> tuple[Shape, tuple[tuple[str, Shape], ...]]:
        arguments = node.layer.arguments_for(len(node.inputs), node.layer.complete(dict(node.options)))
        arriving = [shapes[source] for source in node.inputs]
        node.layer.check_rank(arriving[0])
        options = node.layer.complete(dict(node.options), arriving[0])
        if options != dict(node.options):
            raise ShapeError("its options are incomplete; make nodes with Node.of, which fills in defaults")
        output = node.layer.output_shape(arriving, options)
        slots = node.layer.parameters(arriving, options)
        given = dict(node.parameters)
        if set(given) != set(slots):
            raise ShapeError(f"needs parameters {sorted(slots) or 'none'}, got {sorted(given) or 'none'}")
        for argument, source in zip(arguments, node.inputs, strict=True):
            wanted, held = argument.domain(arriving[0], options), self.domain(source)
            if not wanted.admits(held):
                raise ShapeError(f"its {argument.name} must hold {wanted}, but {source!r} holds {held}")
        return output, tuple((given[slot], shape) for slot, shape in slots.items())

    @cached_property
    def _domains(self) -> dict[str, Domain]:
        domains = {each.name: each.domain for each in self.inputs}
        return domains | {node.name: node.layer.codomain for node in self.nodes}

    def domain(self, name: str) -> Domain:
        """What is known of the numbers of an input, parameter or node output."""
        return self._domains.get(name, REAL)

    @cached_property
    def parameters(self) -> dict[str, Shape]:
        """Name -> shape of every parameter, in order of first use."""
        names = dict.fromkeys(parameter for node in self.nodes for _, parameter in node.parameters)
        return {name: self.shapes[name] for name in names}

    @cached_property
    def differentiable(self) -> tuple[str, ...]:
        """The names that must have a gradient: inputs that are not constant, parameters, node outputs."""
        inputs = [each.name for each in self.inputs if each.domain.differentiable]
        return (*inputs, *self.parameters, *(node.name for node in self.nodes))

    @cached_property
    def consumers(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """Name -> the (node, argument) pairs that read it."""
        readers: dict[str, list[tuple[str, str]]] = {name: [] for name in self.shapes}
        for node in self.nodes:
            for argument, source in node.sources:
                readers[source].append((node.name, argument))
        return {name: tuple(pairs) for name, pairs in readers.items()}

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def alone(self, name: str) -> tuple[Network, dict[str, str]]:
        """The network of this one node, each argument with an input or parameter to itself.

        Returns it with the tensor of this network that each of its inputs and parameters stands for.
        """
        node = self.node(name)
        stands_for: dict[str, str] = {}
        taken = {source for _, source in node.sources}
        for argument, source in node.sources:
            own = source if source not in stands_for else f"{source} as {argument}"
            while own in stands_for or (own != source and own in taken):
                own += "'"
            stands_for[own] = source
        names, slots = list(stands_for)[: len(node.inputs)], list(stands_for)[len(node.inputs) :]
        inputs = tuple(Input(each, self.shapes[stands_for[each]], self.domain(stands_for[each])) for each in names)
        parameters = tuple((slot, own) for (slot, _), own in zip(node.parameters, slots, strict=True))
        return Network(inputs, (replace(node, inputs=tuple(names), parameters=parameters),)), stands_for

    def __str__(self) -> str:
        return _Line(self).text


class _Line:
    """The one-line rendering: chains joined by arrows, names where the graph branches."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.introduced: set[str] = set()
        pieces: list[str] = []
        for before, node in zip((None, *network.nodes), network.nodes, strict=False):
            follows = before is not None and node.inputs[0] == before.name and len(network.consumers[before.name]) == 1
            pieces += [" -> " if follows else ("; " if pieces else "")]
            pieces += [self._call(node, node.inputs[1:]) if follows else self._start(node)]
            if node.name != network.output and not self._flows_on(node):
                pieces += [f" as {node.name}"]
        self.text = "".join(pieces)

    def _flows_on(self, node: Node) -> bool:
        following = self.network.nodes[self.network.nodes.index(node) + 1]
        return following.inputs[0] == node.name and len(self.network.consumers[node.name]) == 1

    def _start(self, node: Node) -> str:
        return f"{self._source(node.inputs[0])} -> {self._call(node, node.inputs[1:])}"

    def _source(self, name: str) -> str:
        known = {each.name: each for each in self.network.inputs}
        if name not in known or name in self.introduced:
            return name
        self.introduced.add(name)
        return f"{name}[{','.join(map(str, known[name].shape))}]"

    def _call(self, node: Node, others: Sequence[str]) -> str:
        shown = [self._source(name) for name in others]
        for option in node.layer.options:
            value = dict(node.options)[option.name]
            text = f"({','.join(map(str, value))})" if isinstance(value, tuple) else str(value)
            if option.default is None:
                shown.append(text)
            elif value != option.default:
                shown.append(f"{option.name}={text}")
        for slot, parameter in node.parameters:
            if len(self.network.consumers[parameter]) > 1:
                shown.append(f"{slot}:{parameter}")
        return f"{node.layer.name}({', '.join(shown)})" if shown else node.layer.name
