"""The per-layer diff as data: every tensor of an examination, from the loss back to the inputs, with its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gradproof.model.network import Network
from gradproof.model.tensors import WHOLE_RUN, Role, Wrong
from gradproof.verdict.agreement import TensorCheck
from gradproof.verdict.diagnosis import Diagnosis
from gradproof.verdict.divergence import Divergence
from gradproof.verdict.equations import usable
from gradproof.verdict.examination import Culprit, Examination


class Verdict(StrEnum):
    """What is said of one tensor.

    INHERITED: its own equation holds, but an earlier error has moved it. WRONG_HERE: its equation fails.
    COMPOSITION: it is wrong by no layer's fault.
    """

    AGREES = "agrees"
    INHERITED = "inherited"
    WRONG_HERE = "WRONG HERE"
    KNOWN = "known divergence"
    COMPOSITION = "composition"


@dataclass(frozen=True)
class Row:
    """One line of the per-layer diff: a tensor, the node it belongs to, and the verdict on it.

    check: of a tensor that inherits an error, how far that has moved it.
    diagnosis: of what is to blame, where a known mistake gives the same numbers.
    """

    node: str
    layer: str
    check: TensorCheck
    verdict: Verdict
    divergence: Divergence | None = None
    diagnosis: Diagnosis | None = None

    @property
    def culprit(self) -> bool:
        return self.verdict in (Verdict.WRONG_HERE, Verdict.COMPOSITION, Verdict.KNOWN)

    @property
    def cause(self) -> str | None:
        """What is known of the cause: the reason of a known divergence, or the likely mistakes."""
        return self.divergence.reason if self.divergence else str(self.diagnosis or "") or None


def rows(examination: Examination) -> tuple[Row, ...]:
    """Every tensor from the loss back to the inputs, each with the node whose equation it belongs to."""
    network = examination.case.network
    guilty = {key: culprit for culprit in examination.culprits for key in culprit.keys}
    found = []
    for check in _backward_order(examination.checks, network):
        culprit = guilty.get(check.key) if check.kind else None
        found.append(_row(examination, culprit.node.name if culprit else _owner(check, network), check, culprit))
    return tuple(found)


def _row(examination: Examination, name: str, check: TensorCheck, culprit: Culprit | None) -> Row:
    layer = examination.case.network.node(name).layer.name
    if not check.kind:
        off = _off(examination, check)
        return Row(name, layer, off or check, Verdict.INHERITED if off else Verdict.AGREES)
    if culprit is None:
        follows = check.kind is Wrong.MISSING and check.got == "None" and bool(examination.culprits)
        verdict = Verdict.INHERITED if follows else Verdict.COMPOSITION
        return Row(name, layer, check, verdict, diagnosis=examination.diagnosis)
    if culprit.divergence:
        return Row(name, layer, check, Verdict.KNOWN, culprit.divergence)
    return Row(name, layer, check, Verdict.WRONG_HERE, diagnosis=culprit.diagnosis)


def _off(examination: Examination, check: TensorCheck) -> TensorCheck | None:
    """How far the tensor is from the reference's own sweep, where anything is wrong at all."""
    got = examination.trace.got.get(check.key)
    if examination.agrees or not usable(got, check.shape) or check.key not in examination.sweep.expected:
        return None
    return examination.sweep.off(check.key, got)


def _owner(check: TensorCheck, network: Network) -> str:
    """The node that computed the tensor: a value's own node; for a gradient, a node that reads the tensor."""
    nodes = {node.name for node in network.nodes}
    readers = [name for name, _ in network.consumers.get(check.key.name, ())]
    if check.kind in WHOLE_RUN or (check.key.role is Role.VALUE and check.key.name in nodes) or not readers:
        return check.key.name if check.key.name in nodes else network.output
    return readers[0]


def _backward_order(checks: Sequence[TensorCheck], network: Network) -> list[TensorCheck]:
    """Values first, in forward order, for all gradients follow from them; then gradients, from the loss back.

    Before all others those that were overwritten, for whatever reads them afterwards goes wrong.
    """
    values = [check for check in checks if check.key.role is Role.VALUE]
    values.sort(key=lambda check: check.kind is not Wrong.MUTATED_INPUT)
    gradients = [check for check in checks if check.key.role is Role.GRADIENT]
    position = {node.name: i for i, node in enumerate(reversed(network.nodes))}
    last_reader: Mapping[str, int] = {
        name: max((position[reader] for reader, _ in readers), default=-1)
        for name, readers in network.consumers.items()
    }
    return values + sorted(gradients, key=lambda check: last_reader.get(check.key.name, len(position)))
