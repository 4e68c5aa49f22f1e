"""Rows of one's own: what an adapter keeps, what it replaces, and what is known of either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradproof.cli import AGREEMENT, DISAGREEMENT, USAGE, main
from gradproof.reference import LAYERS
from gradproof.run.check import replay
from gradproof.subject.isolation import Isolated, close
from gradproof.subject.registry import load_adapter
from gradproof.verdict.divergence import divergences_of
from gradproof.verdict.kinks import one_node

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'gradproof[torch]'")

KERNELS = """
import torch

def rms_norm(x, weight=None, *, axes, eps):
    dims = tuple(range(-axes, 0))
    out = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    return out if weight is None else out * weight

def leaking_relu(x):
    return torch.where(x > 0, x, 0.01 * x)

def softplus(x, beta):
    return torch.nn.functional.softplus(x, beta)
"""

ADAPTERS = """
import torch
from gradproof.adapters.torch import ROWS, TorchAdapter

class Mine(TorchAdapter):
    name = "mine"
    rows = ROWS | {"softplus": lambda x, beta: torch.nn.functional.softplus(x, beta)}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kernels.py").write_text(KERNELS)
    Path("mine.py").write_text(ADAPTERS)


def layers_known(request: str, isolated: bool = False) -> set[str]:
    """The layers of which the adapter has known divergences."""
    adapter: Any = Isolated(request) if isolated else load_adapter(request)
    try:
        return {each.layer for each in divergences_of(adapter)}
    finally:
        close(adapter)


@pytest.mark.parametrize("isolated", [False, True])
def test_an_adapter_inherits_what_is_known_of_the_rows_that_it_keeps(isolated: bool) -> None:
    of_torch = layers_known("torch")
    assert "softplus" in of_torch
    assert layers_known("mine.py:Mine", isolated) == of_torch - {"softplus"}
    assert layers_known("torch+softplus=kernels.py:softplus", isolated) == of_torch - {"softplus"}


def test_a_divergence_that_is_known_of_torch_is_none_of_a_row_of_ones_own() -> None:
    """torch's softplus is the identity above 20."""
    case = one_node(LAYERS["softplus"], {}, 21.0, "float64")
    assert replay(case, ["torch"], isolation=False).agrees
    assert not replay(case, ["torch+softplus=kernels.py:softplus"], isolation=False).agrees


def test_a_right_row_agrees_and_all_else_stays_the_adapters_own(capsys: pytest.CaptureFixture[str]) -> None:
    row = ("--override", "rms_norm=kernels.py:rms_norm")
    assert main(["check", "--adapter", "torch", *row, "--layer", "rms_norm", "--networks", "8", "--seed", "1"]) == (
        AGREEMENT
    ), capsys.readouterr().out
    adapter: Any = load_adapter("torch+rms_norm=kernels.py:rms_norm")
    plain: Any = load_adapter("torch")
    assert {name for name, row in adapter.rows.items() if row is not plain.rows[name]} == {"rms_norm"}
    assert adapter.name == "torch+rms_norm"


def test_a_wrong_row_is_blamed_beside_the_adapter_that_it_was_put_into(capsys: pytest.CaptureFixture[str]) -> None:
    row = ("--override", "relu=kernels.py:leaking_relu")
    options = ("--dtype", "float64", "--layer", "relu", "--networks", "4", "--seed", "1")
    code = main(["check", "--adapter", "torch", *row, "--adapter", "torch", *options])
    shown = capsys.readouterr().out
    assert code == DISAGREEMENT
    assert "torch+relu float64: relu (node " in shown
    assert "torch float64: " not in shown


REFUSED = {
    "relu=kernels.py:relu": "kernels.py has no function 'relu'; its functions: rms_norm, leaking_relu, softplus",
    "rellu=kernels.py:leaking_relu": "override 'rellu=kernels.py:leaking_relu': unknown layer; valid layers: ",
    "relu=nowhere.py:relu": "no file 'nowhere.py'",
    "relu": "override 'relu' cannot be read; expected LAYER=path/to/file.py:function",
}


@pytest.mark.parametrize(("override", "message"), REFUSED.items())
def test_a_row_that_cannot_be_had_is_refused_in_one_line(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--adapter", "torch", "--override", override]) == USAGE
    told = capsys.readouterr().err
    assert told.startswith(f"gradproof: {message}")
    assert told.count("\n") == 1


def test_an_adapter_without_a_table_takes_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--adapter", "reference", "--override", "relu=kernels.py:leaking_relu"]) == USAGE
    assert "adapter 'reference' has no table of rows" in capsys.readouterr().err


def test_a_row_needs_an_adapter_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=str(int(USAGE))):
        main(["check", "--override", "relu=kernels.py:leaking_relu"])
    assert "name the adapter before it" in capsys.readouterr().err


def test_rows_may_be_given_in_python() -> None:
    mine: Callable[..., Any] = lambda x: torch.where(x > 0, x, 0.01 * x)  # noqa: E731
    adapter: Any = load_adapter("torch")
    case = one_node(LAYERS["relu"], {}, {"x": [1.0, -2.0]}, "float64")
    assert replay(case, [adapter], isolation=False).agrees
    assert not replay(case, [adapter.with_rows({"relu": mine})], isolation=False).agrees
