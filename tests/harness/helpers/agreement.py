"""Statements whose floor is simply given, and the check of one tensor against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from gradproof.model.tensors import Tensor, gradient_of
from gradproof.reference import NumpyReference
from gradproof.verdict.agreement import FEW_RUNS, TensorCheck, judge
from gradproof.verdict.equations import Arithmetic, Floor, Statement

KEY = gradient_of("x")


@dataclass(frozen=True, eq=False)
class GivenFloor(Statement):
    """A statement whose floor is simply given, and what was asked of it.

    spread, few: of many and (where it differs) of few runs. overflows: flat indices of elements without a floor.
    """

    spread: Any = 0.0
    few: Any = None
    overflows: Sequence[int] = ()
    counts: list[int] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)

    def floor(
        self,
        count: int,
        arithmetics: Mapping[str, Arithmetic],
        references: Mapping[str, NumpyReference] | None = None,
    ) -> Floor:
        self.counts.append(count)
        self.asked.append((arithmetics, references))
        spread = self.few if self.few is not None and count == FEW_RUNS else self.spread
        lost = np.isin(np.arange(self.expected.size), self.overflows).reshape(self.expected.shape)
        return Floor(np.where(lost, 0.0, np.broadcast_to(spread, self.expected.shape)), lost)


def stated(
    expected: Any, spread: Any = 0.0, key: Tensor = KEY, readers: Sequence[str] = ("r",), **more: Any
) -> GivenFloor:
    """What a tensor must be, as the sum of what these readers send."""
    wanted = np.asarray(expected, np.float64)
    parts: Any = tuple((SimpleNamespace(node=SimpleNamespace(name=name)), "x") for name in readers)
    return GivenFloor(key, wanted, more.pop("size", np.abs(wanted)), parts, spread=spread, **more)


def checked(expected: Any, got: Any, spread: Any = 0.0, dtype: str = "float64", **more: Any) -> TensorCheck:
    """The check of one tensor; lists become arrays in the dtype."""
    return judged(stated(expected, spread, **more), got, dtype)


def judged(statement: Statement, got: Any, dtype: str = "float64", **classes: Arithmetic) -> TensorCheck:
    return judge(statement, np.asarray(got, dtype) if isinstance(got, (list, float)) else got, dtype, classes)
