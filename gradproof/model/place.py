"""Where in an adapter an exception comes from: the last lines of its traceback that are the adapter's own."""

from __future__ import annotations

import linecache
import sysconfig
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

LINES = 2
"""How many lines of code are shown: the one that raised, and the one that led to it."""

SHOWN = 80
"""How many characters of a line of code are shown."""

LIBRARIES = tuple(
    sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}, reverse=True)
)
"""Where libraries lie, a directory in another one before that."""


def place(error: BaseException) -> str:
    """The adapter's last lines that the exception came through, the innermost last; nothing where none is known."""
    steps = [_Step.of(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return "; ".join(map(str, _of_the_adapter([step for step in steps if not step.file.startswith("<")])[-LINES:]))


@dataclass(frozen=True)
class _Step:
    """A frame of a traceback. owner: whose code it is: "harness", "adapters", a library's name, or "" for all else."""

    file: str
    line: int
    function: str
    owner: str

    @staticmethod
    def of(frame: FrameType, line: int) -> _Step:
        code = frame.f_code
        module = str(frame.f_globals.get("__name__"))
        return _Step(code.co_filename, line, code.co_name, _owner(module, Path(code.co_filename)))

    def __str__(self) -> str:
        code = textwrap.shorten(linecache.getline(self.file, self.line), SHOWN, placeholder=" ...")
        where = f"{_short(Path(self.file))}:{self.line} in {self.function}"
        return (
            where if code.partition(" ")[0] in ("", "raise") else f"{where}: {code}"
        )  # what is raised is told already


def _of_the_adapter(steps: Sequence[_Step]) -> list[_Step]:
    """Those outside of libraries; else in gradproof's own adapters; else in the library that was called first."""
    libraries = [step.owner for step in steps if step.owner not in ("", "harness", "adapters")]
    for wanted in ("", "adapters", *libraries[:1]):
        if found := [step for step in steps if step.owner == wanted]:
            return found
    return []


def _owner(module: str, file: Path) -> str:
    if module.partition(".")[0] == "gradproof":
        return "adapters" if module.startswith("gradproof.adapters.") else "harness"
    library = next((each for each in LIBRARIES if file.is_relative_to(each)), None)
    if library is None:
        return ""
    parts = file.relative_to(library).parts
    return next(part for part in parts if part not in ("site-packages", "dist-packages"))


def _short(file: Path) -> Path:
    """The file as its package has it, or as it lies in the working directory."""
    top = file.parent
    while (top / "__init__.py").exists() and top != top.parent:
        top = top.parent
    if top == file.parent and file.is_relative_to(Path.cwd()):
        top = Path.cwd()
    return file.relative_to(top)
