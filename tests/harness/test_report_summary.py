"""What a person reads of a whole run: the summary, its warnings, and other people's words as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradproof.reference import LAYERS
from gradproof.run.check import Run, replay
from gradproof.run.results import Report, Tally
from gradproof.show.layers import layers_table
from gradproof.show.report import closing_line, conventions_table, summary, warnings
from helpers.networks import node
from helpers.reports import VERSION, Changed, bent, case, fault, gated, rendered, settled

# The summary.


def test_summary_of_agreement() -> None:
    report = replay(bent(), [Changed()])
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
    text = rendered(summary(replay(bent(), [Changed()]), by_layer=False))
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
    assert warnings(replay(bent(), [Changed()])) == []


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
        assert run.examine_case(bent()) == []
    assert warnings(run.report) == [f"mine float64: {said} not run, for it lacks one of their layers: tanh"]


def test_warning_where_nothing_was_examined() -> None:
    run = Run({"mine": Changed()}, ["float64", "float32"])
    run.prepare()
    run.examine_case(bent())
    assert warnings(run.report) == ["mine float32: no network was examined"]


def test_warnings_stand_above_the_closing_line() -> None:
    report = replay(bent(), [Changed(lacking="tanh")])
    lines = rendered(summary(report)).splitlines()
    assert lines[-4:-2] == warnings(report)
    assert len(warnings(report)) == 2


# Markup in other people's words.


class OnTheGpu(Changed):
    name = "mine[gpu]"


def test_an_adapters_name_and_version_are_shown_as_they_are() -> None:
    report = replay(bent(), [OnTheGpu(version="1.0 [cuda] :key:")])
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


# What was not asked for.


@pytest.mark.parametrize(("asked", "agrees"), [(["multiply"], True), (["relu"], False), ([], False)])
def test_what_other_layers_than_those_asked_for_do_wrong_is_told_apart(
    asked: list[str], agrees: bool, tmp_path: Path
) -> None:
    run = Run({"reference": fault("relu_derivative_left_out")}, ["float64"], failures=tmp_path)
    run.prepare(asked)
    run.examine_case(gated())
    report = run.report
    assert report.agrees is agrees
    beside, counted = (report.beside, report.disagreements) if agrees else (report.disagreements, report.beside)
    assert {each.layer for each in beside if each.culprit} == {"relu"}
    assert counted == []
    told = [line for line in warnings(report) if "not asked for" in line]
    specs = [str(path) for path in tmp_path.iterdir()]
    assert told == ([f"reference float64: relu is wrong too, which was not asked for: {specs[0]}"] if agrees else [])
    assert len(report.to_json()["beside"]) == len(report.beside)
