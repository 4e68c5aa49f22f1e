"""The per-layer diff as data: every tensor of an examination, from the loss back to the inputs, with its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradproof.model.network import Network
from gradproof.verdict.agreement import TensorCheck
from gradproof.verdict.diagnosis import Diagnosis
from gradproof.verdict.divergence import Divergence
from gradproof.verdict.equations import usable
from gradproof.verdict.examination import Culprit, Examination
from gradproof.verdict.running import OF_THE_RUN


@dataclass(frozen=True)
class Row:
    """One line of the per-layer diff: a tensor, the node it belongs to, and the verdict on it.

    verdict: "agrees"; "inherited" where its own equation holds, but an earlier error has moved it, by as much as the
    check then says; "WRONG HERE" where its equation fails; "known divergence"; or "composition" where it is wrong by no
    layer's fault.
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
        return Row(name, layer, off or check, "inherited" if off else "agrees")
    if culprit is None:
        follows = check.kind == "missing" and check.got == "None" and bool(examination.culprits)
        return Row(name, layer, check, "inherited" if follows else "composition", diagnosis=examination.diagnosis)
    if culprit.divergence:
        return Row(name, layer, check, "known divergence", culprit.divergence)
    return Row(name, layer, check, "WRONG HERE", diagnosis=culprit.diagnosis)


def _off(examination: Examination, check: TensorCheck) -> TensorCheck | None:
    """How far the tensor is from the reference's own sweep, where anything is wrong at all."""
    got = examination.trace.got.get(check.key)
    if examination.agrees or not usable(got, check.shape) or check.key not in examination.sweep.expected:
        return None
    return examination.sweep.off(check.key, got)


def _owner(check: TensorCheck, network: Network) -> str:
    """The node that computed the tensor: a value's own node; for a gradient, a node that reads the tensor."""
    nodes = {node.name for node in network.nodes}
    readers = [name for name, _ in network.consumers.get(check.tensor, ())]
    if check.kind in OF_THE_RUN or (check.role == "value" and check.tensor in nodes) or not readers:
        return check.tensor if check.tensor in nodes else network.output
    return readers[0]


def _backward_order(checks: Sequence[TensorCheck], network: Network) -> list[TensorCheck]:
    """Values first, in forward order, for all gradients follow from them; then gradients, from the loss back.

    Before all others those that were overwritten, for whatever reads them afterwards goes wrong.
    """
    values = [check for check in checks if check.role == "value"]
    values.sort(key=lambda check: check.kind != "mutated_input")
    gradients = [check for check in checks if check.role == "gradient"]
    position = {node.name: i for i, node in enumerate(reversed(network.nodes))}
    last_reader: Mapping[str, int] = {
        name: max((position[reader] for reader, _ in readers), default=-1)
        for name, readers in network.consumers.items()
    }
    return values + sorted(gradients, key=lambda check: last_reader.get(check.tensor, len(position)))
