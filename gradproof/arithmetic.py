"""Which arithmetic a layer of an adapter has in a coarse dtype: a convention, found out once and then demanded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from gradproof.agreement import SUFFICIENT, judge, signed_roundings
from gradproof.case import Case, jittered, redrawn
from gradproof.equations import ARITHMETICS, EVERY, INSIDE, Arithmetic, Equations, Statement, usable
from gradproof.network import Node

FEWEST_PROBES, MOST_PROBES = 8, 64
"""Sets of numbers on which a layer's class is found out: more of them where tensors are small."""

PROBED_ELEMENTS = 512
"""Elements of the smallest tensor after which no more probes are made: few roundings show in few elements."""

FINER = {name: place for place, name in enumerate(ARITHMETICS)}
"""Class -> how many classes are finer."""

ONE_SIDED = 2.0
"""Roundings of the result by which an element may err to one side on average: a rounded constant makes about one."""

SIGNIFICANT = 6.0
"""Standard errors from which on an average is no chance."""

Probe = Callable[[Case], tuple[Equations, Mapping[str, Any]] | None]
"""Runs the adapter on a case of one node."""


class Classes:
    """The classes of one adapter's layers, each found out when it is first asked for.

    known: (layer, options, dtype) -> class. refused: those whose errors on ordinary numbers are one-sided: no rounding.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Arithmetic] = {}
        self.refused: set[tuple[Any, ...]] = set()

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
        if key not in self.known:
            ordinary = Evidence(node)
            ordinary.gather((redrawn(case, seed) for seed in range(_probes(case))), probe)
            self.known[key] = INSIDE if ordinary.one_sided else ordinary.needed
            self.refused |= {key} if ordinary.one_sided else set()
        if key not in self.refused and self.known[key] is not EVERY:
            near = Evidence(node, self.known[key])
            near.gather((jittered(case, seed) for seed in range(_probes(case))), probe)
            self.known[key] = near.needed
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


class Evidence:
    """What the probes of a node tell of its arithmetic.

    needed: the coarsest class that some tensor of them needs. One that fits in none is wrong, and tells no class.
    """

    def __init__(self, node: Node, least: Arithmetic = INSIDE) -> None:
        self.needed = least
        self._node = node
        self._roundings: dict[str, list[Any]] = {}

    def gather(self, probes: Iterable[Case], probe: Probe) -> None:
        """Run the probes, and see what they need."""
        for case in probes:
            result = probe(case)
            for statement in result[0] if result else ():
                given = result[1].get(statement.key) if result else None
                if self.needed is not EVERY:
                    self.needed = _needed(statement, given, case.dtype, self._node, self.needed)
                if usable(given, statement.expected.shape):
                    found = signed_roundings(statement, given, case.dtype)
                    self._roundings.setdefault(statement.key, []).append(found)

    @property
    def one_sided(self) -> bool:
        """Whether some element errs to the same side again and again, by more than a rounded constant explains.

        Rounding of ordinary numbers errs to both sides: something else is at work then.
        """
        enough = (each for each in self._roundings.values() if len(each) >= FEWEST_PROBES)
        return any(_one_sided(np.stack(each)) for each in enough)


def _one_sided(roundings: Any) -> bool:
    with np.errstate(all="ignore"):
        mean = np.abs(roundings.mean(axis=0))
        error = roundings.std(axis=0, ddof=1) / np.sqrt(len(roundings))
        return bool(((mean > ONE_SIDED) & (mean > SIGNIFICANT * error) & np.isfinite(mean)).any())


def _needed(statement: Statement, got: Any, dtype: str, node: Node, least: Arithmetic) -> Arithmetic:
    """The finest class, from `least` on, in which the tensor agrees; `least` where it does in none."""
    coarser = [each for each in ARITHMETICS.values() if FINER[each.name] >= FINER[least.name]]
    checks = ((each, judge(statement, got, dtype, {node.name: each})) for each in coarser)
    fitting = (each for each, check in checks if not check.kind and (check.bound or check.noise_units <= SUFFICIENT))
    return next(fitting, least)


def _probes(case: Case) -> int:
    smallest = min(math.prod(case.network.shapes[name]) for name in case.network.differentiable)
    return min(max(FEWEST_PROBES, PROBED_ELEMENTS // max(smallest, 1)), MOST_PROBES)
