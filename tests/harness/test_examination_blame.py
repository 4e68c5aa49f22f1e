"""Examining one adapter on one case: which node is blamed for what is wrong, and what none is to blame for."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import TOLD, Forward, message_of
from gradproof.model.network import Network
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference import LAYERS, NumpyReference
from gradproof.run.results import disagreements
from gradproof.trust.faults import FAULTS
from gradproof.verdict.examination import Examination
from gradproof.verdict.rows import rows
from helpers.adapters import OnlyOneLayer, row_with, spoilt
from helpers.examining import EACH_DTYPE, culprits, examined, verdicts, wrong
from helpers.networks import SHARED, SIX, TWICE, X, network, node

Array = np.ndarray[Any, Any]


# Blame.


@pytest.mark.parametrize("clean", [SIX, SHARED, TWICE], ids=["six", "shared", "twice"])
@EACH_DTYPE
def test_the_reference_agrees_with_itself(clean: Network, dtype: str) -> None:
    examination = examined(NumpyReference(), clean, dtype)
    assert examination.agrees
    assert not examination.known
    assert examination.culprits == ()
    assert {row.verdict for row in rows(examination)} == {"agrees"}


@EACH_DTYPE
@pytest.mark.parametrize("name", [each.name for each in SIX.nodes])
def test_one_faulty_node_is_named_and_no_other(name: str, dtype: str) -> None:
    assert culprits(examined(spoilt(SIX.node(name).layer.name), dtype=dtype)) == [name]


def test_what_the_fault_spoils_behind_it_is_inherited() -> None:
    examination = examined(spoilt("sigmoid"))
    assert wrong(examination) == {gradient_of("bent"): "gradient"}
    assert {key: verdict for key, verdict in verdicts(examination).items() if verdict != "agrees"} == {
        gradient_of("bent"): "WRONG HERE",
        gradient_of("line"): "inherited",
        gradient_of("x"): "inherited",
        gradient_of("w"): "inherited",
        gradient_of("b"): "inherited",
    }


def test_a_wrong_tensor_belongs_to_the_guilty_one_of_its_readers() -> None:
    for layer, name in (("sigmoid", "gate"), ("softplus", "rise")):
        (row,) = [row for row in rows(examined(spoilt(layer))) if row.verdict == "WRONG HERE"]
        assert (row.node, row.layer, row.check.key.name) == (name, layer, "bent")


def test_two_faults_at_once_are_both_named() -> None:
    assert culprits(examined(spoilt("sigmoid", "linear"))) == ["line", "gate"]
    assert culprits(examined(spoilt("tanh", "mse", "multiply"))) == ["bent", "gated", "loss"]


class Misreporting(NumpyReference):
    """The reference, which goes on with the right gradient of one tensor and gives another."""

    def __init__(self, tensor: str, spoil: Callable[[Array], Array], **rows: Any) -> None:
        super().__init__(**rows)
        self.tensor = tensor
        self.spoil = spoil

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Any]:
        gradients = super().backward(forward, cotangent)
        if self.tensor == forward.tape[0].output:  # as where it stands alone
            return gradients
        return {**gradients, self.tensor: self.spoil(gradients[self.tensor])}


CHAIN = network(X, node("below", "square", "x"), node("middle", "tanh", "below"), node("above", "exp", "middle"))


@pytest.mark.parametrize(
    "spoil", [lambda g: 2.0 * g, lambda g: g.astype(np.float16)], ids=["doubled", "in another dtype"]
)
def test_who_reads_a_gradient_that_was_not_gone_on_with_is_not_blamed(spoil: Callable[[Array], Array]) -> None:
    found = examined(Misreporting("below", spoil), CHAIN)
    assert set(wrong(found)) == {gradient_of("below"), gradient_of("x")}
    assert culprits(found) == ["middle"]
    assert set(found.culprits[0].keys) == {gradient_of("below"), gradient_of("x")}


def test_who_is_wrong_behind_a_gradient_that_was_not_gone_on_with_is_blamed_too() -> None:
    row = row_with("square", lambda g, dout: {"x": 5.0 * g["x"]})
    found = examined(Misreporting("below", lambda g: 2.0 * g, rows={"square": row}), CHAIN)
    assert culprits(found) == ["below", "middle"]


def test_every_use_of_a_faulty_layer_is_named() -> None:
    assert culprits(examined(spoilt("linear"), SHARED)) == ["first", "second"]


def test_a_culprit_comes_with_its_own_part() -> None:
    (culprit,) = examined(spoilt("sigmoid")).culprits
    assert culprit.keys == (gradient_of("bent"),)
    assert culprit.observation is not None
    assert {check.key: check.kind for check in culprit.observation.checks} == {
        value_of("gate"): None,
        gradient_of("gate"): None,
        gradient_of("bent"): "gradient",
    }
    assert culprit.divergence is None


def test_a_wrong_parameter_gradient_is_blamed_on_its_layer() -> None:
    examination = examined(FAULTS["linear_element_zeroed"].make())
    assert wrong(examination) == {gradient_of("w"): "gradient"}
    assert culprits(examination) == ["line"]


def test_a_fault_in_the_forward_pass_is_blamed_where_it_stands() -> None:
    forward = LAYERS["tanh"].forward
    adapter = NumpyReference(rows={"tanh": (lambda x: (1.25 * forward(x)[0], forward(x)[1]), LAYERS["tanh"].backward)})
    examination = examined(adapter)
    assert culprits(examination) == ["bent"]
    told = verdicts(examination)
    assert told[value_of("line")] == "agrees"
    assert told[value_of("bent")] == "WRONG HERE"
    assert {told[value_of(name)] for name in ("gate", "rise", "gated", "loss")} == {"inherited"}


@pytest.mark.parametrize("spoil", ["a missing gradient", "a wrong shape"])
def test_a_structural_fault_is_blamed_too(spoil: str) -> None:
    fault = FAULTS[{"a missing gradient": "returns_none", "a wrong shape": "wrong_shape"}[spoil]]
    examination = examined(fault.make())
    assert wrong(examination) == {gradient_of("line"): {"returns_none": "missing", "wrong_shape": "shape"}[fault.name]}
    assert culprits(examination) == ["bent"]


@EACH_DTYPE
def test_a_missing_gradient_behind_a_missing_one_is_inherited(dtype: str) -> None:
    """A layer that is given no gradient can send none back: only the first is its own layer's fault."""
    of = network(X, node("a", "sigmoid", "x"), node("b", "tanh", "a"), node("out", "exp", "b"))

    class Stopping(NumpyReference):
        """Nothing is sent back beyond a tanh."""

        def backward(self, forward: Forward, cotangent: Array) -> dict[str, Any]:
            gradients: dict[str, Any] = super().backward(forward, cotangent)
            nodes = forward.tape[0].nodes
            first = next((i for i, each in enumerate(nodes) if each.layer.name == "tanh"), -1)
            lost = {source for each in nodes[: first + 1] for _, source in each.sources}
            return {name: None if name in lost else gradient for name, gradient in gradients.items()}

    examination = examined(Stopping(), of, dtype)
    assert wrong(examination) == {gradient_of("a"): "missing", gradient_of("x"): "missing"}
    assert culprits(examination) == ["b"]
    told = verdicts(examination)
    assert (told[gradient_of("a")], told[gradient_of("x")]) == ("WRONG HERE", "inherited")
    assert [(each.tensor, each.kind) for each in disagreements(examination, None)] == [("a", "missing")]


# What no layer is to blame for.


@EACH_DTYPE
@pytest.mark.parametrize("fault", ["fan_out_path_dropped", "fan_out_path_doubled"])
def test_a_wrong_sum_over_paths_is_a_fault_of_composition(fault: str, dtype: str) -> None:
    examination = examined(FAULTS[fault].make(), dtype=dtype)
    assert culprits(examination) == []
    assert not examination.known
    told = verdicts(examination)
    assert [key for key, verdict in told.items() if verdict == "composition"] == [gradient_of("bent")]
    assert {told[gradient_of(name)] for name in ("line", "x", "w", "b")} == {"inherited"}


def kinds_of_culprits(examination: Examination) -> set[tuple[str, str]]:
    """Tensor and kind of the disagreements that are nobody's inheritance."""
    return {(each.tensor, each.kind) for each in disagreements(examination, None) if each.culprit}


@pytest.mark.parametrize(("of", "tensor"), [(SIX, "bent"), (SHARED, "w"), (TWICE, "x")], ids=["six", "shared", "twice"])
@pytest.mark.parametrize("fault", ["fan_out_path_dropped", "fan_out_path_doubled"])
def test_a_fault_of_composition_names_the_tensor(fault: str, of: Network, tensor: str) -> None:
    examination = examined(FAULTS[fault].make(), of)
    assert culprits(examination) == []
    assert kinds_of_culprits(examination) == {(tensor, "composition")}


@EACH_DTYPE
def test_every_sum_that_goes_wrong_is_named(dtype: str) -> None:
    """Each sum is checked on what its readers really sent: an earlier wrong one excuses none, and spoils none."""
    of = network(X, node("a", "tanh", "x"), node("b", "multiply", "a", "x"), node("out", "add", "b", "a"))
    examination = examined(FAULTS["fan_out_path_dropped"].make(), of, dtype)
    assert culprits(examination) == []
    assert [check.key for check in examination.unblamed] == [gradient_of("a"), gradient_of("x")]
    assert kinds_of_culprits(examination) == {("a", "composition"), ("x", "composition")}


def test_what_a_layer_is_to_blame_for_is_not_unblamed() -> None:
    examination = examined(spoilt("sigmoid"))
    assert examination.wrong
    assert examination.unblamed == ()


def test_a_node_that_reads_one_tensor_twice_is_blamed_for_its_own_fault() -> None:
    minus = network(X, node("a", "tanh", "x"), node("b", "subtract", "a", "a"), node("out", "multiply", "b", "x"))
    assert culprits(examined(FAULTS["subtract_sign_lost"].make(), minus)) == ["b"]


class Wavering(NumpyReference):
    """Wrong by one factor after the other; a call without a factor fails."""

    def __init__(self, factors: list[float | None]) -> None:
        super().__init__()
        self.factors = cycle(factors)

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Any]:
        factor = next(self.factors)
        if factor is None:
            raise RuntimeError("not again")
        return {name: gradient * factor for name, gradient in super().backward(forward, cotangent).items()}


@pytest.mark.parametrize(
    ("factors", "kind"),
    [
        ([2.0, 2.0], "gradient"),
        ([2.0, 2.0 + 1e-12], "gradient"),
        ([2.0, 3.0], "nondeterministic"),
        ([2.0, 1.0], "nondeterministic"),
        ([2.0, np.nan], "nondeterministic"),
        ([np.nan, np.nan], "nonfinite"),
        ([2.0, None], "nondeterministic"),
    ],
)
def test_what_is_wrong_in_another_way_when_called_again_is_nondeterministic(
    factors: list[float | None], kind: str
) -> None:
    examination = examined(Wavering(factors), network(X, node("bent", "tanh", "x")))
    assert {check.key: check.kind for check in examination.wrong}[gradient_of("bent")] == kind
    assert culprits(examination) == ["bent"]
    assert not examination.known


def test_a_page_of_an_error_is_cut_to_one_line() -> None:
    message = message_of(ValueError("a traced array\n" * 1000))
    assert message.startswith("ValueError: a traced array a traced array ")
    assert message.endswith(" ...")
    assert len(message) <= len("ValueError: ") + TOLD
    assert "\n" not in message


def test_a_crash_that_no_layer_has_alone() -> None:
    examination = examined(OnlyOneLayer())
    (check,) = examination.checks
    assert (check.key, check.kind) == (value_of("loss"), "crash")
    assert re.fullmatch(
        r"NotImplementedError: one layer at a time \(\S*helpers/adapters.py:\d+ in forward\)", check.got
    )
    assert culprits(examination) == []
    assert [(row.node, row.verdict) for row in rows(examination)] == [("loss", "composition")]
    assert [each.kind for each in disagreements(examination, None)] == ["crash"]
