"""Importing a user's file, which may be anywhere and have any name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def module_from_file(path: Path) -> Any:
    """The module in the file, under a name of its own, so that it hides no module and no other file of that name.

    What it raises passes.
    """
    name = f"gradproof file {path.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
