"""The pytest plugin, in pytest runs of their own: options, ids, summary, failures, and other people's suites."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gradproof.draw.architectures import ARCHITECTURES
from gradproof.model.spec import load_case
from gradproof.reference import LAYERS
from gradproof.subject.registry import adapter_names

USAGE_ERROR = 4
RANDOM = "test_every_gradient_agrees"
KINKS = "test_the_derivative_at_every_kink_is_a_valid_one"

MINE = """
from gradproof.reference import LAYERS, NumpyReference


def no_derivative(dout, cache):
    return {"x": dout}


class Mine(NumpyReference):
    name = "mine"

    def version(self):
        return "1.0"

    def forward(self, network, values, dtype):
        with open("seen.txt", "a") as file:
            print(dtype, *(node.layer.name for node in network.nodes), file=file)
        return super().forward(network, values, dtype)


class Lacking(NumpyReference):
    def supports(self, layer, options, dtype, shapes):
        return "not written yet"


class Broken(NumpyReference):
    name = "broken"

    def __init__(self):
        super().__init__(rows={"tanh": (LAYERS["tanh"].forward, no_derivative)})

    def version(self):
        return "2.0"
"""

WITHOUT_FRAMEWORKS = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "jax"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
"""


def someones(directory: Path) -> Path:
    """A project of someone else's, with strict settings and an adapter of its own."""
    (directory / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\nfilterwarnings = error\n")
    (directory / "my_adapter.py").write_text(MINE)
    return directory


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return someones(tmp_path)


def run_pytest(project: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """pytest in the project's directory. path: what else to import from."""
    ignored = ("CI", "NO_COLOR", "FORCE_COLOR", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in ignored}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-p", "no:cacheprovider", *arguments],
        cwd=project,
        env=environment | {"COLUMNS": "200", "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
    )


def conformance(project: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    return run_pytest(project, "--pyargs", "gradproof.conformance", *arguments, path=path)


def summary_line(stdout: str, start: str) -> str:
    """The line of the terminal summary that begins so."""
    _, _, summary = stdout.partition("= gradproof =")
    (line,) = (line for line in summary.splitlines() if line.startswith(start))
    return line


# Agreement.


def test_ids_header_and_summary(project: Path) -> None:
    done = conformance(
        project,
        "--gradproof-adapter",
        "my_adapter.py:Mine",
        "--gradproof-adapter",
        "reference",
        "--gradproof-networks",
        "3",
        "-v",
    )
    assert done.returncode == 0, done.stdout
    assert f"gradproof: mine 1.0, reference {np.__version__}" in done.stdout.splitlines()
    for target in ("my_adapter.py:Mine-float64", "my_adapter.py:Mine-float32", "reference-float64"):
        assert f"::{RANDOM}[{target}] PASSED" in done.stdout
        assert f"::test_worked_example_agrees[{target}-tanh_2_3_1] PASSED" in done.stdout
    for start in ("mine 1.0 float64: ", f"reference NumPy {np.__version__} float32: "):
        counts = rf"{3 + len(ARCHITECTURES)} networks, (\d+) gradients compared, worst agreement \d+\.\d noise units"
        found = re.fullmatch(re.escape(start) + counts, summary_line(done.stdout, start))
        assert found, summary_line(done.stdout, start)
        assert int(found[1]) > 3


def test_options_narrow_the_run(project: Path) -> None:
    target = ("--gradproof-adapter", "my_adapter.py:Mine", "--gradproof-dtype", "float32")
    options = ("--gradproof-layer", "gelu", "--gradproof-layer", "mse", "--gradproof-networks", "8", "-k", RANDOM, "-v")
    done = conformance(project, *target, *target, *options)
    assert done.returncode == 0, done.stdout
    assert re.findall(r"\[(\S+)\] PASSED", done.stdout) == ["my_adapter.py:Mine-float32"]
    assert summary_line(done.stdout, "mine").startswith("mine 1.0 float32: 8 networks, ")
    seen = [line.split() for line in (project / "seen.txt").read_text().splitlines()]
    assert {dtype for dtype, *_ in seen} == {"float32"}
    drawn = [set(layers) for _, *layers in seen if len(layers) > 1]  # the others may be probes of kinks
    assert drawn
    assert all({"gelu", "mse"} & layers for layers in drawn)


def test_help_shows_the_options(project: Path) -> None:
    text = run_pytest(project, "--help").stdout
    group = text.partition("gradient conformance (gradproof):")[2]
    for option in (
        "--gradproof-adapter=A",
        "--gradproof-dtype=D",
        "--gradproof-layer=L",
        "--gradproof-networks=N",
        "--gradproof-arithmetic=CLASS",
    ):
        assert option in group


# Refusals.


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--gradproof-adapter",
            "tensorflow",
            f"unknown adapter 'tensorflow'; valid adapters: {', '.join(adapter_names())}, or package.module:Class or "
            "path/to/file.py:Class",
        ),
        ("--gradproof-layer", "dense", f"unknown layer 'dense'; valid layers: {', '.join(LAYERS)}"),
        (
            "--gradproof-arithmetic",
            "outside",
            "unknown arithmetic 'outside'; valid arithmetics: inside, stored, every",
        ),
        ("--gradproof-networks", "0", "--gradproof-networks: expected an integer of at least 1, got 0"),
    ],
)
def test_an_unknown_name_ends_the_run_with_the_valid_ones(project: Path, option: str, value: str, message: str) -> None:
    done = conformance(project, option, value)
    assert done.returncode == USAGE_ERROR
    assert done.stderr.strip() == f"ERROR: {message}"
    assert done.stdout == ""


# Disagreement.

HEADLINE = r"DisagreementError: broken float64: tanh \(node h1\) is wrong: d x0 at \["
DIFF = [
    "forward: every value agrees",
    "node layer tensor shape worst error at expected got noise units verdict",
    " WRONG HERE ",
    "replay: gradproof replay gradproof-failures/pytest-broken-float64.json --adapter my_adapter.py:Broken",
]
SHRUNK = [*DIFF, " h1 tanh d x0 [2, 3] ", "broken 2.0, float64, numbers drawn from seed "]
WALKED = [*DIFF, " h1 tanh d z1 [1, 3] ", "broken 2.0, float64, numbers given "]

BROKEN = ("--gradproof-adapter", "my_adapter.py:Broken", "--gradproof-dtype", "float64")


@dataclass(frozen=True)
class Failed:
    """A run that failed, and the directory that it ran in."""

    done: subprocess.CompletedProcess[str]
    project: Path

    @property
    def junit(self) -> ElementTree.Element:
        return ElementTree.parse(self.project / "junit.xml").getroot()


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Failed:
    project = someones(tmp_path_factory.mktemp("failed"))
    options = ("--gradproof-layer", "tanh", "--gradproof-networks", "5", "-k", RANDOM, "--junitxml", "junit.xml")
    return Failed(conformance(project, *BROKEN, *options), project)


def missing(wanted: list[str], text: str) -> list[str]:
    """What of the wanted is not in the text, pytest's margin and repeated spaces aside."""
    lines = (line.removeprefix("E ").split() for line in text.splitlines())
    joined = " ".join(word for line in lines for word in line)
    return [each for each in wanted if each not in joined]


def test_a_failure_shows_the_per_layer_diff(failed: Failed) -> None:
    assert failed.done.returncode == 1
    assert missing(SHRUNK, failed.done.stdout) == []
    assert re.search(HEADLINE, failed.done.stdout)
    assert "in require_agreement" not in failed.done.stdout


def test_a_failure_in_junit_has_the_headline_and_the_diff(failed: Failed) -> None:
    (failure,) = failed.junit.iter("failure")
    assert re.search(HEADLINE, failure.attrib["message"])
    assert missing(SHRUNK, failure.text or "") == []


def test_the_failing_network_is_shrunk_and_can_be_replayed(failed: Failed) -> None:
    assert "network: x0[2,3] -> tanh" in failed.done.stdout
    assert os.listdir(failed.project / "gradproof-failures") == ["pytest-broken-float64.json"]
    case = load_case(failed.project / "gradproof-failures" / "pytest-broken-float64.json", LAYERS)
    assert str(case.network) == "x0[2,3] -> tanh"


def test_distributed(project: Path) -> None:
    """The diff and the summary come from the workers."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    done = conformance(project, "--gradproof-adapter", "my_adapter.py:Mine", *BROKEN, "-k", "tanh_2_3_1", "-n", "2")
    assert done.returncode == 1
    assert missing(WALKED, done.stdout) == []
    assert "1 failed, 1 passed" in done.stdout
    for name in ("mine 1.0", "broken 2.0"):
        assert re.fullmatch(
            rf"{name} float64: \d+ networks?, 10 gradients compared, worst agreement \d+\.\d noise units",
            summary_line(done.stdout, name),
        )


def test_nothing_compared_is_no_agreement(project: Path) -> None:
    done = conformance(
        project, "--gradproof-adapter", "my_adapter.py:Lacking", "--gradproof-networks", "3", "-k", RANDOM
    )
    assert done.returncode == 1
    assert re.search(r"NothingComparedError: .*: 3 networks not run, for it lacks one of their layers: ", done.stdout)
    assert "not written yet" in done.stdout


def test_what_an_adapter_cannot_run_is_skipped_with_the_reason(project: Path) -> None:
    target = ("--gradproof-adapter", "my_adapter.py:Lacking", "--gradproof-dtype", "float64")
    done = conformance(project, *target, "-k", "worked_example or architecture", "-rs")
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ skipped", done.stdout)
    assert " passed" not in done.stdout
    assert "linear: not written yet" in done.stdout


# Frameworks that are not there.


@pytest.fixture
def without_frameworks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory for PYTHONPATH, with which neither torch nor jax can be imported."""
    directory = tmp_path_factory.mktemp("path")
    (directory / "sitecustomize.py").write_text(WITHOUT_FRAMEWORKS)
    return str(directory)


def test_a_missing_framework_skips(project: Path, without_frameworks: str) -> None:
    for name in ("torch", "jax"):
        done = conformance(project, "-k", f"{KINKS} and {name}", "-v", "-rs", path=without_frameworks)
        reason = rf"adapter '{name}' needs \w+, which is not installed: pip install 'gradproof\[{name}\]'"
        assert f"{KINKS}[{name}-float64] SKIPPED" in done.stdout
        assert re.search(reason, done.stdout)
    done = conformance(project, "-k", KINKS, "-v", "-rs", path=without_frameworks)
    assert done.returncode == 0, done.stdout
    assert f"{KINKS}[reference-float64] PASSED" in done.stdout
    assert re.search(
        rf"^gradproof: reference {re.escape(np.__version__)}, torch \S+.*, jax ", done.stdout, re.MULTILINE
    )


def test_a_missing_framework_that_was_asked_for_is_an_error(project: Path, without_frameworks: str) -> None:
    done = conformance(project, "--gradproof-adapter", "torch", path=without_frameworks)
    assert done.returncode == USAGE_ERROR
    assert done.stderr.strip() == (
        "ERROR: adapter 'torch' needs torch, which is not installed: pip install 'gradproof[torch]'"
    )


HALVE = """
from gradproof import Layer

def halve(x):
    return 0.5 * x, None

def halve_backward(dout, cache):
    return {"x": 0.5 * dout}

LAYERS = (Layer("halve", "activation", "activations", halve, halve_backward),)
"""


@pytest.mark.parametrize("installed", [False, True])
def test_layers_of_ones_own_are_drawn(project: Path, installed: bool) -> None:
    """From a file that is named, or from an installed package, which needs no naming."""
    (project / "halves.py").write_text(HALVE)
    if installed:
        (project / "halves-1.0.dist-info").mkdir()
        (project / "halves-1.0.dist-info" / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n"
        )
        (project / "halves-1.0.dist-info" / "entry_points.txt").write_text("[gradproof.layers]\nhalves = halves\n")
    named = () if installed else ("--gradproof-layers", "halves.py")
    target = ("--gradproof-adapter", "reference", "--gradproof-dtype", "float64", "--gradproof-layer", "halve")
    done = conformance(project, *target, *named, "--gradproof-networks", "3", "-k", RANDOM, path=str(project))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "float64: 3 networks, " in done.stdout


def test_a_file_of_layers_that_is_missing_is_a_usage_error(project: Path) -> None:
    done = conformance(project, "--gradproof-layers", "nowhere.py")
    assert done.returncode == USAGE_ERROR
    assert "nowhere.py'; expected a Python file" in done.stderr


# Other people's suites.

UNTOUCHED = """
import sys

HARNESS = {"gradproof." + each for each in ("run", "draw", "verdict", "model", "reference", "cli", "trust")}


def test_nothing_heavy_is_imported():
    assert sorted(({"torch", "jax", "scipy", "rich"} | HARNESS) & sys.modules.keys()) == []
"""

OWN_TARGETS = """
import pytest


@pytest.fixture
def target():
    return "ours"


def test_own_fixture(target):
    assert target == "ours"


@pytest.mark.parametrize("target", ["theirs"])
def test_own_parameter(target):
    assert target == "theirs"
"""


def run_suite(project: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    (project / "test_theirs.py").write_text(text)
    return run_pytest(project, "test_theirs.py", "-q", *options)


def test_another_suite_imports_nothing_heavy(project: Path) -> None:
    done = run_suite(project, UNTOUCHED)
    assert done.returncode == 0, done.stdout
    assert "= gradproof =" not in done.stdout


def test_another_suite_may_have_a_target_of_its_own(project: Path) -> None:
    done = run_suite(project, OWN_TARGETS)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


OWN_OPTIONS = """
def pytest_addoption(parser):
    for name in ("adapter", "dtype", "layer", "networks", "html", "baseline"):
        parser.addoption(f"--{name}", default="ours")
"""


def test_another_suite_may_have_options_of_its_own(project: Path) -> None:
    (project / "conftest.py").write_text(OWN_OPTIONS)
    (project / "test_theirs.py").write_text(
        "def test_theirs(request):\n    assert request.config.getoption('layer') == '3'"
    )
    done = run_pytest(project, "test_theirs.py", "--layer", "3")
    assert done.returncode == 0, done.stdout
    assert "gradproof: " not in done.stdout


OWN_TEST = """
def test_mine(gradproof_run, gradproof_networks, gradproof_layers):
    assert (gradproof_networks, gradproof_layers) == (7, ("tanh",))
    assert list(gradproof_run.report.adapters) == ["reference"]
"""


def test_the_fixtures_serve_tests_outside_the_package(project: Path) -> None:
    done = run_suite(
        project,
        OWN_TEST,
        "--gradproof-adapter",
        "reference",
        "--gradproof-layer",
        "tanh",
        "--gradproof-networks",
        "7",
        "-v",
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


COARSE = """
from gradproof.reference import NumpyReference


class LowerPrecision(NumpyReference):
    name = "coarse"

    def supports(self, layer, options, dtype):
        return layer.name == "sigmoid"
"""


@pytest.mark.parametrize(("demand", "outcomes"), [((), "1 passed"), (("--gradproof-arithmetic", "inside"), "1 failed")])
def test_a_class_of_arithmetic_may_be_demanded(project: Path, demand: Sequence[str], outcomes: str) -> None:
    (project / "coarse.py").write_text(COARSE)
    target = ("--gradproof-adapter", "coarse.py:LowerPrecision", "--gradproof-dtype", "bfloat16")
    done = conformance(
        project, *target, "--gradproof-layer", "sigmoid", "--gradproof-networks", "150", "-k", RANDOM, *demand
    )
    assert outcomes in done.stdout
