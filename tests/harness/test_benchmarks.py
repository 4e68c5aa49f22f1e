"""The benchmark runs and prints what it promises; its figures are never asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("drawing", "reference", "noise floor", "torch", "jax", "comparison")


def test_throughput_prints_rates_their_ratio_and_where_the_time_goes() -> None:
    for framework in ("torch", "jax"):
        pytest.importorskip(framework, reason=f"needs pip install 'gradproof[{framework}]'")
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--networks", "3", "--naive", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [part for part in PARTS if f" {part} " not in result.stdout] == []
    assert result.stdout.count("networks a second") == 3
    assert "ratio of warm to naive:" in result.stdout


def test_layers_prints_ratios_growth_and_memory() -> None:
    pytest.importorskip("torch", reason="needs pip install 'gradproof[torch]'")
    command = [sys.executable, str(ROOT / "benchmarks" / "layers.py"), "--repeats", "1", "--layer", "linear"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "reference / torch" in result.stdout
    assert "linear" in result.stdout
    assert "time grows with batch ^ " in result.stdout
    assert "peak memory / what must be held" in result.stdout
