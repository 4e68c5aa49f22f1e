"""Evidence over networks: a factor so near to 1 that no single network shows it.

In bfloat16 every number is off by up to 0.2 %, and a gradient that is always 0.1 % too large passes each time. The mean
of many relative errors tells: rounding errs to both sides, a factor to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
from scipy.special import stdtrit

from gradproof.model.case import Case, redrawn
from gradproof.model.dtypes import limits
from gradproof.model.network import Network, Node
from gradproof.model.tensors import Tensor
from gradproof.verdict.arithmetic import Probe
from gradproof.verdict.equations import Equations, Statement, usable

Array = np.ndarray[Any, Any]

Place = tuple[str, str]
"""Layer, and what of it: "value", or the argument that the gradient is of."""

Setting = tuple[Any, ...]
"""Options and shapes of a layer alone."""

LOOKED_FOR = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-3, "float16": 1e-3}
"""dtype -> relative error that is looked for: more numbers are asked for until it can be told from 0."""

HONEST = {"float64": 4.0, "float32": 4.0, "bfloat16": 0.125, "float16": 0.125}
"""dtype -> roundings by which a right layer may err to one side. In half precision results come from float32."""

WHOLE = 4.0
"""Roundings above which an element's error is not its result's rounding; such elements tell of no factor."""

BY_CHANCE = 2e-9
"""The chance below which a mean is taken for no chance: that of six standard errors of a normal distribution."""

FEWEST = 12
"""Tensors without which nothing is said."""

OFTEN = 3
"""Tensors of a layer in the networks, from which on more are asked for."""

SLIGHT = 0.05
"""Roundings by which an error may be more than its result's rounding where a layer rounds its results alone."""

SURELY = 3.0
"""Standard errors by which the factor that is looked for must be out of the question."""

ALIKE = 4.0
"""Standard errors by which the factors with different options and shapes may differ by chance."""

MOST_RUNS = 256
"""Runs of a layer alone that are made to look for it."""

KEPT_SETTINGS, FEWEST_SETTINGS = 6, 3
"""Options and shapes of a layer alone that these runs take in turn, and without how many nothing holds everywhere."""


@dataclass
class Scale:
    """Sums of the relative errors of one place, over tensors: those of one tensor may go together.

    elements: their number n, errors: the sum s of their relative errors, and over tensors the sums of n^2, n s and s^2.
    beyond: the largest relative error below and above, without what the rounding of the result makes of it.
    """

    tensors: int = 0
    elements: float = 0.0
    errors: float = 0.0
    squares: Array = field(default_factory=lambda: np.zeros(3))
    beyond: tuple[float, float] = (0.0, 0.0)

    def add(self, errors: Array, roundings: Array) -> None:
        """Take in the relative errors of one tensor, and how large the rounding of the results can make them."""
        left = np.sign(errors) * np.maximum(np.abs(errors) - roundings, 0.0)
        self.beyond = (max(self.beyond[0], float(-left.min())), max(self.beyond[1], float(left.max())))
        size, total = float(errors.size), float(errors.sum())
        self.tensors += 1
        self.elements += size
        self.errors += total
        self.squares = self.squares + np.array([size * size, size * total, total * total])

    def less(self, other: Scale) -> Scale:
        """These sums without some of the tensors."""
        return replace(
            self,
            tensors=self.tensors - other.tensors,
            elements=self.elements - other.elements,
            errors=self.errors - other.errors,
            squares=self.squares - other.squares,
        )

    @property
    def excess(self) -> float:
        """The factor less 1: the mean relative error."""
        return self.errors / self.elements if self.elements else 0.0

    @property
    def standard_error(self) -> float:
        """Of the ratio of two sums over independent tensors (Cochran 1977, section 6.3); infinite for too few."""
        if self.tensors < FEWEST:
            return math.inf
        n2, ns, s2 = self.squares
        variance = (s2 - 2.0 * self.excess * ns + self.excess**2 * n2) * self.tensors / (self.tensors - 1)
        return math.sqrt(max(variance, 0.0)) / self.elements

    def shows_a_factor(self, dtype: str) -> bool:
        """Whether the excess is more than chance, and more than honest arithmetic makes."""
        if self.tensors < FEWEST or abs(self.excess) <= HONEST[dtype] * 0.5 * float(limits(dtype).eps):
            return False
        return abs(self.excess) > float(stdtrit(self.tensors - 1, 1.0 - 0.5 * BY_CHANCE)) * self.standard_error

    def is_all(self, dtype: str) -> bool:
        """Whether the factor and the rounding of the results are all that is wrong: nothing errs to the other side."""
        return self.beyond[self.excess < 0.0] <= SLIGHT * 0.5 * float(limits(dtype).eps)

    @property
    def tells(self) -> bool:
        """Whether it has enough tensors, and not only numbers that were handed on as they came."""
        return self.tensors >= FEWEST and bool(self.squares[2] > 0.0)

    def may_be(self, excess: float) -> bool:
        """Whether the excess may be this one."""
        return abs(self.excess - excess) <= ALIKE * self.standard_error

    def excludes_one(self, dtype: str) -> bool:
        """Whether the factor that is looked for is out of the question."""
        return abs(self.excess) + SURELY * self.standard_error < LOOKED_FOR[dtype]


@dataclass(frozen=True)
class Bias:
    """A factor that a layer's numbers are off by: which, of what, and the case that shows it best.

    tensor: the value's or gradient's name in the case. place: "value", or the argument that the gradient is of.
    """

    layer: str
    place: str
    factor: float
    standard_error: float
    tensors: int
    case: Case
    node: str
    tensor: str

    @property
    def description(self) -> str:
        what = "the value" if self.place == "value" else f"the gradient of {self.place}"
        return (
            f"{what} is {self.factor:.6g} times what it should be, with a standard error of "
            f"{self.standard_error:.1g}, over {self.tensors} tensors"
        )


@dataclass(frozen=True)
class _Shown:
    """A tensor that shows a factor: by how much, and where it stands."""

    strength: float
    case: Case
    node: str
    tensor: str


class Evidence:
    """What the networks of one adapter in one dtype tell of factors."""

    def __init__(self, dtype: str) -> None:
        self.scales: dict[Place, Scale] = {}
        self._dtype = dtype
        self._shown: dict[tuple[Place, bool], _Shown] = {}
        self._alone: dict[str, dict[Setting, Case]] = {}
        self._by_setting: dict[Place, dict[Setting, Scale]] = {}

    def add(self, equations: Equations, got: Mapping[Tensor, Any], agreeing: Iterable[Tensor]) -> None:
        """Take in a run. agreeing: the keys of its tensors that agree and can be verified as a whole."""
        for key in agreeing:
            if key in equations and len(equations[key].parts) == 1:
                self._add(equations.case, equations[key], got.get(key))
        network = equations.case.network
        for node in network.nodes:
            kept = self._alone.setdefault(node.layer.name, {})
            if len(kept) < KEPT_SETTINGS and _setting(network, node) not in kept:
                own = equations.alone(node)
                if own is not None:
                    kept[_setting(network, node)] = own

    def _add(self, case: Case, statement: Statement, got: Any) -> None:
        ((equation, argument),) = statement.parts
        if not usable(got, statement.expected.shape):
            return
        errors, roundings = _relative_errors(statement, np.asarray(got, np.float64), self._dtype)
        if not errors.size:
            return
        place = (equation.node.layer.name, argument or "value")
        self.scales.setdefault(place, Scale()).add(errors, roundings)
        if len(case.network.nodes) == 1:
            by_setting = self._by_setting.setdefault(place, {})
            by_setting.setdefault(_setting(case.network, equation.node), Scale()).add(errors, roundings)
        strength = float(errors.sum()) / math.sqrt(errors.size)
        best = self._shown.get((place, strength > 0.0))
        if best is None or abs(strength) > abs(best.strength):
            tensor = statement.key.name
            self._shown[place, strength > 0.0] = _Shown(strength, case, equation.node.name, tensor)

    def look_closer(self, probe: Probe, looking: Callable[[str], None] = lambda layer: None) -> None:
        """Run layers alone on ordinary numbers, until no factor that is looked for can hide.

        looking: told which layer it is.
        """
        for layer in sorted(self._alone):
            cases = list(self._alone[layer].values())
            places = [each for each in self.scales if each[0] == layer and self.scales[each].tensors >= OFTEN]
            looking(layer)
            for seed in range(MOST_RUNS if cases else 0):
                if all(self._settled(place) for place in places):
                    break
                result = probe(redrawn(cases[seed // FEWEST % len(cases)], seed))
                if result is not None:
                    equations, got = result
                    self.add(equations, got, [each.key for each in equations if each.finite and not each.open])

    def _settled(self, place: Place) -> bool:
        scale = self._telling(place)
        if scale.shows_a_factor(self._dtype):
            run = sum(each.tensors >= FEWEST for each in self._by_setting.get(place, {}).values())
            return run >= len(self._alone[place[0]])
        return scale.excludes_one(self._dtype)

    def _telling(self, place: Place) -> Scale:
        """The sums of a place without the settings in which no factor can show."""
        settings = self._by_setting.get(place, {}).values()
        silent = (each for each in settings if each.tensors >= FEWEST and not each.tells)
        return reduce(Scale.less, silent, self.scales[place])

    def _everywhere(self, place: Place) -> bool:
        """Whether the factor is all that is wrong, and the same with different options and shapes."""
        scales = [each for each in self._by_setting.get(place, {}).values() if each.tells]
        if len(scales) < FEWEST_SETTINGS or not self.scales[place].is_all(self._dtype):
            return False
        together = sum(each.errors for each in scales) / sum(each.elements for each in scales)
        return all(each.may_be(together) for each in scales)

    def biases(self, coarse: Collection[str]) -> Iterator[Bias]:
        """The factors that are no chance.

        coarse: layers that seem to round every operation. So they do with constants, as 1 / n or a slope, which makes
        honest factors; what is told of these layers is a factor that does not depend on options and shapes, and beside
        which they round their results alone.
        """
        for place in sorted(self.scales):
            (layer, what), scale = place, self._telling(place)
            if scale.shows_a_factor(self._dtype) and (layer not in coarse or self._everywhere(place)):
                shown = self._shown[place, scale.excess > 0.0]
                yield Bias(
                    layer,
                    what,
                    1.0 + scale.excess,
                    scale.standard_error,
                    scale.tensors,
                    shown.case,
                    shown.node,
                    shown.tensor,
                )


def _setting(network: Network, node: Node) -> Setting:
    return node.options, tuple(network.shapes[source] for _, source in node.sources)


def _relative_errors(statement: Statement, got: Array, dtype: str) -> tuple[Array, Array]:
    """Errors, and half units in the last place, of ordinary numbers of about the right size; as shares of these."""
    info, expected = limits(dtype), statement.expected
    size = np.abs(expected)
    ordinary = (size >= 4.0 * float(info.smallest_normal)) & (size < 0.5 * float(info.max)) & np.isfinite(got)
    with np.errstate(all="ignore"):
        errors = got / expected - 1.0
        ordinary &= np.abs(errors) <= WHOLE * 0.5 * float(info.eps)
    mantissas, _ = np.frexp(size[ordinary])  # from a half to 1
    return np.asarray(errors[ordinary]), 0.25 * float(info.eps) / mantissas
