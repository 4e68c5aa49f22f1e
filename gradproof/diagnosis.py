"""Which known mistake reproduces the wrong numbers?

Every hypothesis about a culprit is recomputed with the reference; those that give what the adapter gave, to within the
noise of that very computation, are stated. Where none does, nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from typing import Any

import numpy as np

from gradproof.agreement import THRESHOLD, TensorCheck, compare
from gradproof.case import Case
from gradproof.dtypes import limits
from gradproof.hypotheses import HYPOTHESES
from gradproof.hypotheses.precision import rounded_to
from gradproof.hypotheses.suspect import Coarse, Guess, Hypothesis, Suspect
from gradproof.network import Node
from gradproof.noise import NoiseSamples, tensors
from gradproof.reference import NumpyReference
from gradproof.reference.walk import Conventions
from gradproof.reference.walk import Row as Pair

EXPLAINED = 1e-3
"""The share of the error that a hypothesis may leave: an ill-conditioned tensor would agree with many."""

NUMERIC = ("value", "gradient", "shape")
"""Kinds of disagreement between numbers; the other kinds say what is wrong themselves."""

MOST_STATED = 3
"""Mistakes that are stated of one culprit at most."""

FEW_PATHS = 5
"""Paths that meet at a tensor, up to which every choice of them is tried."""


@dataclass(frozen=True, eq=False)
class Observation:
    """What an adapter gave on a case: the tensors, and the checks of them.

    conventions: those of the reference that it was compared with. again: the same adapter on another case.
    """

    case: Case
    conventions: Conventions
    got: Mapping[str, Any]
    checks: tuple[TensorCheck, ...]
    again: Callable[[Case], Observation]

    @cached_property
    def wrong(self) -> dict[str, TensorCheck]:
        """Key -> check of every tensor whose numbers are wrong."""
        return {
            check.key: check
            for check in self.checks
            if check.kind in NUMERIC and isinstance(self.got.get(check.key), (np.ndarray, np.generic))
        }

    def agrees(self, key: str) -> bool:
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

    def __str__(self) -> str:
        return f"{', '.join(self.tensors)}: {self.text}" if self.tensors else self.text


@dataclass(frozen=True)
class Diagnosis:
    """The mistakes that explain a culprit: one of them where they explain everything, else each its own tensors."""

    findings: tuple[Finding, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.findings)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(finding.name for finding in self.findings)

    def __str__(self) -> str:
        alternatives = not any(finding.tensors for finding in self.findings)
        return (", or " if alternatives else "; ").join(map(str, self.findings))


def diagnose(alone: Observation) -> Diagnosis:
    """The mistakes of the one node of this case.

    Few numbers, or such as lie on kinks, fit many a mistake: one that is stated also gives what the adapter gives for
    other numbers, be that right or wrong.
    """
    keys = list(alone.wrong)
    explained = _explanations(alone, keys, HYPOTHESES)
    candidates = list(dict.fromkeys(name for texts in explained.values() for name in texts))
    if candidates:
        anew = _explanations(alone.again(redrawn(alone.case)), keys, candidates)
        explained = {key: {n: text for n, text in texts.items() if n in anew[key]} for key, texts in explained.items()}
    return Diagnosis(_together(explained) or tuple(_apart(alone, explained)))


def redrawn(case: Case) -> Case:
    """The same network with ordinary numbers; integers, and signs, stay as they are."""
    generator = np.random.default_rng(0)
    draw: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
        "real": generator.standard_normal,
        "unit": lambda shape: generator.uniform(size=shape),
        "positive": lambda shape: generator.uniform(0.5, 2.0, shape),
    }
    values = {
        name: draw[kind](value.shape).astype(case.dtype) if (kind := case.network.domain(name).kind) in draw else value
        for name, value in case.values.items()
    }
    return Case(case.network, case.dtype, values, draw["real"](case.cotangent.shape).astype(case.dtype))


def _explanations(alone: Observation, keys: Iterable[str], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Key of each of the tensors -> name -> text of every hypothesis that gives what the adapter gave for it."""
    suspect = Suspect(alone.case, alone.conventions)
    explained: dict[str, dict[str, str]] = {key: {} for key in keys}
    with np.errstate(all="ignore"):
        for hypothesis in (HYPOTHESES[name] for name in names):
            for key, detail in _explained(suspect, alone, list(explained), hypothesis).items():
                explained[key][hypothesis.name] = hypothesis.advice.format(detail)
    return explained


def _together(explained: Mapping[str, Mapping[str, str]]) -> tuple[Finding, ...]:
    """The hypotheses that explain every wrong tensor, without those that another one covers."""
    if not explained:
        return ()
    first, *others = explained.values()
    common = [name for name in first if all(name in each for each in others)]
    covered = {each for name in common for each in HYPOTHESES[name].covers}
    return tuple(Finding(name, first[name]) for name in common if name not in covered)[:MOST_STATED]


def _apart(alone: Observation, explained: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """For each wrong tensor the first hypothesis that explains it; tensors of which the same is said go together."""
    arguments = {f"gradient:{source}": argument for argument, source in alone.case.network.nodes[0].sources}
    found: dict[tuple[str, str], list[str]] = {}
    for key, texts in explained.items():
        for said in list(texts.items())[:1]:
            found.setdefault(said, []).append(arguments.get(key, "the output"))
    for (name, text), names in found.items():
        yield Finding(name, text, tuple(names))


def _explained(suspect: Suspect, alone: Observation, keys: Collection[str], hypothesis: Hypothesis) -> dict[str, str]:
    """Key of every one of the tensors that the hypothesis explains -> the detail of the guess that does."""
    found: dict[str, str] = {}
    for guess in hypothesis.guesses(suspect):
        left = [key for key in keys if key not in found]
        if not left:
            break
        explained = _rounded(alone, left, guess) if isinstance(guess, Coarse) else _given(suspect, alone, left, guess)
        found |= dict.fromkeys(explained, guess.detail)
    return found


def _rounded(alone: Observation, keys: Iterable[str], guess: Coarse) -> list[str]:
    """The tensors whose numbers are all of a lower precision, and off by no more than it explains."""
    bits = int(limits(alone.case.dtype).nmant) + 1
    allowed = THRESHOLD * 2.0 ** (bits - guess.bits)

    def rounded(key: str) -> bool:
        if key not in alone.wrong:
            return alone.agrees(key)
        got, check = np.asarray(alone.got[key]), alone.wrong[key]
        within = check.evidence is not None and not check.ill_conditioned and THRESHOLD < check.noise_units <= allowed
        return within and bool(got.any()) and np.array_equal(rounded_to(got, guess.bits), got)

    return [key for key in keys if guess.bits < bits and rounded(key)]


def _given(suspect: Suspect, alone: Observation, keys: Iterable[str], guess: Guess) -> list[str]:
    """The tensors that are as the guess would have them, to within the noise of what it computes."""
    try:
        predicted = suspect.predicted(guess)
        near = [key for key in keys if key in predicted and _near(predicted[key], key, alone)]
        samples = _samples(suspect, guess)
        return [key for key in near if _agrees(key, predicted[key], alone, samples)]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return []  # a formula that cannot be put to this layer or to these shapes explains nothing


def _near(predicted: np.ndarray, key: str, of: Observation) -> bool:
    """Whether the prediction is far nearer than the truth to what the adapter gave, where that is wrong."""
    if key not in of.wrong:
        return of.agrees(key)
    got, evidence = np.asarray(of.got[key]), of.wrong[key].evidence
    if predicted.shape != got.shape or not got.size:
        return False
    if evidence is None:  # another shape than that of the truth, to which nothing of this shape is near
        return True
    verified = np.isfinite(evidence.error)
    if not verified.any():
        return False
    left = np.abs(got - predicted)[verified].max()
    return bool(left <= EXPLAINED * evidence.error[verified].max() > 0.0)


def _samples(suspect: Suspect, guess: Guess) -> NoiseSamples:
    layer, sources = suspect.node.layer, dict(suspect.node.sources)
    row = (guess.forward or layer.forward, guess.backward or layer.backward)
    given = {sources[argument]: array for argument, array in (guess.arrays or suspect.arrays).items()}
    dout = suspect.dout if guess.dout is None else guess.dout
    reference = NumpyReference(suspect.conventions, {layer.name: row})
    return NoiseSamples(reference, suspect.case.network, given, dout, suspect.case.dtype)


def _agrees(key: str, predicted: np.ndarray, of: Observation, samples: NoiseSamples) -> bool:
    (check,) = compare({key: predicted}, {key: of.got[key]}, samples, of.case.dtype)
    return not check.kind and not check.ill_conditioned


# What no layer is to blame for.


class _Weighing(NumpyReference):
    """The reference, in which what one reader of a tensor sends back counts so many times.

    weights: (node, argument) -> how often.
    """

    def __init__(self, conventions: Conventions, weights: Mapping[tuple[str, str], float]) -> None:
        super().__init__(conventions)
        self._weights = weights

    def row(self, node: Node) -> Pair:
        forward, backward = super().row(node)
        weights = {argument: weight for (name, argument), weight in self._weights.items() if name == node.name}

        def weighed(dout: np.ndarray, cache: Any) -> dict[str, np.ndarray]:
            return {name: each * weights.get(name, 1.0) for name, each in backward(dout, cache).items()}

        return forward, weighed


PATHS = (
    ("path missing", 0.0, "equals the sum without the part from {}: check that gradients are added up, not assigned"),
    ("path doubled", 2.0, "equals the sum with the part from {} counted twice: check that each path is added once"),
)
"""Name, how often a path counts, and the advice."""


def diagnose_sum(network: Observation, key: str) -> Diagnosis:
    """The mistakes in adding up what the readers of this tensor send back, where the layers are right alone."""
    readers = network.case.network.consumers.get(key.partition(":")[2], ())
    if key not in network.wrong or len(readers) < 2:
        return Diagnosis()
    with np.errstate(all="ignore"):
        found = (_sum_finding(network, key, readers, *path) for path in PATHS)
        return Diagnosis(tuple(finding for finding in found if finding))


def _sum_finding(
    network: Observation, key: str, readers: Sequence[tuple[str, str]], name: str, times: float, advice: str
) -> Finding | None:
    for chosen in _choices(readers):
        reference = _Weighing(network.conventions, dict.fromkeys(chosen, times))
        if _sum_agrees(reference, network, key):
            return Finding(name, advice.format(" and ".join(f"{node} ({argument})" for node, argument in chosen)))
    return None


def _choices(readers: Sequence[tuple[str, str]]) -> Iterable[tuple[tuple[str, str], ...]]:
    """Some of the readers, but not all: one, or more where they are few, or all but one."""
    every = range(1, len(readers)) if len(readers) <= FEW_PATHS else (1, len(readers) - 1)
    return chain.from_iterable(combinations(readers, count) for count in every)


def _sum_agrees(reference: NumpyReference, network: Observation, key: str) -> bool:
    case, cotangent = network.case, network.case.cotangent.astype(np.float64)
    forward = reference.forward(case.network, case.exact_values, "float64")
    predicted = tensors(forward.outputs, reference.backward(forward, cotangent))[key]
    samples = NoiseSamples(reference, case.network, case.exact_values, cotangent, case.dtype)
    return _near(predicted, key, network) and _agrees(key, predicted, network, samples)
