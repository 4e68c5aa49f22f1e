"""Pages whose sections are each written by the command that measures them."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import numpy as np
import scipy

TRUST_PAGE = Path("docs/trust.md")


class SectionError(ValueError):
    """A page without the place that a section belongs in; one line."""


def write_section(path: Path, name: str, text: str) -> None:
    """Put the text between `<!-- name -->` and `<!-- /name -->` of the page. Raises SectionError without them."""
    before = path.read_text() if path.exists() else ""
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not place.search(before):
        raise SectionError(f"{path}: no place for {name}: it needs a line <!-- {name} --> and a line <!-- /{name} -->")
    body = text.strip("\n")
    path.write_text(place.sub(lambda found: f"{found[1]}\n{body}\n\n{found[2]}", before))


def versions() -> str:
    """What figures of the reference alone hang on."""
    return f"Python {platform.python_version()}, NumPy {np.__version__}, SciPy {scipy.__version__}"
