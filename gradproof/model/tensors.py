"""The names that a run goes by: of its tensors, and of what can be wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple


class Role(StrEnum):
    """What a tensor is to the sweep."""

    VALUE = "value"
    GRADIENT = "gradient"


class Tensor(NamedTuple):
    """A tensor of one run: the value of a node, or the gradient of a node, an input or a parameter.

    As a string "value:NODE" or "gradient:NAME".
    """

    role: Role
    name: str

    def __str__(self) -> str:
        return f"{self.role}:{self.name}"


def value_of(name: str) -> Tensor:
    return Tensor(Role.VALUE, name)


def gradient_of(name: str) -> Tensor:
    return Tensor(Role.GRADIENT, name)


def tensors(outputs: Mapping[str, Any], gradients: Mapping[str, Any]) -> dict[Tensor, Any]:
    """Values and gradients under one roof. An adapter's names need not be strings."""
    values = {value_of(str(name)): array for name, array in outputs.items()}
    return values | {gradient_of(str(name)): array for name, array in gradients.items()}


class Wrong(StrEnum):
    """What can be wrong with a tensor, or with a run."""

    VALUE = "value"
    GRADIENT = "gradient"
    NONFINITE = "nonfinite"
    SHAPE = "shape"
    DTYPE = "dtype"
    MISSING = "missing"
    NONDETERMINISTIC = "nondeterministic"
    MUTATED_INPUT = "mutated_input"
    VIEW = "view"
    REUSED_BUFFER = "reused_buffer"
    ARITHMETIC = "arithmetic"
    ACCURACY = "accuracy"
    BIAS = "bias"
    GLOBAL_STATE = "global_state"
    CRASH = "crash"
    TIMEOUT = "timeout"
    MEMORY = "memory"


NOTHING_GIVEN = (Wrong.CRASH, Wrong.TIMEOUT, Wrong.MEMORY)
"""What is found of a run that gave no tensors at all."""

WHOLE_RUN = (*NOTHING_GIVEN, Wrong.GLOBAL_STATE)
"""What is found of a run as a whole, not of a tensor."""
