"""Pages whose sections are each written by the command that measures them."""

from __future__ import annotations

import re
from pathlib import Path


class SectionError(ValueError):
    """A page without the place that a section belongs in; one line."""


def write_section(path: Path, name: str, text: str) -> None:
    """Put the text between `<!-- name -->` and `<!-- /name -->` of the page. Raises SectionError without them."""
    before = path.read_text() if path.exists() else ""
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not place.search(before):
        raise SectionError(f"{path}: no place for {name}: it needs a line <!-- {name} --> and a line <!-- /{name} -->")
    path.write_text(place.sub(lambda found: f"{found[1]}\n{text.strip()}\n\n{found[2]}", before))
