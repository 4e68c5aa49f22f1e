"""Planted faults: mistakes that people make in a backward pass, each as an adapter that makes it.

They are the reference with one row replaced, or with one step of its walk done wrong.
"""

from __future__ import annotations

from gradproof.trust.faults.kernels import KERNEL_FAULTS
from gradproof.trust.faults.kinds import KIND_FAULTS
from gradproof.trust.faults.making import Fault
from gradproof.trust.faults.misbehaviour import MISBEHAVIOUR
from gradproof.trust.faults.rows import ROW_FAULTS
from gradproof.trust.faults.structure import STRUCTURE_FAULTS
from gradproof.trust.faults.walk import TAPE_FAULTS, WALK_FAULTS

__all__ = [
    "FAULTS",
    "KERNEL_FAULTS",
    "KIND_FAULTS",
    "MISBEHAVIOUR",
    "ROW_FAULTS",
    "SORTS",
    "TAPE_FAULTS",
    "WALK_FAULTS",
    "Fault",
]

SORTS = (
    ROW_FAULTS,
    STRUCTURE_FAULTS,
    KIND_FAULTS,
    KERNEL_FAULTS,
    WALK_FAULTS,
    TAPE_FAULTS,
    tuple(MISBEHAVIOUR.values()),
)

FAULTS: dict[str, Fault] = {fault.name: fault for sort in SORTS for fault in sort}
