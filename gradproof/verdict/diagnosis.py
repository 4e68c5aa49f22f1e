"""Which known mistake reproduces the wrong numbers?

Every hypothesis about a culprit is recomputed with the reference; those that give what the adapter gave, to within the
noise of that very computation, are stated. Where none does, nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, combinations
from typing import Any, NamedTuple

import numpy as np

from gradproof.model.case import Case, redrawn
from gradproof.model.dtypes import limits
from gradproof.model.tensors import Tensor, Wrong, gradient_of
from gradproof.reference import NumpyReference
from gradproof.reference.walk import Conventions
from gradproof.verdict.agreement import THRESHOLD, Evidence, TensorCheck, judge
from gradproof.verdict.equations import EVERY, Equation, Floor, Statement
from gradproof.verdict.hypotheses import HYPOTHESES
from gradproof.verdict.hypotheses.precision import rounded_to
from gradproof.verdict.hypotheses.suspect import Guess, Hypothesis, LowerPrecision, Suspect

EXPLAINED = 1e-3
"""The share of the error that a hypothesis may leave: an ill-conditioned tensor would agree with many."""

NUMERIC = (Wrong.VALUE, Wrong.GRADIENT, Wrong.SHAPE)
"""Kinds of disagreement between numbers; the other kinds say what is wrong themselves."""

MOST_STATED = 3
"""Mistakes that are stated of the same tensors at most."""

SEVERAL = 4
"""Different wrong numbers that a mistake must account for where it does not show on other numbers."""

FEW_PATHS = 5
"""Paths that meet at a tensor, up to which every choice of them is tried."""


@dataclass(frozen=True, eq=False)
class Observation:
    """What an adapter gave on a case: the tensors, and the checks of them.

    conventions: those of the reference that it was compared with. again: the same adapter on another case.
    """

    case: Case
    conventions: Conventions
    got: Mapping[Tensor, Any]
    checks: tuple[TensorCheck, ...]
    again: Callable[[Case], Observation]

    @cached_property
    def wrong(self) -> dict[Tensor, TensorCheck]:
        """Key -> check of every tensor whose numbers are wrong."""
        return {
            check.key: check
            for check in self.checks
            if check.kind in NUMERIC and isinstance(self.got.get(check.key), (np.ndarray, np.generic))
        }

    def agrees(self, key: Tensor) -> bool:
        return any(check.key == key and not check.kind for check in self.checks)


@dataclass(frozen=True)
class Finding:
    """A mistake that gives what the adapter gave.

    name: of the hypothesis. text: what the tensors equal, and what to check. tensors: the arguments it explains, all
    that are wrong where there are none.
    """

    name: str
    text: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """The mistakes that explain a culprit: each of them everything, or each its own tensors."""

    findings: tuple[Finding, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.findings)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(finding.name for finding in self.findings)

    def __str__(self) -> str:
        alternatives: dict[tuple[str, ...], list[str]] = {}
        for finding in self.findings:
            alternatives.setdefault(finding.tensors, []).append(finding.text)
        return "; ".join(
            ", ".join(tensors) + ": " * bool(tensors) + ", or ".join(texts) for tensors, texts in alternatives.items()
        )


class Fit(NamedTuple):
    """A guess that gives what the adapter gave: the hypothesis' name, the guess's detail, and the tensor's key."""

    name: str
    detail: str
    key: Tensor

    @property
    def hypothesis(self) -> Hypothesis:
        return HYPOTHESES[self.name]

    @property
    def text(self) -> str:
        return self.hypothesis.advice.format(self.detail)


def diagnose(alone: Observation, around: Mapping[str, np.ndarray] | None = None) -> Diagnosis:
    """The mistakes of the one node of this case.

    Few numbers, or such as lie on kinks, fit many a mistake: one that is stated shows in the same way in other numbers.
    Where it cannot, it accounts for several different numbers here, or is of a kind that only shows at kinks.
    around: the larger arrays of the network, of which the cotangent may be a slice in memory.
    """
    here = _fits(Suspect(alone.case, alone.conventions, around or {}, alone.got), alone, list(alone.wrong))
    asked = [fit for fit in here if not fit.hypothesis.in_place]
    there = _fits_again(alone.again(redrawn(alone.case)), asked) if asked else {}
    said: dict[Tensor, list[Fit]] = {key: [] for key in alone.wrong}
    for fit in here:
        if _confirmed(fit, here, there):
            said[fit.key].append(fit)
    numbers_alone = {check.kind for check in alone.checks} <= {None, *NUMERIC}
    return Diagnosis((numbers_alone and _together(said)) or tuple(_apart(alone, said)))


def _fits_again(again: Observation, asked: Collection[Fit]) -> dict[Fit, int]:
    keys = list(dict.fromkeys(fit.key for fit in asked))
    return _fits(Suspect(again.case, again.conventions, got=again.got), again, keys, asked)


def _confirmed(fit: Fit, here: Mapping[Fit, int], there: Mapping[Fit, int]) -> bool:
    """Whether enough speaks for a guess that fits here: the numbers here, and those on other numbers."""
    if not fit.hypothesis.in_place and fit not in there:
        return False
    shown = there.get(fit, 0) > 0
    numbers = sum(count for each, count in here.items() if (each.name, each.detail) == (fit.name, fit.detail))
    return shown or fit.hypothesis.at_kinks or numbers >= SEVERAL


def diagnose_in_place(alone: Observation, around: Mapping[str, np.ndarray] | None = None) -> Diagnosis:
    """The mistakes of the one node of this case that show in its network alone: in memory, not in numbers."""
    found = diagnose(alone, around).findings
    return Diagnosis(tuple(each for each in found if HYPOTHESES[each.name].in_place))


def _fits(
    suspect: Suspect, of: Observation, keys: Sequence[Tensor], asked: Collection[Fit] | None = None
) -> dict[Fit, int]:
    """Every guess that gives what the adapter gave for one of these tensors -> how many wrong numbers it accounts for.

    asked: the guesses that are tried, None for all.
    """
    found: dict[Fit, int] = {}
    names = HYPOTHESES if asked is None else dict.fromkeys(fit.name for fit in asked)
    with np.errstate(all="ignore"):
        for hypothesis in (HYPOTHESES[name] for name in names):
            for guess in hypothesis.guesses(suspect):
                fits = {key: Fit(hypothesis.name, guess.detail, key) for key in keys}
                left = [key for key, fit in fits.items() if fit not in found and (asked is None or fit in asked)]
                found |= {fits[key]: _different_numbers(of, key) for key in _reproduced(suspect, of, left, guess)}
    return found


def _different_numbers(of: Observation, key: Tensor) -> int:
    """How many elements of the tensor are wrong, each in its own way."""
    if key not in of.wrong:
        return 0
    evidence = of.wrong[key].evidence
    return int(np.unique(of.got[key] if evidence is None else evidence.error[evidence.wrong]).size)


def _reproduced(
    suspect: Suspect, of: Observation, keys: Sequence[Tensor], guess: Guess | LowerPrecision
) -> list[Tensor]:
    """Those of the tensors that are as the guess would have them."""
    if not keys:
        return []
    return _rounded(of, keys, guess) if isinstance(guess, LowerPrecision) else _given(suspect, of, keys, guess)


def _together(said: Mapping[Tensor, Sequence[Fit]]) -> tuple[Finding, ...]:
    """The mistakes that explain every wrong tensor."""
    if not said:
        return ()
    first, *others = ({(fit.name, fit.detail): fit for fit in fits} for fits in said.values())
    common = [fit for saying, fit in first.items() if all(saying in each for each in others)]
    return tuple(Finding(fit.name, fit.text) for fit in _specific(common))


def _apart(alone: Observation, said: Mapping[Tensor, Sequence[Fit]]) -> Iterator[Finding]:
    """The mistakes that explain each tensor; tensors of which the same is said go together."""
    arguments = {gradient_of(source): argument for argument, source in alone.case.network.nodes[0].sources}
    tensors_of: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for key, fits in said.items():
        findings = tuple((fit.name, fit.text) for fit in _specific(fits))
        tensors_of.setdefault(findings, []).append(arguments.get(key, "the output"))
    for findings, names in tensors_of.items():
        for name, text in findings:
            yield Finding(name, text, tuple(names))


def _specific(fits: Sequence[Fit]) -> list[Fit]:
    """One for each hypothesis, without those that another one covers."""
    covered = {name for fit in fits for name in fit.hypothesis.covers}
    firsts = {fit.name: fit for fit in reversed(fits) if fit.name not in covered}
    return [firsts[name] for name in HYPOTHESES if name in firsts][:MOST_STATED]


def _rounded(alone: Observation, keys: Iterable[Tensor], guess: LowerPrecision) -> list[Tensor]:
    """The tensors whose numbers are all of a lower precision, and off by no more than it explains."""
    bits = int(limits(alone.case.dtype).nmant) + 1
    allowed = THRESHOLD * 2.0 ** (bits - guess.bits)

    def rounded(key: Tensor) -> bool:
        if key not in alone.wrong:
            return alone.agrees(key)
        got, check = np.asarray(alone.got[key]), alone.wrong[key]
        within = check.evidence is not None and THRESHOLD < check.noise_units <= allowed
        return within and bool(got.any()) and np.array_equal(rounded_to(got, guess.bits), got)

    return [key for key in keys if guess.bits < bits and rounded(key)]


def _given(suspect: Suspect, alone: Observation, keys: Sequence[Tensor], guess: Guess) -> list[Tensor]:
    """The tensors that are as the guess would have them, to within the noise of what it computes."""
    try:
        predicted = suspect.predicted(guess)
        asked = [key for key in (predicted if guess.whole else keys) if key in predicted]
        near = [key for key in asked if _near(predicted[key], key, alone)]
        equation = _equation(suspect, guess) if near else None
        fits = [key for key in near if equation and _agrees(key, predicted[key], alone, equation)]
        return [] if guess.whole and fits != asked else [key for key in fits if key in keys]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return []  # a formula that cannot be put to this layer or to these shapes explains nothing


def _near(predicted: np.ndarray, key: Tensor, of: Observation) -> bool:
    """Whether the prediction is far nearer than the truth to what the adapter gave, where that is wrong."""
    if key not in of.wrong:
        return of.agrees(key)
    got, evidence = np.asarray(of.got[key]), of.wrong[key].evidence
    if predicted.shape != got.shape or not got.size:
        return False
    if evidence is None:  # another shape than that of the truth, to which nothing of this shape is near
        return True
    return _explains(predicted, got, evidence)


def _explains(predicted: np.ndarray, got: np.ndarray, evidence: Evidence) -> bool:
    """Whether the prediction leaves at most a thousandth of the error, or what rounding to the dtype leaves."""
    verified = np.isfinite(evidence.error)
    if not verified.any():
        return False
    left = np.abs(np.asarray(got, np.float64) - predicted)[verified].max()
    share = max(EXPLAINED, 2.0 * float(limits(got.dtype).eps))
    return bool(left <= share * evidence.error[verified].max() > 0.0)


def _equation(suspect: Suspect, guess: Guess) -> Equation:
    """The node as the guess would have it, whose arithmetic rounds."""
    layer, sources = suspect.node.layer, dict(suspect.node.sources)
    row = (guess.forward or layer.forward, guess.backward or layer.backward)
    given = {sources[argument]: array for argument, array in (guess.arrays or suspect.arrays).items()}
    reference = NumpyReference(suspect.conventions, {layer.name: row})
    equation = Equation(suspect.node, 0, given, reference, reference, suspect.case.dtype)
    equation.pull_back(suspect.dout if guess.dout is None else guess.dout)
    return equation


@dataclass(frozen=True, eq=False)
class Roughly(Statement):
    """A statement whose elements may all be off by as much as rounding moves the one that it moves most.

    A mistake may lose digits that the right formula keeps; whether it is this one does not hang on them.
    """

    def floor(self, count: int, *computed: Any) -> Floor:
        found = super().floor(count, *computed)
        return Floor(np.full(found.spread.shape, found.spread.max(initial=0.0)), found.lost)


def _agrees(key: Tensor, predicted: np.ndarray, of: Observation, equation: Equation) -> bool:
    """Whether what the adapter gave is the prediction, to within rounding every operation of its computation."""
    arguments = {gradient_of(source): argument for argument, source in equation.node.sources}
    if key == gradient_of(equation.node.name):
        return np.array_equal(of.got[key], predicted.astype(of.case.dtype))
    statement = Roughly(key, predicted, np.abs(predicted), ((equation, arguments.get(key)),))
    got = np.asarray(of.got[key]).astype(of.case.dtype)
    return not judge(statement, got, of.case.dtype, {equation.node.name: EVERY}).kind


# What no layer is to blame for.


PATHS = (
    ("path missing", 0.0, "equals the sum without the part from {}: check that gradients are added up, not assigned"),
    ("path doubled", 2.0, "equals the sum with the part from {} counted twice: check that each path is added once"),
)
"""Name, how often a path counts, and the advice."""


def diagnose_sum(statement: Statement, got: np.ndarray, check: TensorCheck) -> Diagnosis:
    """The mistakes in adding up the terms of a sum whose every term is right."""
    if len(statement.parts) < 2 or check.evidence is None:
        return Diagnosis()
    with np.errstate(all="ignore"):
        found = (_sum_finding(statement, got, check.evidence, *path) for path in PATHS)
        return Diagnosis(tuple(finding for finding in found if finding))


def _sum_finding(
    statement: Statement, got: np.ndarray, evidence: Evidence, name: str, times: float, advice: str
) -> Finding | None:
    for chosen in _choices(len(statement.parts)):
        predicted = statement.expected
        for place in chosen:
            equation, argument = statement.parts[place]
            predicted = predicted + (times - 1.0) * equation.terms[str(argument)]
        if (
            _explains(predicted, got, evidence)
            and not judge(replace(statement, expected=predicted), got, str(got.dtype)).kind
        ):
            parts = (statement.parts[place] for place in chosen)
            return Finding(name, advice.format(" and ".join(f"{e.node.name} ({argument})" for e, argument in parts)))
    return None


def _choices(count: int) -> Iterable[tuple[int, ...]]:
    """Some of the terms, but not all: one, or more where they are few, or all but one."""
    sizes = range(1, count) if count <= FEW_PATHS else (1, count - 1)
    return chain.from_iterable(combinations(range(count), size) for size in sizes)
