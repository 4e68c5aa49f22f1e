"""Adapters that hang, crash, or write to what they were given: each gets a verdict, and the case stays as it was."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import Forward
from gradproof.model.case import Case
from gradproof.model.layer import UNIT
from gradproof.model.network import Input, Network
from gradproof.model.tensors import value_of
from gradproof.reference import NumpyReference
from gradproof.trust.faults import FAULTS
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.rows import rows
from helpers.adapters import OnlyOneLayer, spoilt
from helpers.examining import EACH_DTYPE, culprits, examined, wrong
from helpers.networks import SIX, TWICE, X, network, node, ordinary

Array = np.ndarray[Any, Any]


class Hanging(NumpyReference):
    """Does not come back from the backward pass of a network with a tanh in it."""

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        while any(each.layer.name == "tanh" for each in forward.tape[0].nodes):
            time.sleep(0.01)
        return super().backward(forward, cotangent)


def test_an_adapter_that_hangs_times_out_and_its_layer_is_named() -> None:
    examination = examined(Hanging(), timeout=0.2)
    (check,) = examination.checks
    assert (check.kind, check.got, check.noise_units) == ("timeout", "no result after 0.2 s", np.inf)
    assert culprits(examination) == ["bent"]
    (row,) = rows(examination)[-1:]
    assert (row.node, row.verdict) == ("bent", "WRONG HERE")


class Stubborn(NumpyReference):
    """Slow, and deaf to exceptions."""

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        for _ in range(10):
            try:
                time.sleep(0.05)
            except Exception:
                continue
        return super().forward(network, values, dtype)


def test_an_adapter_that_swallows_exceptions_times_out_all_the_same() -> None:
    assert wrong(examined(Stubborn(), TWICE, timeout=0.1)) == {value_of("square"): "timeout"}


def test_an_adapter_that_crashes_names_its_layer() -> None:
    examination = examined(FAULTS["raises"].make())
    assert [check.kind for check in examination.checks] == ["crash"]
    assert culprits(examination) == ["bent"]


@EACH_DTYPE
@pytest.mark.parametrize("name", [each.name for each in SIX.nodes])
def test_a_crash_in_a_backward_pass_is_blamed_on_its_node_with_the_line_that_raised(name: str, dtype: str) -> None:
    layer = SIX.node(name).layer

    def broken(dout: Array, cache: Any) -> dict[str, Array]:
        return {"x": dout @ np.ones((1 + dout.size, 1, 7))}

    examination = examined(NumpyReference(rows={layer.name: (layer.forward, broken)}), dtype=dtype)
    (check,) = examination.checks
    assert (check.kind, culprits(examination)) == ("crash", [name])
    line = re.escape('return {"x": dout @ np.ones((1 + dout.size, 1, 7))}')
    where = rf"\(\S*test_examination_misbehaviour.py:\d+ in broken: {line}\)"
    assert re.fullmatch(rf"ValueError: matmul: .* {where}", check.got)


@pytest.mark.parametrize("error", [KeyError("k"), ZeroDivisionError(), RecursionError("deep"), SystemExit(3)])
def test_whatever_is_raised_is_a_crash(error: BaseException) -> None:
    class Raising(NumpyReference):
        def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
            raise error

    (check,) = examined(Raising()).checks
    assert check.kind == "crash"
    assert type(error).__name__ in check.got


@pytest.mark.parametrize("nothing", [None, 3, [1, 2]])
def test_a_backward_pass_that_returns_no_mapping_is_a_crash(nothing: Any) -> None:
    class Useless(NumpyReference):
        def backward(self, forward: Forward, cotangent: Array) -> Any:
            return nothing

    assert [check.kind for check in examined(Useless()).checks] == ["crash"]


def test_an_interrupt_is_no_verdict() -> None:
    class Interrupted(NumpyReference):
        def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examined(Interrupted())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_written_input_is_named(dtype: str) -> None:
    of = network(X, node("a", "identity", "x"), node("out", "relu", "a"))
    straight = network(X, node("out", "relu", "x"))
    fault = FAULTS["writes_to_its_input"].make()
    assert wrong(examined(fault, straight, dtype)) == {value_of("x"): "mutated_input"}
    # In a longer network it is the value of the node before that is spoilt.
    spoiling = examined(fault, of, dtype)
    assert value_of("a") in wrong(spoiling)
    assert culprits(spoiling) == ["out"]


class Scribbling(NumpyReference):
    """Right, but writes to one of the arrays that it was given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        copies = {name: value.copy() for name, value in values.items()}
        if self._name in values:
            values[self._name][...] = 7.0
        return super().forward(network, copies, dtype)

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        gradients = super().backward(forward, cotangent.copy())
        if self._name == "cotangent":
            cotangent[...] = 7.0
        return gradients


@pytest.mark.parametrize("name", ["x", "target", "w", "b", "cotangent"])
def test_every_given_array_is_watched(name: str) -> None:
    of = ordinary(SIX)
    before = {**{each: value.copy() for each, value in of.values.items()}, "cotangent": of.cotangent.copy()}
    examination = examine(Subject(Scribbling(name), {}), of)
    assert wrong(examination) == {value_of(name): "mutated_input"}
    for each, array in {**of.values, "cotangent": of.cotangent}.items():
        np.testing.assert_array_equal(array, before[each])


def test_an_input_may_be_called_cotangent() -> None:
    of = network(Input("cotangent", (8,)), node("out", "relu", "cotangent"))
    assert wrong(examined(FAULTS["writes_to_its_input"].make(), of)) == {value_of("cotangent"): "mutated_input"}


class Hoarding(NumpyReference):
    """Keeps every array that it was given or gave, and scribbles on all of them when it is called again."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Array] = []

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        for array in self._kept:
            array[...] = 7
        self._kept = [*values.values()]
        return super().forward(network, {name: value.copy() for name, value in values.items()}, dtype)

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        self._kept.append(cotangent)
        return super().backward(forward, cotangent.copy())


def test_an_adapter_that_keeps_its_arrays_cannot_spoil_the_case() -> None:
    of, hoarder = ordinary(SIX), Hoarding()
    before = {name: value.copy() for name, value in of.values.items()}
    assert examine(Subject(hoarder, {}), of).agrees
    assert examine(Subject(hoarder, {}), of).agrees
    for name, value in before.items():
        np.testing.assert_array_equal(of.values[name], value)
    assert examine(Subject(NumpyReference(), {}), of).agrees


def test_nan_in_an_input_is_not_taken_for_writing() -> None:
    of = ordinary(TWICE)
    holed = Case(TWICE, "float64", {"x": np.where(of.values["x"] > 0, np.nan, of.values["x"])}, of.cotangent)
    assert examine(Subject(NumpyReference(), {}), holed).agrees


def test_blame_survives_numbers_that_leave_their_domain() -> None:
    """Beyond the range of float64, the reference itself has NaN where a probability belongs."""
    of = network(
        Input("x", (2,)),
        Input("target", (2,), UNIT),
        node("huge", "multiply", "x", "x"),
        node("lost", "subtract", "huge", "huge"),
        node("p", "sigmoid", "lost"),
        node("loss", "bce", "p", "target"),
    )
    values = {"x": np.array([1e200, 0.5]), "target": np.array([0.25, 0.75])}
    examination = examine(Subject(spoilt("bce"), {}), Case(of, "float64", values, np.array(1.5)))
    assert examination.agrees or "loss" in culprits(examination)
    crash = examine(Subject(OnlyOneLayer(), {}), Case(of, "float64", values, np.array(1.5)))
    assert [check.kind for check in crash.checks] == ["crash"]


def test_a_subject_needs_every_layer() -> None:
    class WithoutTanh(NumpyReference):
        def supports(self, layer: Any, options: Any, dtype: str) -> bool:
            return layer.name != "tanh" and dtype == "float64"

    subject = Subject(WithoutTanh(), {})
    assert not subject.supports(SIX, "float64")
    assert subject.supports(TWICE, "float64")
    assert not subject.supports(TWICE, "float32")
