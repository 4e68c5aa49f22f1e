"""What belongs to this checkout alone: the Hypothesis profiles, and a word where gradproof is not installed."""

import os
from importlib.util import find_spec

import pytest
from hypothesis import settings

if find_spec("gradproof.reference") is None:
    raise pytest.UsageError("gradproof is not installed: run `pip install -c constraints.txt -e '.[test]'` first")

settings.register_profile("gradproof", settings.get_profile("default"), deadline=None)
settings.register_profile("gradproof-ci", settings.get_profile("ci"), deadline=None, derandomize=True)
settings.load_profile("gradproof-ci" if os.environ.get("CI") else "gradproof")
