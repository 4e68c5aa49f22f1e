"""One adapter on one case: run it, compare every tensor, and find the layer that is wrong."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gradproof.adapter import Adapter, supported, told
from gradproof.agreement import TensorCheck, compare
from gradproof.case import Case
from gradproof.divergence import Divergence, explain
from gradproof.network import Network, Node
from gradproof.noise import NoiseSamples, tensors
from gradproof.reference import NumpyReference

Conventions = Mapping[str, Mapping[str, float]]

FAILURES = ("crash", "timeout")
"""Kinds of verdict on a run that gave no tensors at all."""


class Oracle:
    """What is expected of one case: the reference's tensors in float64, and their noise samples."""

    def __init__(self, case: Case, conventions: Conventions) -> None:
        self._reference = NumpyReference(conventions)
        self._case = case
        self._forward = self._reference.forward(case.network, case.exact_values, "float64")

    @cached_property
    def outputs(self) -> Mapping[str, np.ndarray]:
        return self._forward.outputs

    @cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients, in the order in which a backward pass reaches them."""
        found = self._reference.backward(self._forward, self._case.cotangent.astype(np.float64))
        network = self._case.network
        wanted = {*network.differentiable}
        order = [*(node.name for node in reversed(network.nodes)), *found]
        return {name: found[name] for name in dict.fromkeys(order) if name in wanted}

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        return tensors(self.outputs, self.gradients)

    @cached_property
    def samples(self) -> NoiseSamples:
        case = self._case
        cotangent = case.cotangent.astype(np.float64)
        return NoiseSamples(self._reference, case.network, case.exact_values, cotangent, case.dtype)


class Oracles:
    """The oracles of one case, one per set of conventions that matters to its network."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._made: dict[Any, Oracle] = {}

    def under(self, conventions: Conventions) -> Oracle:
        layers = {node.layer.name for node in self.case.network.nodes}
        relevant = {name: weights for name, weights in conventions.items() if name in layers}
        key = tuple((name, *weights.items()) for name, weights in sorted(relevant.items()))
        if key not in self._made:
            self._made[key] = Oracle(self.case, relevant)
        return self._made[key]


@dataclass(frozen=True)
class Subject:
    """An adapter under test, with what is known of it.

    conventions: layer -> kink -> weight of the right-hand derivative that it chooses.
    divergences: its known divergences. timeout: seconds that one case may take.
    """

    adapter: Adapter
    conventions: Conventions
    divergences: tuple[Divergence, ...] = ()
    timeout: float = 60.0

    def supports(self, network: Network, dtype: str) -> bool:
        return all(supported(self.adapter, node.layer, dict(node.options), dtype) for node in network.nodes)


@dataclass(frozen=True)
class Culprit:
    """A node that disagrees even when it alone is run on the reference's inputs and cotangent."""

    node: Node
    checks: tuple[TensorCheck, ...]
    divergence: Divergence | None


@dataclass(frozen=True)
class Examination:
    """What was found for one adapter on one case.

    checks: one per expected tensor, values in forward order, then gradients in backward order.
    culprits: the nodes that are wrong alone; empty, where something disagrees, for a composition fault.
    """

    case: Case
    adapter: str
    checks: tuple[TensorCheck, ...]
    culprits: tuple[Culprit, ...] = ()

    @property
    def wrong(self) -> tuple[TensorCheck, ...]:
        return tuple(check for check in self.checks if check.kind)

    @property
    def agrees(self) -> bool:
        return not self.wrong

    @property
    def known(self) -> bool:
        """Whether known divergences explain everything that disagrees."""
        return bool(self.culprits) and all(culprit.divergence for culprit in self.culprits)


def examine(subject: Subject, oracles: Oracles) -> Examination:
    """Run the adapter on the case, compare, and where something disagrees find the guilty nodes."""
    case = oracles.case
    checks = _run_and_compare(subject, oracles)
    if any(check.kind for check in checks):
        return Examination(case, subject.adapter.name, checks, tuple(_culprits(subject, oracles)))
    return Examination(case, subject.adapter.name, checks)


def _run_and_compare(subject: Subject, oracles: Oracles) -> tuple[TensorCheck, ...]:
    case = oracles.case
    oracle = oracles.under(subject.conventions)
    values = {name: value.copy() for name, value in case.values.items()}
    cotangent = case.cotangent.copy()
    try:
        with time_limit(subject.timeout):
            forward = subject.adapter.forward(case.network, values, case.dtype)
            gradients = subject.adapter.backward(forward, cotangent)
            got = tensors(forward.outputs, gradients)
    except TimeLimitError:
        return (_failure("timeout", case, f"no result after {subject.timeout:g} s"),)
    except (Exception, SystemExit) as error:  # whatever an adapter raises is a verdict on it, not the end of the run
        return (_failure("crash", case, told(error)),)
    checks = compare(oracle.expected, got, oracle.samples, case.dtype)
    given = {**values, "cotangent": cotangent}
    before = {**case.values, "cotangent": case.cotangent}
    written = [name for name, value in given.items() if not np.array_equal(value, before[name], equal_nan=True)]
    mutated = [TensorCheck(f"value:{name}", before[name].shape, "mutated_input", float("inf")) for name in written]
    return (*checks, *mutated)


def _failure(kind: str, case: Case, message: str) -> TensorCheck:
    output = case.network.output
    return TensorCheck(f"value:{output}", case.network.shapes[output], kind, float("inf"), got=message)


def _culprits(subject: Subject, oracles: Oracles) -> Iterator[Culprit]:
    for node in oracles.case.network.nodes:
        alone = one_node_case(oracles, node, subject.conventions)
        checks = _run_and_compare(subject, Oracles(alone))
        if any(check.kind for check in checks):
            yield Culprit(node, checks, explain(subject.divergences, alone, checks))


def one_node_case(oracles: Oracles, node: Node, conventions: Conventions) -> Case:
    """The case of one node alone, on the reference's inputs and cotangent rounded to the dtype."""
    case, oracle = oracles.case, oracles.under(conventions)
    network, stands_for = case.network.alone(node.name)

    def rounded(array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.asarray(array).astype(case.dtype)

    known = {**{name: rounded(array) for name, array in oracle.outputs.items()}, **case.values}
    values = {own: known[name] for own, name in stands_for.items()}
    return Case(network, case.dtype, values, rounded(oracle.gradients[node.name]), case.seed)


class TimeLimitError(Exception):
    """An adapter took longer than it may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError in the block after that many seconds (on the main thread of a Unix process)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def give_up(signal_number: int, frame: Any) -> None:
        raise TimeLimitError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Row:
    """One line of the per-layer diff: a tensor, the node it belongs to, and the verdict on it.

    verdict: "agrees", "WRONG HERE", "inherited", "known divergence", or "composition".
    """

    node: str
    layer: str
    check: TensorCheck
    verdict: str
    divergence: Divergence | None = None

    @property
    def culprit(self) -> bool:
        return self.verdict in ("WRONG HERE", "composition", "known divergence")


def rows(examination: Examination) -> tuple[Row, ...]:
    """Every tensor from the loss back to the inputs, each with the node that made it.

    A culprit whose own tensors agree in the network (it spoils another's) is shown with what it does alone.
    """
    network = examination.case.network
    guilty = {culprit.node.name: culprit for culprit in examination.culprits}
    owned = [(_owner(check, network, guilty), check) for check in _backward_order(examination.checks, network)]
    shown = {name for name, check in owned if check.kind}
    hidden = [
        (c.node.name, check) for c in guilty.values() if c.node.name not in shown for check in c.checks if check.kind
    ]
    composition = next((check for _, check in owned if check.kind), None) if not guilty else None
    return tuple(_row(network, name, check, guilty, composition) for name, check in hidden + owned)


def _row(
    network: Network, name: str, check: TensorCheck, guilty: Mapping[str, Culprit], composition: TensorCheck | None
) -> Row:
    divergence = guilty[name].divergence if name in guilty and check.kind else None
    if not check.kind:
        verdict = "agrees"
    elif divergence:
        verdict = "known divergence"
    elif name in guilty:
        verdict = "WRONG HERE"
    else:
        verdict = "composition" if check is composition else "inherited"
    return Row(name, network.node(name).layer.name, check, verdict, divergence)


def _owner(check: TensorCheck, network: Network, guilty: Mapping[str, Culprit]) -> str:
    """The node that computed the tensor: a value's own node; for a gradient, a node that reads the tensor."""
    nodes = {node.name for node in network.nodes}
    if check.kind in FAILURES:
        return next(iter(guilty), network.output)
    readers = [name for name, _ in network.consumers.get(check.tensor, ())]
    if (check.role == "value" and check.tensor in nodes) or not readers:
        return check.tensor if check.tensor in nodes else network.output
    return next((name for name in readers if name in guilty), readers[0])


def _backward_order(checks: Sequence[TensorCheck], network: Network) -> list[TensorCheck]:
    """Wrong values first, in forward order, for all gradients follow from them; then gradients, from the loss back."""
    values = [check for check in checks if check.role == "value"]
    gradients = [check for check in checks if check.role == "gradient"]
    position = {node.name: i for i, node in enumerate(reversed(network.nodes))}
    last_reader = {
        name: max((position[reader] for reader, _ in readers), default=-1)
        for name, readers in network.consumers.items()
    }
    return values + sorted(gradients, key=lambda check: last_reader.get(check.tensor, len(position)))
