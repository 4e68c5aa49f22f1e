"""What a person reads: headlines, the per-layer diff, the summary and its warnings, word for word."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import RenderableType

from gradproof.model.adapter import Adapter, Forward
from gradproof.model.case import Case
from gradproof.model.layer import Layer
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import Options, OptionValue
from gradproof.reference import LAYERS, NumpyReference
from gradproof.run.check import Run, replay
from gradproof.run.results import Report, Tally
from gradproof.show.layers import layers_table
from gradproof.show.report import OutputConsole, closing_line, conventions_table, diff_text, headline, summary, warnings
from gradproof.subject.registry import load_adapter
from gradproof.trust.faults import FAULTS, MISBEHAVIOUR
from gradproof.verdict.divergence import Divergence
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject

VERSION = f"NumPy {np.__version__}"


def node(name: str, layer: str, *inputs: str, **options: OptionValue) -> Node:
    return Node.of(name, LAYERS[layer], *inputs, options=options)


def case(nodes: tuple[Node, ...], cotangent: Any, dtype: str = "float64", **values: Any) -> Case:
    """A case whose inputs are the arrays given by name."""
    arrays = {name: np.array(value, dtype) for name, value in values.items()}
    inputs = tuple(Input(name, array.shape) for name, array in arrays.items())
    return Case(Network(inputs, nodes), dtype, arrays, np.array(cotangent, dtype))


def gated() -> Case:
    """x[2,2] -> relu -> multiply(y[2,2])"""
    nodes = (node("h", "relu", "x"), node("out", "multiply", "h", "y"))
    return case(nodes, [[1.0, 2.0], [3.0, 4.0]], x=[[1.0, -2.0], [-3.0, 4.0]], y=[[0.5, 0.5], [2.0, 2.0]])


def fork() -> Case:
    """One tensor that two nodes read."""
    nodes = (
        node("h", "identity", "x"),
        node("a", "relu", "h"),
        node("b", "leaky_relu", "h"),
        node("sum", "add", "a", "b"),
    )
    return case(nodes, [1.0, 2.0, 4.0], x=[1.0, 2.0, -1.0])


def chain(dtype: str = "float64") -> Case:
    """x[2] -> tanh -> identity"""
    return case((node("t", "tanh", "x"), node("o", "identity", "t")), [1.0, 2.0], dtype, x=[0.0, 0.0])


def fault(name: str) -> Adapter:
    return FAULTS[name].make()


def examined(adapter: Adapter, of: Case, timeout: float = 60.0) -> tuple[Examination, Report]:
    """The one examination that disagrees, and the report that it stands in."""
    report = replay(of, [adapter], timeout)
    ((examination, spec),) = report.examinations
    assert spec is None
    return examination, report


def headline_of(adapter: Adapter, of: Case, timeout: float = 60.0) -> str:
    (line,) = settled(headline(examined(adapter, of, timeout)[0]))
    return line


def diff_of(adapter: Adapter, of: Case, spec: str | None = None) -> str:
    examination, report = examined(adapter, of)
    return diff_text(examination, report, spec)


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
    assert headline_of(shifted, chain()).startswith(
        "mine float64: tanh (node t) is wrong: out t at [0]: expected 0, got 0.5 ("
    )


def test_headline_of_a_composition_fault() -> None:
    assert headline_of(fault("fan_out_path_dropped"), fork()) == (
        "reference float64: every layer agrees alone; in the network, d h at [1]: expected 4, got 2 "
        "(N noise units); the gradients that a, b send to h add up wrongly"
    )


class CrashesOnTwoNodes(NumpyReference):
    name = "mine"

    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward:
        if len(network.nodes) > 1:
            raise RuntimeError("one layer\n  at a time")
        return super().forward(network, values, dtype)


def test_headline_of_a_crash_that_only_the_network_brings_about() -> None:
    headline = headline_of(CrashesOnTwoNodes(), chain())
    crash = "crash: RuntimeError: one layer at a time (tests/harness/test_report.py:N in forward)"
    assert re.sub(r":\d+ in", ":N in", headline) == f"mine float64: every layer agrees alone; in the network, {crash}"


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
    got = headline_of(MISBEHAVIOUR[kind].make(), chain(), timeout=0.2)
    assert got == f"reference float64: tanh (node t) is wrong: {what}"


def test_headline_of_a_mutated_input() -> None:
    assert headline_of(MISBEHAVIOUR["mutated_input"].make(), gated()) == (
        "reference float64: relu (node h) is wrong: mutated_input: x was written to"
    )


def test_headline_of_a_list_where_an_array_is_due() -> None:
    assert headline_of(Changed(extra={"x": [1.0, 2.0]}), chain()) == (
        "mine float64: tanh (node t) is wrong: d x: expected a NumPy array of float64, got list (dtype)"
    )


def test_headline_of_a_gradient_that_nobody_asked_for() -> None:
    got = headline_of(Changed(extra={"bias": np.zeros(2)}), chain())
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
    lines = diff_of(shifted, chain()).splitlines()
    assert lines[2] == "forward: values disagree too, listed first"
    assert [line.split()[:4] for line in lines[4:6]] == [["t", "tanh", "out", "t"], ["o", "identity", "out", "o"]]
    assert lines[4].endswith("WRONG HERE")
    assert lines[5].endswith("inherited")
    assert [line.split()[-1] for line in lines[6:9]] == ["agrees"] * 3


@pytest.mark.parametrize("kind", ["missing", "shape", "dtype", "nonfinite"])
def test_diff_names_the_kind_beside_the_verdict(kind: str) -> None:
    line = diff_of(MISBEHAVIOUR[kind].make(), chain()).splitlines()[6]
    assert line.startswith("t    tanh     d x")
    assert line.endswith(f"WRONG HERE: {kind}")


def test_diff_of_a_mutated_input_does_not_blame_the_values() -> None:
    lines = diff_of(MISBEHAVIOUR["mutated_input"].make(), gated()).splitlines()
    assert lines[4].split() == ["h", "relu", "x", "[2,", "2]", "WRONG", "HERE:", "mutated_input"]
    assert lines[2] == "forward: every value agrees"


def test_diff_of_a_crash_does_not_say_that_values_were_compared() -> None:
    lines = diff_of(MISBEHAVIOUR["crash"].make(), chain()).splitlines()
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
    found = " ".join(diff_of(Changed(raising=ValueError(message)), chain()).split())
    assert found.count(f"ValueError: {message}") == 1
    for word in ("[i]", "[/x]", "[bold]bad[/bold]", ":key:"):
        assert found.count(word) == 2, "once in the headline, once in the table"


def test_names_are_shown_as_they_are() -> None:
    named = case((node("[bold]", "relu", "x[/i]"),), [1.0, 2.0], **{"x[/i]": [1.0, -2.0]})
    row = diff_of(fault("relu_derivative_left_out"), named).splitlines()[-3]
    assert row.split()[:4] == ["[bold]", "relu", "d", "x[/i]"]


# Known divergences.

TANH_IS_OFF = '''
from gradproof.reference import LAYERS, NumpyReference


def forward(x):
    out, kept = LAYERS["tanh"].forward(x)
    return out, (x, kept)


def backward(dout, cache):
    """10 % too large from 1.5 to 2.5."""
    x, kept = cache
    off = (x > 1.5) & (x < 2.5)
    return {"x": LAYERS["tanh"].backward(dout, kept)["x"] * (1.1 if {wrong} else 1.0) ** off}


class Mine(NumpyReference):
    name = "mine"

    def __init__(self):
        super().__init__(rows={"tanh": (forward, backward)})

    def version(self):
        return "1.0"
'''

ENTRY = """
[[divergence]]
layer = "tanh"
dtypes = ["float64"]
argument = "x"
between = [1.5, 2.5]
kinds = ["gradient"]
versions = ["1."]
max_relative_error = 0.11
witness = { x = 2.0 }
reason = "tanh is taken from a table"
link = "https://example.org/tanh"
"""


def mine(directory: Path, wrong: bool) -> Adapter:
    """An adapter with a known-divergence file beside it."""
    stem = f"mine_{'wrong' if wrong else 'right'}"
    file = directory / f"{stem}.py"
    file.write_text(TANH_IS_OFF.replace("{wrong}", str(wrong)))
    file.with_suffix(".toml").write_text(ENTRY)
    return load_adapter(f"{file}:Mine")


def steep(layer: str = "identity") -> Case:
    """x[2] -> tanh -> layer, one element where the divergence shows."""
    return case((node("t", "tanh", "x"), node("o", layer, "t")), [1.0, 2.0], x=[0.0, 2.0])


def test_a_known_divergence_is_told_and_no_disagreement(tmp_path: Path) -> None:
    report = replay(steep(), [mine(tmp_path, wrong=True)])
    assert report.agrees
    assert (report.examinations, report.disagreements) == ([], [])
    assert [(each.tensor, each.cause) for each in report.known] == [("x", "tanh is taken from a table")]
    assert warnings(report) == ["known: mine float64 tanh: tanh is taken from a table (1 tensor)"]
    (tally,) = report.tallies.values()
    assert (tally.networks, tally.known, tally.disagreeing, sum(tally.wrong_layers.values())) == (1, 1, 0, 0)


def known_divergence() -> Divergence:
    return Divergence("relu", ("float64",), "x", (-9.0, 0.0), ("gradient",), ("1",), {"x": -1.0}, "why", "link", 0, 9)


def test_headline_of_a_known_divergence() -> None:
    subject = Subject(fault("relu_derivative_left_out"), {}, (known_divergence(),))
    found = examine(subject, gated())
    assert settled(headline(found)) == [
        "reference float64: relu (node h) diverges as known: d x at [1, 0]: expected 0, got 6 (inf noise units)"
    ]
    report = Report(0, ("float64",), {"reference": "1"}, {"reference": "reference"})
    assert diff_text(found, report, None).splitlines()[7].endswith(" known divergence")


def test_an_unknown_fault_beside_a_known_one_is_the_headline(tmp_path: Path) -> None:
    adapter = mine(tmp_path, wrong=True)
    adapter._rows = {**adapter._rows, "silu": (LAYERS["silu"].forward, lambda dout, cache: {"x": dout})}  # type: ignore[attr-defined]
    report = replay(steep("silu"), [adapter])
    ((examination, _),) = report.examinations
    assert headline(examination).startswith("mine float64: silu (node o) is wrong: d t at ")
    assert [each.cause for each in report.known] == ["tanh is taken from a table"]
    assert [each.layer for each in report.disagreements] == ["silu"]
    assert str(report.disagreements[0].cause).startswith("equals the cotangent as it came")
    assert not report.agrees


def test_a_stale_divergence(tmp_path: Path) -> None:
    report = replay(steep(), [mine(tmp_path, wrong=False)])
    report.seconds = 1.25
    assert not report.agrees
    assert warnings(report) == [
        "mine float64: the known divergence of tanh (tanh is taken from a table) no longer shows at {'x': 2.0}: "
        "remove its entry"
    ]
    assert closing_line(report) == "1 known divergence stale: 1 network, 3 gradients compared in 1.2 s, seed 0"


# The summary.


def test_summary_of_agreement() -> None:
    report = replay(chain(), [Changed()])
    report.seconds = 0.04
    assert rendered(summary(report)).splitlines() == [
        "mine 1.0",
        "",
        "adapter  dtype    networks  gradients  wrong  known  worst agreeing  unverifiable",
        "mine     float64         1          3      0      0       0.0 units         0.00%",
        "",
        "networks with layer  mine float64",
        "identity                        1",
        "tanh                            1",
        "",
        "agreement: 1 network, 3 gradients compared in 0.0 s, seed 0",
    ]


def test_summary_of_disagreement() -> None:
    report = replay(gated(), [fault("relu_derivative_left_out"), Changed()])
    report.seconds = 12.34
    lines = rendered(summary(report)).splitlines()
    assert lines[0] == f"reference {VERSION}, mine 1.0"
    assert settled("\n".join(lines[3:9])) == [
        "reference float64 1 4 1 0 0.0 units 0.00%",
        "mine float64 1 4 0 0 0.0 units 0.00%",
        "",
        "networks with layer reference float64 mine float64",
        "multiply 1 1",
        "relu 1 WRONG of 1 1",
    ]
    assert lines[-1] == "1 tensor disagrees: 1 network, 8 gradients compared in 12.3 s, seed 0"


def test_summary_of_a_replay_has_no_table_of_layers() -> None:
    text = rendered(summary(replay(chain(), [Changed()]), by_layer=False))
    assert "networks with layer" not in text


@pytest.mark.parametrize(
    ("disagreeing", "interrupted", "start"),
    [
        (0, False, "agreement: 7 networks, 0 gradients compared in 0.0 s, seed 5"),
        (0, True, "interrupted: agreement: 7 networks, 0 gradients compared in 0.0 s, seed 5"),
        (3, False, "3 tensors disagree: 7 networks, 0 gradients compared in 0.0 s, seed 5"),
        (1, True, "interrupted: 1 tensor disagrees: 7 networks, 0 gradients compared in 0.0 s, seed 5"),
    ],
)
def test_closing_line(disagreeing: int, interrupted: bool, start: str) -> None:
    found = replay(gated(), [fault("relu_derivative_left_out")]).disagreements * disagreeing
    tallies = {("mine", "float64"): Tally(networks=7)}
    report = Report(5, ("float64",), {}, {}, 7, tallies=tallies, disagreements=found, interrupted=interrupted)
    assert closing_line(report) == start


def test_closing_line_of_a_run_that_examined_nothing() -> None:
    report = Report(5, ("float64",), {}, {}, networks=7, tallies={("mine", "float64"): Tally()})
    assert closing_line(report).startswith("not every adapter examined a network: 7 networks")
    assert not report.agrees


# Warnings.


def test_no_warnings_where_all_was_verified() -> None:
    assert warnings(replay(chain(), [Changed()])) == []


def test_warning_of_too_much_that_overflows() -> None:
    """The square of x, on the way to a gradient of ordinary size, is beyond the range of float32."""
    cubed = case((node("y", "power", "x", exponent=3.0),), [1e-20, 2e-20], "float32", x=[1e20, -1e20])
    report = replay(cubed, [Changed()])
    assert report.agrees
    assert warnings(report) == ["mine float32: verified too little: 33% of the elements overflow float32"]
    assert report.to_json()["unverifiable"] == {"mine": {"float32": pytest.approx(1 / 3)}}


def test_no_warning_of_a_little_that_overflows() -> None:
    cubed = case((node("y", "power", "x", exponent=3.0),), [1e-20, 2.0, 3.0], "float32", x=[1e20, 1.0, 1.0])
    report = replay(cubed, [Changed()])
    assert warnings(report) == []
    (tally,) = report.tallies.values()
    assert (tally.unverifiable, tally.elements) == (1, 9)


@pytest.mark.parametrize(("networks", "said"), [(1, "1 network"), (2, "2 networks")])
def test_warning_of_layers_that_an_adapter_lacks(networks: int, said: str) -> None:
    run = Run({"mine": Changed(lacking="tanh")}, ["float64"])
    run.prepare()
    run.examine_case(gated())
    for _ in range(networks):
        assert run.examine_case(chain()) == []
    assert warnings(run.report) == [f"mine float64: {said} not run, for it lacks one of their layers: tanh"]


def test_warning_where_nothing_was_examined() -> None:
    run = Run({"mine": Changed()}, ["float64", "float32"])
    run.prepare()
    run.examine_case(chain())
    assert warnings(run.report) == ["mine float32: no network was examined"]


def test_warnings_stand_above_the_closing_line() -> None:
    report = replay(chain(), [Changed(lacking="tanh")])
    lines = rendered(summary(report)).splitlines()
    assert lines[-4:-2] == warnings(report)
    assert len(warnings(report)) == 2


# Markup in other people's words.


class OnTheGpu(Changed):
    name = "mine[gpu]"


def test_an_adapters_name_and_version_are_shown_as_they_are() -> None:
    report = replay(chain(), [OnTheGpu(version="1.0 [cuda] :key:")])
    lines = rendered(summary(report)).splitlines()
    assert lines[0] == "mine[gpu] 1.0 [cuda] :key:"
    assert lines[3].startswith("mine[gpu]  float64  ")
    assert lines[5] == "networks with layer  mine[gpu] float64"
    conventions = {"mine[gpu]": {"float64": {"leaky_relu": {"at_zero": 0.0}}}}
    assert rendered(conventions_table(conventions)).startswith("layer       kink     mine[gpu] float64\n")


def test_a_reason_is_shown_as_it_is_in_the_table_of_layers() -> None:
    reason = "pip install 'gradproof[torch]'"
    assert rendered(layers_table({"torch": reason}), 400).count(reason) == len(LAYERS)


def test_conventions_table() -> None:
    conventions = {
        "torch": {"float64": {"relu": {"at_zero": 0.0}}, "float32": {"relu": {"at_zero": 0.5}}},
        "mine": {"float64": {"mae": {"at_target": 1.0}}},
    }
    assert rendered(conventions_table(conventions)).splitlines() == [
        "layer  kink       torch float64  torch float32  mine float64",
        "mae    at_target  ?              ?              1",
        "relu   at_zero    0              0.5            ?",
    ]
