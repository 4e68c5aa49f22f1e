"""One adapter on one case: run it, compare every tensor, and find the layer that is wrong."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from gradproof.adapter import Adapter, EndedError, Forward, supported, told
from gradproof.agreement import Evidence, TensorCheck, compare
from gradproof.case import Case
from gradproof.diagnosis import Diagnosis, Observation, diagnose, diagnose_sum
from gradproof.divergence import Divergence, explain
from gradproof.dtypes import is_floating
from gradproof.network import Input, Network, Node
from gradproof.noise import NoiseSamples, tensors
from gradproof.reference import LAYERS, PRECISE, NumpyReference
from gradproof.reference.walk import Row as Pair
from gradproof.watch import Remark, watch

Conventions = Mapping[str, Mapping[str, float]]

FAILURES = ("crash", "timeout", "memory")
"""Kinds of verdict on a run that gave no tensors at all."""

SECOND_PASS = "a second backward pass on the same tape"

OF_THE_RUN = (*FAILURES, "global_state")
"""Kinds of verdict on a run as a whole, not on a tensor."""


class Oracle:
    """What is expected of one case: the precise tensors in float64, and noise samples of the textbook formulas."""

    def __init__(self, case: Case, conventions: Conventions) -> None:
        self._reference = NumpyReference(conventions, PRECISE)
        self._textbook = NumpyReference(conventions)
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
        return NoiseSamples(self._textbook, case.network, case.exact_values, cotangent, case.dtype)


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
    """A node that disagrees even when it alone is run on the reference's inputs and cotangent.

    alone: what the adapter gave for it, None where that is not known.
    """

    node: Node
    checks: tuple[TensorCheck, ...]
    divergence: Divergence | None
    alone: Observation | None = field(default=None, repr=False, compare=False)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """Which known mistakes reproduce its numbers; found when it is asked for."""
        return diagnose(self.alone) if self.alone and not self.divergence else Diagnosis()


@dataclass(frozen=True)
class Examination:
    """What was found for one adapter on one case.

    checks: one per expected tensor, values in forward order, then gradients in backward order.
    culprits: the nodes that are wrong alone; empty, where something disagrees, for a composition fault.
    unexplained: keys of tensors that disagree even with what the adapter's layers, run one by one, give together.
    observation: what the adapter gave, where something disagrees.
    """

    case: Case
    adapter: str
    checks: tuple[TensorCheck, ...]
    culprits: tuple[Culprit, ...] = ()
    unexplained: frozenset[str] = frozenset()
    observation: Observation | None = field(default=None, repr=False, compare=False)

    @property
    def wrong(self) -> tuple[TensorCheck, ...]:
        return tuple(check for check in self.checks if check.kind)

    @property
    def agrees(self) -> bool:
        return not self.wrong

    @property
    def known(self) -> bool:
        """Whether known divergences explain everything that disagrees."""
        return bool(self.culprits) and all(c.divergence for c in self.culprits) and not self.unexplained

    @cached_property
    def composition(self) -> TensorCheck | None:
        """The first wrong tensor on the way back that no culprit explains."""
        unblamed = (c for c in _backward_order(self.checks, self.case.network) if c.kind)
        return next((c for c in unblamed if not self.culprits or c.key in self.unexplained), None)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """Which known mistakes in adding up reproduce the first tensor that no culprit explains."""
        if self.composition is None or self.observation is None:
            return Diagnosis()
        return diagnose_sum(self.observation, self.composition.key)


def examine(subject: Subject, oracles: Oracles) -> Examination:
    """Run the adapter on the case, compare, and where something disagrees find the guilty nodes."""
    observation = observe(subject, oracles)
    got, checks = observation.got, observation.checks
    found = Examination(oracles.case, subject.adapter.name, checks)
    if found.agrees:
        return found
    found = replace(found, culprits=tuple(_culprits(subject, oracles)), observation=observation)
    if any(culprit.divergence is None for culprit in found.culprits):
        return found
    unexplained = _unexplained(subject, oracles, found, got)
    if not found.culprits and not unexplained:
        return replace(found, checks=tuple(_accumulated(check) for check in checks))
    return replace(found, unexplained=unexplained)


def observe(subject: Subject, oracles: Oracles) -> Observation:
    """Run the adapter on the case and compare; the same may be done again on other cases."""
    got, checks = _run_and_compare(subject, oracles)
    return Observation(
        oracles.case, subject.conventions, got, checks, again=lambda case: observe(subject, Oracles(case))
    )


def disagrees(subject: Subject, oracles: Oracles) -> bool:
    """Whether anything disagrees, without asking who is to blame."""
    return any(check.kind for check in _run_and_compare(subject, oracles)[1])


def _run_and_compare(subject: Subject, oracles: Oracles) -> tuple[dict[str, Any], tuple[TensorCheck, ...]]:
    """What the adapter gave, and the checks of it."""
    case, oracle = oracles.case, oracles.under(subject.conventions)
    values = {name: value.copy() for name, value in case.values.items()}
    cotangent = case.cotangent.copy()
    try:
        with time_limit(subject.timeout):
            forward, got, remarks = _results(subject.adapter, case, values, cotangent)
    except TimeLimitError:
        return {}, (_failure("timeout", case, f"no result after {subject.timeout:g} s"),)
    except MemoryError as error:
        return {}, (_failure("memory", case, told(error)),)
    except (Exception, SystemExit) as error:  # whatever an adapter raises is a verdict on it, not the end of the run
        return {}, (_failure("crash", case, told(error)),)
    checks = compare(oracle.expected, got, oracle.samples, case.dtype)
    written = tuple(_written_to(case, values, cotangent))
    if not written and any(check.evidence for check in checks):
        checks = _steady_or_not(subject, case, checks, got)
    elif not written and not remarks and not any(check.kind for check in checks):
        checks = _once_more(subject, oracles, forward, got, checks)
    return got, (*_remarked(checks, remarks), *written)


def _results(
    adapter: Adapter, case: Case, values: Mapping[str, np.ndarray], cotangent: np.ndarray
) -> tuple[Forward, dict[str, Any], tuple[Remark, ...]]:
    """What the adapter leaves behind and gives, and what is to be said of how it came by it."""
    watched = watch(adapter)
    forward = watched.forward(case.network, values, case.dtype)
    got = tensors(forward.outputs, watched.backward(forward, cotangent))
    return forward, got, tuple(watched.remarks)


def _once_more(
    subject: Subject, oracles: Oracles, forward: Forward, got: Mapping[str, Any], checks: tuple[TensorCheck, ...]
) -> tuple[TensorCheck, ...]:
    """The checks, of kind "nondeterministic" where a second backward pass on the same tape is wrong.

    It may differ by rounding from the first, as sums in another order do, or be refused.
    """
    case, oracle = oracles.case, oracles.under(subject.conventions)
    # A tape that adds up may do so in the very arrays that it gave out.
    first = {key: np.copy(array) for key, array in got.items() if key.startswith("gradient:")}
    try:
        with time_limit(subject.timeout):
            second = tensors({}, subject.adapter.backward(forward, case.cotangent.copy()))
    except TimeLimitError:
        return (_failure("timeout", case, f"{SECOND_PASS} gave no result after {subject.timeout:g} s", True),)
    except (MemoryError, EndedError) as error:
        kind = "memory" if isinstance(error, MemoryError) else "crash"
        return (_failure(kind, case, f"{SECOND_PASS}: {told(error)}", True),)
    except (Exception, SystemExit):  # a tape that serves once and says so has given nothing wrong
        return checks
    if second.keys() == first.keys() and all(_identical(first[key], second[key]) for key in first):
        return checks
    again = compare(oracle.expected, {**got, **dict.fromkeys(first), **second}, oracle.samples, case.dtype)
    return tuple(
        replace(check, kind="nondeterministic", evidence=None, second_pass=True) if check.kind else check
        for check in again
    )


def _identical(first: np.ndarray, second: Any) -> bool:
    same = isinstance(second, np.ndarray) and (first.shape, first.dtype) == (second.shape, second.dtype)
    return same and np.array_equal(first, second, equal_nan=True)


def _remarked(checks: Sequence[TensorCheck], remarks: Sequence[Remark]) -> Iterator[TensorCheck]:
    """The checks, where they agree of kind "view" if there is such a remark; then one for every changed state."""
    views = {remark.key: remark.message for remark in remarks if remark.kind == "view"}
    for check in checks:
        seen = check.key in views and not check.kind
        yield TensorCheck(check.key, check.shape, "view", float("inf"), got=views[check.key]) if seen else check
    for remark in remarks:
        if remark.kind == "global_state":
            yield TensorCheck(f"value:{remark.key}", (), "global_state", float("inf"), got=remark.message)


def _steady_or_not(
    subject: Subject, case: Case, checks: tuple[TensorCheck, ...], first: Mapping[str, Any]
) -> tuple[TensorCheck, ...]:
    """The checks, of kind "nondeterministic" where a second identical call is wrong in another way."""
    values = {name: value.copy() for name, value in case.values.items()}
    second: Mapping[str, Any] = {}
    # A call that fails this time gives nothing, which is something else, too.
    with suppress(Exception, SystemExit, TimeLimitError), time_limit(subject.timeout):
        _, second, _ = _results(subject.adapter, case, values, case.cotangent.copy())
    return tuple(
        replace(check, kind="nondeterministic", evidence=None)
        if check.evidence and _moved(check.evidence, first[check.key], second.get(check.key))
        else check
        for check in checks
    )


def _moved(evidence: Evidence, first: np.ndarray, second: Any) -> bool:
    """Whether some wrong element moved by more than half its error; an honest sum in another order moves by less."""
    if np.shape(second) != first.shape:
        return True
    with np.errstate(all="ignore"):
        moved = np.abs(np.asarray(second, np.float64) - first.astype(np.float64))
    stays = (first == second) | (np.isnan(first) & np.isnan(second)) | (moved <= 0.5 * evidence.error)
    return bool((evidence.wrong & ~stays).any())


def _written_to(case: Case, values: Mapping[str, np.ndarray], cotangent: np.ndarray) -> Iterator[TensorCheck]:
    """A check for every array that is no longer what the adapter was given."""
    pairs = [(name, case.values[name], value) for name, value in values.items()]
    for name, before, after in (*pairs, ("cotangent", case.cotangent, cotangent)):
        if not np.array_equal(before, after, equal_nan=True):
            yield TensorCheck(f"value:{name}", before.shape, "mutated_input", float("inf"))


def _failure(kind: str, case: Case, message: str, second_pass: bool = False) -> TensorCheck:
    output = case.network.output
    return TensorCheck(
        f"value:{output}", case.network.shapes[output], kind, float("inf"), got=message, second_pass=second_pass
    )


def _accumulated(check: TensorCheck) -> TensorCheck:
    """A check of a tensor whose error is what honest errors of several layers add up to."""
    return replace(check, kind=None, ill_conditioned=check.elements, evidence=None) if check.kind else check


class _Lending(NumpyReference):
    """The reference's sweeps, which leave every node to the adapter: what would be right, were each layer so."""

    def __init__(self, subject: Subject, case: Case) -> None:
        super().__init__(subject.conventions)
        self._adapter = subject.adapter
        self._case = case

    def row(self, node: Node) -> Pair:
        network, _ = self._case.network.alone(node.name)
        sources = network.nodes[0].sources
        dtype = self._case.dtype

        def forward(*inputs: np.ndarray, **keywords: Any) -> tuple[np.ndarray, Any]:
            in_order = iter(inputs)
            arrays = [keywords[argument] if argument in keywords else next(in_order) for argument, _ in sources]
            values = {name: rounded(array, dtype) for (_, name), array in zip(sources, arrays, strict=True)}
            result = self._adapter.forward(network, values, dtype)
            return np.asarray(result.outputs[node.name], np.float64), result

        def backward(dout: np.ndarray, result: Any) -> dict[str, np.ndarray]:
            gradients = self._adapter.backward(result, rounded(dout, dtype))
            return {a: np.asarray(gradients[name], np.float64) for a, name in sources if name in gradients}

        return forward, backward


def _unexplained(subject: Subject, oracles: Oracles, found: Examination, got: Mapping[str, Any]) -> frozenset[str]:
    """Keys of the tensors that disagree even with what the adapter's own layers, one by one, give together."""
    malformed = frozenset(check.key for check in found.wrong if check.evidence is None)
    if malformed:
        return malformed
    case, oracle = oracles.case, oracles.under(subject.conventions)
    lending = _Lending(subject, case)
    try:
        with time_limit(subject.timeout):
            forward = lending.forward(case.network, case.exact_values, "float64")
            granted = tensors(forward.outputs, lending.backward(forward, case.cotangent.astype(np.float64)))
    except (Exception, SystemExit, TimeLimitError):  # an adapter that fails now explains nothing
        return frozenset(check.key for check in found.wrong)
    # Nothing can be said of what a granted NaN or infinity reaches.
    said = {key: np.isfinite(granted[key]) for key in oracle.expected}
    expected = {key: np.where(said[key], granted[key], 0.0) for key in said}
    shown = {key: np.where(said[key], got[key], 0).astype(got[key].dtype) for key in said}
    checks = compare(expected, shown, oracle.samples, case.dtype)
    return frozenset(check.key for check in checks if check.kind)


def _culprits(subject: Subject, oracles: Oracles) -> Iterator[Culprit]:
    for node in oracles.case.network.nodes:
        alone = one_node_case(oracles, node, subject.conventions)
        observation = observe(subject, Oracles(alone))
        checks = observation.checks
        if any(check.kind for check in checks) and not _spoils_every_tape(subject, checks, alone.dtype):
            yield Culprit(node, checks, explain(subject.divergences, alone, checks), observation)


def _spoils_every_tape(subject: Subject, checks: Sequence[TensorCheck], dtype: str) -> bool:
    """Whether only a second pass is wrong, and is so even of the identity: then the tape is to blame, and no layer."""
    if not all(check.second_pass for check in checks if check.kind):
        return False
    node = Node.of("out", LAYERS["identity"], "x")
    numbers = np.array([1.75, -0.625], dtype)
    case = Case(Network((Input("x", numbers.shape),), (node,)), dtype, {"x": numbers}, numbers)
    if not subject.supports(case.network, dtype):
        return False
    _, found = _run_and_compare(subject, Oracles(case))
    return any(check.second_pass for check in found)


def one_node_case(oracles: Oracles, node: Node, conventions: Conventions) -> Case:
    """The case of one node alone, on the reference's inputs and cotangent rounded to the dtype."""
    case, oracle = oracles.case, oracles.under(conventions)
    network, stands_for = case.network.alone(node.name)

    known = {**{name: rounded(array, case.dtype) for name, array in oracle.outputs.items()}, **case.values}
    values = {own: known[name] for own, name in stands_for.items()}
    return Case(network, case.dtype, values, rounded(oracle.gradients[node.name], case.dtype), case.seed)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Floating arrays in the dtype, integer ones as they are."""
    if not is_floating(array):
        return array
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(dtype)


class TimeLimitError(BaseException):
    """An adapter took longer than it may. No Exception, so that no adapter catches it by accident."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError in the block after that many seconds (on the main thread of a Unix process)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def give_up(signal_number: int, frame: Any) -> None:
        raise TimeLimitError

    handler = signal.signal(signal.SIGALRM, give_up)
    started = time.monotonic()
    due, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # An alarm that somebody else had set still comes, at once if it was due meanwhile.
        left = max(due - (time.monotonic() - started), 1e-6) if due else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


@dataclass(frozen=True)
class Row:
    """One line of the per-layer diff: a tensor, the node it belongs to, and the verdict on it.

    verdict: "agrees", "WRONG HERE", "inherited", "known divergence", or "composition".
    diagnosis: of what is to blame, where a known mistake gives the same numbers.
    """

    node: str
    layer: str
    check: TensorCheck
    verdict: str
    divergence: Divergence | None = None
    diagnosis: Diagnosis | None = None

    @property
    def culprit(self) -> bool:
        return self.verdict in ("WRONG HERE", "composition", "known divergence")

    @property
    def cause(self) -> str | None:
        """What is known of the cause: the reason of a known divergence, or the likely mistakes."""
        return self.divergence.reason if self.divergence else str(self.diagnosis or "") or None


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
    return tuple(_row(examination, name, check, guilty.get(name)) for name, check in hidden + owned)


def _row(examination: Examination, name: str, check: TensorCheck, culprit: Culprit | None) -> Row:
    layer = examination.case.network.node(name).layer.name
    if not check.kind:
        return Row(name, layer, check, "agrees")
    if check is examination.composition:
        return Row(name, layer, check, "composition", diagnosis=examination.diagnosis)
    if culprit is None:
        return Row(name, layer, check, "inherited")
    if culprit.divergence:
        return Row(name, layer, check, "known divergence", culprit.divergence)
    return Row(name, layer, check, "WRONG HERE", diagnosis=culprit.diagnosis)


def _owner(check: TensorCheck, network: Network, guilty: Mapping[str, Culprit]) -> str:
    """The node that computed the tensor: a value's own node; for a gradient, a node that reads the tensor."""
    nodes = {node.name for node in network.nodes}
    if check.kind in OF_THE_RUN:
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
