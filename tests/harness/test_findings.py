"""Every script in docs/findings.md runs as it stands, alone, and is short."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FINDINGS = (Path(__file__).parents[2] / "docs" / "findings.md").read_text()
MOST_LINES = 10
SCRIPTS = [
    "\n".join(line[4:] for line in block.splitlines())
    for block in re.findall(r"(?:^    .*\n)+", FINDINGS, re.MULTILINE)
]


def test_there_is_a_script_for_every_finding() -> None:
    assert len(SCRIPTS) == len(re.findall(r"^## (?!Pinned)", FINDINGS, re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: re.findall(r"import (\w+)", script)[0])
def test_the_script_runs(script: str) -> None:
    framework = re.findall(r"import (\w+)", script)[0]
    pytest.importorskip(framework, reason=f"needs pip install 'gradproof[{framework}]'")
    assert len(script.splitlines()) <= MOST_LINES
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    fatal = re.search(r"# aborts: (.*)", script)
    if fatal:
        assert result.returncode == -signal.SIGABRT
        assert fatal[1] in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()
