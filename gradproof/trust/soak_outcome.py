"""What a soak is asked to examine, and what it has counted: distributions of errors, and alarms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradproof.draw.drawing import EDGE_SHARES, SCALES, Drawn, draw_each
from gradproof.model.dtypes import VALID_DTYPES
from gradproof.model.tensors import Role
from gradproof.run.check import FAILURE_DIRECTORY
from gradproof.verdict.examination import Examination
from gradproof.verdict.rows import rows

CHUNK = 100
"""Networks that one process examines between two lines of the journal."""

Key = tuple[str, str, str]
"""Adapter, dtype, layer."""

ADAPTERS = ("torch", "jax[jit=network]")

DRAWS = 4
"""Sets of numbers tried on each graph: JAX compiles once for all of them, and that is what a soak pays for."""

BINS_PER_DECADE = 20
NOTHING = -4 * BINS_PER_DECADE
"""The bin of errors up to 1e-4 noise units."""


@dataclass(frozen=True)
class Plan:
    """What a soak examines. Two soaks with the same plan and versions draw the same networks.

    Networks come in graphs of DRAWS sets of numbers each; the dtypes take turns from graph to graph.
    """

    adapters: tuple[str, ...] = ADAPTERS
    dtypes: tuple[str, ...] = VALID_DTYPES
    seed: int = 1
    failures: Path | None = FAILURE_DIRECTORY

    def networks(self, chunk: int, count: int = CHUNK) -> Iterator[tuple[Drawn, str]]:
        """The first `count` networks of a chunk, each with the dtype that it is examined in."""
        graphs: list[Drawn] = []
        draw_each(graphs.append, 1 + math.ceil(count / DRAWS), self.chunk_seed(chunk))
        graphs = graphs[1:]  # Hypothesis begins with the simplest network, whatever the seed
        drawn = (
            (each, self.dtypes[(chunk + i) % len(self.dtypes)])
            for i, graph in enumerate(graphs)
            for each in sets_of_numbers(graph)
        )
        yield from (each for _, each in zip(range(count), drawn, strict=False))

    def chunk_seed(self, chunk: int) -> int:
        return int(np.random.SeedSequence((self.seed, chunk)).generate_state(1)[0])


@dataclass
class Distribution:
    """Errors of tensors in noise units, counted in bins of equal ratio. largest: the largest one, exactly."""

    counts: Counter[int] = field(default_factory=Counter)
    largest: float = 0.0

    def add(self, units: float) -> None:
        tiny = units <= 10.0 ** (NOTHING / BINS_PER_DECADE)
        self.counts[NOTHING if tiny else math.ceil(BINS_PER_DECADE * math.log10(units))] += 1
        self.largest = max(self.largest, units)

    def merge(self, other: Distribution) -> None:
        self.counts.update(other.counts)
        self.largest = max(self.largest, other.largest)

    def quantile(self, share: float) -> float:
        """A number of noise units that this share of the tensors does not exceed, to within a bin."""
        wanted, seen = share * self.counts.total(), 0
        for index in sorted(self.counts):
            seen += self.counts[index]
            if seen >= wanted:
                return min(self.largest, 10.0 ** (index / BINS_PER_DECADE))
        return 0.0

    def to_json(self) -> list[Any]:
        return [self.largest, *sorted(self.counts.items())]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Distribution:
        return cls(Counter(dict(data[1:])), data[0])


@dataclass
class Outcome:
    """What a soak, or a chunk of one, found.

    networks: drawn. gradients: compared. false_alarms: one line each, for a network (of an adapter) that disagrees
    with no known divergence to explain it. known, unsupported: networks by adapter and dtype.
    tensors: numbers of tensors that agree; within: of these, whose error is so small that no noise was measured.
    accuracy: of algorithms that lose digits, by adapter, dtype, layer and algorithm. elements, unverifiable: numbers.
    units: of the tensors that agree and whose noise was measured.
    """

    networks: int = 0
    gradients: int = 0
    false_alarms: list[str] = field(default_factory=list)
    known: Counter[str] = field(default_factory=Counter)
    unsupported: Counter[str] = field(default_factory=Counter)
    tensors: Counter[str] = field(default_factory=Counter)
    within: Counter[str] = field(default_factory=Counter)
    elements: Counter[str] = field(default_factory=Counter)
    unverifiable: Counter[str] = field(default_factory=Counter)
    accuracy: Counter[str] = field(default_factory=Counter)
    units: dict[Key, Distribution] = field(default_factory=dict)

    def add(self, examination: Examination) -> None:
        """Count the tensors of one adapter on one network."""
        where = f"{examination.adapter} {examination.case.dtype}"
        self.gradients += sum(check.key.role is Role.GRADIENT for check in examination.checks)
        self.known[where] += examination.known
        for row in rows(examination) if examination.agrees else ():
            check = row.check
            self.tensors[where] += 1
            self.within[where] += check.bound
            self.elements[where] += check.elements
            self.unverifiable[where] += check.unverifiable
            if check.algorithm:
                self.accuracy[f"{where} {': '.join(check.algorithm)}"] += 1
            elif check.index is not None and not check.bound:
                key = (examination.adapter, examination.case.dtype, row.layer)
                self.units.setdefault(key, Distribution()).add(check.noise_units)

    def merge(self, other: Outcome) -> None:
        self.networks += other.networks
        self.gradients += other.gradients
        self.false_alarms += [each for each in other.false_alarms if each not in self.false_alarms]
        for name in COUNTERS:
            getattr(self, name).update(getattr(other, name))
        for key, distribution in other.units.items():
            self.units.setdefault(key, Distribution()).merge(distribution)

    def distribution(self, adapter: str, dtype: str) -> Distribution:
        """Over all layers."""
        together = Distribution()
        for (name, held, _), each in self.units.items():
            if (name, held) == (adapter, dtype):
                together.merge(each)
        return together

    @property
    def closing_line(self) -> str:
        alarms = len(self.false_alarms)
        return f"soak: networks={self.networks} gradients={self.gradients} false_alarms={alarms}"

    def to_json(self) -> dict[str, Any]:
        units = [[*key, each.to_json()] for key, each in self.units.items()]
        return vars(self) | {"units": units}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        units = {(adapter, dtype, layer): Distribution.from_json(d) for adapter, dtype, layer, d in data["units"]}
        counters = {name: Counter(data[name]) for name in COUNTERS}
        return cls(**dict(data) | counters | {"units": units})


COUNTERS = ("known", "unsupported", "tensors", "within", "elements", "unverifiable", "accuracy")


def sets_of_numbers(drawn: Drawn) -> Iterator[Drawn]:
    """The network as drawn, then with other numbers."""
    yield drawn
    generator = np.random.default_rng(drawn.seed)
    for _ in range(DRAWS - 1):
        yield replace(
            drawn,
            seed=int(generator.integers(2**32)),
            edge_share=float(generator.choice(EDGE_SHARES)),
            scale=float(generator.choice(SCALES)),
        )
