"""What belongs to this checkout alone: Hypothesis profiles, helpers of the tests, a word where it is not installed."""

import os
from importlib.util import find_spec

import pytest
from hypothesis import settings

if find_spec("gradproof.reference") is None:
    raise pytest.UsageError("gradproof is not installed: run `pip install -c constraints.txt -e '.[test]'` first")

pytest.register_assert_rewrite("helpers")

settings.register_profile("gradproof", settings.get_profile("default"), deadline=None)
settings.register_profile("gradproof-ci", settings.get_profile("ci"), deadline=None, derandomize=True)
settings.load_profile("gradproof-ci" if os.environ.get("CI") else "gradproof")
