"""Hypothesis strategies that draw networks, valid by construction, and the numbers for them.

Everything a layer needs is read from its row in the table: options from their domains, partners from its
arguments. Networks shrink towards one node with default options on a small input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from gradproof.draw.hypothesis_internals import BACKEND, Attempt
from gradproof.model.case import Case
from gradproof.model.dtypes import limits
from gradproof.model.layer import REAL, Argument, Domain, Layer, ShapeError
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import MAX_RANK, OptionValue, Shape
from gradproof.reference import LAYERS

MAX_NODES = 8

SHAPES: tuple[Shape, ...] = (
    *((2, 3), (3, 5), (1, 3), (2, 1)),
    *((3,), (1,), (8,)),
    *((2, 3, 2), (2, 1, 5)),
    *((2, 1, 3, 2), (1, 2, 2, 3)),
)
"""Shapes of inputs, ranks 1 to 4, simplest first."""

MAX_ELEMENTS = 256

BRIDGES = tuple(layer for layer in LAYERS.values() if layer.codomain != REAL)
"""Layers whose outputs are known to lie in a domain that others ask for."""

ATTEMPTS = 4
"""How often a layer or options are drawn anew where they do not fit."""

EDGES = (
    *(0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0, 20.0, -20.0, 50.0, -50.0, 88.0, -100.0),
    *(700.0, -700.0, 1000.0, -1000.0, 1e-5, 1e-30),
)
UNIT_EDGES = (0.0, 1.0, 0.5, 1e-5, 1e-30)
CORNERS = 0.8
"""The share of edge values with which every array is overlaid, so that the edges of several arguments meet."""

EDGE_SHARES = (0.0, 0.2, 0.2, 0.2, 0.0, 0.2, 0.2, CORNERS)
SCALES = (1.0, 0.1, 5.0)

Strategy = st.SearchStrategy[Any]


@dataclass(frozen=True, repr=False)
class Drawn:
    """A drawn network and what its numbers hang on.

    seed: of all arrays. edge_share: the share of the elements, in about a third of the arrays (in all of them where it
    is CORNERS), that are replaced by edge values. scale: the standard deviation of the others.
    """

    network: Network
    seed: int
    edge_share: float
    scale: float

    def __repr__(self) -> str:
        return f"<{self.network}; seed={self.seed}, edge_share={self.edge_share}, scale={self.scale}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis prints a failing example."""
        printer.text(repr(self))

    def case(self, dtype: str) -> Case:
        """The numbers, drawn in this dtype."""
        generator = np.random.default_rng(self.seed)
        edges = (*EDGES, *(edge for node in self.network.nodes for edge in node.layer.edges))
        real_edges = [edge for edge in edges if _moderate(edge, dtype)]
        draw = partial(self._array, generator, np.dtype(dtype), real_edges)
        domains = {each.name: each.domain for each in self.network.inputs}
        names = [*domains, *self.network.parameters]
        values = {name: np.asarray(draw(self.network.shapes[name], domains.get(name, REAL))) for name in names}
        cotangent = generator.normal(size=self.network.shapes[self.network.output]).astype(dtype)
        return Case(self.network, dtype, values, np.asarray(cotangent), self.seed)

    def _array(
        self,
        generator: np.random.Generator,
        dtype: np.dtype[Any],
        real_edges: Sequence[float],
        shape: Shape,
        domain: Domain,
    ) -> np.ndarray:
        if domain.kind == "index":
            integers = np.asarray(domain.integers, np.int64)
            return _repeated(generator, generator.choice(integers, shape))
        if domain.kind == "sign":
            return generator.choice([-1.0, 1.0], shape).astype(dtype)
        unit = domain.kind == "unit"
        plain = generator.uniform(0.0, 1.0, shape) if unit else self.scale * generator.normal(size=shape)
        edges = generator.choice(UNIT_EDGES if unit else real_edges, shape)
        if domain.kind == "positive":
            plain, edges = np.abs(plain), np.where(edges > 0.0, edges, 1.0)
        share = self.edge_share if generator.random() < 1 / 3 or self.edge_share == CORNERS else 0.0
        overlaid = np.where(generator.random(shape) < share, edges, plain)
        if self.edge_share and generator.random() < 1 / 6:
            overlaid = _tied(generator, overlaid, domain)
        held = overlaid.astype(dtype)
        if domain.kind == "positive":  # what is too small for the dtype must not become 0
            held = np.maximum(held, limits(dtype).smallest_normal.astype(dtype))
        return np.asarray(held)


def _moderate(edge: float, dtype: str) -> bool:
    """In float16, whose range is soon left, only edges of a magnitude whose cube the dtype still holds."""
    cube = abs(edge) ** 3
    info = limits(dtype)
    return dtype != "float16" or edge == 0.0 or float(info.smallest_normal) <= cube <= float(info.max)


def _repeated(generator: np.random.Generator, integers: np.ndarray) -> np.ndarray:
    """In a quarter of the arrays some rows hold one integer alone: repeated indices, and masks that hide everything."""
    if integers.ndim == 0 or generator.random() < 3 / 4:
        return integers
    alone = generator.random((*integers.shape[:-1], 1)) < 2 / 3
    return np.where(alone, integers[..., :1], integers)


def _tied(generator: np.random.Generator, array: np.ndarray, domain: Domain) -> np.ndarray:
    """Equal numbers: on a grid of halves, or some rows constant, or some all zero where the domain allows it."""
    if array.ndim == 0 or generator.random() < 1 / 2:
        coarse = np.round(2.0 * array) / 2.0
        return np.where(coarse > 0.0, coarse, 0.5) if domain.kind == "positive" else coarse
    alone = generator.random((*array.shape[:-1], 1)) < 2 / 3
    zero = domain.kind != "positive" and generator.random() < 1 / 2
    return np.where(alone, 0.0 if zero else array[..., :1], array)


def draw_each(
    visit: Callable[[Drawn], None], networks: int, seed: int, layers: Sequence[str] = (), max_nodes: int = MAX_NODES
) -> None:
    """Call `visit` with each of so many networks; the same seed and versions draw the same ones. Nothing shrinks."""

    @hypothesis.seed(seed)
    @settings(
        backend=BACKEND,
        max_examples=networks,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn_networks(layers, max_nodes))
    def visit_each(drawn: Drawn) -> None:
        visit(drawn)

    visit_each()


@st.composite
def drawn_networks(draw: st.DrawFn, layers: Sequence[str] = (), max_nodes: int = MAX_NODES) -> Drawn:
    """Networks of 1 to `max_nodes` nodes over the whole table, with their numbers.

    layers: where given, every network has at least one node of one of these layers.
    """
    return Drawn(
        draw(networks(layers, max_nodes)),
        seed=draw(st.integers(0, 2**32 - 1)),
        edge_share=draw(st.sampled_from(EDGE_SHARES)),
        scale=draw(st.sampled_from(SCALES)),
    )


@st.composite
def networks(draw: st.DrawFn, layers: Sequence[str] = (), max_nodes: int = MAX_NODES) -> Network:
    """A network that is valid by construction; see `drawn_networks`."""
    wanted = [LAYERS[name] for name in layers]
    growing = _Growing(wanted, max_nodes)
    while not draw(_grown(growing)):
        pass
    network = growing.finish()
    assume(not wanted or any(node.layer in wanted for node in network.nodes))
    return network


@st.composite
def _grown(draw: st.DrawFn, growing: _Growing) -> bool:
    """One more node; whether it is the last. A strategy of its own, so that shrinking can drop a node whole."""
    return growing.grow(draw)


def _arguments(layer: Layer, options: Mapping[str, OptionValue]) -> tuple[Argument, ...]:
    """The arguments that these options ask for; a variadic layer's only one."""
    return tuple(each for each in layer.arguments if each.when is None or each.when(options))


@cache
def _takes(name: str, shape: Shape, held: Domain) -> bool:
    """Whether the layer, with default options, takes a first input of this shape that holds these numbers."""
    layer = LAYERS[name]
    low, high = layer.ranks
    if not low <= len(shape) <= high:
        return False
    return layer.arguments[0].domain(shape, layer.defaults).admits(held)


@cache
def _bridged(name: str, shape: Shape, held: Domain) -> bool:
    """Whether a layer that takes any number can stand between."""
    return held.differentiable and any(
        _takes(each.name, shape, REAL) and _takes(name, shape, each.codomain) for each in BRIDGES
    )


def _fits(layer: Layer, shape: Shape, options: Mapping[str, OptionValue]) -> bool:
    """Whether the layer with these options takes a first input of this shape, beside the simplest partners."""
    try:
        partners = [each.shapes(shape, options)[0] for each in _arguments(layer, options)[1:]]
        output = layer.output_shape([shape, *partners], options)
    except (ShapeError, IndexError):
        return False
    return math.prod(output) <= MAX_ELEMENTS and len(output) <= MAX_RANK


def _input_shapes(layer: Layer) -> tuple[Shape, ...]:
    """Shapes of a first input worth drawing for the layer."""
    low, high = layer.ranks
    return layer.shapes or tuple(shape for shape in SHAPES if low <= len(shape) <= high)


def _families(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers by family, each family as often as the square root of its size asks for."""
    names = dict.fromkeys(layer.family for layer in layers)
    families = [[layer for layer in layers if layer.family == name] for name in names]
    return [family for family in families for _ in range(math.isqrt(len(family)))]


class _Growing:
    """A network under construction, and the draws that let it grow."""

    draw: st.DrawFn

    def __init__(self, wanted: Sequence[Layer], max_nodes: int) -> None:
        self.wanted = list(wanted)
        self.max_nodes = max_nodes
        self.steps_left = max_nodes
        self.shapes: dict[str, Shape] = {}
        self.domains: dict[str, Domain] = {}
        self.inputs: list[Input] = []
        self.nodes: list[Node] = []
        self.parameters: dict[str, Shape] = {}
        self.anchored: set[str] = set()
        self.read: set[str] = set()

    def grow(self, draw: st.DrawFn) -> bool:
        """Grow by one node, and by one before it where its input's domain demands that."""
        self.draw = draw
        self.steps_left -= 1
        last = draw(st.integers(0, self.steps_left)) == 0  # every length is equally likely
        if len(self.nodes) < self.max_nodes:
            self._add_node(last)
        return last

    def _add_node(self, last: bool) -> None:
        layer = self._layer(last)
        source = self._source(layer)
        if source is None and self.anchored:  # no layer takes what hangs on the wanted one
            return
        shape = self.draw(st.sampled_from(_input_shapes(layer)))
        if source is not None:
            shape = self.shapes[source]
        options = self._options(layer, shape)
        if options is None:
            return
        wanted = layer.arguments[0].domain(shape, options)
        if source is None or not wanted.differentiable:
            source = self._new_input(shape, wanted)
        elif not wanted.admits(self.domains[source]) and self._room_for_bridge:
            source = self._bridge(source, wanted)
        if wanted.admits(self.domains[source]):
            self._append(layer, source, options)

    def _bridge(self, source: str, wanted: Domain) -> str:
        """A node that takes any number, and whose outputs are in the wanted domain."""
        shape = self.shapes[source]
        bridges = [each for each in BRIDGES if each.codomain == wanted and _takes(each.name, shape, REAL)]
        bridge = self.draw(st.sampled_from(bridges))
        options = self._options(bridge, shape)
        return source if options is None else self._append(bridge, source, options)

    def _layer(self, last: bool) -> Layer:
        """A loss can only stand last; a wanted layer stands last at the latest."""
        missing = bool(self.wanted) and not self.anchored
        wanted = missing and (last or self.draw(st.booleans()))
        # Drawn even where it decides nothing, so that a node keeps its draws when shrinking makes it the last.
        loss = self.draw(st.integers(0, 3)) > 0
        goes_on = self.draw(st.integers(0, 9)) > 0
        candidates = self.wanted if wanted else list(LAYERS.values())
        losses = [layer for layer in candidates if layer.kind == "loss"]
        others = [layer for layer in candidates if layer.kind != "loss"]
        if wanted and not last and not others:
            # Only losses are wanted: their turn comes with the last node.
            others = [layer for layer in LAYERS.values() if layer.kind != "loss"]
        pool = losses if losses and last and (loss or not others) else others
        if not (self.anchored or (goes_on and not wanted and self.nodes)):
            return self._one_of(pool)
        newest = next(name for name in reversed(self.domains) if not self.anchored or name in self.anchored)
        # Not from those that fit at once: the draws of a layer that fits stay the same when shrinking drops the node
        # before. The draws of one that does not are marked, so that shrinking drops them.
        for _ in range(ATTEMPTS):
            with Attempt() as attempt:
                layer = self._one_of(pool)
                attempt.kept = self._reaches(layer, newest)
            if attempt.kept:
                return layer
        return self._one_of([each for each in (*pool, *others) if self._reaches(each, newest)] or pool)

    def _one_of(self, layers: Sequence[Layer]) -> Layer:
        return self.draw(st.sampled_from(self.draw(st.sampled_from(_families(layers)))))

    @property
    def _room_for_bridge(self) -> bool:
        return len(self.nodes) + 1 < self.max_nodes

    def _reaches(self, layer: Layer, tensor: str) -> bool:
        """Whether the layer can take the tensor, at worst over a bridge, without leaving a wanted node behind."""
        if self.anchored and tensor not in self.anchored:
            return False
        shape, held = self.shapes[tensor], self.domains[tensor]
        return _takes(layer.name, shape, held) or (self._room_for_bridge and _bridged(layer.name, shape, held))

    def _source(self, layer: Layer) -> str | None:
        """The newest tensor, or an older one, or None for a new input."""
        fitting = [name for name in self.domains if self._reaches(layer, name)]
        # All drawn even where they decide nothing, so that a node keeps its draws when shrinking drops the one before.
        fresh = self.draw(st.integers(0, 29)) == 29
        older = self.draw(st.integers(0, 6)) == 6
        if not fitting or (fresh and not self.anchored):
            return None
        return self.draw(st.sampled_from(fitting[::-1])) if older else fitting[-1]

    def _options(self, layer: Layer, shape: Shape) -> dict[str, OptionValue] | None:
        """Options that fit the shape; the simplest ones where several draws do not, None where even they do not."""
        choices = {option.name: option.domain.choices(shape) for option in layer.options}
        if not all(choices.values()):
            return None
        for _ in range(ATTEMPTS if layer.options else 1):
            options = {name: self.draw(st.sampled_from(values)) for name, values in choices.items()}
            if _fits(layer, shape, options):
                return options
        simplest = {name: values[0] for name, values in choices.items()}
        return simplest if _fits(layer, shape, simplest) else None

    def _append(self, layer: Layer, source: str, options: dict[str, OptionValue]) -> str:
        sources = [source]
        shape = self.shapes[source]
        count = 1 + self.draw(st.integers(0, 2)) if layer.variadic else len(_arguments(layer, options))
        for argument in layer.arguments_for(count, options)[1:]:
            sources.append(self._partner(argument, shape, options, sources))
        shapes = [self.shapes[each] for each in sources]
        try:
            output = layer.output_shape(shapes, options)
        except ShapeError:  # two partners that each fit the first need not fit each other
            if not layer.variadic:
                return source
            sources, shapes = [source] * len(sources), [shape] * len(sources)
            output = layer.output_shape(shapes, options)
        if math.prod(output) > MAX_ELEMENTS or len(output) > MAX_RANK:
            return source
        name = f"h{len(self.nodes) + 1}"
        slots = {slot: self._parameter(name, slot, size) for slot, size in layer.parameters(shapes, options).items()}
        self.nodes.append(Node.of(name, layer, *sources, parameters=slots, options=options))
        self.read.update(sources)
        self.shapes[name], self.domains[name] = output, layer.codomain
        if self.anchored & set(sources) or layer in self.wanted:
            self.anchored.add(name)
        return name

    def _partner(self, argument: Argument, shape: Shape, options: dict[str, OptionValue], taken: list[str]) -> str:
        """An existing tensor that fits, the same one again, or a new input."""
        domain = argument.domain(shape, options)
        shapes = argument.shapes(shape, options)
        fitting = [name for name, held in self.domains.items() if self.shapes[name] in shapes and domain.admits(held)]
        loose = [name for name in fitting if name not in self.read and name not in taken]
        reuse = bool(fitting) and self.draw(st.integers(0, 3)) > 0
        if reuse:
            return self.draw(st.sampled_from(loose or fitting[::-1]))
        return self._new_input(self.draw(st.sampled_from(shapes)), domain)

    def _new_input(self, shape: Shape, domain: Domain) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(Input(name, shape, domain))
        self.shapes[name], self.domains[name] = shape, domain
        return name

    def _parameter(self, node: str, slot: str, shape: Shape) -> str:
        """A new parameter, or an older one of the same shape, shared."""
        same = [name for name, size in self.parameters.items() if size == shape]
        shared = bool(same) and self.draw(st.booleans())
        if shared:
            return self.draw(st.sampled_from(same))
        self.parameters[f"{node}.{slot}"] = shape
        return f"{node}.{slot}"

    def finish(self) -> Network:
        """The part of the network that the last node depends on."""
        needed = {self.nodes[-1].name}
        for node in reversed(self.nodes):
            if node.name in needed:
                needed.update(node.inputs)
        inputs = tuple(each for each in self.inputs if each.name in needed)
        return Network(inputs, tuple(node for node in self.nodes if node.name in needed))
