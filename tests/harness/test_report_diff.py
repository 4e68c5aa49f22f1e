"""What a person reads of one network: the headline and the per-layer diff, word for word."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from gradproof.model.adapter import Adapter
from gradproof.model.case import Case
from gradproof.reference import LAYERS, NumpyReference
from gradproof.show.report import diff_text, headline
from gradproof.trust.faults import MISBEHAVIOUR
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from helpers.adapters import OnlyOneLayer
from helpers.networks import node
from helpers.reports import VERSION, Changed, bent, case, fault, gated, replayed, settled


def fork() -> Case:
    """One tensor that two nodes read."""
    nodes = (
        node("h", "identity", "x"),
        node("a", "relu", "h"),
        node("b", "leaky_relu", "h"),
        node("sum", "add", "a", "b"),
    )
    return case(nodes, [1.0, 2.0, 4.0], x=[1.0, 2.0, -1.0])


def headline_of(adapter: Adapter, of: Case, timeout: float = 60.0) -> str:
    """What is said first of the one examination that disagrees."""
    (line,) = settled(headline(replayed(adapter, of, timeout)[0]))
    return line


def diff_of(adapter: Adapter, of: Case, spec: str | None = None) -> str:
    """The diff of the one examination that disagrees."""
    examination, report = replayed(adapter, of)
    return diff_text(examination, report, spec)


# Headlines.


def test_headline_of_agreement() -> None:
    found = examine(Subject(NumpyReference(), {}), gated())
    assert headline(found) == "reference float64: every tensor agrees"


def test_headline_of_a_wrong_gradient() -> None:
    assert headline_of(fault("relu_derivative_left_out"), gated()) == (
        "reference float64: relu (node h) is wrong: d x at [1, 0]: expected 0, got 6 (inf noise units)"
    )


def test_headline_of_a_wrong_scalar_has_no_index() -> None:
    loss = case((node("loss", "mse", "x", "y", reduction="sum"),), 1.0, x=[3.0], y=[1.0])
    doubled = Changed(("mse", (lambda x, target, reduction: (np.float64(8.0), None), lambda dout, cache: {})))
    assert headline_of(doubled, loss).startswith(
        "mine float64: mse (node loss) is wrong: out loss: expected 4, got 8 ("
    )


def test_headline_of_a_wrong_value() -> None:
    shifted = Changed(("tanh", (lambda x: (np.tanh(x) + 0.5, np.tanh(x)), LAYERS["tanh"].backward)))
    assert headline_of(shifted, bent()).startswith(
        "mine float64: tanh (node t) is wrong: out t at [0]: expected 0, got 0.5 ("
    )


def test_headline_of_a_composition_fault() -> None:
    assert headline_of(fault("fan_out_path_dropped"), fork()) == (
        "reference float64: every layer agrees alone; in the network, d h at [1]: expected 4, got 2 "
        "(N noise units); the gradients that a, b send to h add up wrongly"
    )


def test_headline_of_a_crash_that_only_the_network_brings_about() -> None:
    headline = re.sub(r":\d+ in", ":N in", headline_of(OnlyOneLayer(), bent()))
    crash = "crash: NotImplementedError: one layer at a time (helpers/adapters.py:N in forward)"
    assert headline == f"reference float64: every layer agrees alone; in the network, {crash}"


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("missing", "d x: expected an array, got None (missing)"),
        ("shape", "d x: expected [2], got [1, 2] (shape)"),
        ("dtype", "d x: expected float64, got float16 (dtype)"),
        ("nonfinite", "d x at [0]: expected 1, got nan (inf noise units)"),
        (
            "nondeterministic",
            "d x at [1]: expected 2, got 3.27392337, and something else when called again (N noise units)",
        ),
        ("crash", "crash: RuntimeError: the kernel is not implemented"),
        ("timeout", "timeout: no result after 0.2 s"),
    ],
)
def test_headline_of_misbehaviour(kind: str, what: str) -> None:
    got = headline_of(MISBEHAVIOUR[kind].make(), bent(), timeout=0.2)
    assert got == f"reference float64: tanh (node t) is wrong: {what}"


def test_headline_of_a_mutated_input() -> None:
    assert headline_of(MISBEHAVIOUR["mutated_input"].make(), gated()) == (
        "reference float64: relu (node h) is wrong: mutated_input: x was written to"
    )


def test_headline_of_a_list_where_an_array_is_due() -> None:
    assert headline_of(Changed(extra={"x": [1.0, 2.0]}), bent()) == (
        "mine float64: tanh (node t) is wrong: d x: expected a NumPy array of float64, got list (dtype)"
    )


def test_headline_of_a_gradient_that_nobody_asked_for() -> None:
    got = headline_of(Changed(extra={"bias": np.zeros(2)}), bent())
    assert "d bias" in got
    assert "not asked for" in got
    assert "expected ," not in got


# The diff.


def test_diff_of_a_wrong_gradient() -> None:
    assert settled(diff_of(fault("relu_derivative_left_out"), gated(), "some/spec.json")) == [
        "reference float64: relu (node h) is wrong: d x at [1, 0]: expected 0, got 6 (inf noise units)",
        "likely mistake in relu (node h): equals the cotangent as it came: check that the layer's derivative is "
        "multiplied in",
        "network: x[2,2] -> relu -> multiply(y[2,2])",
        "forward: every value agrees",
        "node layer tensor shape worst error at expected got noise units verdict",
        "out multiply d out [2, 2] 0.00e+00 [0, 0] 1 1 0 agrees",
        "out multiply d h [2, 2] 0.00e+00 [0, 0] 0.5 0.5 0 agrees",
        "out multiply d y [2, 2] 0.00e+00 [0, 0] 1 1 0 agrees",
        "h relu d x [2, 2] 6.00e+00 [1, 0] 0 6 inf WRONG HERE",
        f"reference {VERSION}, float64, numbers given",
        "replay: gradproof replay some/spec.json --adapter reference",
    ]


def test_diff_of_a_composition_fault() -> None:
    lines = settled(diff_of(fault("fan_out_path_dropped"), fork()))
    assert lines[2:4] == [
        "likely mistake: d h equals the sum without the part from b (x): check that gradients are added "
        "up, not assigned",
        "network: x[3] -> identity as h; h -> relu as a; h -> leaky_relu as b; a -> add(b)",
    ]
    assert lines[lines.index("forward: every value agrees") - 1 :] == [
        "network: x[3] -> identity as h; h -> relu as a; h -> leaky_relu as b; a -> add(b)",
        "forward: every value agrees",
        "node layer tensor shape worst error at expected got noise units verdict",
        "sum add d sum [3] 0.00e+00 [0] 1 1 0 agrees",
        "sum add d b [3] 0.00e+00 [0] 1 1 0 agrees",
        "sum add d a [3] 0.00e+00 [0] 1 1 0 agrees",
        "a relu d h [3] 2.00e+00 [1] 4 2 N composition",
        "h identity d x [3] 2.00e+00 [1] 4 2 N inherited",
        f"reference {VERSION}, float64, numbers given",
        "replay: no spec was written",
    ]


def test_columns_stand_below_their_headings() -> None:
    lines = diff_of(fault("relu_derivative_left_out"), gated()).splitlines()
    start = lines.index("forward: every value agrees") + 1
    heading, *rows = lines[start : start + 5]
    for row in rows:
        assert row.index(" d ") + 1 == heading.index("tensor")
        assert row.index("]") + 1 <= heading.index("worst error")
    assert rows[-1].endswith("WRONG HERE")
    assert rows[-1].index("WRONG HERE") == heading.index("verdict")


def test_diff_of_a_wrong_value_lists_values_first() -> None:
    shifted = Changed(("tanh", (lambda x: (np.tanh(x) + 0.5, np.tanh(x)), LAYERS["tanh"].backward)))
    lines = diff_of(shifted, bent()).splitlines()
    assert lines[2] == "forward: values disagree too, listed first"
    assert [line.split()[:4] for line in lines[4:6]] == [["t", "tanh", "out", "t"], ["o", "identity", "out", "o"]]
    assert lines[4].endswith("WRONG HERE")
    assert lines[5].endswith("inherited")
    assert [line.split()[-1] for line in lines[6:9]] == ["agrees"] * 3


@pytest.mark.parametrize("kind", ["missing", "shape", "dtype", "nonfinite"])
def test_diff_names_the_kind_beside_the_verdict(kind: str) -> None:
    line = diff_of(MISBEHAVIOUR[kind].make(), bent()).splitlines()[6]
    assert line.startswith("t    tanh     d x")
    assert line.endswith(f"WRONG HERE: {kind}")


def test_diff_of_a_mutated_input_does_not_blame_the_values() -> None:
    lines = diff_of(MISBEHAVIOUR["mutated_input"].make(), gated()).splitlines()
    assert lines[4].split() == ["h", "relu", "x", "[2,", "2]", "WRONG", "HERE:", "mutated_input"]
    assert lines[2] == "forward: every value agrees"


def test_diff_of_a_crash_does_not_say_that_values_were_compared() -> None:
    lines = diff_of(MISBEHAVIOUR["crash"].make(), bent()).splitlines()
    assert lines[4].startswith("t    tanh ")
    assert "WRONG HERE: crash" in lines[4]
    assert lines[2] not in ("forward: every value agrees", "forward: values disagree too, listed first")


def test_diff_says_which_seed_the_numbers_hang_on() -> None:
    seeded = replace(gated(), seed=42)
    assert f"reference {VERSION}, float64, numbers drawn from seed 42" in diff_of(
        fault("relu_derivative_left_out"), seeded
    )


def test_the_replay_command_stays_on_one_line() -> None:
    spec = "/".join(["a-rather-long-directory"] * 8) + "/spec.json"
    last = diff_of(fault("relu_derivative_left_out"), gated(), spec).splitlines()[-1]
    assert last == f"replay: gradproof replay {spec} --adapter reference"


def test_an_adapters_message_is_shown_as_it_is() -> None:
    message = "axis [i] of [/x] is [bold]bad[/bold] :key:"
    found = " ".join(diff_of(Changed(raising=ValueError(message)), bent()).split())
    assert found.count(f"ValueError: {message}") == 1
    for word in ("[i]", "[/x]", "[bold]bad[/bold]", ":key:"):
        assert found.count(word) == 2, "once in the headline, once in the table"


def test_names_are_shown_as_they_are() -> None:
    named = case((node("[bold]", "relu", "x[/i]"),), [1.0, 2.0], **{"x[/i]": [1.0, -2.0]})
    row = diff_of(fault("relu_derivative_left_out"), named).splitlines()[-3]
    assert row.split()[:4] == ["[bold]", "relu", "d", "x[/i]"]
