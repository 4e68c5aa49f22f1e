"""An adapter's run held against the equations: every tensor is checked, and nobody is blamed yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from gradproof.model.adapter import Adapter, supported
from gradproof.model.case import Case, redrawn
from gradproof.model.dtypes import HALF
from gradproof.model.network import Network, Node
from gradproof.model.tensors import Tensor, Wrong
from gradproof.reference import PRECISE, NumpyReference
from gradproof.reference.algorithms import ALGORITHMS, algorithms_of
from gradproof.subject.watch import Remark
from gradproof.verdict.agreement import Evidence, TensorCheck, judge, unknown
from gradproof.verdict.arithmetic import HOPELESS, Classes
from gradproof.verdict.diagnosis import Observation
from gradproof.verdict.divergence import Divergence
from gradproof.verdict.equations import EVERY, INSIDE, STORED, Arithmetic, Equations, Statement
from gradproof.verdict.examination import Examination
from gradproof.verdict.running import Trace, reused_check, run, run_again, run_backward_again


@dataclass(frozen=True)
class Subject:
    """An adapter under test, with what is known of it.

    conventions: layer -> kink -> weight of the right-hand derivative that it chooses, of the layers probed so far.
    divergences: its known divergences. timeout: seconds that one case may take.
    classes: of the arithmetic of its layers, found out as they are needed.
    strict: whether an honest algorithm that loses digits counts as a disagreement.
    demanded: the coarsest class of arithmetic that is no disagreement.
    called_twice: layers of the networks that were called a second time, to see whether that overwrites the results.
    probed: layers whose kinks and known divergences have been looked at.
    """

    adapter: Adapter
    conventions: dict[str, dict[str, float]]
    divergences: tuple[Divergence, ...] = ()
    timeout: float = 60.0
    classes: Classes = field(default_factory=Classes, compare=False)
    strict: bool = False
    demanded: str = "every"
    called_twice: set[str] = field(default_factory=set, compare=False)
    probed: set[str] = field(default_factory=set, compare=False)

    def supports(self, network: Network, dtype: str) -> bool:
        return self.lacking(network, dtype) is None

    def lacking(self, network: Network, dtype: str) -> str | None:
        """Why the adapter cannot run the network: the first layer that it lacks, and what it says of it."""
        for node in network.nodes:
            shapes = [network.shapes[name] for name in node.inputs]
            answer = supported(self.adapter, node.layer, dict(node.options), dtype, shapes)
            if answer is not True:
                return f"{node.layer.name}: {answer}" if answer else node.layer.name
        return None

    @property
    def fused(self) -> bool:
        """Whether the adapter may go on with more digits of a tensor than it gives."""
        return bool(getattr(self.adapter, "fused", False))

    def equations(self, case: Case, got: Mapping[Tensor, Any], held_otherwise: bool = False) -> Equations:
        """The equations of a run. held_otherwise: let the adapter go on with other digits though it is not fused."""
        fused = self.fused or held_otherwise
        return Equations(case, got, NumpyReference(self.conventions, PRECISE), NumpyReference(self.conventions), fused)


def verdict_on(subject: Subject, case: Case) -> Examination:
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


def run_alone(subject: Subject, case: Case) -> Trace:
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
    trace = run_alone(subject, case)
    checks: tuple[TensorCheck, ...] = (trace.failure,) if trace.failure else ()
    if not trace.failure:
        checks = (*_judged(subject, subject.equations(case, trace.got), trace.got), *trace.checks)
    return Observation(case, subject.conventions, trace.got, checks, again=lambda other: observe(subject, other))


def _judged(subject: Subject, equations: Equations, got: Mapping[Tensor, Any]) -> Iterator[TensorCheck]:
    """The check of every equation, then of every tensor that nobody asked for."""
    expected = set()
    for statement in equations:
        expected.add(statement.key)
        yield judgement(subject, equations, statement, got)
    yield from (unknown(key, got[key]) for key in sorted(got.keys() - expected))


def judgement(subject: Subject, equations: Equations, statement: Statement, got: Mapping[Tensor, Any]) -> TensorCheck:
    """The check of one equation: against the finest arithmetic, then against the layer's own, then its algorithms."""
    case, given = equations.case, got.get(statement.key)
    check = judge(statement, given, case.dtype, _known_classes(subject, case.dtype, statement))
    if check.evidence is None:
        return check
    sharper, classes = check, _classes(subject, equations, statement, given, check.evidence.wrong)
    for allowed in _allowed(classes):
        check = judge(statement, given, case.dtype, allowed)
        if not check.kind:
            break
    if check.evidence:
        check = _by_algorithm(subject, statement, given, case.dtype, classes, check)
    if not check.kind and not subject.classes.allow(classes.values(), subject.demanded):
        return replace(sharper, kind=Wrong.ARITHMETIC)
    return check


def _allowed(classes: Mapping[str, Arithmetic]) -> Iterator[dict[str, Arithmetic]]:
    """The classes by which the layers may have computed, the coarsest last: a program may round less than it might.

    A number that every operation rounds may come out the same in all runs, and differ where it is rounded less often.
    """
    if any(each is EVERY for each in classes.values()):
        yield {name: STORED if each is EVERY else each for name, each in classes.items()}
    if any(each is not INSIDE for each in classes.values()):
        yield dict(classes)


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


def probe(subject: Subject, case: Case) -> tuple[Equations, Mapping[Tensor, Any]] | None:
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
    """The check where an honest algorithm loses the digits that are missing: of kind accuracy if that is asked.

    Where an algorithm accounts for some elements alone, the others are what is wrong.
    """
    fitting: list[tuple[str, str]] = []
    for equation, _ in statement.parts:
        node = equation.node
        for each in algorithms_of(node.layer.name):
            other = judge(statement, got, dtype, classes, {node.name: each}, HOPELESS)
            if not other.kind:
                fitting.append((node.layer.name, each.name))
            elif not (fitting or subject.strict):
                check = _left_over(check, other)
    if not fitting:
        return check
    layer = fitting[0][0]
    agreeing = replace(
        check, evidence=None, algorithm=(layer, " or ".join(name for own, name in fitting if own == layer))
    )
    return replace(agreeing, kind=Wrong.ACCURACY if subject.strict else None)


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
        yield (
            TensorCheck(check.key, check.shape, Wrong.VIEW, float("inf"), got=trace.views[check.key]) if seen else check
        )


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
    if any(check.kind is Wrong.MUTATED_INPUT for check in trace.checks):
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
            replace(check, kind=Wrong.NONDETERMINISTIC, evidence=None, second_pass=True) if check.kind else check
            for check in twice
        )
    reused = {remark.key: remark for remark in again.reused}
    return tuple(
        reused_check(reused[check.key], check.shape, second_pass=True) if check.key in reused else check
        for check in checks
    )


def _steady_or_not(check: TensorCheck, first: Mapping[Tensor, Any], second: Mapping[Tensor, Any]) -> TensorCheck:
    if check.evidence and _moved(check.evidence, first[check.key], second.get(check.key)):
        return replace(check, kind=Wrong.NONDETERMINISTIC, evidence=None)
    return check


def _moved(evidence: Evidence, first: np.ndarray, second: Any) -> bool:
    """Whether some wrong element moved by more than half its error; an honest sum in another order moves by less."""
    if np.shape(second) != first.shape:
        return True
    with np.errstate(all="ignore"):
        moved = np.abs(np.asarray(second, np.float64) - first.astype(np.float64))
    stays = (first == second) | (np.isnan(first) & np.isnan(second)) | (moved <= 0.5 * evidence.error)
    return bool((evidence.wrong & ~stays).any())
