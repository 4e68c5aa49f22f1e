"""The command line: what each command prints, writes and returns, and what it says of a request it cannot serve."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradproof.cli import AGREEMENT, DISAGREEMENT, INTERRUPTED, USAGE, main
from gradproof.draw.examples import EXAMPLES
from gradproof.model.spec import load_case
from gradproof.reference import LAYERS
from gradproof.reference.algorithms import DIFFERENCE
from gradproof.run.results import Disagreement
from gradproof.subject.registry import adapter_names
from gradproof.verdict.agreement import THRESHOLD

VERSION = f"NumPy {np.__version__}"
COMMANDS = ("check", "layers", "replay", "walk")

ADAPTERS = '''
"""Adapters that are right, wrong, or ill-behaved."""

import os
import signal
from pathlib import Path

from gradproof.adapters.base import Composed, TableAdapter
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.algorithms import ALGORITHMS


class Right(NumpyReference):
    name = "right"


class Wrong(NumpyReference):
    """Leaves out the derivative of tanh."""

    name = "wrong"

    def __init__(self):
        super().__init__(rows={"tanh": (LAYERS["tanh"].forward, lambda dout, cache: {"x": dout})})


class Marks(NumpyReference):
    """Leaves a file behind when it is run."""

    name = "marks"

    def forward(self, network, values, dtype):
        Path("was-run").touch()
        return super().forward(network, values, dtype)


class Small(NumpyReference):
    """Has two layers."""

    name = "small"

    def supports(self, layer, options, dtype):
        return layer.name in ("tanh", "linear")


class Tabled(TableAdapter, NumpyReference):
    """Has a function of its own for one layer, and puts another together."""

    name = "tabled"
    rows = {"gelu": abs, "mse": Composed(abs)}


class Counting(NumpyReference):
    """Does something at the fourth network that `check` draws; in probes the node is named after its layer."""

    seen = frozenset()

    def forward(self, network, values, dtype):
        if network.nodes[-1].name != network.nodes[-1].layer.name:
            self.seen |= {network}
        if len(self.seen) > 3:
            self.happen()
        return super().forward(network, values, dtype)


class Interrupted(Counting):
    name = "interrupted"

    def happen(self):
        raise KeyboardInterrupt


class Signalled(Counting):
    name = "signalled"

    def happen(self):
        os.kill(os.getppid(), getattr(signal, os.environ["SIGNAL"]))  # the adapter runs in a process of its own


class Exits(Counting):
    name = "exits"

    def happen(self):
        raise SystemExit(0)


class Spoilt(NumpyReference):
    """Something is wrong wherever there is a softmax, a sigmoid, a multiply or an mse."""

    name = "spoilt"

    def backward(self, forward, cotangent):
        gradients = super().backward(forward, cotangent)
        layers = {node.layer.name for node in forward.tape[0].nodes}
        name = forward.tape[0].inputs[0].name
        if "softmax" in layers:
            raise RuntimeError("no softmax")
        if "sigmoid" in layers:
            return None
        if "multiply" in layers:
            return {**gradients, name: None}
        if "mse" in layers:
            return {**gradients, name: gradients[name] * float("nan")}
        return gradients


class Lossy(NumpyReference):
    """Takes log cosh as a difference of logarithms."""

    name = "lossy"

    def __init__(self):
        super().__init__(rows={"log_cosh": ALGORITHMS["log_cosh"][0].row})


class Coarse(NumpyReference):
    """Has one layer, in which every operation rounds to bfloat16."""

    name = "coarse"

    def supports(self, layer, options, dtype):
        return layer.name == "sigmoid"


class NoVersion(NumpyReference):
    name = "noversion"

    def version(self):
        raise RuntimeError("no version")


class NoSupports(NumpyReference):
    name = "nosupports"

    def supports(self, layer, options, dtype):
        raise RuntimeError("cannot tell")


class NoBackward(NumpyReference):
    name = "nobackward"

    def backward(self, forward, cotangent):
        raise RuntimeError("no backward pass")


class Incomplete:
    name = "incomplete"

    def forward(self, network, values, dtype):
        pass


class Unmade(NumpyReference):
    def __init__(self):
        raise RuntimeError("no device")
'''

BOTH = ("--adapter", "adapters_here.py:Right", "--adapter", "adapters_here.py:Wrong")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of standard output, with single spaces."""
        return [" ".join(line.split()) for line in self.out.splitlines()]


Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty directory with the adapters, and wide lines."""
    (tmp_path / "adapters_here.py").write_text(ADAPTERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")
    for name in ("NO_COLOR", "FORCE_COLOR", "GRADPROOF_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def gradproof(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, adapters too."""

    def run(*arguments: str) -> Result:
        runs = arguments[:1] in (("check",), ("replay",))
        try:
            code = main((*arguments, "--no-isolation") if runs else arguments)
        except SystemExit as exit_:  # argparse
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def process(*arguments: str, **environment: str) -> Result:
    """Run a command in a process of its own, into a pipe."""
    done = subprocess.run(
        [sys.executable, "-m", "gradproof", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def check(gradproof: Command, adapter: str, *arguments: str) -> Result:
    """A check of one of the adapters above in float64, with a seed."""
    return gradproof(
        "check", "--adapter", f"adapters_here.py:{adapter}", "--dtype", "float64", "--seed", "1", *arguments
    )


def valid_json(path: str | Path) -> Any:
    """What the file holds, read as other programs would: without Python's Infinity and NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def single_spaced(text: str) -> str:
    return " ".join(text.split())


def refused(result: Result, message: str) -> bool:
    """Whether it said this, in one line on standard error, and nothing else."""
    return (result.code, result.err, result.out) == (USAGE, f"gradproof: {message}\n", "")


def refused_in_one_line(result: Result, *parts: str) -> None:
    assert result.code == USAGE
    assert re.fullmatch(r"gradproof: .+\n", result.err), result.err
    assert [part for part in parts if part not in result.err] == []


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
    told = gradproof(*asked, "--networks", "80", "--json", "report.json")
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
    strict = gradproof(*asked, "--networks", "80", "--json", "report.json", "--strict")
    assert strict.code == DISAGREEMENT
    found = valid_json("report.json")["disagreements"]
    assert {(each["kind"], each["layer"]) for each in found} == {("accuracy", "log_cosh")}
    assert gradproof("replay", found[0]["spec"], *adapter, "--strict").code == DISAGREEMENT
    assert gradproof("replay", found[0]["spec"], *adapter).code == AGREEMENT


def test_a_class_of_arithmetic_is_told_and_may_be_demanded(gradproof: Command) -> None:
    adapter = ("--adapter", "adapters_here.py:Coarse")
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


@pytest.mark.parametrize("command", [("check",), ("replay", "spec.json")])
def test_an_unknown_class_of_arithmetic_is_refused_with_the_valid_ones(
    gradproof: Command, command: Sequence[str]
) -> None:
    check(gradproof, "Wrong", "--layer", "tanh", "-x", "--failures", "specs")
    (spec,) = Path("specs").iterdir()
    spec.rename("spec.json")
    result = gradproof(*command, "--adapter", "reference", "--arithmetic", "outside")
    assert refused(result, "unknown arithmetic 'outside'; valid arithmetics: inside, stored, every")


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


# Adapters that misbehave


def tally(result: Result, adapter: str) -> list[str]:
    """The counts after adapter and dtype: networks, gradients, wrong, known."""
    (row,) = (line for line in result.lines if re.match(rf"{adapter}( {VERSION})? float64 \d", line))
    return row.partition(" float64 ")[2].split()[:4]


def test_an_adapter_that_fails_does_not_stop_the_others(gradproof: Command) -> None:
    options = ("--networks", "60", "--json", "both.json", "--adapter", "adapters_here.py:Right")
    both = check(gradproof, "Spoilt", *options)
    assert both.code == DISAGREEMENT
    alone = check(gradproof, "Right", "--networks", "60", "--json", "alone.json")
    assert alone.code == AGREEMENT
    assert tally(both, "right") == tally(alone, "right")
    assert tally(alone, "right")[0] == "60"
    assert tally(both, "spoilt")[0] == "60"
    assert int(tally(both, "spoilt")[2]) > 3
    text = Path("both.json").read_text()
    kinds = {each["kind"] for each in json.loads(text)["disagreements"]}
    assert {"crash", "missing", "nonfinite"} <= kinds


def test_what_an_adapter_raises_is_shown_as_it_is(gradproof: Command) -> None:
    text = Path("adapters_here.py").read_text().replace('"no softmax"', r'"[i] of [/x]\n is\n [bold]bad"')
    Path("adapters_here.py").write_text(text)
    result = check(gradproof, "Spoilt", "--layer", "softmax", "--max-nodes", "1", "--networks", "1")
    assert result.code == DISAGREEMENT
    line = text[: text.index("raise RuntimeError")].count("\n") + 1
    assert result.lines[0] == (
        "spoilt float64: softmax (node h1) is wrong: crash: RuntimeError: [i] of [/x] is [bold]bad "
        f"(adapters_here.py:{line} in backward)"
    )
    assert f"is [bold]bad (adapters_here.py:{line} in backward) WRONG HERE: crash" in result.lines[4]


def test_an_adapter_that_exits_is_no_agreement(gradproof: Command) -> None:
    result = check(gradproof, "Exits", "--networks", "6")
    assert result.code != AGREEMENT


def test_an_adapter_without_a_version_is_refused(gradproof: Command) -> None:
    refused_in_one_line(check(gradproof, "NoVersion", "--networks", "1"), "no version")


def test_an_adapter_that_cannot_tell_what_it_supports_is_refused(gradproof: Command) -> None:
    refused_in_one_line(check(gradproof, "NoSupports", "--networks", "1"), "cannot tell")


def test_what_an_adapter_lacks_is_told(gradproof: Command) -> None:
    result = check(gradproof, "Small", "--networks", "12", "--json", "report.json")
    unsupported = 12 - int(tally(result, "small")[0])
    assert unsupported > 0
    assert f"small float64: {unsupported} networks not run, for it lacks one of their layers: " in result.out
    assert valid_json("report.json")["unsupported"] == {"small": {"float64": unsupported}}


def test_a_replay_of_what_an_adapter_lacks_is_no_agreement(gradproof: Command) -> None:
    check(gradproof, "Wrong", "--layer", "tanh", "-x", "--failures", "specs")
    (spec,) = Path("specs").iterdir()
    text = spec.read_text().replace('"tanh"', '"gelu"')
    spec.write_text(text)
    result = gradproof("replay", str(spec), "--adapter", "adapters_here.py:Small")
    assert "small float64: no network was examined" in result.lines
    assert result.code != AGREEMENT


# Ctrl-C


def test_an_interrupt_shows_and_writes_what_was_found_so_far(gradproof: Command) -> None:
    result = check(gradproof, "Interrupted", "--networks", "300", "--json", "report.json")
    assert result.code == INTERRUPTED
    assert re.match(r"interrupted: agreement: [34] networks, [1-9]\d* gradients compared in ", result.lines[-1])
    assert tally(result, "interrupted")[0] == "3"
    report = valid_json("report.json")
    assert report["interrupted"] is True
    assert report["networks"] in (3, 4)
    assert report["gradients_compared"] == int(tally(result, "interrupted")[1])


def test_an_interrupt_after_a_disagreement(gradproof: Command) -> None:
    wrong = ("--adapter", "adapters_here.py:Wrong", "--layer", "tanh")
    result = check(gradproof, "Interrupted", *wrong, "--networks", "300", "--json", "report.json")
    assert result.code == DISAGREEMENT
    assert re.match(r"interrupted: \d+ tensors? disagrees?: ", result.lines[-1])
    assert valid_json("report.json")["interrupted"] is True


def test_an_interrupt_before_anything_was_examined(gradproof: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradproof.subject.isolation.load_adapter", interrupt)
    result = gradproof("check", "--adapter", "reference")
    assert (result.code, result.out, result.err) == (INTERRUPTED, "", "gradproof: interrupted\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_real_signal(name: str) -> None:
    command = ("check", "--adapter", "adapters_here.py:Signalled", "--dtype", "float64", "--json", "report.json")
    result = process(*command, SIGNAL=name)
    assert result.code == INTERRUPTED
    assert result.lines[-1].startswith("interrupted: agreement: ")
    assert "Traceback" not in result.err
    assert valid_json("report.json")["interrupted"] is True


def test_the_version_is_told() -> None:
    result = process("--version")
    assert (result.code, result.out, result.err) == (AGREEMENT, f"gradproof {version('gradproof')}\n", "")


# layers


def test_layers(gradproof: Command) -> None:
    result = gradproof("layers", "--adapter", "reference", "--adapter", "adapters_here.py:Small", "--json", "l.json")
    assert (result.code, result.err) == (AGREEMENT, "")
    heading, *rows = result.lines
    assert heading == "layer kind family options kinks reference adapters_here.py:Small"
    assert [row.split()[0] for row in rows] == list(LAYERS)
    by_name = {row.split()[0]: row for row in rows}
    assert by_name["tanh"] == "tanh activation activations native native"
    assert by_name["relu"] == "relu activation activations at_zero (0) native not supported"


def test_the_json_of_layers(gradproof: Command) -> None:
    gradproof("layers", "--adapter", "reference", "--adapter", "adapters_here.py:Small", "--json", "layers.json")
    data = valid_json("layers.json")
    assert list(data) == ["schema", "layers"]
    assert data["schema"] == 1
    assert [each["name"] for each in data["layers"]] == list(LAYERS)
    for each in data["layers"]:
        assert list(each) == ["name", "kind", "family", "options", "kinks", "adapters"]
        assert each["kind"] in ("activation", "loss", "layer")
        assert each["adapters"].keys() == {"reference", "adapters_here.py:Small"}
        assert each["adapters"]["reference"] == "native"
    by_name = {each["name"]: each for each in data["layers"]}
    assert by_name["leaky_relu"]["kinks"] == [{"name": "at_zero", "point": 0.0, "valid": [0.0, 1.0]}]
    assert list(by_name["leaky_relu"]["options"]) == ["negative_slope"]
    assert by_name["relu"]["adapters"]["adapters_here.py:Small"] == "not supported"


def test_layers_probes_the_class_of_arithmetic_where_it_is_asked(gradproof: Command) -> None:
    adapter = ("--adapter", "adapters_here.py:Coarse")
    result = gradproof("layers", *adapter, "--arithmetic", "bfloat16", "--json", "layers.json")
    by_name = {row.split()[0]: row for row in result.lines}
    assert by_name["sigmoid"] == "sigmoid activation activations native, every"
    classes = {each["name"]: each["arithmetic"] for each in valid_json("layers.json")["layers"]}
    assert classes.pop("sigmoid") == {"adapters_here.py:Coarse": "every"}
    assert set(map(str, classes.values())) == {"{}"}


def not_installed(entry: EntryPoint) -> Any:
    """Instead of EntryPoint.load: the frameworks are missing."""
    if entry.name in ("torch", "jax"):
        raise ModuleNotFoundError(f"No module named {entry.name!r}", name=entry.name)
    module, _, attribute = entry.value.partition(":")
    return getattr(sys.modules[module], attribute)


def test_layers_tells_why_an_adapter_cannot_be_had(gradproof: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntryPoint, "load", not_installed)
    monkeypatch.setenv("COLUMNS", "500")
    result = gradproof("layers", "--json", "layers.json")
    assert result.code == AGREEMENT
    reason = "adapter 'torch' needs torch, which is not installed: pip install 'gradproof[torch]'"
    (first, *_) = valid_json("layers.json")["layers"]
    assert first["adapters"]["torch"] == reason
    assert first["adapters"]["reference"] == "native"
    assert result.out.count(reason) == len(LAYERS)


def test_layers_tells_native_from_composed(gradproof: Command) -> None:
    gradproof("layers", "--adapter", "adapters_here.py:Tabled", "--json", "layers.json")
    origins = {
        each["name"]: each["adapters"]["adapters_here.py:Tabled"] for each in valid_json("layers.json")["layers"]
    }
    assert origins.pop("gelu") == "native"
    assert origins.pop("mse") == "composed"
    assert set(origins.values()) == {"no row in the adapter's table"}


# walk


def test_walk(gradproof: Command) -> None:
    result = gradproof("walk", "tanh_2_3_1")
    assert (result.code, result.err) == (AGREEMENT, "")
    assert result.lines[0] == "tanh_2_3_1"
    text = single_spaced(result.out)
    assert text.index("Forward sweep") < text.index("Backward sweep")
    assert "off by" not in text


def test_walk_beside_an_adapter(gradproof: Command) -> None:
    result = gradproof("walk", "tanh_2_3_1", "--adapter", "adapters_here.py:Right", "--json", "walk.json")
    assert result.code == AGREEMENT
    assert "off by: the largest absolute difference from the reference" in result.lines
    walked = valid_json("walk.json")
    assert walked["adapters"] == {"reference": VERSION, "right": VERSION}
    nodes = [node.name for node in EXAMPLES["tanh_2_3_1"].network.nodes]
    assert [step["node"] for step in walked["forward"]] == nodes
    assert [step["node"] for step in walked["backward"]] == nodes[::-1]
    for step in walked["forward"]:
        assert step["values"]["right"] == step["values"]["reference"]
    for step in walked["backward"]:
        assert step["cotangents"]["right"] == step["cotangents"]["reference"]
        assert all(sides["right"] == sides["reference"] for sides in step["parameters"].values())


def test_walk_with_an_adapter_that_lacks_a_layer(gradproof: Command) -> None:
    result = gradproof("walk", "tanh_2_3_1", "--adapter", "adapters_here.py:Small")
    assert refused(
        result,
        "small does not support half_squared_error in float64, which tanh_2_3_1 needs; "
        "walk it with another adapter or dtype",
    )


def test_walk_with_an_adapter_that_crashes(gradproof: Command) -> None:
    result = gradproof("walk", "tanh_2_3_1", "--adapter", "adapters_here.py:NoBackward")
    refused_in_one_line(result, "nobackward", "no backward pass")


# Requests that cannot be served

HOW_TO_ADD = "package.module:Class or path/to/file.py:Class"
UNKNOWN = {
    "adapter": f"unknown adapter 'nope'; valid adapters: {', '.join(adapter_names())}, or {HOW_TO_ADD}",
    "layer": f"unknown layer 'nope'; valid layers: {', '.join(LAYERS)}",
    "dtype": "unknown dtype 'nope'; valid dtypes: float64, float32, bfloat16, float16",
    "example": f"unknown example 'nope'; valid examples: {', '.join(EXAMPLES)}",
    "spec": "nope: cannot be read: No such file or directory",
}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("check", "--adapter", "nope"), "adapter"),
        (("check", "--adapter", "reference", "--layer", "nope"), "layer"),
        (("check", "--adapter", "reference", "--layer", "gelu", "--layer", "nope"), "layer"),
        (("check", "--adapter", "reference", "--dtype", "nope"), "dtype"),
        (("layers", "--adapter", "nope"), "adapter"),
        (("walk", "nope"), "example"),
        (("walk", "tanh_2_3_1", "--adapter", "nope"), "adapter"),
        (("replay", "nope"), "spec"),
    ],
)
def test_an_unknown_name_is_told_with_the_valid_ones(gradproof: Command, arguments: tuple[str, ...], what: str) -> None:
    assert refused(gradproof(*arguments), UNKNOWN[what])


def test_a_bad_spec_is_told_in_one_line(gradproof: Command) -> None:
    Path("spec.json").write_text('{"schema": 7}')
    assert refused(
        gradproof("replay", "spec.json"), "spec.json: spec has schema 7; this version of gradproof reads schema 1"
    )


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("nothing.py:Mine", f"no file 'nothing.py'; expected {HOW_TO_ADD}"),
        ("nothing:Mine", f"cannot import 'nothing': No module named 'nothing'; expected {HOW_TO_ADD}"),
        ("broken.py:Mine", "broken.py cannot be imported: ZeroDivisionError: division by zero"),
        ("empty.py:Mine", "empty.py has no class 'Mine'; its classes: none"),
        (
            "adapters_here.py:Incomplete",
            "adapter 'adapters_here.py:Incomplete' is no adapter: it lacks version, supports, backward",
        ),
        ("adapters_here.py:Unmade", "adapter 'adapters_here.py:Unmade' cannot be made: RuntimeError: no device"),
    ],
)
def test_an_adapter_that_cannot_be_had(gradproof: Command, adapter: str, message: str) -> None:
    Path("broken.py").write_text("1 / 0\n")
    Path("empty.py").write_text("")
    assert refused(gradproof("check", "--adapter", adapter), message)


def test_a_module_that_does_not_import(gradproof: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(".")
    Path("broken.py").write_text("1 / 0\n")
    refused_in_one_line(gradproof("check", "--adapter", "broken:Mine"), "'broken'", "division by zero")


def test_two_adapters_of_the_same_name(gradproof: Command) -> None:
    adapters = ("--adapter", "adapters_here.py:Right", "--adapter", "./adapters_here.py:Right")
    message = "two of the adapters are named 'right'; give each a name of its own"
    assert refused(gradproof("check", *adapters), message)


@pytest.mark.parametrize("command", [("check",), ("check", "--adapter", "torch"), ("layers", "--adapter", "torch")])
def test_a_framework_that_is_not_installed(
    gradproof: Command, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(EntryPoint, "load", not_installed)
    message = "adapter 'torch' needs torch, which is not installed: pip install 'gradproof[torch]'"
    assert refused(gradproof(*command), message)


WITHOUT_TORCH = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
"""


def test_a_framework_that_is_really_not_there(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = process("check", "--adapter", "torch", PYTHONPATH=path)
    message = "adapter 'torch' needs torch, which is not installed: pip install 'gradproof[torch]'"
    assert refused(result, message)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--networks", "0", "expected an integer of at least 1, got '0'"),
        ("--networks", "-3", "expected an integer of at least 1, got '-3'"),
        ("--networks", "1e3", "expected an integer of at least 1, got '1e3'"),
        ("--networks", "many", "expected an integer of at least 1, got 'many'"),
        ("--max-nodes", "0", "expected an integer of at least 1, got '0'"),
        ("--seed", "-1", "expected an integer of at least 0, got '-1'"),
        ("--seed", "1.5", "expected an integer of at least 0, got '1.5'"),
        ("--timeout", "0", "expected a number of seconds above 0, got '0'"),
        ("--timeout", "inf", "expected a number of seconds above 0, got 'inf'"),
        ("--timeout", "nan", "expected a number of seconds above 0, got 'nan'"),
        ("--timeout", "soon", "expected a number of seconds above 0, got 'soon'"),
        ("--memory", "-1", "expected a number above 0, got '-1'"),
    ],
)
def test_a_bad_number(gradproof: Command, option: str, value: str, expected: str) -> None:
    result = gradproof("check", option, value)
    assert result.code == USAGE
    assert result.err.splitlines()[-1].startswith("gradproof check: error: argument ")
    assert result.err.splitlines()[-1].endswith(f"{option}: {expected}")


@pytest.mark.parametrize("arguments", [(), ("chekc",), ("walk",), ("replay",), ("check", "--netwroks", "3")])
def test_a_bad_command_line(gradproof: Command, arguments: tuple[str, ...]) -> None:
    result = gradproof(*arguments)
    assert (result.code, result.out) == (USAGE, "")
    assert "usage: gradproof" in result.err


UNWRITABLE = [
    ("nowhere/report.json", "No such file or directory"),
    (".", "Is a directory"),
    ("adapters_here.py/report.json", "Not a directory"),
]


@pytest.mark.parametrize(("path", "reason"), UNWRITABLE)
@pytest.mark.parametrize("command", [("check", "--networks", "1"), ("layers",), ("walk", "tanh_2_3_1")])
def test_json_that_cannot_be_written(gradproof: Command, command: tuple[str, ...], path: str, reason: str) -> None:
    result = gradproof(*command, "--adapter", "adapters_here.py:Marks", "--json", path)
    assert refused(result, f"cannot write {path!r}: {reason}")


def test_json_that_cannot_be_written_is_told_before_the_run(gradproof: Command) -> None:
    result = check(gradproof, "Marks", "--networks", "1", "--json", "nowhere/report.json")
    assert result.code == USAGE
    assert not Path("was-run").exists()


def test_a_run_that_cannot_start_leaves_the_old_json_alone(gradproof: Command) -> None:
    Path("report.json").write_text("{}")
    assert gradproof("check", "--adapter", "nope", "--json", "report.json").code == USAGE
    assert Path("report.json").read_text() == "{}"


def test_failures_that_cannot_be_written(gradproof: Command) -> None:
    result = check(gradproof, "Wrong", "--layer", "tanh", "--networks", "2", "--failures", "adapters_here.py")
    refused_in_one_line(result, "adapters_here.py")


# Output


def test_a_pipe_gets_no_escape_codes_and_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    directory = "/".join(["a-rather-long-directory"] * 5)
    arguments = ("check", *BOTH, "--layer", "tanh", "--networks", "2", "--seed", "1", "--failures", directory)
    result = process(*arguments, TERM="xterm-256color")
    assert result.code == DISAGREEMENT
    assert "\x1b" not in result.out + result.err
    assert "…" not in result.out
    again = [line for line in result.lines if line.startswith("replay: ")]
    assert again
    for line in again:
        assert re.fullmatch(rf"replay: gradproof replay {directory}/\S+\.json --adapter adapters_here\.py:Wrong", line)


def test_no_color(monkeypatch: pytest.MonkeyPatch, gradproof: Command) -> None:
    arguments = ("check", *BOTH, "--layer", "tanh", "--networks", "2", "--seed", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1;31m" in gradproof(*arguments).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert re.findall(r"\x1b\[[\d;]*3\d", gradproof(*arguments).out) == []


def test_a_reader_that_leaves_early_changes_no_verdict() -> None:
    """`gradproof layers | head -1` must not look like a disagreement."""
    with subprocess.Popen(
        [sys.executable, "-m", "gradproof", "layers", "--adapter", "reference"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stdout
        assert running.stderr
        running.stdout.close()
        messages = running.stderr.read()
        running.wait(timeout=60)
    assert running.returncode != DISAGREEMENT
    assert messages == b""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_lists_its_options(gradproof: Command, command: str) -> None:
    result = gradproof(command, "--help")
    assert (result.code, result.err) == (0, "")
    options = {"--json FILE", "--jax-cache DIRECTORY", "--adapter A"}
    if command == "check":
        options |= {"--networks N", "--seed S", "--dtype D", "--layer L", "--max-nodes N", "--timeout SECONDS"}
        options |= {"-x, --exitfirst", "--failures DIRECTORY"}
    if command in ("check", "replay"):
        options |= {"--isolation, --no-isolation", "--memory GIB"}
    assert {option for option in options if option not in result.out} == set()
    positional = {"replay": "SPEC.json", "walk": "EXAMPLE"}.get(command, "")
    assert positional in result.out


def test_help_lists_the_commands_and_examples(gradproof: Command) -> None:
    result = gradproof("--help")
    assert (result.code, result.err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^    {command} +\S", result.out, re.MULTILINE)
    assert "examples:\n  gradproof check " in result.out


def test_help_of_walk_names_the_examples(gradproof: Command) -> None:
    text = single_spaced(gradproof("walk", "--help").out)
    assert all(name in text for name in EXAMPLES)


def test_the_defaults_that_help_tells_are_those_that_hold(gradproof: Command) -> None:
    text = single_spaced(gradproof("check", "--help").out)
    for told in ("how many (default 300)", "(default 8)", "(default 60)", "(default gradproof-failures)"):
        assert told in text
