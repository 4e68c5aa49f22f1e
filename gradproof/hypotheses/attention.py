"""Masks and scales that are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gradproof.hypotheses.suspect import Guess, Suspect, replaced

# Masks.

ATTENTION = ("scaled_dot_product_attention", "multi_head_attention")


def _attending(suspect: Suspect, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Guess:
    """Change what attention kept: its own cache, or the first part of that of all heads."""
    if suspect.name == "multi_head_attention":
        return suspect.cached(lambda cache: replaced(cache, 0, change(cache[0])))
    return suspect.cached(change)


def mask_missing(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name == "dropout":
        yield suspect.changed(lambda g, dout, cache: {"x": dout})
        yield suspect.changed(lambda g, dout, cache: {"x": dout / (1.0 - suspect.keywords["p"])})
    if suspect.name == "embedding":
        yield suspect.cached(lambda cache: replaced(cache, 2, -1))
    if suspect.name in ATTENTION:
        yield _attending(suspect, lambda cache: replaced(cache, 5, np.ones_like(cache[5])))
        yield from suspect.called(mask=None, causal=False)


def mask_scale_missing(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name == "dropout":
        yield suspect.cached(lambda scale: scale * (1.0 - suspect.keywords["p"]))


def scale_missing(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name in ATTENTION:
        yield _attending(suspect, lambda cache: replaced(cache, 6, 1.0))
