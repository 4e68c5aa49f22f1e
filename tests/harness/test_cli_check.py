"""The command `check`: what it prints, what it draws, and the JSON that it writes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gradproof.cli import AGREEMENT, DISAGREEMENT
from gradproof.model.spec import load_case
from gradproof.reference import LAYERS
from gradproof.reference.algorithms import DIFFERENCE
from gradproof.run.results import Disagreement
from gradproof.verdict.agreement import THRESHOLD
from helpers.command_line import BOTH, VERSION, Command, check, process, valid_json

pytestmark = pytest.mark.usefixtures("workplace")

# check


def test_check_that_agrees(gradproof: Command) -> None:
    result = gradproof("check", "--adapter", "reference", "--networks", "10", "--seed", "1", "--layer", "abs")
    assert (result.code, result.err) == (AGREEMENT, "")
    assert re.fullmatch(
        r"agreement: 10 networks, \d+ gradients compared in \d+\.\d s, seed 1", result.out.splitlines()[-1]
    )
    assert result.lines[:3] == [
        "Conventions at kinks (weight of the right-hand derivative):",
        "layer kink reference float64 reference float32",
        "abs at_zero 0.5 0.5",
    ]
    assert not Path("gradproof-failures").exists()


def test_check_that_disagrees(gradproof: Command) -> None:
    result = gradproof("check", *BOTH, "--layer", "tanh", "--networks", "4", "--seed", "1", "--json", "report.json")
    assert result.code == DISAGREEMENT
    diff = result.out.partition("\n\n")[0]
    assert re.match(r"wrong float(64|32): tanh \(node h\d+\) is wrong: d \w+ at \[[\d, ]+\]: expected ", diff)
    assert re.search(r"^h\d+ +tanh +d \w+ .* WRONG HERE$", diff, re.MULTILINE)
    assert re.search(rf"^wrong {VERSION}, float(64|32), numbers drawn from seed \d+$", diff, re.MULTILINE)
    spec = re.search(r"^replay: gradproof replay (\S+) --adapter adapters_here\.py:Wrong$", diff, re.MULTILINE)
    assert spec
    assert "tanh" in {node.layer.name for node in load_case(Path(spec[1]), LAYERS).network.nodes}
    assert re.match(r"\d+ tensors disagree: 4 networks, \d+ gradients compared in ", result.lines[-1])
    assert any(re.match(r"tanh \d 4? ?.* WRONG of \d", line) for line in result.lines)


def test_check_lists_every_disagreeing_network(gradproof: Command) -> None:
    result = check(gradproof, "Wrong", "--layer", "tanh", "--networks", "8", "--json", "report.json")
    specs = {each["spec"] for each in valid_json("report.json")["disagreements"]}
    assert len(specs) > 5
    assert {str(path) for path in Path("gradproof-failures").iterdir()} == specs
    assert result.out.count("replay: gradproof replay ") == 5
    assert f"... and {len(specs) - 5} more networks that disagree: replay their specs to see them" in result.lines


def test_a_spec_that_check_wrote_replays(gradproof: Command) -> None:
    check(gradproof, "Wrong", "--layer", "tanh", "-x")
    (spec,) = map(str, Path("gradproof-failures").iterdir())
    wrong = gradproof("replay", spec, "--adapter", "adapters_here.py:Wrong", "--json", "again.json")
    assert wrong.code == DISAGREEMENT
    assert wrong.out.startswith("wrong float64: tanh (node h")
    assert f"replay: gradproof replay {spec} --adapter adapters_here.py:Wrong" in wrong.lines
    assert [each["layer"] for each in valid_json("again.json")["disagreements"] if each["culprit"]] == ["tanh"]
    right = gradproof("replay", spec, "--adapter", "reference")
    assert right.code == AGREEMENT
    assert "is wrong" not in right.out
    assert re.match(r"agreement: 1 network, \d+ gradients compared in ", right.lines[-1])


def test_replay_shows_the_diff_that_check_showed(gradproof: Command) -> None:
    shown = check(gradproof, "Wrong", "--layer", "tanh", "-x").out.partition("\n\n")[0]
    (spec,) = map(str, Path("gradproof-failures").iterdir())
    assert gradproof("replay", spec, "--adapter", "adapters_here.py:Wrong").out.partition("\n\n")[0] == shown


def test_exitfirst_stops_at_the_first_disagreement(gradproof: Command) -> None:
    result = check(gradproof, "Wrong", "--networks", "300", "--json", "report.json", "-x")
    assert result.code == DISAGREEMENT
    report = valid_json("report.json")
    assert report["networks"] < 300
    assert len({each["network"] for each in report["disagreements"]}) == 1
    assert not report["interrupted"]


def test_an_algorithm_that_loses_digits_is_counted_and_disagrees_where_that_is_asked(gradproof: Command) -> None:
    adapter = ("--adapter", "adapters_here.py:Lossy")
    asked = ("check", *adapter, "--dtype", "float32", "--seed", "1", "--layer", "log_cosh", "--max-nodes", "2")
    told = gradproof(*asked, "--networks", "40", "--json", "report.json")
    assert told.code == AGREEMENT
    (counted,) = valid_json("report.json")["accuracy"]
    assert counted | {"tensors": 0} == {
        "adapter": "lossy",
        "dtype": "float32",
        "layer": "log_cosh",
        "algorithm": DIFFERENCE,
        "tensors": 0,
    }
    number = counted["tensors"]
    line = f"accuracy: lossy float32 log_cosh: no more digits than {DIFFERENCE} gives ({number} tensor"
    assert any(each.startswith(line) for each in told.lines)
    strict = gradproof(*asked, "--networks", "40", "--json", "report.json", "--strict")
    assert strict.code == DISAGREEMENT
    found = valid_json("report.json")["disagreements"]
    assert {(each["kind"], each["layer"]) for each in found} == {("accuracy", "log_cosh")}
    assert gradproof("replay", found[0]["spec"], *adapter, "--strict").code == DISAGREEMENT
    assert gradproof("replay", found[0]["spec"], *adapter).code == AGREEMENT


def test_a_class_of_arithmetic_is_told_and_may_be_demanded(gradproof: Command) -> None:
    adapter = ("--adapter", "adapters_here.py:LowerPrecision")
    asked = ("check", *adapter, "--dtype", "bfloat16", "--seed", "1", "--layer", "sigmoid", "--max-nodes", "1")
    told = gradproof(*asked, "--networks", "10", "--json", "report.json")
    assert told.code == AGREEMENT
    assert valid_json("report.json")["arithmetic"] == {"coarse": {"bfloat16": {"sigmoid": "every"}}}
    assert "arithmetic: coarse bfloat16 rounds every operation: sigmoid" in told.lines
    demanded = gradproof(*asked, "--networks", "10", "--json", "report.json", "--arithmetic", "inside")
    assert demanded.code == DISAGREEMENT
    found = valid_json("report.json")["disagreements"]
    assert {(each["kind"], each["layer"]) for each in found} == {("arithmetic", "sigmoid")}
    spec = found[0]["spec"]
    assert gradproof("replay", spec, *adapter, "--arithmetic", "inside").code == DISAGREEMENT
    assert gradproof("replay", spec, *adapter).code == AGREEMENT


def test_failures_go_where_they_are_told_to(gradproof: Command) -> None:
    check(gradproof, "Wrong", "--layer", "tanh", "-x", "--failures", "some/where")
    (spec,) = Path("some/where").iterdir()
    assert re.fullmatch(r"wrong-float64-tanh-1-\d+\.json", spec.name)
    assert not Path("gradproof-failures").exists()


def networks_of(report: dict[str, Any]) -> Sequence[str]:
    return [each["network"] for each in report["disagreements"]]


def test_layer_draws_only_networks_with_it(gradproof: Command) -> None:
    result = gradproof("check", "--adapter", "reference", "--layer", "gelu", "--layer", "mae", "--networks", "8")
    assert result.code == AGREEMENT
    table = result.lines[result.lines.index("networks with layer reference float64 reference float32") :]
    counts = {line.split()[0]: int(line.split()[1]) for line in table[1:] if re.match(r"\w+ \d+ \d+$", line)}
    assert counts.get("gelu", 0) + counts.get("mae", 0) >= 8


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_can_be_asked_for_alone(gradproof: Command, layer: str) -> None:
    options = ("--layer", layer, "--max-nodes", "1", "--networks", "3", "--dtype", "float64", "--json", "report.json")
    result = gradproof("check", "--adapter", "reference", *options)
    assert result.code == AGREEMENT
    assert valid_json("report.json")["networks"] == 3


def test_max_nodes(gradproof: Command) -> None:
    check(gradproof, "Wrong", "--layer", "tanh", "--max-nodes", "1", "--networks", "10", "--json", "report.json")
    networks = networks_of(valid_json("report.json"))
    assert networks
    assert all(re.fullmatch(r"x0\[[\d,]+\] -> tanh", network) for network in networks)


def test_dtype(gradproof: Command) -> None:
    options = ("--dtype", "float32", "--dtype", "float32", "--networks", "3", "--json", "report.json")
    result = gradproof("check", "--adapter", "reference", *options)
    assert result.code == AGREEMENT
    assert valid_json("report.json")["unverifiable"]["reference"].keys() == {"float32"}
    assert "float64" not in result.out


def without_seconds(path: str) -> dict[str, Any]:
    report: dict[str, Any] = valid_json(path)
    assert report.pop("seconds") > 0.0
    return report


def test_a_seed_decides_everything(gradproof: Command) -> None:
    arguments = ("check", *BOTH, "--layer", "tanh", "--networks", "4", "--seed", "12345", "--json")
    gradproof(*arguments, "first.json")
    specs = {path.name: path.read_text() for path in Path("gradproof-failures").iterdir()}
    process(*arguments, "second.json", PYTHONHASHSEED="7")
    assert without_seconds("first.json") == without_seconds("second.json")
    assert without_seconds("first.json")["disagreements"]
    assert {path.name: path.read_text() for path in Path("gradproof-failures").iterdir()} == specs
    gradproof("check", *BOTH, "--layer", "tanh", "--networks", "4", "--seed", "54321", "--json", "third.json")
    assert networks_of(valid_json("third.json")) != networks_of(valid_json("first.json"))


def test_without_a_seed_one_is_drawn_and_told(gradproof: Command) -> None:
    seeds = set()
    for name in ("first.json", "second.json"):
        result = gradproof("check", "--adapter", "reference", "--networks", "1", "--json", name)
        seeds.add(valid_json(name)["seed"])
        assert result.lines[-1].endswith(f", seed {valid_json(name)['seed']}")
    assert len(seeds) == 2


# The JSON of check

NUMBER = (int, float)
REPORT_FIELDS = {
    "schema": int,
    "seed": int,
    "seconds": float,
    "networks": int,
    "gradients_compared": int,
    "adapters": dict,
    "disagreements": list,
    "known": list,
    "unverifiable": dict,
}
DISAGREEMENT_FIELDS: dict[str, Any] = {
    "adapter": str,
    "dtype": str,
    "network": str,
    "node": str,
    "layer": str,
    "tensor": str,
    "kind": str,
    "max_error": NUMBER,
    "noise_units": NUMBER,
    "bound": bool,
    "index": list,
    "expected": NUMBER,
    "got": NUMBER,
    "culprit": bool,
    "cause": (str, type(None)),
    "spec": str,
}


def test_the_json_of_check(gradproof: Command) -> None:
    gradproof("check", *BOTH, "--networks", "3", "--layer", "tanh", "--seed", "3", "--json", "report.json")
    report = valid_json("report.json")
    assert list(report)[: len(REPORT_FIELDS)] == list(REPORT_FIELDS)
    assert [name for name, kind in REPORT_FIELDS.items() if not isinstance(report[name], kind)] == []
    assert (report["schema"], report["seed"], report["networks"]) == (1, 3, 3)
    assert report["adapters"] == {"right": VERSION, "wrong": VERSION}
    assert report["known"] == []
    assert report["unverifiable"].keys() == {"right", "wrong"}
    for shares in report["unverifiable"].values():
        assert shares.keys() == {"float64", "float32"}
        assert all(0.0 <= share <= 1.0 for share in shares.values())


def test_the_json_of_a_disagreement(gradproof: Command) -> None:
    gradproof("check", *BOTH, "--networks", "3", "--layer", "tanh", "--seed", "3", "--json", "report.json")
    disagreements = valid_json("report.json")["disagreements"]
    assert {each["adapter"] for each in disagreements} == {"wrong"}
    assert {each["dtype"] for each in disagreements} == {"float64", "float32"}
    for each in disagreements:
        assert list(each) == list(DISAGREEMENT_FIELDS) == list(Disagreement.__dataclass_fields__)
        assert [name for name, kind in DISAGREEMENT_FIELDS.items() if not isinstance(each[name], kind)] == []
        assert each["kind"] == "gradient"
        assert math.isclose(each["max_error"], abs(each["expected"] - each["got"]))
        assert each["noise_units"] > THRESHOLD
        assert not each["bound"]
        assert not each["culprit"] or each["layer"] == "tanh"
        assert (each["cause"] is not None) == each["culprit"]
        assert Path(each["spec"]).is_file()
    assert any(each["culprit"] for each in disagreements)


@pytest.mark.parametrize("layer", ["softmax", "sigmoid", "multiply", "mse"])
def test_the_json_is_json_whatever_an_adapter_returns(gradproof: Command, layer: str) -> None:
    options = ("--layer", layer, "--max-nodes", "1", "--networks", "2", "--json", "report.json")
    assert check(gradproof, "Spoilt", *options).code == DISAGREEMENT
    disagreements = valid_json("report.json")["disagreements"]
    kinds = {"softmax": "crash", "sigmoid": "crash", "multiply": "missing", "mse": "nonfinite"}
    assert {each["kind"] for each in disagreements if each["culprit"]} == {kinds[layer]}
