"""Results that a later call overwrites: whose they were, and that nobody is blamed who gives new arrays."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradproof.draw.drawing import Drawn
from gradproof.model.adapter import Adapter, Forward
from gradproof.model.case import Case, redrawn
from gradproof.model.network import Input, Network, Node
from gradproof.model.tensors import Role, Tensor, gradient_of, value_of
from gradproof.reference import LAYERS, NumpyReference
from gradproof.run.check import replay
from gradproof.run.results import disagreements
from gradproof.show.report import diff_text, headline
from gradproof.subject.isolation import Isolated
from gradproof.subject.watch import _given_out
from gradproof.trust.faults import FAULTS
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.running import run

Array = np.ndarray[Any, Any]

MESSAGE = "the next call overwrote it: it is no longer what was returned; return a new array"


def chain(*layers: str, shape: tuple[int, ...] = (2, 3)) -> Network:
    names = ["x", *(f"h{i + 1}" for i in range(len(layers)))]
    nodes = (Node.of(names[i + 1], LAYERS[layer], names[i]) for i, layer in enumerate(layers))
    return Network((Input("x", shape),), tuple(nodes))


def case(*layers: str, shape: tuple[int, ...] = (2, 3), seed: int = 11) -> Case:
    return Drawn(chain(*layers, shape=shape), seed=seed, edge_share=0.0, scale=1.0).case("float64")


def wrong(found: Examination) -> dict[str, str | None]:
    return {check.key: check.kind for check in found.wrong}


def culprits(found: Examination) -> list[str]:
    return [culprit.node.layer.name for culprit in found.culprits]


class Reusing(NumpyReference):
    """Gives what these keys stand for in memory that it has for every key and shape."""

    def __init__(self, *keys: Tensor) -> None:
        super().__init__()
        self._keys = keys
        self._memory: dict[Any, Array] = {}

    def _given(self, role: Role, found: Mapping[str, Array]) -> dict[str, Array]:
        return {name: self._placed(Tensor(role, name), array) for name, array in found.items()}

    def _placed(self, key: Tensor, array: Array) -> Array:
        if key not in self._keys:
            return array
        place = self._memory.setdefault((key, array.shape), np.empty_like(array))
        np.copyto(place, array)
        return place

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        forward = super().forward(network, values, dtype)
        return replace(forward, outputs=self._given(Role.VALUE, forward.outputs))

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        return self._given(Role.GRADIENT, super().backward(forward, cotangent))


# In this process.


@pytest.mark.parametrize(
    "key", [value_of("h1"), value_of("h2"), gradient_of("h2"), gradient_of("h1"), gradient_of("x")], ids=str
)
def test_a_result_that_the_next_call_overwrites_is_named(key: Tensor) -> None:
    found = examine(Subject(Reusing(key), {}), case("sigmoid", "tanh"))
    assert wrong(found) == {key: "reused_buffer"}
    assert found.wrong[0].got == MESSAGE
    assert found.wrong[0].shape == (2, 3)


def test_it_is_seen_in_the_first_network() -> None:
    """Memory for every shape would else show where two networks after each other happen to have one in common."""
    subject = Subject(Reusing(gradient_of("x")), {})
    assert wrong(examine(subject, case("sigmoid"))) == {gradient_of("x"): "reused_buffer"}


def test_a_network_is_called_twice_once_for_every_layer() -> None:
    class Counting(NumpyReference):
        calls = 0

        def forward(self, *arguments: Any) -> Forward:
            self.calls += 1
            return super().forward(*arguments)

    adapter = Counting()
    subject = Subject(adapter, {})
    calls = []
    for layers in (("sigmoid", "tanh"), ("sigmoid", "tanh"), ("tanh",), ("tanh", "exp"), ("exp", "sigmoid")):
        adapter.calls = 0
        assert examine(subject, case(*layers)).agrees
        calls.append(adapter.calls)
    assert calls == [2, 1, 1, 2, 1]


def test_a_result_of_the_network_before_is_named_where_this_one_keeps_its_own() -> None:
    class Changing(NumpyReference):
        """Writes to the first result it ever gave, and to no other."""

        first: Any = None

        def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
            gradients = super().backward(forward, cotangent)
            if self.first is None:
                self.first = gradients["x"]
            elif len(forward.tape[0].nodes) == 2:
                self.first[...] = 7.0
            return gradients

    subject = Subject(Changing(), {}, called_twice=set(LAYERS))
    run(subject.adapter, case("exp"), 60.0)
    found = examine(subject, case("sigmoid", "tanh"))
    (check,) = found.wrong
    assert (check.key, check.kind) == (gradient_of("x"), "reused_buffer")
    assert check.got == f"{MESSAGE} (a tensor of the network before: {chain('exp')})"
    assert culprits(found) == []
    assert [each.kind for each in disagreements(found, None)] == ["reused_buffer"]


def test_nothing_is_found_where_every_array_is_new() -> None:
    subject = Subject(NumpyReference(), {})
    for layers in (("sigmoid", "tanh"), ("identity", "flatten"), ("tanh",)):
        assert examine(subject, case(*layers)).agrees


def test_an_array_that_is_given_again_unchanged_is_right() -> None:
    kept: dict[Any, Array] = {}

    class Remembering(NumpyReference):
        """Gives the very array that it gave for the same numbers."""

        def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
            found = super().backward(forward, cotangent)
            return {name: kept.setdefault((name, array.tobytes()), array) for name, array in found.items()}

    subject = Subject(Remembering(), {})
    for _ in range(3):
        assert examine(subject, case("sigmoid", "tanh")).agrees


def test_two_adapters_in_turn_are_told_apart() -> None:
    right, reusing = NumpyReference(), Reusing(gradient_of("x"))
    of = case("sigmoid", "tanh")
    for adapter, expected in ((right, 0), (reusing, 0), (right, 0), (reusing, 1)):
        other = redrawn(of, seed=int(expected))
        assert len(run(adapter, other, 60.0).reused) == expected


def test_only_the_last_results_are_kept_and_none_of_an_adapter_that_is_gone() -> None:
    adapter = NumpyReference()
    for seed in range(3):
        run(adapter, case("tanh", seed=seed), 60.0)
    assert id(adapter) in _given_out
    size = len(_given_out)
    run(adapter, case("tanh", "exp"), 60.0)
    assert len(_given_out) == size
    key = id(adapter)
    del adapter
    gc.collect()
    assert key not in _given_out


def test_an_adapter_without_weak_references_is_examined_all_the_same() -> None:
    class Slotted:
        __slots__ = ("_inner",)
        name = "slotted"

        def __init__(self) -> None:
            self._inner = NumpyReference()

        def version(self) -> str:
            return "1"

        def supports(self, *asked: Any) -> bool:
            return True

        def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
            return self._inner.forward(network, values, dtype)

        def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
            return self._inner.backward(forward, cotangent)

    adapter: Any = Slotted()
    assert examine(Subject(adapter, {}), case("sigmoid", "tanh")).agrees


# Blame.


def with_workspace(layer: str, value: bool = False) -> NumpyReference:
    """The reference, where one layer computes its gradient, or value, in memory that it has for every shape."""
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward
    memory: dict[Any, Array] = {}

    def placed(array: Array) -> Array:
        place = memory.setdefault(array.shape, np.empty_like(array))
        np.copyto(place, array)
        return place

    if not value:
        return NumpyReference(rows={layer: (forward, lambda dout, cache: {"x": placed(backward(dout, cache)["x"])})})

    class HandingOut(NumpyReference):
        def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
            found = super().forward(network, values, dtype)
            mine = {node.name for node in network.nodes if node.layer.name == layer}
            return replace(found, outputs={n: placed(a) if n in mine else a for n, a in found.outputs.items()})

    return HandingOut()


@pytest.mark.parametrize("value", [False, True], ids=["gradient", "value"])
@pytest.mark.parametrize("layers", [("sigmoid", "exp", "tanh"), ("exp", "tanh"), ("tanh", "exp"), ("exp",)])
def test_the_layer_whose_memory_it_is_is_named(layers: tuple[str, ...], value: bool) -> None:
    found = examine(Subject(with_workspace("exp", value), {}), case(*layers))
    assert set(wrong(found).values()) == {"reused_buffer"}
    assert culprits(found) == ["exp"]
    assert found.unblamed == ()
    assert {each.layer for each in disagreements(found, None) if each.culprit} == {"exp"}


def test_the_identity_may_be_to_blame_too() -> None:
    found = examine(Subject(with_workspace("identity"), {}), case("identity"))
    assert wrong(found) == {gradient_of("x"): "reused_buffer"}
    assert culprits(found) == ["identity"]


def test_who_hands_such_memory_on_is_not_to_blame() -> None:
    found = examine(Subject(with_workspace("exp"), {}), case("flatten", "identity", "exp", "tanh"))
    assert set(wrong(found)) == {gradient_of("h2"), gradient_of("h1"), gradient_of("x")}
    assert culprits(found) == ["exp"]
    assert found.unblamed == ()


def test_memory_of_the_adapters_own_is_no_layers_fault() -> None:
    found = examine(Subject(FAULTS["values_in_one_arena"].make(), {}), case("sigmoid", "tanh"))
    assert wrong(found) == {value_of("h1"): "reused_buffer", value_of("h2"): "reused_buffer"}
    assert culprits(found) == []
    assert {each.kind for each in disagreements(found, None)} == {"reused_buffer"}


def test_the_headline_says_what_to_do() -> None:
    found = examine(Subject(FAULTS["gradient_in_a_workspace"].make(), {}), case("sigmoid", "softsign"))
    assert headline(found) == f"reference float64: softsign (node h2) is wrong: reused_buffer: d h1: {MESSAGE}"


def test_the_values_are_not_said_to_disagree() -> None:
    adapter = FAULTS["values_in_one_arena"].make()
    report = replay(case("sigmoid", "tanh"), [adapter])
    ((found, spec),) = report.examinations
    assert "forward: every value agrees" in diff_text(found, report, spec)


def test_a_spec_of_it_shows_it_again() -> None:
    report = replay(case("sigmoid", "tanh"), [Reusing(gradient_of("x"))])
    assert {(each.tensor, each.kind) for each in report.disagreements} == {("x", "reused_buffer")}


# The second backward pass.


class Unsteady(NumpyReference):
    """Every backward pass adds something to what it gives, all in the same arrays."""

    def __init__(self, change: Callable[[Array, Array], Array]) -> None:
        super().__init__()
        self._change = change

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        forward = super().forward(network, values, dtype)
        return Forward(forward.outputs, (forward, {}))

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        tape, kept = forward.tape
        for name, gradient in super().backward(tape, cotangent).items():
            if name in kept:
                np.copyto(kept[name], self._change(kept[name], gradient))
            else:
                kept[name] = gradient
        return dict(kept)


def test_a_second_pass_that_rounds_otherwise_in_the_same_memory_reuses_it() -> None:
    adapter = Unsteady(lambda before, gradient: np.nextafter(gradient, np.inf))
    found = examine(Subject(adapter, {}, called_twice=set(LAYERS)), case("sigmoid", "tanh"))
    assert wrong(found) == dict.fromkeys((gradient_of("h2"), gradient_of("h1"), gradient_of("x")), "reused_buffer")
    assert all(check.second_pass for check in found.wrong)
    assert culprits(found) == []


def test_a_tape_that_adds_up_in_the_same_memory_is_told_to_add_up() -> None:
    found = examine(Subject(Unsteady(np.add), {}), case("sigmoid", "tanh"))
    assert set(wrong(found).values()) == {"nondeterministic"}
    assert culprits(found) == []


def test_the_first_gradients_are_judged_as_they_were() -> None:
    of = case("sigmoid", "tanh")
    adapter = Unsteady(np.add)
    trace = run(adapter, of, 60.0)
    before = {key: np.copy(array) for key, array in trace.got.items()}
    assert trace.watched is not None
    trace.watched.backward_again(trace.forward, of.cotangent.copy())  # type: ignore[arg-type]
    for key, array in before.items():
        np.testing.assert_array_equal(trace.got[key], array)
    assert {remark.key for remark in trace.watched.remarks} == {gradient_of("h2"), gradient_of("h1"), gradient_of("x")}


# In a process of its own.

MODULE = """
import os, pathlib
import numpy as np
from gradproof.reference import LAYERS, NumpyReference

memory = {}

def placed(array):
    place = memory.setdefault(array.shape, np.empty_like(array))
    np.copyto(place, array)
    return place

forward, backward = LAYERS["exp"].forward, LAYERS["exp"].backward

class Workspace(NumpyReference):
    name = "mine"

    def __init__(self):
        super().__init__(rows={"exp": (forward, lambda dout, cache: {"x": placed(backward(dout, cache)["x"])})})

class Right(NumpyReference):
    name = "mine"
"""


@pytest.fixture
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MODULE)


@pytest.mark.skipif(os.name != "posix", reason="adapters have processes of their own on Unix alone")
@pytest.mark.usefixtures("_module")
def test_a_child_keeps_its_arrays_and_looks_at_them_again() -> None:
    with closing(Isolated("mine.py:Workspace")) as adapter:
        found = examine(Subject(adapter, {}), case("sigmoid", "exp", "tanh"))
        assert wrong(found) == {gradient_of("h1"): "reused_buffer"}
        assert found.wrong[0].got == MESSAGE
        assert culprits(found) == ["exp"]
        before = examine(Subject(adapter, {}, called_twice=set(LAYERS)), case("exp"))
        assert wrong(before) == {gradient_of("x"): "reused_buffer"}
    with closing(Isolated("mine.py:Right")) as adapter:
        assert examine(Subject(adapter, {}), case("sigmoid", "exp", "tanh")).agrees


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_frameworks_give_new_arrays(name: str) -> None:
    pytest.importorskip(name, reason=f"needs pip install 'gradproof[{name}]'")
    from gradproof.subject.registry import load_adapter

    adapter: Adapter = load_adapter(name)
    of = case("sigmoid", "exp", "tanh")
    for seed in range(4):
        assert run(adapter, redrawn(of, seed), 60.0).reused == ()
