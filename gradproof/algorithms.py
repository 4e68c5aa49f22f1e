"""Honest algorithms that lose digits which the textbook formula keeps, each with a noise floor of its own."""

from __future__ import annotations

from dataclasses import dataclass

from gradproof.reference.walk import Row


@dataclass(frozen=True)
class Algorithm:
    """One algorithm for one layer. name: the formula in a few words. row: its forward and backward functions."""

    name: str
    row: Row


ALGORITHMS: dict[str, tuple[Algorithm, ...]] = {}
"""Layer -> its other honest algorithms."""


def algorithms_of(layer: str) -> tuple[Algorithm, ...]:
    """The honest algorithms of a layer beside the textbook's."""
    return ALGORITHMS.get(layer, ())
