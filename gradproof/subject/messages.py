"""What passes between a run and the process of an adapter: arrays, remarks and exceptions, layers by their names."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradproof.model.layer import Layer
from gradproof.reference import LAYERS
from gradproof.subject.ancestry import Ancestor
from gradproof.subject.watch import Remark


def named_layer(name: str) -> Layer:
    return LAYERS[name]


class _Pickler(pickle.Pickler):
    """Layers go by their name, for their functions cannot be pickled."""

    dispatch_table = copyreg.dispatch_table | {Layer: lambda layer: (named_layer, (layer.name,))}


def pickled(message: Any) -> bytes:
    target = io.BytesIO()
    _Pickler(target, pickle.HIGHEST_PROTOCOL).dump(message)
    return target.getvalue()


@dataclass(frozen=True)
class Loaded:
    name: str
    version: str
    ancestry: tuple[Ancestor, ...]
    fused: bool
    sees_shapes: bool


@dataclass(frozen=True)
class Raised:
    """An exception of the adapter's. kind: what the parent raises in its place."""

    kind: type[BaseException]
    message: str


@dataclass(frozen=True)
class Answer:
    """The arrays of a forward or backward pass, what it wrote to of what was there before, and the remarks on both.

    overwritten: the node outputs that are no longer what they were when they were computed, as they are now.
    """

    arrays: dict[str, Any]
    values: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    cotangent: dict[str, np.ndarray] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    overwritten: dict[str, np.ndarray] = field(default_factory=dict)


def passed_on(found: Mapping[str, Any]) -> dict[str, Any]:
    """Results as they can be passed on; those that are no arrays as something else of the same name."""
    return {f"{name}": _plain(result) for name, result in found.items()}


def _plain(result: Any) -> Any:
    if result is None or isinstance(result, np.generic):
        return result
    if isinstance(result, np.ndarray):
        return np.empty(result.shape, object) if result.dtype.hasobject else np.asarray(result)
    return _Foreign(type(result).__name__)


class _Foreign:
    """Stands for a result that is no array: an object whose type has that name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> Any:
        return _foreign, (self._name,)


def _foreign(name: str) -> Any:
    return type(name, (), {})()
