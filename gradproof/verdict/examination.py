"""One adapter on one case: run it, check every equation of the sweep, and name the layer whose equation fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from gradproof.model.adapter import Adapter, supported
from gradproof.model.case import Case, redrawn
from gradproof.model.dtypes import HALF
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.reference import LAYERS, PRECISE, NumpyReference
from gradproof.reference.algorithms import ALGORITHMS, algorithms_of
from gradproof.reference.walk import Conventions
from gradproof.subject.watch import Remark
from gradproof.verdict.agreement import Evidence, TensorCheck, judge, unknown
from gradproof.verdict.arithmetic import Classes
from gradproof.verdict.diagnosis import Diagnosis, Observation, diagnose, diagnose_in_place, diagnose_sum
from gradproof.verdict.divergence import Divergence, Suspected, explanation
from gradproof.verdict.equations import EVERY, STORED, Arithmetic, Equations, Statement, usable
from gradproof.verdict.running import OF_THE_RUN, REUSED, Trace, reused_check, run, run_again, run_backward_again
from gradproof.verdict.sweep import Sweep, alone_as_the_sweep_has_it


@dataclass(frozen=True)
class Subject:
    """An adapter under test, with what is known of it.

    conventions: layer -> kink -> weight of the right-hand derivative that it chooses.
    divergences: its known divergences. timeout: seconds that one case may take.
    classes: of the arithmetic of its layers, found out as they are needed.
    strict: whether an honest algorithm that loses digits counts as a disagreement.
    demanded: the coarsest class of arithmetic that is no disagreement.
    called_twice: layers of the networks that were called a second time, to see whether that overwrites the results.
    """

    adapter: Adapter
    conventions: Conventions
    divergences: tuple[Divergence, ...] = ()
    timeout: float = 60.0
    classes: Classes = field(default_factory=Classes, compare=False)
    strict: bool = False
    demanded: str = "every"
    called_twice: set[str] = field(default_factory=set, compare=False)

    def supports(self, network: Network, dtype: str) -> bool:
        return all(supported(self.adapter, node.layer, dict(node.options), dtype) for node in network.nodes)

    @property
    def fused(self) -> bool:
        """Whether the adapter may go on with more digits of a tensor than it gives."""
        return bool(getattr(self.adapter, "fused", False))

    def equations(self, case: Case, got: Mapping[str, Any], held_otherwise: bool = False) -> Equations:
        """The equations of a run. held_otherwise: let the adapter go on with other digits though it is not fused."""
        fused = self.fused or held_otherwise
        return Equations(case, got, NumpyReference(self.conventions, PRECISE), NumpyReference(self.conventions), fused)


@dataclass(frozen=True)
class Culprit:
    """A node whose equation fails.

    keys: of the tensors that are wrong by its fault. divergence: the known one that explains them.
    observation: the node on the numbers that the adapter had in the network, None where they are not known.
    around: the gradients of its readers' outputs, of which its cotangent may be a part in memory.
    told: what a diagnosis in place has found already.
    """

    node: Node
    keys: tuple[str, ...]
    divergence: Divergence | None = None
    observation: Observation | None = field(default=None, repr=False, compare=False)
    around: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    told: Diagnosis | None = field(default=None, repr=False, compare=False)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """Which known mistakes reproduce its numbers; found when it is asked for."""
        if self.told is not None or self.divergence or not self.observation:
            return self.told or Diagnosis()
        return diagnose(self.observation, self.around)


@dataclass(frozen=True)
class Examination:
    """What was found for one adapter on one case.

    checks: one per expected tensor, values in forward order, then gradients in backward order, then all else.
    culprits: the nodes whose equations fail. trace: what the adapter gave. equations: what it was checked against.
    """

    case: Case
    adapter: str
    checks: tuple[TensorCheck, ...]
    culprits: tuple[Culprit, ...] = ()
    conventions: Conventions = field(default_factory=dict, repr=False)
    trace: Trace = field(default_factory=Trace, repr=False, compare=False)
    equations: Equations | None = field(default=None, repr=False, compare=False)

    @property
    def wrong(self) -> tuple[TensorCheck, ...]:
        return tuple(check for check in self.checks if check.kind)

    @property
    def agrees(self) -> bool:
        return not self.wrong

    @property
    def known(self) -> bool:
        """Whether known divergences explain everything that disagrees."""
        explained = {key for culprit in self.culprits if culprit.divergence for key in culprit.keys}
        return bool(explained) and all(check.key in explained for check in self.wrong)

    @property
    def accuracy(self) -> list[tuple[str, str]]:
        """Layer and algorithms of every tensor in which an honest algorithm loses digits."""
        return [check.algorithm for check in self.checks if check.algorithm]

    @cached_property
    def unblamed(self) -> tuple[TensorCheck, ...]:
        """What is wrong by no layer's fault: sums, and runs, that go wrong between the layers."""
        blamed = {key for culprit in self.culprits for key in culprit.keys}
        return tuple(check for check in self.wrong if check.key not in blamed)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """Which known mistakes in adding up reproduce the first tensor that no layer is to blame for."""
        if self.equations is None:
            return Diagnosis()
        found = (_sum_diagnosis(self.equations, self.trace, check) for check in self.unblamed)
        return next((each for each in found if each), Diagnosis())

    @cached_property
    def sweep(self) -> Sweep:
        """The reference's own sweep over the case, which shows what an error did further down."""
        return Sweep(self.case, self.conventions)


def examine(subject: Subject, case: Case) -> Examination:
    """Run the adapter on the case, check every equation, and where one fails name the guilty nodes."""
    found = _verdict(subject, case)
    if found.trace.before:  # no layer of this network need have ended the process
        return found
    if found.trace.failure:
        return replace(found, culprits=tuple(_alone(subject, found, case.network.nodes)))
    return found if found.agrees else replace(found, culprits=tuple(_blamed(subject, found)))


def _verdict(subject: Subject, case: Case) -> Examination:
    """The examination before anybody is blamed."""
    trace = _run(subject, case)
    found = Examination(case, subject.adapter.name, (), conventions=subject.conventions, trace=trace)
    if trace.failure:
        return replace(found, checks=(trace.failure,))
    equations = subject.equations(case, trace.got)
    checks = _called_again(subject, equations, trace, tuple(_judged(subject, equations, trace.got)))
    checks = tuple(_with_views(checks, trace))
    reused = trace.reused
    if _to_be_called_twice(subject, case, trace, checks):
        other = redrawn(case)
        again = _run(subject, other)
        if again.failure:
            return replace(found, case=other, trace=again, checks=(again.failure,))
        reused = again.reused or reused
    return replace(found, checks=(*_with_reused(checks, reused), *trace.checks), equations=equations)


def _run(subject: Subject, case: Case) -> Trace:
    """A run; where its process ended that had run others before, a fresh one tells whether the case alone ends it."""
    trace = run(subject.adapter, case, subject.timeout)
    if not trace.before:
        return trace
    again = run(subject.adapter, case, subject.timeout)
    if again.ended:
        return again
    assert trace.failure is not None
    alone = "but not when this network ran alone in a fresh process: an earlier network may have done the damage"
    return replace(trace, failure=replace(trace.failure, got=f"{trace.failure.got}, {alone}; {trace.before}"))


def _run_alone(subject: Subject, case: Case) -> Trace:
    """A run; where its process ended that had run others before, the run in a fresh one counts."""
    trace = run(subject.adapter, case, subject.timeout)
    return run(subject.adapter, case, subject.timeout) if trace.before else trace


def disagrees(subject: Subject, case: Case) -> bool:
    """Whether anything disagrees, without asking who is to blame."""
    trace = run(subject.adapter, case, subject.timeout)
    if trace.failure or trace.checks or trace.views or trace.reused:
        return True
    return any(check.kind for check in _judged(subject, subject.equations(case, trace.got), trace.got))


def observe(subject: Subject, case: Case) -> Observation:
    """Run the adapter on a case of one node, and check it; the same may be done again on other cases."""
    trace = _run_alone(subject, case)
    checks: tuple[TensorCheck, ...] = (trace.failure,) if trace.failure else ()
    if not trace.failure:
        checks = (*_judged(subject, subject.equations(case, trace.got), trace.got), *trace.checks)
    return Observation(case, subject.conventions, trace.got, checks, again=lambda other: observe(subject, other))


# The verdict.


def _judged(subject: Subject, equations: Equations, got: Mapping[str, Any]) -> Iterator[TensorCheck]:
    """The check of every equation, then of every tensor that nobody asked for."""
    expected = set()
    for statement in equations:
        expected.add(statement.key)
        yield _judgement(subject, equations, statement, got)
    yield from (unknown(key, got[key]) for key in sorted(got.keys() - expected))


def _judgement(subject: Subject, equations: Equations, statement: Statement, got: Mapping[str, Any]) -> TensorCheck:
    """The check of one equation: against the finest arithmetic, then against the layer's own, then its algorithms."""
    case, given = equations.case, got.get(statement.key)
    check = judge(statement, given, case.dtype, _known_classes(subject, case.dtype, statement))
    if check.evidence is None:
        return check
    sharper, classes = check, _classes(subject, equations, statement, given, check.evidence.wrong)
    if any(each.name != "inside" for each in classes.values()):
        check = judge(statement, given, case.dtype, classes)
    if check.evidence:
        check = _by_algorithm(subject, statement, given, case.dtype, classes, check)
    if not check.kind and not subject.classes.allow(classes.values(), subject.demanded):
        return replace(sharper, kind="arithmetic")
    return check


def _known_classes(subject: Subject, dtype: str, statement: Statement) -> dict[str, Arithmetic]:
    """Node -> class of its arithmetic as far as it is known; inside for all where a class is demanded."""
    if dtype not in HALF or subject.demanded != "every":
        return {}
    return {e.node.name: subject.classes.already(e.node, dtype) for e, _ in statement.parts}


def _classes(
    subject: Subject, equations: Equations, statement: Statement, got: Any, wrong: np.ndarray
) -> dict[str, Arithmetic]:
    """Node -> class of its arithmetic, for the nodes whose equations these are.

    It is found out where it explains some of what is wrong: of each node alone, then, where that is not enough, in the
    network.
    """
    case, nodes = equations.case, {equation.node.name: equation.node for equation, _ in statement.parts}
    if case.dtype not in HALF:
        return {}
    found = {name: subject.classes.already(node, case.dtype) for name, node in nodes.items()}
    if not any(_explains_some(check, wrong) for check in _in_coarser_classes(statement, got, case.dtype, nodes)):
        return found
    alone = {name: own for name, node in nodes.items() if (own := equations.alone(node)) is not None}
    run_one = partial(probe, subject)
    found |= {name: subject.classes.of(own, run_one) for name, own in alone.items()}
    if len(case.network.nodes) > 1 and judge(statement, got, case.dtype, found).kind:
        found |= {name: subject.classes.within(nodes[name], own, case, run_one) for name, own in alone.items()}
    if judge(statement, got, case.dtype, found).kind:
        found |= {name: subject.classes.patiently(own, run_one) for name, own in alone.items()}
    return found


def _in_coarser_classes(statement: Statement, got: Any, dtype: str, nodes: Mapping[str, Node]) -> Iterator[TensorCheck]:
    """The checks in the classes that are not the finest, then in the coarsest of other algorithms."""
    for each in (STORED, EVERY):
        yield judge(statement, got, dtype, dict.fromkeys(nodes, each))
    for name, node in nodes.items():
        for algorithm in ALGORITHMS.get(node.layer.name, ()):
            yield judge(statement, got, dtype, dict.fromkeys(nodes, EVERY), {name: algorithm})


def _explains_some(check: TensorCheck, wrong: np.ndarray) -> bool:
    return check.evidence is None or not (check.evidence.wrong >= wrong).all()


def probe(subject: Subject, case: Case) -> tuple[Equations, Mapping[str, Any]] | None:
    """The equations of a case, and what the adapter gave for it; None where it gave nothing."""
    trace = run(subject.adapter, case, subject.timeout)
    return None if trace.failure else (subject.equations(case, trace.got), trace.got)


def _by_algorithm(
    subject: Subject,
    statement: Statement,
    got: Any,
    dtype: str,
    classes: Mapping[str, Arithmetic],
    check: TensorCheck,
) -> TensorCheck:
    """The check where an honest algorithm loses the digits that are missing: of kind "accuracy" if that is asked.

    Where an algorithm accounts for some elements alone, the others are what is wrong.
    """
    fitting: list[tuple[str, str]] = []
    for equation, _ in statement.parts:
        node = equation.node
        for each in algorithms_of(node.layer.name):
            other = judge(statement, got, dtype, classes, {node.name: each})
            if not other.kind:
                fitting.append((node.layer.name, each.name))
            elif not (fitting or subject.strict):
                check = _left_over(check, other)
    if not fitting:
        return check
    layer = fitting[0][0]
    told = replace(check, evidence=None, algorithm=(layer, " or ".join(name for own, name in fitting if own == layer)))
    return replace(told, kind="accuracy" if subject.strict else None)


def _left_over(check: TensorCheck, other: TensorCheck) -> TensorCheck:
    """The check, of the elements alone that are wrong by another algorithm too, where these are fewer."""
    assert check.evidence is not None
    assert other.evidence is not None
    both = check.evidence.wrong & other.evidence.wrong
    fewer = both.sum() < check.evidence.wrong.sum() and other.index is not None and both[other.index]
    return replace(other, evidence=replace(other.evidence, wrong=both)) if fewer else check


def _with_views(checks: Iterable[TensorCheck], trace: Trace) -> Iterator[TensorCheck]:
    """The checks, of kind "view" where a tensor that agrees shares memory that it must not share."""
    for check in checks:
        seen = check.key in trace.views and not check.kind
        yield TensorCheck(check.key, check.shape, "view", float("inf"), got=trace.views[check.key]) if seen else check


def _to_be_called_twice(subject: Subject, case: Case, trace: Trace, checks: Iterable[TensorCheck]) -> bool:
    """Whether the network is to be run on other numbers too, to see whether that overwrites these results.

    It is where this run has overwritten the last one's, to tell it by this network's names. Else it is once for every
    layer: memory that is kept for every shape shows in drawn networks but rarely, for these have few shapes in common.
    """
    layers = {node.layer.name for node in case.network.nodes}
    settled = trace.checks or trace.views or any(check.kind for check in checks) or layers <= subject.called_twice
    if settled and not trace.reused:
        return False
    subject.called_twice.update(layers)
    return True


def _with_reused(checks: Sequence[TensorCheck], reused: Iterable[Remark]) -> Iterator[TensorCheck]:
    """The checks, of kind "reused_buffer" where a tensor that agrees was overwritten; then those of other networks."""
    own = {remark.key: remark for remark in reused if not remark.network}
    for check in checks:
        overwritten = check.key in own and not check.kind
        yield reused_check(own[check.key], check.shape) if overwritten else check
    yield from (reused_check(remark) for remark in reused if remark.network)


def _called_again(
    subject: Subject, equations: Equations, trace: Trace, checks: tuple[TensorCheck, ...]
) -> tuple[TensorCheck, ...]:
    """The checks, of kind "nondeterministic" where a second call, or a second backward pass, is wrong otherwise."""
    if any(check.kind == "mutated_input" for check in trace.checks):
        return checks
    if any(check.evidence for check in checks):
        second = run_again(subject.adapter, equations.case, subject.timeout)
        return tuple(_steady_or_not(check, trace.got, second) for check in checks)
    if trace.checks or trace.views or any(check.kind for check in checks):
        return checks
    again = run_backward_again(subject.adapter, equations.case, trace, subject.timeout)
    if again is None:
        return checks
    if again.failure:
        return (again.failure,)
    # It may differ by rounding from the first, as sums in another order do.
    twice = tuple(_judged(subject, subject.equations(equations.case, again.got), again.got))
    if any(check.kind for check in twice):  # a tape that adds up may do so in what it gave: that it adds up counts
        return tuple(
            replace(check, kind="nondeterministic", evidence=None, second_pass=True) if check.kind else check
            for check in twice
        )
    reused = {remark.key: remark for remark in again.reused}
    return tuple(
        reused_check(reused[check.key], check.shape, second_pass=True) if check.key in reused else check
        for check in checks
    )


def _steady_or_not(check: TensorCheck, first: Mapping[str, Any], second: Mapping[str, Any]) -> TensorCheck:
    if check.evidence and _moved(check.evidence, first[check.key], second.get(check.key)):
        return replace(check, kind="nondeterministic", evidence=None)
    return check


def _moved(evidence: Evidence, first: np.ndarray, second: Any) -> bool:
    """Whether some wrong element moved by more than half its error; an honest sum in another order moves by less."""
    if np.shape(second) != first.shape:
        return True
    with np.errstate(all="ignore"):
        moved = np.abs(np.asarray(second, np.float64) - first.astype(np.float64))
    stays = (first == second) | (np.isnan(first) & np.isnan(second)) | (moved <= 0.5 * evidence.error)
    return bool((evidence.wrong & ~stays).any())


# Blame.


def _blamed(subject: Subject, found: Examination) -> Iterator[Culprit]:
    """The nodes whose equations fail: in forward order, each with the known divergence that explains it."""
    assert found.equations is not None
    explained = dict(_explained(subject, found))
    guilty: dict[str, list[str]] = {}
    sums = []
    spoilers = _spoilers(subject, found)
    for key, name in spoilers.items():
        guilty.setdefault(name, []).append(key)
    spoilt = _spoilt(found, spoilers)
    misled = dict(_misled(subject, found))
    for check in found.wrong:
        settled = (check.kind == "mutated_input" and check.key in spoilers) or check.key in misled
        if check.key in explained or check.kind in (*OF_THE_RUN, REUSED) or settled:
            continue
        nodes = _suspects(found, check)
        if len(nodes) == 1 and not _is_sum(found, check):
            if nodes[0] in spoilt and not any(_alone(subject, found, [found.case.network.node(nodes[0])])):
                name = spoilt[nodes[0]]
            else:
                name = _overwriter(subject, found, check) or nodes[0]
            guilty.setdefault(name, []).append(check.key)
        elif nodes:
            sums.append((check, nodes))
        elif owner := _overwriter(subject, found, check):
            guilty.setdefault(owner, []).append(check.key)
    told: dict[str, Diagnosis] = {}
    for check, nodes in sums:
        for name in _of_many(subject, found, check, [n for n in nodes if n in guilty] or nodes, guilty, spoilt, told):
            guilty.setdefault(name, []).append(check.key)
    for key, by in misled.items():
        for name in [name for name, keys in guilty.items() if by & set(keys)]:
            guilty[name].append(key)
    for key, name in _reusers(subject, found).items():
        guilty.setdefault(name, []).append(key)
    if found.trace.checks and not guilty:
        for culprit in _alone(subject, found, found.case.network.nodes):
            guilty[culprit.node.name] = list(culprit.keys)
    if _spoils_every_tape(subject, found):
        guilty = {}
    network = found.case.network
    for node in network.nodes:
        keys = tuple(key for key, (name, _) in explained.items() if name == node.name)
        if keys and node.name not in guilty:
            yield Culprit(node, keys, explained[keys[0]][1], _own_observation(subject, found, node))
        if node.name in guilty:
            mine = (*guilty[node.name], *keys)
            observation, around = _own_observation(subject, found, node), _around(found, node)
            yield Culprit(node, mine, None, observation, around, told.get(node.name))


def _suspects(found: Examination, check: TensorCheck) -> list[str]:
    """The nodes whose equation this tensor fails: the one that computes a value, the readers of a gradient's tensor.

    None for the cotangent that was given, and for a gradient that is missing because a later one is missing.
    """
    network = found.case.network
    names = {node.name for node in network.nodes}
    if check.role == "value":
        owner = [check.tensor] if check.tensor in names else []
        changed = check.kind == "mutated_input"
        readers = [reader for reader, _ in network.consumers.get(check.tensor, ())] if changed else []
        return list(dict.fromkeys([*owner, *readers]))
    readers = list(dict.fromkeys(reader for reader, _ in network.consumers.get(check.tensor, ())))
    if check.kind == "missing":
        readers = [name for name in readers if usable(found.trace.got.get(f"gradient:{name}"), network.shapes[name])]
    return readers


def _is_sum(found: Examination, check: TensorCheck) -> bool:
    """Whether the tensor is a sum of several terms, which may be right each and added up wrongly."""
    statements = found.equations
    return bool(statements and check.key in statements and len(statements[check.key].parts) > 1)


def _misled(subject: Subject, found: Examination) -> Iterator[tuple[str, set[str]]]:
    """Key -> the wrong tensors that its equation reads, where it holds with what these should be.

    The adapter has then gone on with the right numbers, and given others.
    """
    assert found.equations is not None
    wrong = {check.key for check in found.wrong if check.kind not in (*OF_THE_RUN, REUSED, "view", "mutated_input")}
    right = {key: given for key, given in found.trace.got.items() if key not in wrong}
    mended: Equations | None = None
    for key in sorted(wrong):
        by = found.equations.read_by(key) & wrong if key in found.equations else set()
        if not by or key not in found.trace.got:
            continue
        mended = mended or subject.equations(found.case, right, held_otherwise=True)
        if not _judgement(subject, mended, replace(mended[key], open=False), found.trace.got).kind:
            yield key, by


def _overwriter(subject: Subject, found: Examination, check: TensorCheck) -> str | None:
    """The node whose backward pass overwrites its cotangent, in whose memory this gradient lies."""
    network = found.case.network
    if check.role != "gradient" or check.tensor not in {node.name for node in network.nodes}:
        return None
    return next((name for name in _in_one_memory(found, check.tensor) if _overwrites(subject, found, name)), None)


def _in_one_memory(found: Examination, name: str) -> Iterator[str]:
    """The node, then those behind it whose gradients may be views of its own, for they have no other numbers."""
    yield name
    node, given = found.case.network.node(name), found.trace.got
    nodes = {each.name for each in found.case.network.nodes}
    for source in dict.fromkeys(each for each in node.inputs if each in nodes):
        whole, part = given.get(f"gradient:{name}"), given.get(f"gradient:{source}")
        if whole is not None and part is not None and np.isin(part, whole).all():
            yield from _in_one_memory(found, source)


def _overwrites(subject: Subject, found: Examination, name: str) -> bool:
    """Whether the node, run alone, overwrites its cotangent."""
    try:  # on the sweep's cotangent, for its own may be overwritten already
        case = alone_as_the_sweep_has_it(found.sweep, found.case, found.case.network.node(name))
    except NetworkError:
        return False
    return f"gradient:{name}" in {each.key for each in observe(subject, case).checks if each.kind}


def _spoilers(subject: Subject, found: Examination) -> dict[str, str]:
    """Key -> the node that overwrites that value: its own, or one that reads it, which does so even when run alone."""
    network = found.case.network
    changed = [
        check for check in found.trace.checks if check.kind == "mutated_input" and check.tensor in network.shapes
    ]
    spoilers: dict[str, str] = {}
    writes: dict[str, set[str]] = {}
    for check in changed:
        for name in _suspects(found, check):
            if name not in writes:
                _, stands_for = network.alone(name)
                alone = _alone(subject, found, [network.node(name)])
                kept = (each for culprit in alone if culprit.observation for each in culprit.observation.checks)
                writes[name] = {stands_for.get(each.tensor, each.tensor) for each in kept if each.kind == check.kind}
            if check.tensor in writes[name]:
                spoilers.setdefault(check.key, name)
    if len(set(spoilers.values())) == 1:  # others that changed with it lie in the same memory
        spoilers |= {check.key: next(iter(spoilers.values())) for check in changed if check.key not in spoilers}
    return spoilers


def _spoilt(found: Examination, spoilers: Mapping[str, str]) -> dict[str, str]:
    """Node -> who overwrote a value that it computed or read, and may have kept."""
    network = found.case.network
    spoilt = {}
    for key, name in spoilers.items():
        tensor = key.partition(":")[2]
        computed = [node.name for node in network.nodes if node.name == tensor]
        for each in (*computed, *(reader for reader, _ in network.consumers.get(tensor, ()))):
            if each != name:
                spoilt[each] = name
    return spoilt


def _of_many(
    subject: Subject,
    found: Examination,
    check: TensorCheck,
    nodes: Sequence[str],
    guilty: Mapping[str, Any],
    spoilt: Mapping[str, str],
    told: dict[str, Diagnosis],
) -> list[str]:
    """Which of several readers made a sum wrong: one that is guilty already, that is wrong alone, or whose memory is.

    Who overwrote the sum, or what one of them had kept, where that may be why. None where each of them is right: then
    the terms are added up wrongly.
    """
    certain = [name for name in nodes if name in guilty]
    if certain:
        return certain
    alone = [culprit.node.name for culprit in _alone(subject, found, [found.case.network.node(n) for n in nodes])]
    if alone or check.evidence is None or found.equations is None:
        return alone
    if owner := _overwriter(subject, found, check):
        return [owner]
    if _sum_diagnosis(found.equations, found.trace, check):
        return []
    overwriters = list(dict.fromkeys(spoilt[name] for name in nodes if name in spoilt))
    if overwriters:
        return overwriters
    for name in nodes:
        observation = _own_observation(subject, found, found.case.network.node(name))
        around = _around(found, found.case.network.node(name))
        diagnosis = diagnose_in_place(observation, around) if observation else Diagnosis()
        if diagnosis:
            told[name] = diagnosis
            return [name]
    return list(nodes) if len(nodes) == 1 else []  # no other node has a part in it


def _alone(subject: Subject, found: Examination, nodes: Iterable[Node]) -> Iterator[Culprit]:
    """The nodes that go wrong even when they alone are run, on the numbers that the adapter had, else the sweep's."""
    keys = tuple(check.key for check in found.wrong if check.kind in OF_THE_RUN or found.trace.checks)
    for node in nodes:
        case = _case_alone(found, node)
        if case is None:
            continue
        observation = observe(subject, case)
        if any(check.kind for check in observation.checks):
            explained = explanation(subject.divergences, _suspected(case, observation.checks))
            yield Culprit(node, keys, explained, observation)


def _case_alone(found: Examination, node: Node) -> Case | None:
    """The node alone on the numbers that the adapter had, else on the sweep's; None where no layer takes these."""
    case = found.equations.alone(node) if found.equations else None
    try:
        return case or alone_as_the_sweep_has_it(found.sweep, found.case, node)
    except NetworkError:  # numbers that no layer before this one gives
        return None


def _reusers(subject: Subject, found: Examination) -> dict[str, str]:
    """Key -> the node that gives this tensor, where it gives the same memory again even when it alone is called twice.

    None where every layer does: then it is no layer's memory.
    """
    reused = [check for check in found.wrong if check.kind == REUSED]
    if not reused or _reuses_everything(subject, found.case.dtype):
        return {}
    network = found.case.network
    alone: dict[str, set[str]] = {}
    reusers: dict[str, str] = {}
    for check in reused:
        for name in _suspects(found, check):
            if name not in alone:
                alone[name] = _keys_reused_alone(subject, found, network.node(name))
            if check.key in alone[name]:
                reusers.setdefault(check.key, name)
    if len(set(reusers.values())) == 1:  # others that changed with it lie in the same memory
        reusers |= {check.key: next(iter(reusers.values())) for check in reused if check.key not in reusers}
    return reusers


def _keys_reused_alone(subject: Subject, found: Examination, node: Node) -> set[str]:
    """The keys, as the network has them, of what a next call of this node alone overwrites."""
    case = _case_alone(found, node)
    _, stands_for = found.case.network.alone(node.name)
    tensors = [remark.key.partition(":") for remark in _reused_alone(subject, case)] if case else []
    return {f"{role}:{stands_for.get(own, own)}" for role, _, own in tensors}


def _reused_alone(subject: Subject, case: Case) -> tuple[Remark, ...]:
    """The results of this case that a next call on other numbers overwrites."""
    run(subject.adapter, case, subject.timeout)
    return run(subject.adapter, redrawn(case), subject.timeout).reused


def _reuses_everything(subject: Subject, dtype: str) -> bool:
    """Whether what layers of no memory give is overwritten too, whichever they are."""
    cases = (_plainest(layer, dtype) for layer in ("identity", "square"))
    known = [case for case in cases if subject.supports(case.network, dtype)]
    return bool(known) and all(_reused_alone(subject, case) for case in known)


def _plainest(layer: str, dtype: str) -> Case:
    """Two numbers through one layer."""
    node = Node.of("out", LAYERS[layer], "x")
    numbers = np.array([1.75, -0.625], dtype)
    return Case(Network((Input("x", numbers.shape),), (node,)), dtype, {"x": numbers}, numbers)


def _spoils_every_tape(subject: Subject, found: Examination) -> bool:
    """Whether only a second pass is wrong, and is so even of the identity: then the tape is to blame, and no layer."""
    if not all(check.second_pass for check in found.wrong):
        return False
    case = _plainest("identity", found.case.dtype)
    if not subject.supports(case.network, case.dtype):
        return False
    return any(check.second_pass for check in _verdict(subject, case).checks)


def _explained(subject: Subject, found: Examination) -> Iterator[tuple[str, tuple[str, Divergence]]]:
    """Key -> node and known divergence, of every wrong tensor that divergences of the nodes behind it explain."""
    if not subject.divergences or found.equations is None:
        return
    for check in found.wrong:
        if check.evidence is None:
            continue
        statement = found.equations[check.key]
        suspected = []
        for equation, argument in statement.parts:
            case = found.equations.alone(equation.node)
            expected = np.asarray(equation.out if argument is None else equation.terms[argument])
            if case is not None:
                suspected.append(Suspected(case, check, replace(check.evidence, expected=expected)))
        entry = explanation(subject.divergences, suspected)
        if entry is not None:
            names = [equation.node.name for equation, _ in statement.parts if equation.node.layer.name == entry.layer]
            yield check.key, (names[0], entry)


def _suspected(case: Case, checks: Iterable[TensorCheck]) -> list[Suspected]:
    """The wrong tensors of a case of one node, for `explanation`; none where one of them cannot be explained."""
    wrong = [check for check in checks if check.kind]
    if any(check.evidence is None for check in wrong):
        return []
    return [Suspected(case, check, check.evidence) for check in wrong if check.evidence]


# One node on the numbers that the adapter had.


def _own_observation(subject: Subject, found: Examination, node: Node) -> Observation | None:
    """What the adapter gave for one node in the network, as if it had been run alone."""
    assert found.equations is not None
    case = found.equations.alone(node)
    if case is None:
        return None
    got: dict[str, Any] = {f"gradient:{node.name}": case.cotangent, f"value:{node.name}": None}
    checks = {check.key: check for check in found.checks}
    _, stands_for = found.case.network.alone(node.name)
    arguments = {own: argument for argument, own in case.network.nodes[0].sources}
    given = TensorCheck(f"gradient:{node.name}", case.cotangent.shape, None)
    if node.name == found.case.network.output:  # whose cotangent was given, whatever became of it
        given, case = checks[given.key], replace(case, cotangent=found.case.cotangent)
        got[given.key] = found.trace.got[given.key]
    own_checks = [checks[f"value:{node.name}"], given]
    got[f"value:{node.name}"] = found.trace.got[f"value:{node.name}"]
    for own, source in stands_for.items():
        key = f"gradient:{source}"
        if key in checks and checks[key].tensor in found.case.network.differentiable:
            statement = found.equations[key]
            got[f"gradient:{own}"], check = _own_term(node, arguments[own], statement, checks[key], found.trace.got)
            own_checks.append(replace(check, key=f"gradient:{own}"))
    return Observation(case, subject.conventions, got, tuple(own_checks), again=lambda other: observe(subject, other))


def _around(found: Examination, node: Node) -> dict[str, np.ndarray]:
    """The gradients of the outputs of the nodes that read this one, in float64."""
    readers = dict.fromkeys(reader for reader, _ in found.case.network.consumers[node.name])
    gradients = {name: found.trace.got.get(f"gradient:{name}") for name in readers}
    shapes = found.case.network.shapes
    return {name: np.asarray(got, np.float64) for name, got in gradients.items() if usable(got, shapes[name])}


def _own_term(
    node: Node, argument: str, statement: Statement, check: TensorCheck, got: Mapping[str, Any]
) -> tuple[Any, TensorCheck]:
    """A node's part in a gradient: what is left of it without the parts that other readers must have sent."""
    mine = [
        equation.terms[str(each)]
        for equation, each in statement.parts
        if (equation.node.name, each) == (node.name, argument)
    ]
    given = got.get(statement.key)
    if len(statement.parts) < 2 or not mine or not usable(given, statement.expected.shape):
        return given, check
    with np.errstate(all="ignore"):
        left = np.asarray(given, np.float64) - (statement.expected - mine[0])
    evidence = replace(check.evidence, expected=np.asarray(mine[0])) if check.evidence else None
    return left, replace(check, evidence=evidence)


def _sum_diagnosis(equations: Equations, trace: Trace, check: TensorCheck) -> Diagnosis:
    """The mistakes in adding up what the readers of this tensor send back."""
    if check.evidence is None or check.role != "gradient":
        return Diagnosis()
    return diagnose_sum(equations[check.key], trace.got[check.key], check)
