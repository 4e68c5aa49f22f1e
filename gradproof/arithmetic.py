"""Which arithmetic a layer of an adapter has in a coarse dtype: a convention, found out once and then demanded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gradproof.agreement import SUFFICIENT, judge
from gradproof.case import Case, jittered, redrawn
from gradproof.equations import ARITHMETICS, EVERY, INSIDE, Arithmetic, Equations, Statement
from gradproof.network import Node

FEWEST_PROBES, MOST_PROBES = 8, 64
"""Sets of numbers on which a layer's class is found out: more of them where tensors are small."""

PROBED_ELEMENTS = 512
"""Elements of the smallest tensor after which no more probes are made: few roundings show in few elements."""

FINER = {name: place for place, name in enumerate(ARITHMETICS)}
"""Class -> how many classes are finer."""

Probe = Callable[[Case], tuple[Equations, Mapping[str, Any]] | None]
"""Runs the adapter on a case of one node."""


class Classes:
    """The classes of one adapter's layers, each found out when it is first asked for.

    known: (layer, options, dtype) -> class.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Arithmetic] = {}

    def already(self, node: Node, dtype: str) -> Arithmetic:
        """The class as far as it is known, inside where it is not."""
        return self.known.get((node.layer.name, node.options, dtype), INSIDE)

    def of(self, case: Case, probe: Probe) -> Arithmetic:
        """The class of the one node of this case: the coarsest that it was ever found to need.

        It is probed with ordinary numbers when it is first asked for, and each time with numbers near the case's own,
        for some roundings show only where numbers cancel.
        """
        (node,) = case.network.nodes
        key = (node.layer.name, node.options, case.dtype)
        probes = [] if key in self.known else [redrawn(case, seed) for seed in range(_probes(case))]
        probes += [jittered(case, seed) for seed in range(_probes(case))]
        self.known[key] = class_of(probes, probe, self.known.get(key, INSIDE))
        return self.known[key]

    @staticmethod
    def allow(classes: Iterable[Arithmetic], demanded: str) -> bool:
        """Whether none is coarser than the class that is demanded."""
        return all(FINER[each.name] <= FINER[demanded] for each in classes)

    def by_layer(self, dtype: str) -> dict[str, str]:
        """Layer -> the coarsest class that was found for it with any options."""
        found: dict[str, str] = {}
        for (layer, _, held), each in self.known.items():
            if held == dtype:
                found[layer] = max(found.get(layer, "inside"), each.name, key=FINER.__getitem__)
        return found


def class_of(probes: Iterable[Case], probe: Probe, least: Arithmetic = INSIDE) -> Arithmetic:
    """The coarsest class that some tensor of the probes needs. One that fits in none is wrong, and tells no class."""
    needed = least
    for case in probes:
        result = None if needed is EVERY else probe(case)
        if result is not None:
            equations, got = result
            for statement in equations:
                needed = _needed(statement, got.get(statement.key), case.dtype, case.network.nodes[0], needed)
    return needed


def _needed(statement: Statement, got: Any, dtype: str, node: Node, least: Arithmetic) -> Arithmetic:
    """The finest class, from `least` on, in which the tensor agrees; `least` where it does in none."""
    coarser = [each for each in ARITHMETICS.values() if FINER[each.name] >= FINER[least.name]]
    checks = ((each, judge(statement, got, dtype, {node.name: each})) for each in coarser)
    fitting = (each for each, check in checks if not check.kind and (check.bound or check.noise_units <= SUFFICIENT))
    return next(fitting, least)


def _probes(case: Case) -> int:
    smallest = min(math.prod(case.network.shapes[name]) for name in case.network.differentiable)
    return min(max(FEWEST_PROBES, PROBED_ELEMENTS // max(smallest, 1)), MOST_PROBES)
