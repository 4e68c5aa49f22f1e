"""Architectures that users train, by name: small, with random weights.

Legend: N batch, C channels, H and W height and width, T time steps, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice

import numpy as np

from gradproof.drawing import Drawn
from gradproof.layer import REAL, Domain, OptionValue, Shape
from gradproof.network import Input, Network, Node
from gradproof.reference import LAYERS

SCALE = 0.5
"""The standard deviation of weights and inputs: deep networks neither die out nor overflow."""


class Sketch:
    """A network under construction, node by node."""

    def __init__(self) -> None:
        self._inputs: list[Input] = []
        self._nodes: list[Node] = []
        self._shapes: dict[str, Shape] = {}

    def input(self, name: str, shape: Shape, domain: Domain = REAL) -> str:
        self._inputs.append(Input(name, shape, domain))
        self._shapes[name] = shape
        return name

    def __call__(
        self, layer: str, *sources: str, name: str = "", share: Mapping[str, str] | None = None, **options: OptionValue
    ) -> str:
        """One more node; returns its name.

        name: by default the layer's and a number. share: slot -> name of its parameter, where it is not the node's own.
        """
        row = LAYERS[layer]
        name = name or f"{layer}_{len(self._nodes) + 1}"
        completed = row.complete(options)
        shapes = [self._shapes[source] for source in sources]
        slots = {slot: f"{name}.{slot}" for slot in row.parameters(shapes, completed)} | dict(share or {})
        self._nodes.append(Node.of(name, row, *sources, parameters=slots, options=completed))
        self._shapes[name] = row.output_shape(shapes, completed)
        return name

    def network(self) -> Network:
        return Network(tuple(self._inputs), tuple(self._nodes))


ARCHITECTURES: dict[str, Callable[[], Network]] = {}


def layers_of(architectures: Sequence[str]) -> set[str]:
    """The layers that these architectures are made of."""
    return {node.layer.name for name in architectures for node in ARCHITECTURES[name]().nodes}


def drawn_architectures(names: Sequence[str], count: int, seed: int) -> Iterator[Drawn]:
    """The architectures in turn, `count` in all, each with numbers of its own."""
    networks = {name: ARCHITECTURES[name]() for name in names}
    seeds = np.random.SeedSequence(seed).generate_state(count)
    for name, each in zip(islice(cycle(names), count), seeds, strict=True):
        yield Drawn(networks[name], int(each), edge_share=0.0, scale=SCALE)
