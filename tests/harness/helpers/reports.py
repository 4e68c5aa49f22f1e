"""Small cases with a fault, and what is printed of them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest
from rich.console import RenderableType

from gradproof.model.adapter import Adapter, Forward
from gradproof.model.case import Case
from gradproof.model.layer import Layer
from gradproof.model.network import Input, Node
from gradproof.model.options import Options
from gradproof.reference import NumpyReference
from gradproof.run.check import replay
from gradproof.run.results import Report
from gradproof.show.report import OutputConsole
from gradproof.trust.faults import FAULTS
from gradproof.verdict.examination import Examination
from helpers.networks import case_of, network, node

VERSION = f"NumPy {np.__version__}"


def case(nodes: tuple[Node, ...], cotangent: Any, dtype: str = "float64", **values: Any) -> Case:
    """A case whose inputs are the arrays given by name."""
    inputs = (Input(name, np.shape(value)) for name, value in values.items())
    return case_of(network(*inputs, *nodes), dtype, cotangent, **values)


def gated() -> Case:
    """x[2,2] -> relu -> multiply(y[2,2])"""
    nodes = (node("h", "relu", "x"), node("out", "multiply", "h", "y"))
    return case(nodes, [[1.0, 2.0], [3.0, 4.0]], x=[[1.0, -2.0], [-3.0, 4.0]], y=[[0.5, 0.5], [2.0, 2.0]])


def bent(dtype: str = "float64") -> Case:
    """x[2] -> tanh -> identity"""
    return case((node("t", "tanh", "x"), node("o", "identity", "t")), [1.0, 2.0], dtype, x=[0.0, 0.0])


def fault(name: str) -> Adapter:
    """The reference with a planted fault."""
    return FAULTS[name].make()


def replayed(adapter: Adapter, of: Case, timeout: float = 60.0) -> tuple[Examination, Report]:
    """The one examination that disagrees, and the report that it stands in."""
    report = replay(of, [adapter], timeout)
    ((examination, spec),) = report.examinations
    assert spec is None
    return examination, report


def settled(text: str) -> list[str]:
    """The lines, with single spaces, and N for noise units so large that they depend on the noise drawn."""
    return [" ".join(re.sub(r"\b\d(\.\d+)?e\+1\d\b", "N", line).split()) for line in text.splitlines()]


def rendered(what: RenderableType, width: int = 200) -> str:
    """What appears on standard output."""
    target = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(target):
        patched.setenv("COLUMNS", str(width))
        OutputConsole().show(what)
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines())


class Changed(NumpyReference):
    """The reference under another name, with something changed.

    row: a layer and the pair to use for it. lacking: a layer that is not supported.
    raising, extra: what the backward pass raises, or returns beside what it should, wherever there is a tanh.
    """

    name = "mine"

    def __init__(
        self,
        row: tuple[str, Any] | None = None,
        lacking: str = "",
        raising: Exception | None = None,
        extra: Mapping[str, Any] | None = None,
        version: str = "1.0",
    ) -> None:
        super().__init__(rows=dict([row] if row else []))
        self._lacking, self._raising, self._extra, self._version = lacking, raising, extra or {}, version

    def version(self) -> str:
        return self._version

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool:
        return layer.name != self._lacking

    def backward(self, forward: Forward, cotangent: np.ndarray) -> dict[str, np.ndarray]:
        gradients = super().backward(forward, cotangent)
        if all(node.layer.name != "tanh" for node in forward.tape[0].nodes):
            return gradients
        if self._raising:
            raise self._raising
        return {**gradients, **self._extra}
