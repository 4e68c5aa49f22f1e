"""Who may import whom, and that importing gradproof costs nothing that was not asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS: dict[str, tuple[str, set[str]]] = {
    "model": ("gradproof/model", set()),
    "reference": ("reference", {"model"}),
    "adapters": ("adapters", {"model"}),
    "draw": ("gradproof/draw", {"model", "reference"}),
    "subject": ("gradproof/subject", {"model", "reference"}),
    "verdict": ("gradproof/verdict", {"model", "reference", "subject"}),
    "run": ("gradproof/run", {"model", "reference", "draw", "subject", "verdict"}),
    "show": ("gradproof/show", {"model", "reference", "draw", "subject", "verdict", "run"}),
    "trust": ("gradproof/trust", {"model", "reference", "adapters", "draw", "subject", "verdict", "run", "show"}),
}
"""Room -> its folder, and the rooms that it may know."""

LIBRARIES = {
    "model": {"numpy", "ml_dtypes"},
    "reference": {"numpy", "scipy.special"},
    "adapters": {"numpy", "platformdirs", "torch", "jax", "optax", "flax"},
}
"""Room -> the libraries that it may import, where these count."""

HEAVY = ("torch", "jax", "optax", "flax", "hypothesis", "rich", "scipy")


def imported(source: str) -> Iterator[str]:
    """The modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def within(name: str, allowed: set[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in allowed)


def foreign(source: str, room: str) -> list[str]:
    """The imports that a room may not make: of another room, of another library."""
    _, known = ROOMS[room]
    rooms = {f"gradproof.{each}" for each in (room, *known)}
    names = [name for name in imported(source) if name.partition(".")[0] not in sys.stdlib_module_names]
    own = [name for name in names if name.partition(".")[0] == "gradproof" and not within(name, rooms)]
    others = [name for name in names if name.partition(".")[0] != "gradproof"]
    return own + [name for name in others if room in LIBRARIES and not within(name, LIBRARIES[room])]


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_knows_only_what_it_may(room: str) -> None:
    folder, _ = ROOMS[room]
    sources = {path.name: path.read_text() for path in (ROOT / folder).rglob("*.py")}
    assert len(sources) > 1
    assert {name: found for name, text in sources.items() if (found := foreign(text, room))} == {}


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in (ROOT / "gradproof").iterdir() if (path / "__init__.py").is_file()}
    assert folders == {name for name, (folder, _) in ROOMS.items() if folder.startswith("gradproof/")}


def test_every_room_is_described() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert [folder for folder, _ in ROOMS.values() if f"| `{folder}/` |" not in page] == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("reference", "import torch"),
        ("reference", "from gradproof.run.check import check"),
        ("reference", "from scipy import optimize"),
        ("model", "from gradproof.reference import LAYERS"),
        ("verdict", "import gradproof.draw"),
        ("run", "from gradproof.show.report import summary"),
        ("show", "from gradproof.trust import soak"),
        ("draw", "from gradproof import check"),
    ],
)
def test_a_forbidden_import_is_seen(room: str, line: str) -> None:
    assert foreign(f"def late():\n    {line}\n", room)


def test_importing_gradproof_imports_nothing_heavy() -> None:
    script = f"import sys, gradproof; print([each for each in {HEAVY!r} if each in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_command_line_imports_no_framework_before_it_is_asked_for() -> None:
    frameworks = ("torch", "jax", "optax", "flax")
    script = f"import sys, gradproof.cli; print([each for each in {frameworks!r} if each in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
