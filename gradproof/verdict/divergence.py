"""Known divergences: real disagreements of a framework, written down beside its adapter and still shown.

An entry excuses nothing but what it describes, and one that no longer shows is an error.
"""

from __future__ import annotations

import inspect
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from gradproof.model.adapter import Adapter
from gradproof.model.case import Case, upcast
from gradproof.model.dtypes import VALID_DTYPES
from gradproof.model.layer import Layer
from gradproof.model.network import Node
from gradproof.model.options import OptionValue, Shape, TrailingAxes
from gradproof.model.tensors import Role, Tensor, Wrong
from gradproof.reference import LAYERS, NumpyReference
from gradproof.subject.ancestry import ancestry
from gradproof.verdict.agreement import Evidence, TensorCheck

COTANGENT = "cotangent"
"""Stands for an argument's name in an entry that is located by the gradient of the layer's output."""

OUTPUT = "output"
"""Stands for an argument's name in an entry that is located by what the layer must give, and in its gradients by the
elements that are a part of it."""

KINDS = (Wrong.VALUE, Wrong.GRADIENT, Wrong.NONFINITE)
"""The kinds of disagreement that an entry can describe."""

ROLES = tuple(Role)

Statistic = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]

STATISTICS: dict[str, Statistic] = {
    "magnitude": lambda x, axes: np.abs(x),
    "largest": lambda x, axes: np.abs(x).max(keepdims=True),
    "peak": lambda x, axes: np.abs(x).max(axis=axes, keepdims=True),
    "range": lambda x, axes: x.max(axis=axes, keepdims=True) - x.min(axis=axes, keepdims=True),
    "peak over range": lambda x, axes: (
        np.abs(x).max(axis=axes, keepdims=True) / (x.max(axis=axes, keepdims=True) - x.min(axis=axes, keepdims=True))
    ),
    "variance": lambda x, axes: x.var(axis=axes, keepdims=True),
    "largest product": lambda x, axes: np.maximum(np.abs(x), 1.0).prod(axis=axes, keepdims=True),
    "smallest product": lambda x, axes: np.minimum(np.where(x == 0, np.nan, np.abs(x)), 1.0).prod(
        axis=axes, keepdims=True
    ),
}
"""What an entry may locate in place of an argument's numbers: the magnitude of each, the largest of all, or one number
per slice along some axes: the largest magnitude, the largest less the smallest, the former over the latter, the
variance, the largest or smallest magnitude that a product of some of them can have (NaN, which lies nowhere, where one
is 0)."""


class DivergenceError(ValueError):
    """A known-divergence file that cannot be used; one line that says which entry and why."""


@dataclass(frozen=True)
class Divergence:
    """One entry of a known-divergence file.

    layer, dtypes: where it shows. argument, between: it shows where this argument or parameter of the layer, or its
    "output", or "cotangent" for the gradient of that, times the option named `times` if any, lies between these two
    numbers (both included). statistic, along: or where this statistic of the argument does, taken along the axes that
    the option `along` names, or so many of the last ones. options: it shows with these. role: in tensors of this role
    alone, where it is named ("value" or "gradient").
    kinds: what disagrees ("value", "gradient", "nonfinite"). max_relative_error, max_absolute_error: how far
    it is off at most, as a share of the expected number plus a number, which for gradients is in units of the largest
    finite cotangent. versions: prefixes of the adapter's.
    witness: argument -> number, or nested list, at which the divergence must show. cotangent: what the cotangent is
    multiplied by there, for an error that is small beside the smallest normal number.
    reason, link: what it is, where it is told.
    """

    layer: str
    dtypes: tuple[str, ...]
    argument: str
    between: tuple[float, float]
    kinds: tuple[str, ...]
    versions: tuple[str, ...]
    witness: Mapping[str, Any]
    reason: str
    link: str
    max_relative_error: float = 0.0
    max_absolute_error: float = 0.0
    cotangent: float = 1.0
    times: str = ""
    statistic: str = ""
    role: str = ""
    along: str = ""
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    def applies(self, version: str, dtype: str) -> bool:
        return dtype in self.dtypes and version.startswith(self.versions)

    def explained(self, case: Case, check: TensorCheck, evidence: Evidence) -> np.ndarray:
        """Mask of the elements of a wrong tensor of this one-node case that the entry accounts for."""
        (node,) = case.network.nodes
        if node.layer.name != self.layer or not self.options.items() <= dict(node.options).items():
            return np.zeros_like(evidence.wrong)
        if self.role not in ("", check.key.role):
            return np.zeros_like(evidence.wrong)
        located = self.located(case, evidence.wrong.shape)
        with np.errstate(all="ignore"):
            scale = _largest(case.cotangent) if check.key.role is Role.GRADIENT else 1.0
            allowed = self.max_relative_error * np.abs(evidence.expected) + self.max_absolute_error * scale
        small = evidence.error <= allowed if check.key.role in self.kinds else False
        lost = ~np.isfinite(evidence.error) if Wrong.NONFINITE in self.kinds else False
        return np.asarray(located & (small | lost) & evidence.wrong)

    def located(self, case: Case, shape: Shape) -> np.ndarray:
        """Mask of the elements of a tensor of this shape; all of them or none where they have other places."""
        (node,) = case.network.nodes
        options = dict(node.options)
        argument = self._located_by(case, node)
        measured: Any = argument * float(options[self.times]) if self.times else argument  # type: ignore[arg-type]
        if self.statistic:
            axes = self._axes(node, options)
            with np.errstate(all="ignore"):
                measured = STATISTICS[self.statistic](measured, axes)
        held = (measured >= self.between[0]) & (measured <= self.between[1])
        if shape == argument.shape:
            return np.broadcast_to(held, shape)
        if self.argument == OUTPUT:
            return _parts_of(case, held, shape)
        per_slice = bool(self.along) and held.size == math.prod(shape)
        return held.reshape(shape) if per_slice else np.asarray(held.any())

    def _axes(self, node: Node, options: Mapping[str, OptionValue]) -> Any:
        """The axes of a slice, of which some layers tell the number alone."""
        named = options.get(self.along, ())
        counted = any(o.name == self.along and isinstance(o.domain, TrailingAxes) for o in node.layer.options)
        return tuple(range(-named, 0)) if counted and isinstance(named, int) else named

    def _located_by(self, case: Case, node: Node) -> np.ndarray:
        if self.argument == COTANGENT:
            return upcast(case.cotangent)
        if self.argument == OUTPUT:
            return NumpyReference().forward(case.network, case.exact_values, "float64").outputs[node.name]
        return case.exact_values[dict(node.sources)[self.argument]]


def _parts_of(case: Case, held: np.ndarray, shape: Shape) -> np.ndarray:
    """Mask of the elements, of the arguments of this shape, that the outputs which are held depend on."""
    reference = NumpyReference()
    forward = reference.forward(case.network, case.exact_values, "float64")
    gradients = reference.backward(forward, held.astype(np.float64))
    given = [each for name, each in gradients.items() if name in case.values and each.shape == shape]
    return np.any([each != 0 for each in given], axis=0) if given else np.full(shape, bool(held.any()))


def _largest(array: np.ndarray) -> float:
    """The largest magnitude among the finite numbers, 0 where there is none."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))


@dataclass(frozen=True, eq=False)
class Suspected:
    """A wrong tensor, and a node that may be why: the case of the node alone, and what it should have given.

    evidence: the elements that are wrong, by how much, and the node's own part of what was expected.
    """

    case: Case
    check: TensorCheck
    evidence: Evidence


def explanation(divergences: Iterable[Divergence], suspected: Sequence[Suspected]) -> Divergence | None:
    """The first entry that is needed, where the entries together account for all that is wrong; else None.

    Suspects for one tensor, which its readers are, share in explaining it.
    """
    needed: list[Divergence] = []
    open_elements: dict[Tensor, np.ndarray] = {}
    for each in suspected:
        left = open_elements.setdefault(each.check.key, each.evidence.wrong)
        for entry in divergences:
            explained = entry.explained(each.case, each.check, each.evidence) & left
            needed += [entry] if explained.any() else []
            left = left & ~explained
        open_elements[each.check.key] = left
    unexplained = any(left.any() for left in open_elements.values())
    return needed[0] if needed and not unexplained else None


def divergences_of(adapter: Adapter) -> tuple[Divergence, ...]:
    """The entries of the TOML file beside the adapter's class, and beside those that it is made from.

    Of a class that it is made from, those of the rows that it keeps. None where there is no file.
    """
    found: list[Divergence] = []
    for each in ancestry(adapter):
        path = each.file.with_suffix(".toml")
        entries = read_divergences(path) if path.is_file() else ()
        found += [entry for entry in entries if entry.layer not in each.replaced]
    return tuple(found)


def read_divergences(path: Path) -> tuple[Divergence, ...]:
    """Read a known-divergence file. Raises DivergenceError, in one line, for a file that is not valid."""
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise DivergenceError(f"{path.name}: not TOML: {error}") from None
    entries = data.get("divergence", [])
    if data.keys() - {"divergence"} or not isinstance(entries, list):
        raise DivergenceError(f"{path.name}: may hold [[divergence]] tables alone, got {', '.join(data)}")
    return tuple(each for i, entry in enumerate(entries) for each in _entries(entry, f"{path.name}: entry {i + 1}"))


def _entries(entry: dict[str, Any], where: str) -> Iterator[Divergence]:
    """The entry; then the same in other dtypes, which `also` names, each with the numbers that differ there."""
    own = {name: value for name, value in entry.items() if name != "also"}
    yield _entry(own, where)
    also = entry.get("also", {})
    if not (isinstance(also, dict) and all(isinstance(numbers, dict) for numbers in also.values())):
        raise DivergenceError(f"{where}: also must be a table of tables, one per dtype, got {also!r}")
    for dtype, numbers in also.items():
        yield _entry(own | {"dtypes": [dtype]} | numbers, f"{where}: also {dtype}")


def _entry(entry: dict[str, Any], where: str) -> Divergence:
    known = {each.name: each.default is each.default_factory is MISSING for each in fields(Divergence)}
    unknown = sorted(entry.keys() - known.keys())
    missing = sorted(name for name, required in known.items() if required and name not in entry)
    if unknown or missing:
        raise DivergenceError(f"{where}: unknown fields: {unknown or 'none'}, missing fields: {missing or 'none'}")
    _require_types(where, entry)
    if not (isinstance(entry["between"], list) and len(entry["between"]) == 2):
        raise DivergenceError(f"{where}: between must be [low, high], got {entry['between']!r}")
    _require_known(where, "layer", [entry["layer"]], LAYERS)
    options = [option.name for option in LAYERS[entry["layer"]].options]
    arguments = _arguments(LAYERS[entry["layer"]])
    _require_known(where, "argument", [entry["argument"]], [*arguments, COTANGENT, OUTPUT])
    _require_known(where, "option", entry.get("options", {}), options)
    _require_known(where, "option", [entry[name] for name in ("times", "along") if name in entry], options)
    _require_known(where, "witness argument", entry["witness"], arguments)
    _require_known(where, "statistic", [entry.get("statistic", "magnitude")], STATISTICS)
    _require_known(where, "kind", entry["kinds"], KINDS)
    _require_known(where, "role", [entry[name] for name in ("role",) if name in entry], ROLES)
    _require_known(where, "dtype", entry["dtypes"], VALID_DTYPES)
    _require_bounds(where, entry)
    return Divergence(**_tupled(entry) | {"options": _tupled(entry.get("options", {}))})


def _require_types(where: str, entry: Mapping[str, Any]) -> None:
    """Raise where a field is not of the type that its use expects."""
    for name in ("dtypes", "kinds", "versions"):
        if not (isinstance(entry[name], list) and all(isinstance(each, str) for each in entry[name])):
            raise DivergenceError(f"{where}: {name} must be a list of strings, got {entry[name]!r}")
    for name in ("options", "witness"):
        if not isinstance(entry.get(name, {}), dict):
            raise DivergenceError(f"{where}: {name} must be a table, got {entry[name]!r}")


def _require_bounds(where: str, entry: Mapping[str, Any]) -> None:
    """Raise where wrong numbers would be excused without a bound on their error."""
    for name in ("max_relative_error", "max_absolute_error"):
        bound = entry.get(name, 0.0)
        if not (isinstance(bound, int | float) and 0.0 <= bound < math.inf):
            raise DivergenceError(f"{where}: {name} must be a finite number of at least 0, got {bound!r}")


def _arguments(layer: Layer) -> list[str]:
    """What an entry may name: the layer's arguments, and its parameters, which only its forward function tells."""
    parameters = inspect.signature(layer.forward).parameters
    named = [name for name, each in parameters.items() if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    return [*dict.fromkeys([*(argument.name for argument in layer.arguments), *named])]


def _tupled(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


def _require_known(where: str, what: str, names: Iterable[str], valid: Iterable[str]) -> None:
    for name in names:
        if name not in valid:
            raise DivergenceError(f"{where}: unknown {what} {name!r}; valid: {', '.join(valid)}")
