"""Planted faults: mistakes that people make in a backward pass, each as an adapter that makes it.

They are the reference with one row replaced, or with one step of its walk done wrong.
"""

from __future__ import annotations

from gradproof.faults.kernels import KERNEL_FAULTS
from gradproof.faults.kinds import KIND_FAULTS
from gradproof.faults.making import Fault
from gradproof.faults.misbehaviour import MISBEHAVIOUR
from gradproof.faults.rows import ROW_FAULTS
from gradproof.faults.structure import STRUCTURE_FAULTS
from gradproof.faults.walk import TAPE_FAULTS, WALK_FAULTS

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
