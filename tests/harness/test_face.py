"""What outsiders import: each with a docstring, from gradproof itself, and by the names that older code has."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gradproof


@pytest.mark.parametrize("name", [name for name in gradproof.__all__ if name not in ("__version__", "LAYERS")])
def test_a_public_name_is_there_and_documented(name: str) -> None:
    public = getattr(gradproof, name)
    assert callable(public)
    assert (public.__doc__ or "").strip()
    assert name in dir(gradproof)


def test_nothing_else_is_public() -> None:
    with pytest.raises(AttributeError, match=r"module 'gradproof' has no attribute 'chekc'; public: .*check"):
        gradproof.chekc  # noqa: B018


OLDER = """
import gradproof
before = gradproof.check
from gradproof.check import check, replay
from gradproof.adapter import Adapter, AdapterError, Forward
from gradproof.adapters.base import Composed
from gradproof.adapters.functional import FunctionalAdapter
from gradproof.adapters.tape import TapeAdapter
from gradproof.reference import LAYERS, NumpyReference
assert check is before is gradproof.run.check.check
assert (Adapter, Forward, Composed) == (gradproof.Adapter, gradproof.Forward, gradproof.Composed)
report = gradproof.check(["reference"], networks=2, seed=1, isolation=False, failures=None)
assert report.agrees and report.networks == 2
"""


def test_what_older_code_imports_is_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", OLDER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
