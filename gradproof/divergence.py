"""Known divergences: real disagreements of a framework, written down beside its adapter and still shown.

An entry excuses nothing but what it describes, and one that no longer shows is an error.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradproof.adapter import Adapter
from gradproof.agreement import TensorCheck
from gradproof.case import Case

COMPARISONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "above": np.greater,
    "below": np.less,
    "at": np.equal,
}
FIELDS = {
    "layer",
    "dtype",
    "argument",
    "kinds",
    "versions",
    "max_relative_error",
    "reason",
    "link",
    "witness",
    *COMPARISONS,
}


class DivergenceError(ValueError):
    """A known-divergence file that cannot be used; one line that says which entry and why."""


@dataclass(frozen=True)
class Divergence:
    """One entry of a known-divergence file.

    layer, dtypes: where it shows. argument: the layer's argument that the condition speaks of, and
    comparison, bound: the condition itself ("above", 20.0).
    kinds: what disagrees ("value", "gradient", "nonfinite"). versions: prefixes of the framework's version.
    max_relative_error: how far it is off at most, as a share of the expected number.
    witness: argument -> number at which the divergence must show. reason, link: what it is, where it is told.
    """

    layer: str
    dtypes: tuple[str, ...]
    argument: str
    comparison: str
    bound: float
    kinds: tuple[str, ...]
    versions: tuple[str, ...]
    max_relative_error: float
    witness: Mapping[str, float]
    reason: str
    link: str

    def applies(self, version: str, dtype: str) -> bool:
        return dtype in self.dtypes and version.startswith(self.versions)

    def explains(self, case: Case, checks: tuple[TensorCheck, ...]) -> bool:
        """Whether every disagreement of this one-node case is the one described."""
        (node,) = case.network.nodes
        wrong = [check for check in checks if check.kind]
        if node.layer.name != self.layer or not wrong:
            return False
        held = COMPARISONS[self.comparison](case.exact_values[dict(node.sources)[self.argument]], self.bound)
        return all(self._explains(check, held) for check in wrong)

    def _explains(self, check: TensorCheck, held: np.ndarray) -> bool:
        if check.kind not in self.kinds or check.wrong is None:
            return False
        located = (check.wrong <= held).all() if check.wrong.shape == held.shape else held.any()
        size = abs(check.expected)
        return bool(located and (check.max_error or 0.0) <= self.max_relative_error * size)


def divergences_of(adapter: Adapter) -> tuple[Divergence, ...]:
    """The entries of the TOML file beside the adapter's class, none where there is no file."""
    path = Path(inspect.getfile(type(adapter))).with_suffix(".toml")
    return read_divergences(path) if path.is_file() else ()


def read_divergences(path: Path) -> tuple[Divergence, ...]:
    """Read a known-divergence file. Raises DivergenceError, in one line, for a file that is not valid."""
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise DivergenceError(f"{path.name}: not TOML: {error}") from None
    return tuple(_entry(entry, f"{path.name}: entry {i + 1}") for i, entry in enumerate(data.get("divergence", [])))


def _entry(entry: dict[str, Any], where: str) -> Divergence:
    comparisons = [name for name in COMPARISONS if name in entry]
    if len(comparisons) != 1:
        raise DivergenceError(f"{where}: needs exactly one of {', '.join(COMPARISONS)}")
    unknown, missing = entry.keys() - FIELDS, FIELDS - COMPARISONS.keys() - entry.keys()
    if unknown or missing:
        raise DivergenceError(f"{where}: unknown {sorted(unknown) or 'none'}, missing {sorted(missing) or 'none'}")
    (comparison,) = comparisons
    rest = {name: entry[name] for name in FIELDS - COMPARISONS.keys()}
    rest |= {name: tuple(entry[name]) for name in ("dtypes", "kinds", "versions")}
    return Divergence(comparison=comparison, bound=float(entry[comparison]), **rest)
