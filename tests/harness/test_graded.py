"""Graded faults: each is planted where it is said to be, and the table's figures come from what the tools said."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from gradproof import graded as measured
from gradproof.adapter import AdapterError
from gradproof.drawing import Drawn
from gradproof.dtypes import DTYPES
from gradproof.examination import Subject
from gradproof.graded import (
    CAUGHT,
    ELEMENT,
    FAILED,
    FIXED,
    FRAMEWORKS,
    NOTHING,
    PASSED,
    SCALED,
    Graded,
    Outcome,
    Plant,
    Row,
    Scene,
    Spoilt,
    Tool,
    graded,
    main,
    shares_table,
    table,
    told,
)
from gradproof.network import Input, Network, Node
from gradproof.reference import LAYERS, NumpyReference
from gradproof.registry import load_adapter
from gradproof.sweep import Sweep

TWICE = 0
"""The k of a fault that doubles."""


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


def scene(victim: str = "w", element: int = 1, dtype: str = "float64") -> Scene:
    return Scene(0, LINEAR.case(dtype), victim, element)


def tools(framework: str) -> Iterator[Tool]:
    return measured._tools({framework: Subject(load_adapter(framework), {})})


def need(framework: str) -> None:
    pytest.importorskip(framework, reason=f"needs pip install 'gradproof[{framework}]'")


EACH_FRAMEWORK = pytest.mark.parametrize("framework", FRAMEWORKS)

# What is planted.


@pytest.mark.parametrize("element", [None, 2])
def test_only_the_victim_s_gradient_is_changed(element: int | None) -> None:
    case = LINEAR.case("float32")
    right, spoilt = (Spoilt(NumpyReference(), plant) for plant in (None, Plant("w", element, 3)))
    true, got = (
        each.backward(each.forward(case.network, case.values, "float32"), case.cotangent) for each in (right, spoilt)
    )
    expected = true["w"].astype(np.float64)
    expected.reshape(-1)[slice(None) if element is None else element] *= 1.001
    assert np.array_equal(got["w"], expected.astype(np.float32))
    assert got["w"].dtype == np.float32
    assert got.keys() == true.keys()
    for name in true.keys() - {"w"}:
        assert np.array_equal(got[name], true[name])


@EACH_FRAMEWORK
@pytest.mark.parametrize("element", [None, 1])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_identity_of_a_framework_changes_the_gradient_alone(
    framework: str, element: int | None, dtype: str
) -> None:
    need(framework)
    plant = Plant("x", element, 2)
    x, dout = np.array([1.5, -0.25], dtype), np.array([3.0, 7.0], dtype)
    if framework == "torch":
        import torch

        leaf = torch.tensor(x, requires_grad=True)
        y = measured._torch_identity(plant, leaf)
        out, (gradient,) = y.detach().numpy(), torch.autograd.grad(y, [leaf], torch.tensor(dout))
    else:
        import jax

        load_adapter("jax")
        out, pull = jax.vjp(lambda x: measured._jax_identity(plant, x), x)
        (gradient,) = pull(jax.numpy.asarray(dout))
    assert np.array_equal(out, x)
    factors = np.array([1.01 if element is None else 1.0, 1.01])
    assert np.array_equal(np.asarray(gradient), (factors * dout).astype(dtype))


@EACH_FRAMEWORK
def test_every_tool_sees_what_is_planted_and_nothing_else(framework: str) -> None:
    need(framework)
    found = list(tools(framework))
    assert len({tool.name for tool in found}) == len(found) == len(FIXED) + (3 if framework == "torch" else 2)
    for tool in found:
        assert not tool.judge(scene(), None), tool.name
        for victim in ("x", "w", "b"):
            for element in (None, 0):
                assert tool.judge(scene(victim), Plant(victim, element, TWICE)), (tool.name, victim, element)


@EACH_FRAMEWORK
def test_an_error_of_a_tool_is_no_verdict(framework: str) -> None:
    need(framework)
    nowhere = Plant("nothing of this name", None, 1)
    own = [tool for tool in tools(framework) if "check" in tool.name]
    assert own
    assert {measured._judged(tool, scene(), SCALED, nowhere).verdict for tool in own} == {FAILED}


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
    assert len({(each.number, each.victim, each.element) for each in scenes if isinstance(each, Scene)}) == 1
    first = scenes[0]
    assert isinstance(first, Scene)
    assert Sweep(first.case, {}).gradients[first.victim].flat[first.element] != 0.0


# What the table says.


def said(verdicts: dict[tuple[str, int], str]) -> Row:
    """One letter per network and fault: c(aught), p(assed), f(ailed)."""
    names = {"c": CAUGHT, "p": PASSED, "f": FAILED}
    outcomes = [
        Outcome(number, planted, k, names[letter], 0.5 + number)
        for (planted, k), letters in verdicts.items()
        for number, letter in enumerate(letters)
    ]
    return Row("a tool", "float64", tuple(outcomes))


def test_shares_are_of_the_networks_that_pass_with_nothing_planted() -> None:
    row = said({(NOTHING, 0): "cfpp", (SCALED, 1): "ccpc", (ELEMENT, 1): "ffcc", (ELEMENT, 2): "ccpp"})
    assert (row.share(CAUGHT), row.share(FAILED), row.share(PASSED)) == (0.25, 0.25, 0.5)
    assert (row.caught(SCALED, 1), row.caught(ELEMENT, 1), row.caught(ELEMENT, 2)) == (0.5, 1.0, 0.0)
    assert (row.finest(SCALED), row.finest(ELEMENT)) == (None, 1)
    assert row.seconds == 2.0


def test_a_k_counts_only_where_every_smaller_one_does() -> None:
    assert said({(NOTHING, 0): "pp", (SCALED, 1): "cc", (SCALED, 2): "cp", (SCALED, 3): "cc"}).finest(SCALED) == 1


def test_the_tables_tell_what_was_found() -> None:
    usable = said({(NOTHING, 0): "cfpp", (SCALED, 1): "cccc", (ELEMENT, 1): "ccpc"})
    useless = said({(NOTHING, 0): "cccp", (SCALED, 1): "cccc", (ELEMENT, 1): "cccc"})
    found = Graded(7, 9, (usable, useless), {"float64": {"torch lacks a layer": 5}}, {"torch": "1.2"})
    head, _, first, second = table(found).splitlines()
    assert head.count("|") == first.count("|") == 9
    assert first == "| a tool | float64 | 4 | 25% | 25% | 1 | none | 2 |"
    assert second == "| a tool | float64 | 4 | 75% | 0% | - | - | 2 |"
    assert "| a tool | float64 | scaled | 100% |" in shares_table(found)
    assert "| a tool | float64 | element | 50% |" in shares_table(found)
    assert "| a tool | float64 | element | - |" in shares_table(found)
    text = told(found).replace("\n", " ")
    assert "9 random networks of seed 7, with torch 1.2." in text
    assert "left out are, in float64: 5 where torch lacks a layer." in text


@EACH_FRAMEWORK
def test_a_run_asks_every_tool_about_the_same_networks(framework: str) -> None:
    need(framework)
    found = graded(3, seed=1, frameworks=[framework], dtypes=["float64"], ks=[TWICE, 15])
    assert found.versions.keys() == {framework}
    (left_out,) = found.left_out.values()
    assert found.drawn == 3
    numbers = {tuple(each.network for each in row.sound) for row in found.rows}
    assert len(numbers) == 1
    assert len(numbers.pop()) == 3 - sum(left_out.values()) > 0
    own = next(row for row in found.rows if row.tool == f"gradproof on {framework}")
    assert own.share(PASSED) == own.caught(SCALED, TWICE) == own.caught(ELEMENT, TWICE) == 1.0
    assert own.caught(SCALED, 15) < 1.0
    assert own.finest(SCALED) == TWICE
    again = graded(3, seed=1, frameworks=[framework], dtypes=["float64"], ks=[TWICE])
    assert {(e.network, e.planted, e.k, e.verdict) for row in again.rows for e in row.outcomes} < {
        (e.network, e.planted, e.k, e.verdict) for row in found.rows for e in row.outcomes
    }


def test_the_command_prints_the_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    need("torch")
    monkeypatch.setattr(measured, "graded", partial(graded, ks=[1], dtypes=["float64"]))
    assert main(["--networks", "2", "--framework", "torch", "--seed", "4"]) == 0
    out = capsys.readouterr().out
    assert "2 random networks of seed 4" in out
    assert re.search(r"\| gradproof on torch \| float64 \| \d \| 0% \| 0% \| 1 \| 1 \| [\d.e-]+ \|", out)


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
    command = [sys.executable, "-m", "gradproof.graded", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = " ".join(text.split())
    assert "1 + 10^-k" in text
    assert "python -m gradproof.graded --networks 5 --framework torch" in text


def test_no_framework_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, gradproof.graded; print(sorted({'torch', 'jax'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
