"""Networks of some thirty nodes, joined of small ones, in which each part keeps the numbers that it has alone.

The parts stand in a row. Each adds one number to a running total, and hands the total to the next, one of whose inputs
it moves by nothing, so that values stay and gradients flow:

    moved = input + (total - level)                 level: what the total comes to
    total = total + sum(weights * output)           weights: the part's own cotangent / the gradient of the total

So the value of an input is what it was, the output gets the cotangent that it has alone, to within roundings, and what
a part sends back reaches everything before it, added to the cotangent of the total: at no depth does it vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count as counted

import numpy as np

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.model.case import Case, upcast
from gradproof.model.layer import REAL
from gradproof.model.network import Input, Network, Node
from gradproof.reference import LAYERS, NumpyReference

NODES = 30
"""How many nodes a joined network has, to within SLACK."""

SLACK = 3

FIRST = 1
"""How many nodes less it takes, at least, to join the first part."""

LEAST = 4
"""Nodes of a part that others are buried among, so that most nodes are not there to join parts."""

POOL = 60
"""Small networks drawn for others to be buried among."""

ORDINARY = 1e3
"""The magnitude up to which the numbers of a part are ordinary."""

FELT = 1e-3
"""The magnitude from which on a gradient has not vanished."""

SMALLEST_COTANGENT = 1 / 16
"""Of the running total: below, weights that make up for it would grow."""


@dataclass(frozen=True)
class Flow:
    """What a part gives when it runs alone, in the reference's float64.

    output: of the part. total: the sum of its outputs times its cotangent.
    sent: input -> sum of its gradient, for the inputs that may hold any number.
    largest: magnitude of its values and gradients, NaN or infinite where one of them is.
    least: of its nodes' gradients, each by its largest element.
    """

    output: np.ndarray
    total: float
    sent: dict[str, float]
    largest: float
    least: float

    @property
    def ordinary(self) -> bool:
        """Whether nothing in it explodes, and no gradient vanishes."""
        return self.least >= FELT and self.largest <= ORDINARY


def flow(case: Case) -> Flow:
    """Run the reference on the case, in float64."""
    reference = NumpyReference()
    forward = reference.forward(case.network, case.exact_values, "float64")
    gradients = reference.backward(forward, upcast(case.cotangent))
    output = forward.outputs[case.network.output]
    movable = [each.name for each in case.network.inputs if each.domain == REAL]
    with np.errstate(all="ignore"):
        return Flow(
            output,
            float((output * upcast(case.cotangent)).sum()),
            {name: float(gradients[name].sum()) for name in movable if name in gradients},
            max(float(np.abs(each).max()) for each in (*forward.outputs.values(), *gradients.values())),
            min(float(np.abs(gradients[node.name]).max()) for node in case.network.nodes),
        )


@dataclass(frozen=True)
class Link:
    """How a part is joined: which of its inputs the total moves, None for none, and the gradient of its own total."""

    moved: str | None
    cotangent: float


def links(flows: Sequence[Flow]) -> tuple[Link, ...]:
    """How parts that flow so are joined, the last with the total's cotangent 1."""
    found: list[Link] = []
    cotangent = 1.0
    for position in reversed(range(len(flows))):
        ordinary = position > 0 and all(abs(each.total) <= ORDINARY for each in flows[:position])
        sent = {
            name: number
            for name, number in flows[position].sent.items()
            if ordinary and SMALLEST_COTANGENT <= abs(cotangent + number) <= ORDINARY
        }
        moved = max(sent, key=lambda name: abs(sent[name]), default=None)
        found.append(Link(moved, cotangent))
        cotangent += sent[moved] if moved else 0.0
    return tuple(reversed(found))


def join(networks: Sequence[Network], how: Sequence[Link]) -> Network:
    """One network of these, in this order; names of the k-th get the prefix "pk."."""
    parts = [_part(k, network, link) for k, (network, link) in enumerate(zip(networks, how, strict=True))]
    return Network(
        tuple(each for part in parts for each in part.inputs), tuple(each for part in parts for each in part.nodes)
    )


def join_cases(cases: Sequence[Case], how: Sequence[Link] | None = None) -> Case:
    """One case of these, all of one dtype, in which each has the values and the cotangent that it has alone.

    how: as `links` finds it from these cases where None. The whole network's cotangent is 1.
    """
    how = how or links([flow(case) for case in cases])
    dtype = cases[0].dtype
    network = join([case.network for case in cases], how)
    values: dict[str, np.ndarray] = {}
    total: np.ndarray | None = None
    for k, (case, link) in enumerate(zip(cases, how, strict=True)):
        values |= {f"p{k}.{name}": value for name, value in case.values.items()}
        weights = np.asarray((upcast(case.cotangent) / link.cotangent).astype(dtype))
        values[f"p{k}.weights"] = weights
        if link.moved is not None and total is not None:
            values[f"p{k}.level"] = total
        total = _total(k, case, weights, total)
    return Case(network, dtype, values, np.ones((), dtype), cases[0].seed)


@dataclass(frozen=True)
class _Part:
    """What a part gives to the joined network."""

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]


def _part(k: int, network: Network, link: Link) -> _Part:
    """The network with its names prefixed, between the nodes that join it."""
    prefix, before = f"p{k}.", f"total{k - 1}" if k else None
    inputs = [replace(each, name=prefix + each.name) for each in network.inputs]
    inputs.append(Input(f"{prefix}weights", network.shapes[network.output]))
    nodes: list[Node] = []
    moved = {}
    if link.moved is not None and before is not None:
        inputs.append(Input(f"{prefix}level", ()))
        nodes.append(Node.of(f"{prefix}offset", LAYERS["subtract"], before, f"{prefix}level"))
        nodes.append(Node.of(f"{prefix}moved", LAYERS["add"], prefix + link.moved, f"{prefix}offset"))
        moved = {link.moved: f"{prefix}moved"}
    nodes += [
        replace(
            node,
            name=prefix + node.name,
            inputs=tuple(moved.get(each, prefix + each) for each in node.inputs),
            parameters=tuple((slot, prefix + name) for slot, name in node.parameters),
        )
        for node in network.nodes
    ]
    tail = _tail(k, prefix + network.output, len(network.shapes[network.output]), before)
    return _Part(tuple(inputs), (*nodes, *tail))


def _tail(k: int, output: str, rank: int, before: str | None) -> Iterator[Node]:
    """The nodes that add the weighted sum of a part's outputs to the total before it; the last of them is "totalk"."""
    sums: list[Callable[[str, str], Node]] = [
        lambda name, source: Node.of(name, LAYERS["multiply"], source, f"p{k}.weights")
    ]
    if rank:
        axes = tuple(range(rank))
        sums.append(lambda name, source: Node.of(name, LAYERS["reduce_sum"], source, options={"axes": axes}))
    if before is not None:
        sums.append(lambda name, source: Node.of(name, LAYERS["add"], before, source))
    names = [*(f"p{k}.weighted", f"p{k}.sum")[: len(sums) - 1], f"total{k}"]
    for name, source, make in zip(names, [output, *names], sums, strict=False):
        yield make(name, source)


def _total(k: int, case: Case, weights: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """What the reference has for the total behind the part, to the bit where it has the dtype's arithmetic."""
    reference, dtype = NumpyReference(), case.dtype
    held = dtype if reference.supports(LAYERS["add"], {}, dtype) else "float32"
    output = reference.forward(case.network, case.values, held).outputs[case.network.output]
    values = {"output": output, f"p{k}.weights": weights} | ({} if before is None else {"before": before})
    nodes = tuple(_tail(k, "output", output.ndim, None if before is None else "before"))
    tail = Network(tuple(Input(name, value.shape) for name, value in values.items()), nodes)
    with np.errstate(all="ignore"):
        return np.asarray(reference.forward(tail, values, held).outputs[tail.output].astype(dtype))


def ordinary_parts(seed: int, count: int = POOL) -> tuple[Drawn, ...]:
    """So many of the drawn networks of this seed that are not tiny, with ordinary numbers."""
    drawn: list[Drawn] = []
    for more in counted():
        if len(drawn) >= count:
            return tuple(drawn[:count])
        candidates: list[Drawn] = []
        draw_each(candidates.append, count, seed + more)
        plain = [replace(e, edge_share=0.0, scale=1.0) for e in candidates if len(e.network.nodes) >= LEAST]
        drawn += [each for each in plain if flow(each.case("float64")).ordinary]
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Surroundings:
    """Small networks among which others are buried."""

    parts: tuple[Drawn, ...]

    def bury(self, case: Case, seed: int, nodes: int = NODES, apart: Collection[str] = ()) -> Case:
        """The case in a network of about so many nodes, among others that have none of its layers.

        seed: which others, and where among them. apart: layers that they must not have either.
        """
        generator = np.random.default_rng(seed)
        forbidden = {node.layer.name for node in case.network.nodes} | set(apart)
        fitting = [each for each in self.parts if not forbidden & {node.layer.name for node in each.network.nodes}]
        chosen = _filling(_shuffled(fitting, generator), nodes, _joined_size(case.network) - FIRST)
        cases = [each.case(case.dtype) for each in chosen]
        cases.insert(int(generator.integers(len(cases) + 1)), case)
        return replace(join_cases(cases), seed=case.seed)


def _shuffled(parts: Sequence[Drawn], generator: np.random.Generator) -> list[Drawn]:
    return [parts[k] for k in generator.permutation(len(parts))]


def _joined_size(network: Network) -> int:
    """How many nodes it takes up in a joined network, if it is not the first and one of its inputs can be moved."""
    movable = any(each.domain == REAL for each in network.inputs)
    return len(network.nodes) + (3 if network.shapes[network.output] else 2) + (2 if movable else 0)


def _filling(parts: Sequence[Drawn], nodes: int, taken: int = -FIRST) -> list[Drawn]:
    """As many of these, in their order, as fit into so many nodes; `taken` are taken already."""
    chosen = []
    for each in parts:
        size = _joined_size(each.network)
        if taken + size <= nodes + SLACK:
            chosen.append(each)
            taken += size
        if taken >= nodes - SLACK:
            break
    return chosen


@dataclass(frozen=True, repr=False)
class Deep:
    """A joined network and its numbers, to be used where a drawn one is.

    seed: of the first part. The network is the same in every dtype; the parts' numbers are what they draw there.
    """

    parts: tuple[Drawn, ...]

    @property
    def seed(self) -> int:
        return self.parts[0].seed

    @cached_property
    def _links(self) -> tuple[Link, ...]:
        return links([flow(each.case("float64")) for each in self.parts])

    @cached_property
    def network(self) -> Network:
        return join([each.network for each in self.parts], self._links)

    def case(self, dtype: str) -> Case:
        """The numbers, drawn in this dtype."""
        return join_cases([each.case(dtype) for each in self.parts], self._links)

    def __repr__(self) -> str:
        return f"<{self.network}; joined of {list(self.parts)}>"


def deep_networks(count: int, seed: int, nodes: int = NODES) -> list[Deep]:
    """So many networks of about so many nodes, over the whole table; the same seed and versions draw the same ones."""
    generator = np.random.default_rng(seed)
    parts = ordinary_parts(seed, max(POOL, 2 * count))
    return [Deep(tuple(_filling(_shuffled(parts, generator), nodes))) for _ in range(count)]
