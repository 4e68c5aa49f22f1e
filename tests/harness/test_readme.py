"""The README, followed to the letter: the diff that it shows, and the activation that it adds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gradproof.cli import main
from gradproof.draw.architectures import ARCHITECTURES
from gradproof.reference import LAYERS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MOST_LINES_IN_REFERENCE = 8


def blocks(language: str, section: str) -> list[str]:
    """The fenced blocks of this language in the section of this title."""
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "120", "NO_COLOR": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def without_version(text: str) -> str:
    return re.sub(r"NumPy [\d.]+", "NumPy", "\n".join(line.rstrip() for line in text.splitlines()))


def test_the_diff_shown_is_the_one_that_is_printed() -> None:
    (block,) = blocks("console", "What a wrong gradient looks like")
    command, _, expected = block.partition("\n")
    assert command.startswith("$ gradproof ")
    result = run("-m", "gradproof", *command.removeprefix("$ gradproof ").split())
    assert result.returncode == 1
    assert without_version(result.stdout).startswith(without_version(expected).rstrip())


def section(title: str) -> str:
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)
    return str(text)


def test_the_table_of_layers_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for framework in ("torch", "jax"):
        pytest.importorskip(framework, reason=f"needs pip install 'gradproof[{framework}]'")
    assert main(["layers", "--markdown", "--adapter", "torch", "--adapter", "jax"]) == 0
    shown = [line for line in section("Layers").splitlines() if line.startswith("|")]
    assert shown == capsys.readouterr().out.splitlines()


def test_the_table_has_every_layer_and_enough_of_each_kind() -> None:
    assert [name for name in LAYERS if f"`{name}`" not in section("Layers")] == []
    kinds = Counter(layer.kind for layer in LAYERS.values())
    assert kinds["activation"] >= 38
    assert kinds["loss"] >= 26
    assert kinds["layer"] >= 45


def test_every_architecture_is_named() -> None:
    assert [name for name in ARCHITECTURES if not re.search(rf"\b{name}\b", section("Layers"))] == []


def code_lines(source: str) -> list[str]:
    """The lines of code, docstrings and blank lines aside."""
    without_docstrings = re.sub(r'^ *""".*?"""\n', "", source, flags=re.MULTILINE | re.DOTALL)
    return [line for line in without_docstrings.splitlines() if line.strip()]


def insert_before(path: Path, marker: str, text: str) -> None:
    source = path.read_text()
    position = source.rindex(marker)
    path.write_text(source[:position] + text + source[position:])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package as it is installed, to which the README's lines can be added."""
    shutil.copytree(ROOT / "gradproof", tmp_path / "gradproof", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("reference", "adapters"):
        shutil.copytree(ROOT / folder, tmp_path / "gradproof" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def add_the_activation(checkout: Path) -> None:
    pair, row, torch_row, jax_row = blocks("python", "Add a built-in activation")
    package = checkout / "gradproof"
    source = (package / "reference" / "activations.py").read_text().rstrip()
    assert source.endswith("\n)")
    (package / "reference" / "activations.py").write_text(source[:-1] + row + ")\n")
    insert_before(package / "reference" / "activations.py", "LAYERS = (", pair + "\n\n")
    for adapter, line in (("torch", torch_row), ("jax", jax_row)):
        insert_before(package / "adapters" / f"{adapter}.py", '    "linear":', line)


def test_adding_an_activation_takes_few_lines() -> None:
    pair, row, *adapter_rows = blocks("python", "Add a built-in activation")
    assert len(code_lines(pair) + code_lines(row)) <= MOST_LINES_IN_REFERENCE
    assert [len(code_lines(each)) for each in adapter_rows] == [1, 1]


@pytest.mark.parametrize("adapter", ["torch", "jax"])
def test_the_added_activation_agrees(checkout: Path, adapter: str) -> None:
    pytest.importorskip(adapter, reason=f"needs pip install 'gradproof[{adapter}]'")
    (name,) = re.findall(r"def (\w+)_forward", blocks("python", "Add a built-in activation")[0])
    assert name not in LAYERS
    add_the_activation(checkout)
    options = ("--layer", name, "--networks", "10", "--seed", "1", "--max-nodes", "2", "--json", "report.json")
    result = run("-m", "gradproof", "check", "--adapter", adapter, *options, cwd=checkout, PYTHONPATH=str(checkout))
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((checkout / "report.json").read_text())
    assert report["networks"] == 10
    assert re.search(rf"^{name} +10 +10$", result.stdout, re.MULTILINE)


def test_a_wrong_added_activation_is_found(checkout: Path) -> None:
    pytest.importorskip("torch", reason="needs pip install 'gradproof[torch]'")
    add_the_activation(checkout)
    activations = checkout / "gradproof" / "reference" / "activations.py"
    activations.write_text(activations.read_text().replace("dout * -2.0 * x * out", "dout * 2.0 * x * out"))
    options = ("--layer", "gaussian", "--networks", "10", "--seed", "1", "-x")
    result = run("-m", "gradproof", "check", "--adapter", "torch", *options, cwd=checkout, PYTHONPATH=str(checkout))
    assert result.returncode == 1
    assert "gaussian (node" in result.stdout


# A layer of one's own, in one file outside the checkout.


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    (text,) = blocks("python", "Add a layer of yours")
    (tmp_path / "gaussian.py").write_text(text)
    return tmp_path


def of_own(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "gradproof", *arguments, "--layers", "gaussian.py", cwd=directory)


def test_a_layer_of_ones_own_is_proven_and_listed(own_file: Path) -> None:
    proven = of_own(own_file, "prove", "gaussian")
    assert (proven.returncode, proven.stdout.splitlines()[-1]) == (0, "1 of 1 layer proven"), proven.stderr
    page = of_own(own_file, "layers", "gaussian", "--adapter", "reference").stdout
    assert "f(x) = exp(-x^2)." in page
    assert "gaussian " in of_own(own_file, "layers", "--adapter", "reference").stdout
    (own_file / "gaussian.py").write_text((own_file / "gaussian.py").read_text().replace("* -2.0 * x", "* 2.0 * x"))
    assert of_own(own_file, "prove", "gaussian").returncode == 1


@pytest.mark.parametrize("adapter", ["torch", "jax"])
def test_a_layer_of_ones_own_agrees_in_processes_of_their_own(own_file: Path, adapter: str) -> None:
    pytest.importorskip(adapter, reason=f"needs pip install 'gradproof[{adapter}]'")
    options = ("--adapter", adapter, "--layer", "gaussian", "--networks", "6", "--seed", "1", "--max-nodes", "2")
    done = of_own(own_file, "check", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^gaussian +6 +6$", done.stdout, re.MULTILINE)


def test_a_mistake_in_a_row_of_ones_own_is_caught_and_blamed(own_file: Path) -> None:
    pytest.importorskip("torch", reason="needs pip install 'gradproof[torch]'")
    text = (own_file / "gaussian.py").read_text()
    assert text.count("torch.exp(-x * x)") == 1
    (own_file / "gaussian.py").write_text(text.replace("torch.exp(-x * x)", "torch.exp(-x * x.detach())"))
    options = ("--adapter", "torch", "--layer", "gaussian", "--networks", "20", "--seed", "1", "-x")
    done = of_own(own_file, "check", *options, "--json", "report.json")
    assert done.returncode == 1
    assert "gaussian (node" in done.stdout
    report = json.loads((own_file / "report.json").read_text())
    culprits = [each for each in report["disagreements"] if each["culprit"]]
    assert {each["layer"] for each in culprits} == {"gaussian"}
    assert all(each["cause"].startswith("equals half the gradient") for each in culprits)
