"""What was found for one adapter on one case: the checks, and the nodes that are to blame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from gradproof.model.case import Case
from gradproof.model.network import Node
from gradproof.model.tensors import Role, Tensor
from gradproof.reference.walk import Conventions
from gradproof.verdict.agreement import TensorCheck
from gradproof.verdict.diagnosis import Diagnosis, Observation, diagnose, diagnose_sum
from gradproof.verdict.divergence import Divergence
from gradproof.verdict.equations import Equations
from gradproof.verdict.running import Trace
from gradproof.verdict.sweep import Sweep


@dataclass(frozen=True)
class Culprit:
    """A node whose equation fails.

    keys: of the tensors that are wrong by its fault. divergence: the known one that explains them.
    observation: the node on the numbers that the adapter had in the network, None where they are not known.
    around: the gradients of its readers' outputs, of which its cotangent may be a part in memory.
    in_place: what a diagnosis in place has found already.
    """

    node: Node
    keys: tuple[Tensor, ...]
    divergence: Divergence | None = None
    observation: Observation | None = field(default=None, repr=False, compare=False)
    around: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    in_place: Diagnosis | None = field(default=None, repr=False, compare=False)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """Which known mistakes reproduce its numbers; found when it is asked for."""
        if self.in_place is not None or self.divergence or not self.observation:
            return self.in_place or Diagnosis()
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
        found = (sum_diagnosis(self.equations, self.trace, check) for check in self.unblamed)
        return next((each for each in found if each), Diagnosis())

    @cached_property
    def sweep(self) -> Sweep:
        """The reference's own sweep over the case, which shows what an error did further down."""
        return Sweep(self.case, self.conventions)


def sum_diagnosis(equations: Equations, trace: Trace, check: TensorCheck) -> Diagnosis:
    """The mistakes in adding up what the readers of this tensor send back."""
    if check.evidence is None or check.key.role is not Role.GRADIENT:
        return Diagnosis()
    return diagnose_sum(equations[check.key], trace.got[check.key], check)
