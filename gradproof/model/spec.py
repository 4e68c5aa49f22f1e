"""The JSON file ("spec") that replays a case."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradproof.model.case import Case, upcast
from gradproof.model.dtypes import VALID_DTYPES
from gradproof.model.layer import Domain, Layer
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import is_integer

SCHEMA = 1
LARGEST = 2**24
"""The most elements of one tensor: in float64, and in the runs that measure its noise, it takes gigabytes."""

_NOT_FINITE = {word: float(word) for word in ("nan", "inf", "-inf")}
DOMAIN_KINDS = ("real", "unit", "positive", "sign", "index")


class SpecError(ValueError):
    """A spec that cannot be replayed; one line that says where and why."""


def network_to_json(network: Network) -> dict[str, Any]:
    """The network as JSON data: inputs and nodes in forward order."""
    inputs = [
        {"name": each.name, "shape": list(each.shape), "domain": each.domain.kind} | _domain_to_json(each.domain)
        for each in network.inputs
    ]
    nodes = [
        {
            "name": node.name,
            "layer": node.layer.name,
            "inputs": list(node.inputs),
            "options": json_safe(dict(node.options)),
            "parameters": dict(node.parameters),
        }
        for node in network.nodes
    ]
    return {"inputs": inputs, "nodes": nodes}


def _domain_to_json(domain: Domain) -> dict[str, Any]:
    """What the kind alone does not say."""
    extra = {"extra": list(domain.extra)} if domain.extra else {}
    details = {"classes": domain.classes, "low": domain.low, "constant": domain.constant}
    return {name: value for name, value in details.items() if value} | extra


def json_safe(data: Any) -> Any:
    """The data with tuples as lists, and numbers that JSON has no form for as "nan", "inf" and "-inf"."""
    if isinstance(data, dict):
        return {key: json_safe(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [json_safe(each) for each in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def network_from_json(data: Mapping[str, Any], layers: Mapping[str, Layer]) -> Network:
    """The network that `network_to_json` described. Raises SpecError, or NetworkError naming the node."""
    inputs = tuple(_input(each) for each in _list(data, "inputs", "network"))
    return Network(inputs, tuple(_node(each, layers) for each in _list(data, "nodes", "network")))


def _input(data: Any) -> Input:
    name = _field(data, "name", str, "an input")
    shape = tuple(_field(data, "shape", list, f"input {name!r}"))
    if not all(is_integer(size) and size >= 0 for size in shape):
        raise SpecError(f"input {name!r}: shape {list(shape)}: expected a list of sizes, 0 or more")
    return Input(name, shape, _domain(data, f"input {name!r}"))


def _domain(data: Any, where: str) -> Domain:
    kind = data.get("domain", "real")
    if kind not in DOMAIN_KINDS:
        raise SpecError(f"{where}: unknown domain {kind!r}; valid domains: {', '.join(DOMAIN_KINDS)}")
    if kind != "index":
        return Domain(kind, constant=_optional(data, "constant", False, where))
    extra = _optional(data, "extra", [], where)
    if not all(is_integer(each) for each in extra):
        raise SpecError(f"{where}: 'extra' must hold integers, got {extra!r}")
    return Domain(kind, _field(data, "classes", int, where), _optional(data, "low", 0, where), tuple(extra))


def _node(data: Any, layers: Mapping[str, Layer]) -> Node:
    name = _field(data, "name", str, "a node")
    where = f"node {name!r}"
    layer = _field(data, "layer", str, where)
    if layer not in layers:
        raise SpecError(f"{where}: unknown layer {layer!r}; valid layers: {', '.join(layers)}")
    options = _field(data, "options", dict, where) if "options" in data else {}
    parameters = _field(data, "parameters", dict, where) if "parameters" in data else {}
    inputs = _field(data, "inputs", list, where)
    for what, names in (("inputs", inputs), ("parameters", list(parameters.values()))):
        if not all(isinstance(each, str) for each in names):
            raise SpecError(f"{where}: {what!r} must hold names, got {names!r}")
    return Node.of(name, layers[layer], *inputs, parameters=parameters, options=_options(options, where))


def _options(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options with lists as tuples, and the words of `json_safe` as numbers."""
    for name, value in options.items():
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(each, (bool, int, float, str)) for each in parts):
            raise SpecError(f"{where}: option {name!r} must be a number, a string or a list of integers, got {value!r}")
    return {
        name: tuple(value) if isinstance(value, list) else _NOT_FINITE.get(value, value)
        for name, value in options.items()
    }


def _list(data: Any, key: str, where: str) -> list[Any]:
    items: list[Any] = _field(data, key, list, where)
    return items


def _optional(data: Any, key: str, default: Any, where: str) -> Any:
    return _field(data, key, type(default), where) if key in data else default


def _field(data: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(data, dict):
        raise SpecError(f"{where}: expected a JSON object, got {type(data).__name__}")
    if key not in data:
        raise SpecError(f"{where}: {key!r} is missing")
    if not isinstance(data[key], kind) or (kind is int and isinstance(data[key], bool)):
        raise SpecError(f"{where}: {key!r} must be of type {kind.__name__}, got {data[key]!r}")
    return data[key]


def case_to_json(case: Case) -> dict[str, Any]:
    """The case as JSON data: half precision as the numbers that it stands for."""
    return {
        "schema": SCHEMA,
        "dtype": case.dtype,
        "seed": case.seed,
        "network": network_to_json(case.network),
        "values": {name: upcast(value).tolist() for name, value in case.values.items()},
        "cotangent": upcast(case.cotangent).tolist(),
    }


def case_from_json(data: Any, layers: Mapping[str, Layer]) -> Case:
    """The case of a spec. Raises SpecError or NetworkError, each one line."""
    schema = _field(data, "schema", int, "spec")
    if schema != SCHEMA:
        raise SpecError(f"spec has schema {schema}; this version of gradproof reads schema {SCHEMA}")
    dtype = _field(data, "dtype", str, "spec")
    if dtype not in VALID_DTYPES:
        raise SpecError(f"unknown dtype {dtype!r}; valid dtypes: {', '.join(VALID_DTYPES)}")
    network = network_from_json(_field(data, "network", dict, "spec"), layers)
    _require_size(network)
    indices = {each.name for each in network.inputs if not each.domain.floating}
    values = {
        name: _array(array, "int64" if name in indices else dtype, f"values: {name!r}")
        for name, array in _field(data, "values", dict, "spec").items()
    }
    if "cotangent" not in data:
        raise SpecError("spec: 'cotangent' is missing")
    seed = None if data.get("seed") is None else _field(data, "seed", int, "spec")
    return Case(network, dtype, values, _array(data["cotangent"], dtype, "cotangent"), seed)


def _require_size(network: Network) -> None:
    """Raise SpecError where a tensor would take more memory than any that is checked, before it is taken."""
    for name, shape in network.shapes.items():
        if math.prod(shape) > LARGEST:
            raise SpecError(f"{name!r} has the shape {list(shape)}, {math.prod(shape)} elements; at most {LARGEST}")


def _array(data: Any, dtype: str, what: str) -> np.ndarray:
    numbers = "integers" if dtype == "int64" else "numbers"
    try:
        exact = np.array(data, dtype=object)
        allowed = int if dtype == "int64" else (int, float)
        if not all(isinstance(each, allowed) and not isinstance(each, bool) for each in exact.flat):
            raise SpecError(f"{what} is not an array of {numbers}")
        array = exact.astype("int64" if dtype == "int64" else "float64")
    except (TypeError, ValueError, OverflowError):
        raise SpecError(f"{what} is not an array of {numbers}") from None
    if not np.isfinite(array).all():
        raise SpecError(f"{what} holds NaN or infinity; of what follows from these nothing can be said")
    with np.errstate(over="ignore"):
        rounded = np.asarray(array.astype(dtype))
    if not np.isfinite(rounded).all():
        raise SpecError(f"{what} holds numbers beyond the range of {dtype}")
    return rounded


def save_case(case: Case, directory: Path, name: str) -> Path:
    """Write the spec, whole or not at all, and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / (re.sub(r"[^A-Za-z0-9_.-]", "-", name) + ".json")
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(case_to_json(case), allow_nan=False))
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_case(path: Path, layers: Mapping[str, Layer]) -> Case:
    """Read a spec. Raises SpecError, in one line, where the file is missing, no JSON, or no valid case."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SpecError(f"{path}: not JSON: {error}") from None
    except RecursionError:
        raise SpecError(f"{path}: not JSON: nested too deeply") from None
    try:
        return case_from_json(data, layers)
    except ValueError as error:
        raise SpecError(f"{path}: {error}") from None
