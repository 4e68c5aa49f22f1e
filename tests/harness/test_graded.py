"""Graded faults: each is planted where it is said to be, and the table's figures come from what the tools said."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from gradproof.draw.drawing import Drawn
from gradproof.model.adapter import AdapterError
from gradproof.model.case import Case
from gradproof.model.dtypes import DTYPES
from gradproof.model.network import Input, Network, Node
from gradproof.reference import LAYERS, NumpyReference
from gradproof.subject.registry import load_adapter
from gradproof.trust import graded as measured
from gradproof.trust import long_sums, peers
from gradproof.trust.graded import (
    CAUGHT,
    DEEP,
    ELEMENT,
    FAILED,
    FRAMEWORKS,
    PASSED,
    SCALED,
    SHALLOW,
    SIZES,
    Graded,
    Outcome,
    Row,
    Scene,
    asked,
    graded,
    main,
    shares_table,
    smallest_caught,
    table,
    told,
)
from gradproof.trust.long_sums import COARSE, FINE, LONG_SUMS, added_up, told_apart
from gradproof.trust.peers import FIXED, Place, Plant, Spoilt, Tool, tools_of
from gradproof.verdict.judging import Subject
from gradproof.verdict.sweep import Sweep

TWICE = 1.0
"""The size of a fault that doubles."""


def chain(*layers: str, shape: tuple[int, ...] = (2, 3)) -> Network:
    names = ["x", *(f"h{i}" for i in range(len(layers)))]
    nodes = [
        Node.of(
            name,
            LAYERS[layer],
            source,
            parameters={"weight": "w", "bias": "b"} if layer == "linear" else {},
            options={"features": 2} if layer == "linear" else {"axes": (0, 1)} if layer == "reduce_sum" else {},
        )
        for name, layer, source in zip(names[1:], layers, names, strict=False)
    ]
    return Network((Input("x", shape),), tuple(nodes))


def drawn(network: Network, scale: float = 1.0) -> Drawn:
    return Drawn(network, seed=5, edge_share=0.0, scale=scale)


LINEAR = drawn(chain("linear", "tanh"))


def place(victim: str = "w", element: int = 1) -> Place:
    argument = {"w": "weight", "b": "bias"}.get(victim, victim)
    return Place(victim, element, LINEAR.network.nodes[0], argument)


def scene(victim: str = "w", element: int = 1, dtype: str = "float64") -> Scene:
    return Scene(0, LINEAR.case(dtype), place(victim, element), FRAMEWORKS)


def tools(framework: str) -> Iterator[Tool]:
    return tools_of({framework: Subject(load_adapter(framework), {})})


def need(framework: str) -> None:
    pytest.importorskip(framework, reason=f"needs pip install 'gradproof[{framework}]'")


EACH_FRAMEWORK = pytest.mark.parametrize("framework", FRAMEWORKS)

# What is planted.


@pytest.mark.parametrize("everywhere", [True, False])
def test_only_the_victim_s_gradient_is_changed(everywhere: bool) -> None:
    case = LINEAR.case("float32")
    plant = Plant(place("w", 2), everywhere, 1e-3)
    true, got = (gradients(Spoilt(NumpyReference(), each), case) for each in (None, plant))
    expected = true["w"].astype(np.float64)
    expected.reshape(-1)[slice(None) if everywhere else 2] *= 1.001
    assert np.array_equal(got["w"], expected.astype(np.float32))
    assert got["w"].dtype == np.float32
    assert got.keys() == true.keys()
    for name in true.keys() - {"w"}:
        assert np.array_equal(got[name], true[name])


def gradients(adapter: Spoilt, case: Case) -> dict[str, np.ndarray]:
    return dict(adapter.backward(adapter.forward(case.network, case.values, case.dtype), case.cotangent))


def test_the_layer_makes_its_mistake_alone_too_and_no_other_layer_does() -> None:
    plant = Plant(place("x"), True, TWICE)
    alone, names = LINEAR.network.alone("h0")
    (own,) = (name for name, source in names.items() if source == "x")
    assert plant.spoils(alone) == own
    assert plant.spoils(LINEAR.network) == plant.spoils(LINEAR.network.alone("h1")[0]) == "x"


@EACH_FRAMEWORK
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_identity_of_a_framework_changes_the_gradient_alone(framework: str, everywhere: bool, dtype: str) -> None:
    need(framework)
    plant = Plant(place("x"), everywhere, 1e-2)
    x, dout = np.array([1.5, -0.25], dtype), np.array([3.0, 7.0], dtype)
    if framework == "torch":
        import torch

        leaf = torch.tensor(x, requires_grad=True)
        y = peers._torch_identity(plant, leaf)
        out, (gradient,) = y.detach().numpy(), torch.autograd.grad(y, [leaf], torch.tensor(dout))
    else:
        import jax

        load_adapter("jax")
        out, pull = jax.vjp(lambda x: peers._jax_identity(plant, x), x)
        (gradient,) = pull(jax.numpy.asarray(dout))
    assert np.array_equal(out, x)
    factors = np.array([1.01 if everywhere else 1.0, 1.01])
    assert np.array_equal(np.asarray(gradient), (factors * dout).astype(dtype))


@EACH_FRAMEWORK
def test_every_tool_sees_what_is_planted_and_nothing_else(framework: str) -> None:
    need(framework)
    found = list(tools(framework))
    assert len({tool.name for tool in found}) == len(found) == len(FIXED) + (4 if framework == "torch" else 3)
    case = LINEAR.case("float64")
    for tool in (each for each in found if "float64" in each.dtypes):
        assert not tool.judge(case, None), tool.name
        for victim in ("x", "w", "b"):
            for everywhere in (True, False):
                plant = Plant(place(victim, 0), everywhere, TWICE)
                assert tool.judge(case, plant), (tool.name, victim, everywhere)


@EACH_FRAMEWORK
def test_an_error_of_a_tool_is_no_verdict(framework: str) -> None:
    need(framework)
    nowhere = Plant(replace(place(), victim="nothing of this name"), True, 0.1)
    own = [tool for tool in tools(framework) if "check" in tool.name]
    assert own
    assert {measured._judged(tool, scene(), nowhere) for tool in own} == {FAILED}


def test_an_error_of_twice_that_of_the_framework_passes_and_more_does_not() -> None:
    """What it lets pass depends on how far the framework happens to be off."""
    need("torch")
    judge = next(tool.judge for tool in tools("torch") if tool.name.startswith("error at most twice"))
    case = LINEAR.case("float32")
    verdicts = [judge(case, Plant(place("w"), True, size)) for size in (1e-9, 1e-2)]
    assert verdicts == [False, True]


# Where faults can be planted.


@pytest.mark.parametrize(
    ("network", "scale", "reason"),
    [
        (chain("hardtanh"), 1e3, "every gradient is zero"),
        (chain("softmax", "reduce_sum"), 1.0, "the gradient is unverifiable or zero"),
        (chain("square", "exp"), 100.0, "the gradient is unverifiable or zero"),
    ],
)
def test_networks_that_show_no_fault_are_left_out(network: Network, scale: float, reason: str) -> None:
    scenes, left_out = measured._scenes([drawn(network, scale)], "float32", [Subject(NumpyReference(), {})])
    assert scenes == []
    assert left_out == {reason: 1}


def test_networks_that_a_framework_lacks_or_knows_to_be_wrong_are_left_out() -> None:
    need("torch")
    lacking = NumpyReference()
    lacking.supports = lambda layer, options, dtype: layer.name != "tanh"  # type: ignore[method-assign]
    assert measured._scene(0, LINEAR, "float64", [Subject(lacking, {})]) == "reference lacks a layer"
    subject, _ = measured.probed_subject(load_adapter("torch"), "float64", layers=["hardsigmoid"])
    small = drawn(chain("hardsigmoid"), 0.1)
    assert measured._scene(0, small, "float64", [subject]) == "torch diverges as known"


def test_the_place_is_the_same_in_every_dtype_and_its_gradient_is_not_zero() -> None:
    scenes = [measured._scene(3, LINEAR, dtype, [Subject(NumpyReference(), {})]) for dtype in DTYPES]
    assert len({(each.number, each.place) for each in scenes if isinstance(each, Scene)}) == 1
    first = scenes[0]
    assert isinstance(first, Scene)
    assert Sweep(first.case, {}).gradients[first.place.victim].flat[first.place.element] != 0.0


# What the table says.


def test_a_layer_that_rounds_more_than_its_results_is_left_out_in_half_precision() -> None:
    need("torch")
    rounding, exact = drawn(chain("softmax")), drawn(chain("relu"))
    for network, expected in ((rounding, "the layer rounds more than its results"), (exact, None)):
        found = measured._scene(0, network, "bfloat16", [Subject(load_adapter("torch"), {})])
        assert (found if isinstance(found, str) else None) == expected


def test_the_smallest_that_is_caught_is_found_by_bisection() -> None:
    for least in (*SIZES, math.inf):
        asked_for: list[float] = []

        def catches(size: float, least: float = least, asked_for: list[float] = asked_for) -> bool:
            asked_for.append(size)
            return size >= least

        assert smallest_caught(catches) == least
        assert len(asked_for) <= 5


def said(smallest: dict[str, tuple[float, ...]], sound: str) -> Row:
    """One letter per network with nothing planted: c(aught), p(assed), f(ailed)."""
    names = {"c": CAUGHT, "p": PASSED, "f": FAILED}
    outcomes = [
        Outcome(number, names[letter], 0.5 + number, {planted: each[number] for planted, each in smallest.items()})
        for number, letter in enumerate(sound)
    ]
    return Row("gradproof on a tool", "float64", SHALLOW, tuple(outcomes))


def test_shares_are_of_the_networks_that_pass_with_nothing_planted() -> None:
    row = said({SCALED: (1e-9, 1e-9, 1e-3, 1e-2), ELEMENT: (1e-9, 1e-9, 1e-1, math.inf)}, "cfpp")
    assert (row.share(CAUGHT), row.share(FAILED), row.share(PASSED)) == (0.25, 0.25, 0.5)
    assert (row.caught(SCALED, 1e-2), row.caught(SCALED, 1e-3), row.caught(SCALED, 1e-4)) == (1.0, 0.5, 0.0)
    assert (row.finest(SCALED), row.finest(ELEMENT)) == (1e-2, None)
    assert row.seconds == 2.0


def test_the_tables_tell_what_was_found() -> None:
    usable = said({SCALED: (1e-9, 1e-9, 1e-3, 1e-2), ELEMENT: (1e-9, 1e-9, 1e-1, math.inf)}, "cfpp")
    useless = said({SCALED: (0.1,) * 4, ELEMENT: (0.1,) * 4}, "cccp")
    left_out = {("float64", SHALLOW): {"torch lacks a layer": 5}, ("float64", DEEP): {}}
    found = Graded(7, 9, (usable, useless), left_out, {"torch": "1.2"})
    head, _, first, second = table(found).splitlines()
    assert head.count("|") == first.count("|") == 10
    assert first == "| gradproof on a tool | float64 | 1 to 8 | 4 | 25% | 25% | 1e-02 | none | 2 |"
    assert second == "| gradproof on a tool | float64 | 1 to 8 | 4 | 75% | 0% | - | - | 2 |"
    shares = shares_table(found).splitlines()
    assert shares[2].startswith(
        "| gradproof on a tool | float64 | 1 to 8 | scaled | 100% | 100% | 100% | 50% | 50% | 0% |"
    )
    assert shares[3].startswith("| gradproof on a tool | float64 | 1 to 8 | one element | 50% | 0% |")
    text = told(found)
    assert "9 random networks of 1 to 8 nodes and as many of about 30, of seed 7, with torch 1.2." in text
    assert "- float64, 1 to 8: 5 where torch lacks a layer\n- float64, about 30: none" in text


@EACH_FRAMEWORK
def test_a_run_asks_every_tool_about_the_same_networks(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(framework)
    monkeypatch.setattr(measured, "SIZES", (TWICE, 1e-15))
    found = graded(3, seed=1, frameworks=[framework], dtypes=["float64"])
    assert found.versions.keys() == {framework}
    assert found.left_out.keys() == {("float64", SHALLOW), ("float64", DEEP)}
    assert found.drawn == 3
    for nodes in (SHALLOW, DEEP):
        numbers = {tuple(each.network for each in row.outcomes) for row in found.rows if row.nodes == nodes}
        assert len(numbers) == 1
        assert len(numbers.pop()) == 3 - sum(found.left_out["float64", nodes].values()) > 0
        own = next(row for row in found.rows if (row.tool, row.nodes) == (f"gradproof on {framework}", nodes))
        assert own.share(PASSED) == own.caught(SCALED, TWICE) == own.caught(ELEMENT, TWICE) == 1.0
        assert own.caught(SCALED, 1e-15) < 1.0
        assert own.finest(SCALED) == TWICE
    assert not any("check" in row.tool for row in found.rows if row.nodes == DEEP)


def test_nothing_is_planted_where_a_tool_raises_an_alarm_without() -> None:
    def alarm(case: Case, plant: Plant | None) -> bool:
        assert plant is None
        return True

    outcome = asked(Tool("a tool", "torch", ("float64",), alarm), scene())
    assert (outcome.sound, outcome.smallest) == (CAUGHT, {})


# Long sums.


def test_partial_sums_round_to_what_they_are_kept_in() -> None:
    ones = np.ones((2, 1000))
    assert added_up(ones, -1, FINE).tolist() == [1000.0, 1000.0]
    assert added_up(ones, -1, COARSE).tolist() == [256.0, 256.0]


@pytest.mark.parametrize("each", LONG_SUMS, ids=lambda each: each.layer)
def test_a_long_sum_in_bfloat16_is_told_from_one_in_float32(each: long_sums.LongSum) -> None:
    assert each.told(COARSE, 5)
    assert not each.told(FINE, 5)


def test_how_often_they_are_told_apart_is_counted() -> None:
    lines = told_apart(7, tries=1).splitlines()
    assert [line.split(" | ")[2:] for line in lines[4:]] == [["1 of 1", "0 of 1 |"]] * 3


def test_the_command_prints_the_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    need("torch")
    monkeypatch.setattr(measured, "graded", partial(graded, dtypes=["float64"]))
    monkeypatch.setattr(measured, "SIZES", (0.1, 1e-15))
    monkeypatch.setattr(measured, "told_apart", lambda seed: f"long sums of seed {seed}")
    assert main(["--networks", "2", "--framework", "torch", "--seed", "4"]) == 0
    out = capsys.readouterr().out
    assert "2 random networks of 1 to 8 nodes and as many of about 30, of seed 4" in " ".join(out.split())
    assert "long sums of seed 4" in out
    row = r"\| gradproof on torch \| float64 \| about 30 \| \d \| 0% \| 0% \| 1e-01 \| 1e-01 \| [\d.e-]+ \|"
    assert re.search(row, out)


def test_a_framework_that_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise AdapterError(f"adapter {name!r} needs {name}")

    monkeypatch.setattr(measured, "load_adapter", missing)
    assert main([]) == 2
    assert "error: adapter 'torch' needs torch" in capsys.readouterr().err


@pytest.mark.parametrize("networks", ["0", "-1", "many"])
def test_a_number_of_networks_that_is_none_is_refused(networks: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--networks", networks])
    assert "--networks" in capsys.readouterr().err


def test_help_teaches() -> None:
    command = [sys.executable, "-m", "gradproof.trust.graded", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = " ".join(text.split())
    assert "1 + a size" in text
    assert "python -m gradproof.trust.graded --networks 5 --framework torch" in text


def test_no_framework_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, gradproof.trust.graded; print(sorted({'torch', 'jax'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
