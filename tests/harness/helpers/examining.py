"""Examining an adapter on one case, and what is asked of what was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from gradproof.model.adapter import Adapter
from gradproof.model.case import Case
from gradproof.model.dtypes import DTYPES, HALF
from gradproof.model.network import Network
from gradproof.model.tensors import tensors
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.rows import rows
from helpers.networks import SIX, ordinary

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
EACH_HALF = pytest.mark.parametrize("dtype", HALF)


def examined(
    adapter: Adapter, of: Network | Case = SIX, dtype: str = "float64", timeout: float = 60.0, demanded: str = "every"
) -> Examination:
    """The adapter on a case, or on ordinary numbers of this dtype for a network."""
    case = ordinary(of, dtype) if isinstance(of, Network) else of
    return examine(Subject(adapter, {}, timeout=timeout, demanded=demanded), case)


def wrong(examination: Examination) -> dict[str, str | None]:
    """Key of a tensor that is wrong -> how."""
    return {check.key: check.kind for check in examination.wrong}


def culprits(examination: Examination) -> list[str]:
    """The nodes that are to blame."""
    return [culprit.node.name for culprit in examination.culprits]


def guilty_layers(examination: Examination) -> list[str]:
    """The layers of the nodes that are to blame."""
    return [culprit.node.layer.name for culprit in examination.culprits]


def verdicts(examination: Examination) -> dict[str, str]:
    """Key of a tensor -> verdict, of the rows about gradients and what is wrong."""
    return {row.check.key: row.verdict for row in rows(examination)}


def results(adapter: Adapter, of: Case) -> Mapping[str, Any]:
    """Key -> array of every value and every gradient that the adapter gives; it gets copies of what is given."""
    forward = adapter.forward(of.network, {name: value.copy() for name, value in of.values.items()}, of.dtype)
    return tensors(forward.outputs, adapter.backward(forward, of.cotangent.copy()))
