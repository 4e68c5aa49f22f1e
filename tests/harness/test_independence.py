"""Who may import whom, and that importing gradproof costs nothing that was not asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VOCABULARY = {"gradproof.layer", "gradproof.network", "gradproof.adapter", "gradproof.dtypes"}
ALLOWED = {
    "reference": {"numpy", "scipy.special", *VOCABULARY, "gradproof.reference"},
    "adapters": {"numpy", "platformdirs", "torch", "jax", "optax", "flax", *VOCABULARY, "gradproof.adapters"},
}
HEAVY = ("torch", "jax", "optax", "flax", "hypothesis", "rich", "scipy")


def imported(source: str) -> Iterator[str]:
    """The modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def foreign(source: str, allowed: set[str]) -> list[str]:
    """The imports that are neither allowed, nor within something allowed, nor of the standard library."""
    return [
        name
        for name in imported(source)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not any(name == each or name.startswith(f"{each}.") for each in allowed)
    ]


@pytest.mark.parametrize("folder", ALLOWED)
def test_each_side_knows_only_what_it_may(folder: str) -> None:
    sources = {path.name: path.read_text() for path in (ROOT / folder).glob("*.py")}
    assert sources
    assert {name: found for name, text in sources.items() if (found := foreign(text, ALLOWED[folder]))} == {}


@pytest.mark.parametrize("line", ["import torch", "from gradproof.check import check", "from scipy import optimize"])
def test_a_forbidden_import_is_seen(line: str) -> None:
    assert foreign(f"def late():\n    {line}\n", ALLOWED["reference"])


def test_importing_gradproof_imports_nothing_heavy() -> None:
    script = f"import sys, gradproof; print([each for each in {HEAVY!r} if each in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_command_line_imports_no_framework_before_it_is_asked_for() -> None:
    frameworks = ("torch", "jax", "optax", "flax")
    script = f"import sys, gradproof.cli; print([each for each in {frameworks!r} if each in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
