"""How known divergences are read from their file, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gradproof.reference import NumpyReference
from gradproof.verdict.divergence import DivergenceError, divergences_of, read_divergences
from helpers.divergences import ENTRY, READ, changed


def written(directory: Path, text: str) -> Path:
    path = directory / "framework.toml"
    path.write_text(text)
    return path


def test_an_entry_is_read(tmp_path: Path) -> None:
    assert read_divergences(written(tmp_path, ENTRY)) == (READ,)


def test_entries_are_read_in_order(tmp_path: Path) -> None:
    read = read_divergences(written(tmp_path, ENTRY + ENTRY.replace("softplus", "bce")))
    assert [entry.layer for entry in read] == ["softplus", "bce"]


def test_an_empty_file_has_no_entries(tmp_path: Path) -> None:
    assert read_divergences(written(tmp_path, "# none\n")) == ()


def test_an_entry_tells_what_differs_in_other_dtypes(tmp_path: Path) -> None:
    also = """
[divergence.also.float16]
between = [11.0, inf]
witness = { x = 12.0 }
cotangent = 1000.0

[divergence.also.bfloat16]
max_relative_error = 0.5
"""
    half = replace(READ, dtypes=("float16",), between=(11.0, float("inf")), witness={"x": 12.0}, cotangent=1000.0)
    coarse = replace(READ, dtypes=("bfloat16",), max_relative_error=0.5)
    assert read_divergences(written(tmp_path, ENTRY + also)) == (READ, half, coarse)


def test_an_entry_may_name_a_parameter(tmp_path: Path) -> None:
    text = changed('"softplus"', '"weight_norm"').replace('argument = "x"', 'argument = "direction"')
    assert read_divergences(written(tmp_path, text))[0].argument == "direction"


REFUSED = {
    "no toml": ("[[divergence", "framework.toml: not TOML: "),
    "an unknown field": (
        changed("max_relative_error", "max_error"),
        "framework.toml: entry 1: unknown fields: ['max_error'], missing fields: none",
    ),
    "missing fields": (
        changed('link = "https://example.org"', "").replace('reason = "linear above 20"', ""),
        "framework.toml: entry 1: unknown fields: none, missing fields: ['link', 'reason']",
    ),
    "both": (
        changed("witness =", "witnes ="),
        "framework.toml: entry 1: unknown fields: ['witnes'], missing fields: ['witness']",
    ),
    "one bound": (
        changed("[20.0, inf]", "[20.0]"),
        "framework.toml: entry 1: between must be [low, high], got [20.0]",
    ),
    "a bound alone": (
        changed("[20.0, inf]", "20.0"),
        "framework.toml: entry 1: between must be [low, high], got 20.0",
    ),
    "in another dtype": (
        ENTRY + "[divergence.also.float16]\nbetween = [1.0]",
        "framework.toml: entry 1: also float16: between must be [low, high], got [1.0]",
    ),
    "a kind alone": (
        changed('["value", "gradient"]', '"gradient"'),
        "framework.toml: entry 1: kinds must be a list of strings, got 'gradient'",
    ),
    "versions of numbers": (
        changed('["1.2", "2"]', "[1.2, 2]"),
        "framework.toml: entry 1: versions must be a list of strings, got [1.2, 2]",
    ),
    "other dtypes that are no tables": (
        ENTRY + 'also = ["float16"]',
        "framework.toml: entry 1: also must be a table of tables, one per dtype, got ['float16']",
    ),
    "a witness that is no table": (
        changed("{ x = 21.0 }", "21.0"),
        "framework.toml: entry 1: witness must be a table, got 21.0",
    ),
    "an error of any size": (
        changed("max_relative_error = 1e-6", "max_relative_error = 1e-6\nmax_absolute_error = inf"),
        "framework.toml: entry 1: max_absolute_error must be a finite number of at least 0, got inf",
    ),
    "an error below nothing": (
        changed("max_relative_error = 1e-6", "max_relative_error = -1e-6"),
        "framework.toml: entry 1: max_relative_error must be a finite number of at least 0, got -1e-06",
    ),
    "in a later entry": (
        ENTRY + changed("[20.0, inf]", "[]"),
        "framework.toml: entry 2: between must be [low, high], got []",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DivergenceError) as refusal:
        read_divergences(written(tmp_path, text))
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


MEANINGLESS = {
    "a misspelt table": changed("[[divergence]]", "[[divergences]]"),
    "a table that is no list": changed("[[divergence]]", "[divergence]"),
    "an unknown layer": changed('"softplus"', '"softplusplus"'),
    "an unknown argument": changed('argument = "x"', 'argument = "y"'),
    "an unknown statistic": changed("between =", 'statistic = "median"\nbetween ='),
    "axes of an unknown option": changed("between =", 'along = "axes"\nbetween ='),
    "an unknown factor": changed("between =", 'times = "alpha"\nbetween ='),
    "an unknown kind": changed('["value", "gradient"]', '["gradients"]'),
    "an unknown dtype": changed('["float64"]', '["float63"]'),
    "an unknown role": ENTRY.replace("[[divergence]]", '[[divergence]]\nrole = "loss"'),
    "an unknown other dtype": ENTRY + "[divergence.also.float8]\nbetween = [1.0, inf]",
    "a witness of another argument": changed("{ x = 21.0 }", "{ y = 21.0 }"),
}


@pytest.mark.parametrize("text", MEANINGLESS.values(), ids=MEANINGLESS)
def test_a_file_that_means_nothing_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DivergenceError):
        read_divergences(written(tmp_path, text))


@pytest.mark.parametrize(
    ("version", "dtype", "applies"),
    [
        ("1.2.3", "float64", True),
        ("1.2", "float64", True),
        ("2.0+cpu", "float64", True),
        ("1.3.0", "float64", False),
        ("1.1.2", "float64", False),
        ("1.2.3", "float32", False),
    ],
)
def test_an_entry_is_for_some_versions_and_dtypes(version: str, dtype: str, applies: bool) -> None:
    assert READ.applies(version, dtype) is applies


def test_an_adapter_without_a_file_has_no_divergences() -> None:
    assert divergences_of(NumpyReference()) == ()
