"""Which arithmetic a layer of an adapter has in a coarse dtype: a convention, found out once and then demanded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from scipy.special import stdtrit

from gradproof.model.case import Case, jittered, redrawn
from gradproof.model.network import Node
from gradproof.model.tensors import Tensor
from gradproof.reference.algorithms import ALGORITHMS, Algorithm, algorithms_of
from gradproof.verdict.agreement import SUFFICIENT, TensorCheck, judge, signed_roundings
from gradproof.verdict.equations import ARITHMETICS, EVERY, INSIDE, Arithmetic, Equations, Statement, usable

FEWEST_PROBES, MOST_PROBES = 8, 32
"""Sets of numbers on which a layer's class is found out: more of them where tensors are small."""

PATIENT_PROBES = 512
"""Sets of numbers on which it is found out where fewer told nothing: an average of many numbers that are rounded once
hardly ever errs by more than one that is not."""

PROBED_ELEMENTS = 256
"""Elements of the smallest tensor after which no more probes are made: few roundings show in few elements."""

FINER = {name: place for place, name in enumerate(ARITHMETICS)}
"""Class -> how many classes are finer."""

ONE_SIDED = 2.0
"""Roundings of the result by which an element may err to one side on average: a rounded constant makes about one."""

BY_CHANCE = 1e-6
"""The chance below which an average is taken for no chance."""

FEWEST_TO_AVERAGE = 5
"""Probes that must tell of an element before its average counts."""

ENOUGH = 16
"""Probes after which nothing more is learnt once the coarsest class is needed."""

HOPELESS = 1000.0
"""Noise units, measured from a few runs, that more runs do not make few."""

Probe = Callable[[Case], tuple[Equations, Mapping[Tensor, Any]] | None]
"""Runs the adapter on a case."""


class Classes:
    """The classes of one adapter's layers, each found out when it is first asked for.

    known: (layer, options, dtype) -> class. refused: those whose errors on ordinary numbers are one-sided: no rounding.
    searched: those that were probed with patience, which is done once.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Arithmetic] = {}
        self.refused: set[tuple[Any, ...]] = set()
        self.searched: set[tuple[Any, ...]] = set()

    def already(self, node: Node, dtype: str) -> Arithmetic:
        """The class as far as it is known, inside where it is not."""
        return self.known.get(_key(node, dtype), INSIDE)

    def of(self, case: Case, probe: Probe) -> Arithmetic:
        """The class of the one node of this case: the coarsest that it was ever found to need.

        It is probed with ordinary numbers when it is first asked for, and each time with numbers near the case's own,
        for some roundings show only where numbers cancel.
        """
        (node,) = case.network.nodes
        if _key(node, case.dtype) not in self.known:
            self._probe(node, (redrawn(case, seed) for seed in range(_probes(case))), probe, case.dtype)
        return self._probe(node, (jittered(case, seed) for seed in range(_probes(case))), probe, case.dtype, near=True)

    def within(self, node: Node, alone: Case, whole: Case, probe: Probe) -> Arithmetic:
        """The class of a node in a network: memory layouts count, and what is compiled together.

        alone: the case of the node alone. whole: that of the network, of which `probe` runs others.
        """
        count = range(_probes(alone))
        self._probe(node, (redrawn(whole, seed) for seed in count), probe, whole.dtype)
        return self._probe(node, (jittered(whole, seed) for seed in count), probe, whole.dtype, near=True)

    def patiently(self, case: Case, probe: Probe) -> Arithmetic:
        """As `of`, on many more sets of numbers near the case's own; but once for a layer and its options."""
        (node,) = case.network.nodes
        key = _key(node, case.dtype)
        if key in self.searched:
            return self.already(node, case.dtype)
        self.searched.add(key)
        many = (jittered(case, seed) for seed in range(PATIENT_PROBES))
        return self._probe(node, many, probe, case.dtype, near=True)

    def _probe(self, node: Node, cases: Iterable[Case], probe: Probe, dtype: str, near: bool = False) -> Arithmetic:
        """The class, after the cases have been looked at; what is refused stays as it is.

        near: whether the cases hardly differ from one another.
        """
        key = _key(node, dtype)
        before = self.known.setdefault(key, INSIDE)
        if key in self.refused or before is EVERY:
            return before
        evidence = Evidence(node, before, lambda other: self.already(other, dtype), near)
        evidence.gather(cases, probe)
        if evidence.one_sided:
            self.refused.add(key)
        else:
            self.known[key] = evidence.needed
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


def _key(node: Node, dtype: str) -> tuple[Any, ...]:
    return node.layer.name, node.options, dtype


def _verifies_some(check: TensorCheck, finest: TensorCheck) -> bool:
    """Whether a check says of one element at least that it is right, of those that are wrong by the finest class.

    What is beyond the range of a coarser one is no evidence for it: nothing can be said of it there.
    """
    wrong = 0 if finest.evidence is None else int(finest.evidence.wrong.sum())
    return wrong == 0 or check.unverifiable - finest.unverifiable < wrong


def _inside(node: Node) -> Arithmetic:
    return INSIDE


class Evidence:
    """What the probes of a node tell of its arithmetic.

    needed: the coarsest class that some tensor of them needs. One that fits in none is wrong, and tells no class.
    least: the finest that is asked about. others: the class of another node of the network. near: whether the probes
    hardly differ from one another.
    """

    def __init__(
        self,
        node: Node,
        least: Arithmetic = INSIDE,
        others: Callable[[Node], Arithmetic] = _inside,
        near: bool = False,
    ) -> None:
        self.needed = self._least = least
        self._near = near
        self._node = node
        self._others = others
        self._given: dict[str, list[tuple[Statement, Any, str, Mapping[str, Algorithm]]]] = {}

    def gather(self, probes: Iterable[Case], probe: Probe) -> None:
        """Run the probes, and see what they need."""
        for number, case in enumerate(probes):
            if self.needed is EVERY and number >= ENOUGH:
                return
            result = probe(case)
            for statement in result[0] if result else ():
                given = result[1].get(statement.key) if result else None
                if not any(equation.node.name == self._node.name for equation, _ in statement.parts):
                    continue
                self.needed, algorithms, whole = self._needed_by(statement, given, case.dtype)
                if whole and usable(given, statement.expected.shape):
                    self._given.setdefault(statement.key, []).append((statement, given, case.dtype, algorithms))

    def _needed_by(
        self, statement: Statement, got: Any, dtype: str
    ) -> tuple[Arithmetic, Mapping[str, Algorithm], bool]:
        """The finest class, from what is needed anyway on, in which the tensor agrees; that, where it does in none.

        And the algorithm by which it agrees there, where it does not by the textbook's in any class; and whether
        something can be said of all its elements then.
        """
        finest: TensorCheck | None = None
        for algorithm in (None, *ALGORITHMS.get(self._node.layer.name, ())):
            algorithms = {self._node.name: algorithm} if algorithm else {}
            for each in ARITHMETICS.values():
                if FINER[each.name] >= FINER[self.needed.name]:
                    classes = self._arithmetics(statement, each)
                    check = judge(statement, got, dtype, classes, algorithms, HOPELESS, forgiving=True)
                    finest = finest or check
                    agrees = not check.kind and (check.bound or check.noise_units <= SUFFICIENT)
                    if agrees and _verifies_some(check, finest):
                        return each, algorithms, not check.unverifiable
        return self.needed, {}, True

    def _arithmetics(self, statement: Statement, own: Arithmetic) -> dict[str, Arithmetic]:
        names = {equation.node.name: equation.node for equation, _ in statement.parts}
        return {name: own if name == self._node.name else self._others(node) for name, node in names.items()}

    @property
    def one_sided(self) -> bool:
        """Whether some element errs to the same side again and again, in the coarser class that is needed.

        Rounding errs to both sides: something else is at work then.
        """
        if self.needed is self._least or any(each.one_sided for each in algorithms_of(self._node.layer.name)):
            return False
        return any(_one_sided(np.stack([self._signed(*given) for given in each])) for each in self._given.values())

    def _signed(self, statement: Statement, got: Any, dtype: str, algorithms: Mapping[str, Algorithm]) -> Any:
        classes = self._arithmetics(statement, self.needed)
        return signed_roundings(statement, got, dtype, classes, algorithms, self._near)


def _one_sided(roundings: Any) -> bool:
    """Whether some element's mean over the probes is not 0, by Student's t."""
    known = ~np.isnan(roundings)
    count = np.maximum(known.sum(axis=0), 2)
    with np.errstate(all="ignore"):
        mean = np.where(known, roundings, 0.0).sum(axis=0) / count
        variance = np.where(known, (roundings - mean) ** 2, 0.0).sum(axis=0) / (count - 1)
        surely = np.abs(mean) > stdtrit(count - 1, 1.0 - BY_CHANCE) * np.sqrt(variance / count)
        return bool(((np.abs(mean) > ONE_SIDED) & surely & (count >= FEWEST_TO_AVERAGE) & np.isfinite(mean)).any())


def _probes(case: Case) -> int:
    smallest = min(math.prod(case.network.shapes[name]) for name in case.network.differentiable)
    return min(max(FEWEST_PROBES, PROBED_ELEMENTS // max(smallest, 1)), MOST_PROBES)
