"""Which nodes are to blame: those whose own equations fail, on the numbers that the adapter had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gradproof.model.case import Case, redrawn
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.tensors import WHOLE_RUN, Role, Tensor, Wrong, gradient_of, value_of
from gradproof.reference import LAYERS
from gradproof.subject.watch import Remark
from gradproof.verdict.agreement import TensorCheck
from gradproof.verdict.diagnosis import Diagnosis, Observation, diagnose_in_place
from gradproof.verdict.divergence import Divergence, Suspected, explanation
from gradproof.verdict.equations import Equations, Statement, usable
from gradproof.verdict.examination import Culprit, Examination, sum_diagnosis
from gradproof.verdict.judging import Subject, judgement, observe, verdict_on
from gradproof.verdict.running import run
from gradproof.verdict.sweep import alone_as_the_sweep_has_it

BESIDE_THE_NUMBERS = (*WHOLE_RUN, Wrong.REUSED_BUFFER, Wrong.VIEW, Wrong.MUTATED_INPUT)
"""What says nothing of a tensor's numbers."""


def blamed(subject: Subject, found: Examination) -> Iterator[Culprit]:
    """The nodes whose equations fail: in forward order, each with the known divergence that explains it."""
    assert found.equations is not None
    explained = dict(_explained(subject, found))
    guilty: dict[str, list[Tensor]] = {}
    sums = []
    spoilers = _spoilers(subject, found)
    for key, name in spoilers.items():
        guilty.setdefault(name, []).append(key)
    spoilt = _spoilt(found, spoilers)
    misled = dict(_misled(subject, found))
    for check in found.wrong:
        settled = (check.kind is Wrong.MUTATED_INPUT and check.key in spoilers) or check.key in misled
        if check.key in explained or check.kind in (*WHOLE_RUN, Wrong.REUSED_BUFFER) or settled:
            continue
        nodes = _suspects(found, check)
        if len(nodes) == 1 and not _is_sum(found, check):
            if nodes[0] in spoilt and not any(wrong_alone(subject, found, [found.case.network.node(nodes[0])])):
                name = spoilt[nodes[0]]
            else:
                name = _overwriter(subject, found, check) or nodes[0]
            guilty.setdefault(name, []).append(check.key)
        elif nodes:
            sums.append((check, nodes))
        elif owner := _overwriter(subject, found, check):
            guilty.setdefault(owner, []).append(check.key)
    diagnoses: dict[str, Diagnosis] = {}
    for check, nodes in sums:
        for name in _of_many(
            subject, found, check, [n for n in nodes if n in guilty] or nodes, guilty, spoilt, diagnoses
        ):
            guilty.setdefault(name, []).append(check.key)
    for key, by in misled.items():
        for name in [name for name, keys in guilty.items() if by & set(keys)]:
            guilty[name].append(key)
    for key, name in _reusers(subject, found).items():
        guilty.setdefault(name, []).append(key)
    if found.trace.checks and not guilty:
        for culprit in wrong_alone(subject, found, found.case.network.nodes):
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
            yield Culprit(node, mine, None, observation, around, diagnoses.get(node.name))


def _suspects(found: Examination, check: TensorCheck) -> list[str]:
    """The nodes whose equation this tensor fails: the one that computes a value, the readers of a gradient's tensor.

    None for the cotangent that was given, and for a gradient that is missing because a later one is missing.
    """
    network = found.case.network
    names = {node.name for node in network.nodes}
    if check.key.role is Role.VALUE:
        owner = [check.key.name] if check.key.name in names else []
        changed = check.kind is Wrong.MUTATED_INPUT
        readers = [reader for reader, _ in network.consumers.get(check.key.name, ())] if changed else []
        return list(dict.fromkeys([*owner, *readers]))
    readers = list(dict.fromkeys(reader for reader, _ in network.consumers.get(check.key.name, ())))
    if check.kind is Wrong.MISSING:
        readers = [name for name in readers if usable(found.trace.got.get(gradient_of(name)), network.shapes[name])]
    return readers


def _is_sum(found: Examination, check: TensorCheck) -> bool:
    """Whether the tensor is a sum of several terms, which may be right each and added up wrongly."""
    statements = found.equations
    return bool(statements and check.key in statements and len(statements[check.key].parts) > 1)


def _misled(subject: Subject, found: Examination) -> Iterator[tuple[Tensor, set[Tensor]]]:
    """Key -> the wrong tensors that its equation reads, where it holds with what these should be.

    The adapter has then gone on with the right numbers, and given others.
    """
    assert found.equations is not None
    wrong = {check.key for check in found.wrong if check.kind not in BESIDE_THE_NUMBERS}
    right = {key: given for key, given in found.trace.got.items() if key not in wrong}
    mended: Equations | None = None
    for key in sorted(wrong):
        by = found.equations.read_by(key) & wrong if key in found.equations else set()
        if not by or key not in found.trace.got:
            continue
        mended = mended or subject.equations(found.case, right, held_otherwise=True)
        if not judgement(subject, mended, replace(mended[key], open=False), found.trace.got).kind:
            yield key, by


def _overwriter(subject: Subject, found: Examination, check: TensorCheck) -> str | None:
    """The node whose backward pass overwrites its cotangent, in whose memory this gradient lies."""
    network = found.case.network
    if check.key.role is not Role.GRADIENT or check.key.name not in {node.name for node in network.nodes}:
        return None
    return next((name for name in _in_one_memory(found, check.key.name) if _overwrites(subject, found, name)), None)


def _in_one_memory(found: Examination, name: str) -> Iterator[str]:
    """The node, then those behind it whose gradients may be views of its own, for they have no other numbers."""
    yield name
    node, given = found.case.network.node(name), found.trace.got
    nodes = {each.name for each in found.case.network.nodes}
    for source in dict.fromkeys(each for each in node.inputs if each in nodes):
        whole, part = given.get(gradient_of(name)), given.get(gradient_of(source))
        if whole is not None and part is not None and np.isin(part, whole).all():
            yield from _in_one_memory(found, source)


def _overwrites(subject: Subject, found: Examination, name: str) -> bool:
    """Whether the node, run alone, overwrites its cotangent."""
    try:  # on the sweep's cotangent, for its own may be overwritten already
        case = alone_as_the_sweep_has_it(found.sweep, found.case, found.case.network.node(name))
    except NetworkError:
        return False
    return gradient_of(name) in {each.key for each in observe(subject, case).checks if each.kind}


def _spoilers(subject: Subject, found: Examination) -> dict[Tensor, str]:
    """Key -> the node that overwrites that value: its own, or one that reads it, which does so even when run alone."""
    network = found.case.network
    changed = [
        check for check in found.trace.checks if check.kind is Wrong.MUTATED_INPUT and check.key.name in network.shapes
    ]
    spoilers: dict[Tensor, str] = {}
    writes: dict[str, set[str]] = {}
    for check in changed:
        for name in _suspects(found, check):
            if name not in writes:
                _, stands_for = network.alone(name)
                alone = wrong_alone(subject, found, [network.node(name)])
                kept = (each for culprit in alone if culprit.observation for each in culprit.observation.checks)
                writes[name] = {
                    stands_for.get(each.key.name, each.key.name) for each in kept if each.kind is check.kind
                }
            if check.key.name in writes[name]:
                spoilers.setdefault(check.key, name)
    if len(set(spoilers.values())) == 1:  # others that changed with it lie in the same memory
        spoilers |= {check.key: next(iter(spoilers.values())) for check in changed if check.key not in spoilers}
    return spoilers


def _spoilt(found: Examination, spoilers: Mapping[Tensor, str]) -> dict[str, str]:
    """Node -> who overwrote a value that it computed or read, and may have kept."""
    network = found.case.network
    spoilt = {}
    for key, name in spoilers.items():
        tensor = key.name
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
    diagnoses: dict[str, Diagnosis],
) -> list[str]:
    """Which of several readers made a sum wrong: one that is guilty already, that is wrong alone, or whose memory is.

    Who overwrote the sum, or what one of them had kept, where that may be why. None where each of them is right: then
    the terms are added up wrongly.
    """
    certain = [name for name in nodes if name in guilty]
    if certain:
        return certain
    alone = [culprit.node.name for culprit in wrong_alone(subject, found, [found.case.network.node(n) for n in nodes])]
    if alone or check.evidence is None or found.equations is None:
        return alone
    if owner := _overwriter(subject, found, check):
        return [owner]
    if sum_diagnosis(found.equations, found.trace, check):
        return []
    overwriters = list(dict.fromkeys(spoilt[name] for name in nodes if name in spoilt))
    if overwriters:
        return overwriters
    for name in nodes:
        observation = _own_observation(subject, found, found.case.network.node(name))
        around = _around(found, found.case.network.node(name))
        diagnosis = diagnose_in_place(observation, around) if observation else Diagnosis()
        if diagnosis:
            diagnoses[name] = diagnosis
            return [name]
    return list(nodes) if len(nodes) == 1 else []  # no other node has a part in it


def wrong_alone(subject: Subject, found: Examination, nodes: Iterable[Node]) -> Iterator[Culprit]:
    """The nodes that go wrong even when they alone are run, on the numbers that the adapter had, else the sweep's."""
    keys = tuple(check.key for check in found.wrong if check.kind in WHOLE_RUN or found.trace.checks)
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


def _reusers(subject: Subject, found: Examination) -> dict[Tensor, str]:
    """Key -> the node that gives this tensor, where it gives the same memory again even when it alone is called twice.

    None where every layer does: then it is no layer's memory.
    """
    reused = [check for check in found.wrong if check.kind is Wrong.REUSED_BUFFER]
    if not reused or _reuses_everything(subject, found.case.dtype):
        return {}
    network = found.case.network
    alone: dict[str, set[Tensor]] = {}
    reusers: dict[Tensor, str] = {}
    for check in reused:
        for name in _suspects(found, check):
            if name not in alone:
                alone[name] = _keys_reused_alone(subject, found, network.node(name))
            if check.key in alone[name]:
                reusers.setdefault(check.key, name)
    if len(set(reusers.values())) == 1:  # others that changed with it lie in the same memory
        reusers |= {check.key: next(iter(reusers.values())) for check in reused if check.key not in reusers}
    return reusers


def _keys_reused_alone(subject: Subject, found: Examination, node: Node) -> set[Tensor]:
    """The keys, as the network has them, of what a next call of this node alone overwrites."""
    case = _case_alone(found, node)
    _, stands_for = found.case.network.alone(node.name)
    reused = [remark.key for remark in _reused_alone(subject, case)] if case else []
    return {key._replace(name=stands_for.get(key.name, key.name)) for key in reused}


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
    return any(check.second_pass for check in verdict_on(subject, case).checks)


def _explained(subject: Subject, found: Examination) -> Iterator[tuple[Tensor, tuple[str, Divergence]]]:
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
    got: dict[Tensor, Any] = {gradient_of(node.name): case.cotangent, value_of(node.name): None}
    checks = {check.key: check for check in found.checks}
    _, stands_for = found.case.network.alone(node.name)
    arguments = {own: argument for argument, own in case.network.nodes[0].sources}
    given = TensorCheck(gradient_of(node.name), case.cotangent.shape, None)
    if node.name == found.case.network.output:  # whose cotangent was given, whatever became of it
        given, case = checks[given.key], replace(case, cotangent=found.case.cotangent)
        got[given.key] = found.trace.got[given.key]
    own_checks = [checks[value_of(node.name)], given]
    got[value_of(node.name)] = found.trace.got[value_of(node.name)]
    for own, source in stands_for.items():
        key = gradient_of(source)
        if key in checks and source in found.case.network.differentiable:
            statement = found.equations[key]
            got[gradient_of(own)], check = _own_term(node, arguments[own], statement, checks[key], found.trace.got)
            own_checks.append(replace(check, key=gradient_of(own)))
    return Observation(case, subject.conventions, got, tuple(own_checks), again=lambda other: observe(subject, other))


def _around(found: Examination, node: Node) -> dict[str, np.ndarray]:
    """The gradients of the outputs of the nodes that read this one, in float64."""
    readers = dict.fromkeys(reader for reader, _ in found.case.network.consumers[node.name])
    gradients = {name: found.trace.got.get(gradient_of(name)) for name in readers}
    shapes = found.case.network.shapes
    return {name: np.asarray(got, np.float64) for name, got in gradients.items() if usable(got, shapes[name])}


def _own_term(
    node: Node, argument: str, statement: Statement, check: TensorCheck, got: Mapping[Tensor, Any]
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
