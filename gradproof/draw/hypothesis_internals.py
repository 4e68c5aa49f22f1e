"""What gradproof takes from inside Hypothesis, in one place, for none of it is documented to stay."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from hypothesis.control import current_build_context
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider
from hypothesis.internal.conjecture.utils import calc_label_from_name

BACKEND = "gradproof"
"""The Hypothesis backend to draw with, so that a seed alone decides what is drawn."""

REJECTED = calc_label_from_name("a layer that may not fit")
"""What Hypothesis knows the draws of an attempt by."""


class SeededProvider(HypothesisProvider):
    """Hypothesis' own draws, without the constants that it collects from whichever modules are loaded."""

    def _maybe_draw_constant(self, *arguments: Any, **options: Any) -> None:
        return None


AVAILABLE_PROVIDERS[BACKEND] = f"{SeededProvider.__module__}.{SeededProvider.__qualname__}"


class Attempt:
    """Draws in a `with` block that shrinking drops, unless they are kept."""

    kept = False

    def __enter__(self) -> Self:
        self._data = current_build_context().data
        self._data.start_span(REJECTED)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._data.stop_span(discard=not self.kept)
