"""Examining one adapter on one case: who is blamed, in which order it is told, and what keeps a bad adapter at bay."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from gradproof.draw.drawing import Drawn, drawn_networks
from gradproof.model.adapter import TOLD, Adapter, Forward, told
from gradproof.model.case import Case
from gradproof.model.layer import UNIT
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import OptionValue
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.walk import Conventions
from gradproof.run.results import disagreements
from gradproof.trust.faults import FAULTS
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.rows import Row, rows
from gradproof.verdict.running import TimeLimitError, time_limit
from gradproof.verdict.sweep import Sweep, alone_as_the_sweep_has_it

Array = np.ndarray[Any, Any]

EACH_DTYPE = pytest.mark.parametrize("dtype", ["float64", "float32"])


def node(name: str, layer: str, *inputs: str, parameters: str = "", **options: OptionValue) -> Node:
    """A node; its parameters are written "slot:name slot:name"."""
    pairs = dict(pair.split(":") for pair in parameters.split())
    return Node.of(name, LAYERS[layer], *inputs, parameters=pairs, options=options)


def network(*parts: Input | Node) -> Network:
    inputs = tuple(part for part in parts if isinstance(part, Input))
    return Network(inputs, tuple(part for part in parts if isinstance(part, Node)))


X = Input("x", (2, 3))

SIX = network(
    X,
    Input("target", (2, 4)),
    node("line", "linear", "x", parameters="weight:w bias:b", features=4),
    node("bent", "tanh", "line"),
    node("gate", "sigmoid", "bent"),
    node("rise", "softplus", "bent"),
    node("gated", "multiply", "gate", "rise"),
    node("loss", "mse", "gated", "target"),
)

SHARED = network(
    X,
    node("first", "linear", "x", parameters="weight:w", features=3, use_bias=False),
    node("middle", "tanh", "first"),
    node("second", "linear", "middle", parameters="weight:w", features=3, use_bias=False),
)

TWICE = network(X, node("square", "multiply", "x", "x"))

EACH_CLEAN = pytest.mark.parametrize("clean", [SIX, SHARED, TWICE], ids=["six", "shared", "twice"])


def case(of: Network, dtype: str = "float64") -> Case:
    return Drawn(of, seed=11, edge_share=0.0, scale=1.0).case(dtype)


def examined(adapter: Adapter, of: Network = SIX, dtype: str = "float64", timeout: float = 60.0) -> Examination:
    return examine(Subject(adapter, {}, timeout=timeout), case(of, dtype))


def spoilt(*layers: str, factor: float = 1.5) -> NumpyReference:
    """The reference, with every gradient of these layers too large."""

    def scaled(backward: Callable[..., dict[str, Array]]) -> Callable[..., dict[str, Array]]:
        return lambda dout, cache: {name: factor * gradient for name, gradient in backward(dout, cache).items()}

    return NumpyReference(rows={name: (LAYERS[name].forward, scaled(LAYERS[name].backward)) for name in layers})


def culprits(examination: Examination) -> list[str]:
    return [culprit.node.name for culprit in examination.culprits]


def wrong(examination: Examination) -> dict[str, str | None]:
    return {check.key: check.kind for check in examination.wrong}


def verdicts(examination: Examination) -> dict[str, str]:
    """Tensor -> verdict of the rows about gradients and what is wrong."""
    return {row.check.key: row.verdict for row in rows(examination)}


# Blame.


@EACH_CLEAN
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
    assert wrong(examination) == {"gradient:bent": "gradient"}
    assert {key: verdict for key, verdict in verdicts(examination).items() if verdict != "agrees"} == {
        "gradient:bent": "WRONG HERE",
        "gradient:line": "inherited",
        "gradient:x": "inherited",
        "gradient:w": "inherited",
        "gradient:b": "inherited",
    }


def test_a_wrong_tensor_belongs_to_the_guilty_one_of_its_readers() -> None:
    for layer, name in (("sigmoid", "gate"), ("softplus", "rise")):
        (row,) = [row for row in rows(examined(spoilt(layer))) if row.verdict == "WRONG HERE"]
        assert (row.node, row.layer, row.check.tensor) == (name, layer, "bent")


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
    assert set(wrong(found)) == {"gradient:below", "gradient:x"}
    assert culprits(found) == ["middle"]
    assert set(found.culprits[0].keys) == {"gradient:below", "gradient:x"}


def test_who_is_wrong_behind_a_gradient_that_was_not_gone_on_with_is_blamed_too() -> None:
    row = (LAYERS["square"].forward, lambda dout, cache: {"x": 5.0 * LAYERS["square"].backward(dout, cache)["x"]})
    found = examined(Misreporting("below", lambda g: 2.0 * g, rows={"square": row}), CHAIN)
    assert culprits(found) == ["below", "middle"]


def test_every_use_of_a_faulty_layer_is_named() -> None:
    assert culprits(examined(spoilt("linear"), SHARED)) == ["first", "second"]


def test_a_culprit_comes_with_its_own_part() -> None:
    (culprit,) = examined(spoilt("sigmoid")).culprits
    assert culprit.keys == ("gradient:bent",)
    assert culprit.observation is not None
    assert {check.key: check.kind for check in culprit.observation.checks} == {
        "value:gate": None,
        "gradient:gate": None,
        "gradient:bent": "gradient",
    }
    assert culprit.divergence is None


def test_a_wrong_parameter_gradient_is_blamed_on_its_layer() -> None:
    examination = examined(FAULTS["linear_element_zeroed"].make())
    assert wrong(examination) == {"gradient:w": "gradient"}
    assert culprits(examination) == ["line"]


def test_a_fault_in_the_forward_pass_is_blamed_where_it_stands() -> None:
    forward = LAYERS["tanh"].forward
    adapter = NumpyReference(rows={"tanh": (lambda x: (1.25 * forward(x)[0], forward(x)[1]), LAYERS["tanh"].backward)})
    examination = examined(adapter)
    assert culprits(examination) == ["bent"]
    told = verdicts(examination)
    assert told["value:line"] == "agrees"
    assert told["value:bent"] == "WRONG HERE"
    assert {told[f"value:{name}"] for name in ("gate", "rise", "gated", "loss")} == {"inherited"}


@pytest.mark.parametrize("spoil", ["a missing gradient", "a wrong shape"])
def test_a_structural_fault_is_blamed_too(spoil: str) -> None:
    fault = FAULTS[{"a missing gradient": "returns_none", "a wrong shape": "wrong_shape"}[spoil]]
    examination = examined(fault.make())
    assert wrong(examination) == {"gradient:line": {"returns_none": "missing", "wrong_shape": "shape"}[fault.name]}
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
    assert wrong(examination) == {"gradient:a": "missing", "gradient:x": "missing"}
    assert culprits(examination) == ["b"]
    told = verdicts(examination)
    assert (told["gradient:a"], told["gradient:x"]) == ("WRONG HERE", "inherited")
    assert [(each.tensor, each.kind) for each in disagreements(examination, None)] == [("a", "missing")]


# What no layer is to blame for.


@EACH_DTYPE
@pytest.mark.parametrize("fault", ["fan_out_path_dropped", "fan_out_path_doubled"])
def test_a_wrong_sum_over_paths_is_a_fault_of_composition(fault: str, dtype: str) -> None:
    examination = examined(FAULTS[fault].make(), dtype=dtype)
    assert culprits(examination) == []
    assert not examination.known
    told = verdicts(examination)
    assert [key for key, verdict in told.items() if verdict == "composition"] == ["gradient:bent"]
    assert {told[f"gradient:{name}"] for name in ("line", "x", "w", "b")} == {"inherited"}


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
    assert [check.key for check in examination.unblamed] == ["gradient:a", "gradient:x"]
    assert kinds_of_culprits(examination) == {("a", "composition"), ("x", "composition")}


def test_what_a_layer_is_to_blame_for_is_not_unblamed() -> None:
    examination = examined(spoilt("sigmoid"))
    assert examination.wrong
    assert examination.unblamed == ()


def test_a_node_that_reads_one_tensor_twice_is_blamed_for_its_own_fault() -> None:
    minus = network(X, node("a", "tanh", "x"), node("b", "subtract", "a", "a"), node("out", "multiply", "b", "x"))
    assert culprits(examined(FAULTS["subtract_sign_lost"].make(), minus)) == ["b"]


class OnlyOneLayer(NumpyReference):
    """Raises for networks of more than one node."""

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        if len(network.nodes) > 1:
            raise NotImplementedError("one layer\nat a time")
        return super().forward(network, values, dtype)


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
    assert {check.key: check.kind for check in examination.wrong}["gradient:bent"] == kind
    assert culprits(examination) == ["bent"]
    assert not examination.known


def test_a_page_of_an_error_is_cut_to_one_line() -> None:
    message = told(ValueError("a traced array\n" * 1000))
    assert message.startswith("ValueError: a traced array a traced array ")
    assert message.endswith(" ...")
    assert len(message) <= len("ValueError: ") + TOLD
    assert "\n" not in message


def test_a_crash_that_no_layer_has_alone() -> None:
    examination = examined(OnlyOneLayer())
    (check,) = examination.checks
    assert (check.key, check.kind) == ("value:loss", "crash")
    assert re.fullmatch(
        r"NotImplementedError: one layer at a time \(\S*test_examination.py:\d+ in forward\)", check.got
    )
    assert culprits(examination) == []
    assert [(row.node, row.verdict) for row in rows(examination)] == [("loss", "composition")]
    assert [each.kind for each in disagreements(examination, None)] == ["crash"]


# Adapters that misbehave.


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
    assert wrong(examined(Stubborn(), TWICE, timeout=0.1)) == {"value:square": "timeout"}


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
    where = r'\(\S*test_examination.py:\d+ in broken: return {"x": dout @ np.ones\(\(1 \+ dout.size, 1, 7\)\)}\)'
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
    assert wrong(examined(fault, straight, dtype)) == {"value:x": "mutated_input"}
    # In a longer network it is the value of the node before that is spoilt.
    spoiling = examined(fault, of, dtype)
    assert "value:a" in wrong(spoiling)
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
    of = case(SIX)
    before = {**{each: value.copy() for each, value in of.values.items()}, "cotangent": of.cotangent.copy()}
    examination = examine(Subject(Scribbling(name), {}), of)
    assert wrong(examination) == {f"value:{name}": "mutated_input"}
    for each, array in {**of.values, "cotangent": of.cotangent}.items():
        np.testing.assert_array_equal(array, before[each])


def test_an_input_may_be_called_cotangent() -> None:
    of = network(Input("cotangent", (8,)), node("out", "relu", "cotangent"))
    assert wrong(examined(FAULTS["writes_to_its_input"].make(), of)) == {"value:cotangent": "mutated_input"}


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
    of, hoarder = case(SIX), Hoarding()
    before = {name: value.copy() for name, value in of.values.items()}
    assert examine(Subject(hoarder, {}), of).agrees
    assert examine(Subject(hoarder, {}), of).agrees
    for name, value in before.items():
        np.testing.assert_array_equal(of.values[name], value)
    assert examine(Subject(NumpyReference(), {}), of).agrees


def test_nan_in_an_input_is_not_taken_for_writing() -> None:
    of = case(TWICE)
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


# One node alone.


def alone_in(of: Case, each: Node, conventions: Conventions) -> Case:
    return alone_as_the_sweep_has_it(Sweep(of, conventions), of, each)


@EACH_DTYPE
def test_a_node_alone_gets_the_references_numbers_rounded(dtype: str) -> None:
    of = case(SIX, dtype)
    sweep = Sweep(of, {})
    alone = alone_in(of, SIX.node("gated"), {})
    assert [each.name for each in alone.network.nodes] == ["gated"]
    assert (alone.dtype, alone.seed) == (dtype, of.seed)
    for name in ("gate", "rise"):
        np.testing.assert_array_equal(alone.values[name], sweep.outputs[name].astype(dtype))
    np.testing.assert_array_equal(alone.cotangent, sweep.gradients["gated"].astype(dtype))


def test_a_node_alone_gets_the_given_arrays_as_they_are() -> None:
    of = case(SIX)
    alone = alone_in(of, SIX.node("line"), {})
    assert set(alone.values) == {"x", "w", "b"}
    assert all(alone.values[name] is of.values[name] for name in alone.values)
    loss = alone_in(of, SIX.node("loss"), {})
    np.testing.assert_array_equal(loss.cotangent, of.cotangent)


def test_a_tensor_that_is_read_twice_becomes_two_inputs() -> None:
    of = case(TWICE)
    alone = alone_in(of, TWICE.nodes[0], {})
    assert len(alone.network.inputs) == 2
    for value in alone.values.values():
        np.testing.assert_array_equal(value, of.values["x"])


def test_a_node_alone_follows_the_conventions() -> None:
    kinked = network(Input("x", (3,)), node("a", "relu", "x"), node("b", "relu", "a"))
    of = Case(kinked, "float64", {"x": np.array([0.0, -1.0, 2.0])}, np.array([1.5, 2.5, -0.5]))
    cotangents = {
        weight: alone_in(of, kinked.node("a"), {"relu": {"at_zero": weight}}).cotangent for weight in (0.0, 1.0)
    }
    np.testing.assert_array_equal(cotangents[0.0], [0.0, 0.0, -0.5])
    np.testing.assert_array_equal(cotangents[1.0], [1.5, 2.5, -0.5])


def test_numbers_beyond_the_dtype_are_infinite_alone() -> None:
    of = network(Input("x", (2,)), node("huge", "multiply", "x", "x"), node("out", "tanh", "huge"))
    given = Case(of, "float32", {"x": np.array([1e30, 0.5], "float32")}, np.array([1.5, 0.5], "float32"))
    alone = alone_in(given, of.node("out"), {})
    assert np.isinf(alone.values["huge"]).tolist() == [True, False]


# Rows.


def gradient_rows(found: tuple[Row, ...]) -> list[str]:
    return [row.check.tensor for row in found if row.check.role == "gradient"]


def test_rows_run_from_the_loss_back() -> None:
    assert gradient_rows(rows(examined(NumpyReference()))) == [
        *("loss", "gated", "target", "rise", "gate", "bent", "line", "x", "w", "b")
    ]


def test_values_come_first_in_forward_order() -> None:
    keys = [row.check.key for row in rows(examined(NumpyReference()))]
    assert keys[:6] == [f"value:{each.name}" for each in SIX.nodes]


@settings(max_examples=50)
@given(drawn_networks())
def test_no_gradient_stands_before_one_that_it_follows_from(drawn: Drawn) -> None:
    of = drawn.case("float64")
    found = gradient_rows(rows(examine(Subject(NumpyReference(), {}), of)))
    assert sorted(found) == sorted(drawn.network.differentiable)
    for each in drawn.network.nodes:
        sources = {source for _, source in each.sources} & set(found)
        assert all(found.index(each.name) < found.index(source) for source in sources)


def test_every_row_names_a_node_and_its_layer() -> None:
    owners = {row.check.key: (row.node, row.layer) for row in rows(examined(NumpyReference()))}
    assert owners["value:gate"] == ("gate", "sigmoid")
    assert owners["gradient:loss"] == ("loss", "mse")
    assert owners["gradient:target"] == ("loss", "mse")
    assert owners["gradient:w"] == ("line", "linear")
    assert owners["gradient:bent"] == ("gate", "sigmoid")


def test_a_value_that_a_later_layer_overwrites_is_that_layers_fault() -> None:
    of = network(X, node("a", "tanh", "x"), node("out", "relu", "a"))
    examination = examined(FAULTS["writes_to_its_input"].make(), of)
    (row,) = [each for each in rows(examination) if each.culprit]
    assert (row.node, row.check.key, row.check.kind, row.verdict) == ("out", "value:a", "mutated_input", "WRONG HERE")
    assert row.check.got == "a later layer's forward pass overwrote it: it is no longer what was computed"


class OverwritingItsOutput(NumpyReference):
    """Softmax, whose backward pass computes in place, into the output that it has kept."""

    def __init__(self) -> None:
        forward, backward = LAYERS["softmax"].forward, LAYERS["softmax"].backward

        def keeping(x: Array, **options: Any) -> tuple[Array, Any]:
            out, cache = forward(x, **options)
            return out, (out, cache)

        def in_place(dout: Array, kept: Any) -> dict[str, Array]:
            gradients = backward(dout, kept[1])
            np.copyto(kept[0], gradients["x"])
            return {"x": kept[0].copy()}

        super().__init__(rows={"softmax": (keeping, in_place)})


@EACH_DTYPE
def test_a_value_that_its_own_backward_pass_overwrites_is_that_layers_fault(dtype: str) -> None:
    of = network(X, node("a", "tanh", "x"), node("p", "softmax", "a"), node("out", "exp", "p"))
    examination = examined(OverwritingItsOutput(), of, dtype)
    assert wrong(examination) == {"value:p": "mutated_input"}
    assert culprits(examination) == ["p"]
    assert examination.wrong[0].got == "the backward pass overwrote it: it is no longer what was computed"


RELU_IN_PLACE = FAULTS["relu_cotangent_overwritten"].make
TARGET = Input("target", (2, 3))
VIEWED = network(
    X,
    TARGET,
    node("rectified", "relu", "x"),
    node("turned", "transpose", "rectified", axes=(1, 0)),
    node("back", "transpose", "turned", axes=(1, 0)),
    node("loss", "mse", "back", "target"),
)
SUMMED = network(X, node("rectified", "relu", "x"), node("doubled", "add", "rectified", "rectified"))
BRANCHED = network(
    X, node("rectified", "relu", "x"), node("bent", "tanh", "rectified"), node("all", "add", "bent", "rectified")
)


@pytest.mark.parametrize("of", [VIEWED, SUMMED, BRANCHED], ids=["views", "one reader", "two readers"])
def test_who_overwrites_its_cotangent_is_blamed_for_all_that_lies_in_its_memory(of: Network) -> None:
    found = examined(RELU_IN_PLACE(), of)
    assert {check.tensor for check in found.wrong} <= {"rectified", "turned", "back"}
    assert culprits(found) == ["rectified"]
    assert found.unblamed == ()


def test_who_reads_what_lies_in_one_memory_is_blamed_where_nobody_overwrites_it() -> None:
    assert culprits(examined(spoilt("mse"), VIEWED)) == ["loss"]
    assert culprits(examined(spoilt("add"), BRANCHED)) == ["all"]


def writing_over_what_it_reads(layer: str, when: str) -> NumpyReference:
    """A layer that computes its output, or its gradient, in the memory of its input."""
    right, back = LAYERS[layer].forward, LAYERS[layer].backward

    def forward(x: Array, **options: Any) -> tuple[Array, Any]:
        out, cache = right(x.copy(), **options)
        if when == "forward":
            np.copyto(x, out)
        return out, (x, cache)

    def backward(dout: Array, kept: Any) -> dict[str, Array]:
        gradients = back(dout, kept[1])
        if when == "backward":
            np.copyto(kept[0], gradients["x"])
        return gradients

    return NumpyReference(rows={layer: (forward, backward)})


LAST = network(X, node("a", "tanh", "x"), node("out", "exp", "a"))
BESIDE = network(
    X, node("a", "tanh", "x"), node("out", "exp", "a"), node("b", "sigmoid", "a"), node("end", "multiply", "b", "out")
)
SUMMED = network(
    X,
    node("first", "sigmoid", "x"),
    node("a", "tanh", "first"),
    node("out", "exp", "a"),
    node("b", "multiply", "first", "a"),
    node("end", "multiply", "b", "out"),
)


@EACH_DTYPE
@pytest.mark.parametrize("of", [LAST, BESIDE, SUMMED], ids=["last", "beside", "summed"])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_who_overwrites_what_others_have_kept_is_blamed_and_not_they(when: str, of: Network, dtype: str) -> None:
    """Tanh has kept its output for its backward pass, which is wrong by no fault of its own."""
    examination = examined(writing_over_what_it_reads("exp", when), of, dtype)
    found = wrong(examination)
    assert found["value:a"] == "mutated_input"
    assert "gradient" in found.values()
    assert culprits(examination) == ["out"]
    assert examination.unblamed == ()
    first = next(row for row in rows(examination) if row.culprit)
    assert (first.node, first.check.tensor, first.check.kind) == ("out", "a", "mutated_input")


def test_who_overwrites_is_blamed_beside_a_neighbour_that_is_wrong_itself() -> None:
    overwriting, bad = writing_over_what_it_reads("exp", "backward"), spoilt("tanh")
    adapter = NumpyReference(rows={"exp": overwriting._rows["exp"], "tanh": bad._rows["tanh"]})
    examination = examined(adapter, LAST)
    assert culprits(examination) == ["a", "out"]
    assert {each.node.name: each.keys for each in examination.culprits} == {
        "a": ("gradient:x",),
        "out": ("value:a",),
    }


def test_values_in_one_memory_are_overwritten_together() -> None:
    of = network(X, node("a", "tanh", "x"), node("same", "identity", "a"), node("out", "exp", "same"))
    overwriting = writing_over_what_it_reads("exp", "forward")
    handing_back = (lambda x: (x, None), LAYERS["identity"].backward)
    adapter = NumpyReference(rows={"exp": overwriting._rows["exp"], "identity": handing_back})
    examination = examined(adapter, of)
    found = wrong(examination)
    assert {key for key, kind in found.items() if kind == "mutated_input"} == {"value:a", "value:same"}
    assert culprits(examination) == ["out"]


def test_what_is_inherited_or_agrees_is_no_culprits_row() -> None:
    found = {row.verdict: row.culprit for row in rows(examined(spoilt("sigmoid")))}
    assert found == {"agrees": False, "inherited": False, "WRONG HERE": True}


# Time.


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """The alarms that come while a test has a handler of its own."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(signal.SIGALRM, note)
    yield received
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, before)


def test_a_limit_ends_what_takes_too_long() -> None:
    started = time.monotonic()
    with pytest.raises(TimeLimitError), time_limit(0.1):
        time.sleep(5.0)
    assert time.monotonic() - started < 2.0


def test_within_the_limit_nothing_happens(alarms: list[int]) -> None:
    with time_limit(0.1):
        pass
    time.sleep(0.2)
    assert alarms == []


@pytest.mark.parametrize("error", [None, ValueError, TimeLimitError])
def test_the_handler_of_others_comes_back(alarms: list[int], error: type[Exception] | None) -> None:
    mine = signal.getsignal(signal.SIGALRM)
    try:
        with time_limit(5.0):
            assert signal.getsignal(signal.SIGALRM) is not mine
            if error:
                raise error
    except (ValueError, TimeLimitError):
        pass
    assert signal.getsignal(signal.SIGALRM) is mine
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_that_others_set_still_comes(alarms: list[int]) -> None:
    """As pytest-timeout does."""
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with time_limit(5.0):
        pass
    time.sleep(0.4)
    assert alarms == [signal.SIGALRM]


def test_off_the_main_thread_there_is_no_limit() -> None:
    passed: list[bool] = []

    def work() -> None:
        with time_limit(0.05):
            time.sleep(0.1)
        passed.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert passed == [True]


# The whole sweep.


def test_a_sweep_has_every_value_and_every_gradient() -> None:
    sweep = Sweep(case(SIX), {})
    assert list(sweep.outputs) == [each.name for each in SIX.nodes]
    assert list(sweep.gradients)[:6] == [each.name for each in reversed(SIX.nodes)]
    assert set(sweep.gradients) == set(SIX.differentiable)
    assert set(sweep.expected) == {f"value:{name}" for name in sweep.outputs} | {
        f"gradient:{name}" for name in sweep.gradients
    }


def test_a_subject_needs_every_layer() -> None:
    class WithoutTanh(NumpyReference):
        def supports(self, layer: Any, options: Any, dtype: str) -> bool:
            return layer.name != "tanh" and dtype == "float64"

    subject = Subject(WithoutTanh(), {})
    assert not subject.supports(SIX, "float64")
    assert subject.supports(TWICE, "float64")
    assert not subject.supports(TWICE, "float32")
