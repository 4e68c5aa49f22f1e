"""Finding adapters by name: built in, from an entry point, from a module, from a file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from gradproof.model.adapter import Adapter, AdapterError, message_of
from gradproof.reference import LAYERS
from gradproof.subject.modules import module_from_file
from gradproof.subject.own_layers import give_own_rows

GROUP = "gradproof.adapters"
HOW_TO_ADD = "package.module:Class or path/to/file.py:Class"
REQUEST = re.compile(r"(?P<name>[^\[\]+]*)(?:\[(?P<options>[^\[\]]*)\])?(?P<overrides>(?:\+[^+]*)*)")
OVERRIDE = re.compile(r"(?P<layer>\w+)=(?P<file>.+\.py):(?P<function>\w+)")
HOW_TO_OVERRIDE = "LAYER=path/to/file.py:function"
BUILT_IN = {"reference": "numpy", "torch": "torch", "jax": "jax"}
"""The adapters of gradproof itself -> the distribution whose version is theirs."""

METHODS = ("version", "supports", "forward", "backward")


def adapter_names() -> list[str]:
    """The names that `load_adapter` knows without a path."""
    return sorted(entry.name for entry in entry_points(group=GROUP))


def load_adapters(names: Iterable[str | Adapter], load: Callable[[str], Adapter] | None = None) -> dict[str, Adapter]:
    """Name asked for -> adapter, each once; adapters pass as they are, under their own name.

    load: `load_adapter` where None.

    Raises AdapterError where one cannot be had, or where two call themselves the same.
    """
    adapters: dict[str, Adapter] = {}
    for each in dict.fromkeys(names):
        adapter = (load or load_adapter)(each) if isinstance(each, str) else each
        give_own_rows(adapter)
        if any(adapter.name == other.name for other in adapters.values()):
            raise AdapterError(f"two of the adapters are named {adapter.name!r}; give each a name of its own")
        adapters[each if isinstance(each, str) else adapter.name] = adapter
    return adapters


def load_adapter(name: str) -> Adapter:
    """An adapter by its registered name, or by `package.module:Class`, or by `path/to/file.py:Class`.

    Options for its constructor may follow in brackets, as in `jax[jit=network]`, and then other rows for some layers,
    as in `torch+rms_norm=my_kernels.py:rms_norm`; its name tells them.

    Raises AdapterError, in one line, where there is none of that name, it cannot be imported, takes no such option or
    no rows, or where such a row cannot be had.
    """
    request = parsed(name)
    adapter = _instance(_factory(request.name), request.name, request.options)
    give_own_rows(adapter)
    return _overridden(adapter, request.overrides) if request.overrides else adapter


@dataclass(frozen=True)
class Request:
    """An adapter as it was asked for. options: of its constructor. overrides: LAYER=path/to/file.py:function."""

    name: str
    options: Mapping[str, str]
    overrides: tuple[str, ...]


def parsed(request: str) -> Request:
    """The parts of a request. Raises AdapterError where there is no telling them."""
    match = REQUEST.fullmatch(request)
    pairs = [each.partition("=") for each in (match["options"] or "").split(",") if each] if match else []
    if match is None or not all(name and separator for name, separator, _ in pairs):
        raise AdapterError(f"adapter {request!r} cannot be read; expected NAME or NAME[option=value,...]")
    options = {name.strip(): value.strip() for name, _, value in pairs}
    return Request(match["name"], options, tuple(match["overrides"].split("+")[1:]))


def _overridden(adapter: Adapter, overrides: Iterable[str]) -> Adapter:
    """The adapter with rows of somebody's own."""
    if not hasattr(adapter, "with_rows"):
        raise AdapterError(f"adapter {adapter.name!r} has no table of rows, so that none can be replaced")
    rows: dict[str, Any] = {}
    for each in overrides:
        match = OVERRIDE.fullmatch(each)
        if match is None:
            raise AdapterError(f"override {each!r} cannot be read; expected {HOW_TO_OVERRIDE}")
        if match["layer"] not in LAYERS:
            raise AdapterError(f"override {each!r}: unknown layer; valid layers: {', '.join(LAYERS)}")
        rows[match["layer"]] = _function(Path(match["file"]), match["function"])
    changed: Adapter = adapter.with_rows(rows)
    return changed


def _function(path: Path, name: str) -> Any:
    module = _module_from_file(path)
    function = getattr(module, name, None)
    if not callable(function):
        known = [each for each, value in vars(module).items() if inspect.isfunction(value)]
        raise AdapterError(f"{path} has no function {name!r}; its functions: {', '.join(known) or 'none'}")
    return function


def _factory(name: str) -> Any:
    """What makes the adapter of that name."""
    registered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name in registered:
        return _registered(registered[name])
    module_name, separator, class_name = name.rpartition(":")
    if not separator:
        raise AdapterError(
            f"unknown adapter {name!r}; valid adapters: {', '.join(sorted(registered))}, or {HOW_TO_ADD}"
        )
    module = _module_from_file(Path(module_name)) if module_name.endswith(".py") else _module(module_name)
    if not hasattr(module, class_name):
        classes = [
            each
            for each, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        raise AdapterError(f"{module_name} has no class {class_name!r}; its classes: {', '.join(classes) or 'none'}")
    return getattr(module, class_name)


def describe_adapter(name: str) -> str:
    """Its name and version, as far as they can be told without importing a framework."""
    request = parsed(name)
    if request.name not in BUILT_IN or request.overrides:
        adapter = load_adapter(name)
        return f"{adapter.name} {adapter.version()}"
    try:
        return f"{name} {version(BUILT_IN[request.name])}"
    except PackageNotFoundError:
        return f"{name} not installed"


def _registered(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except ImportError as error:
        missing = error.name or str(error)
        hint = f": pip install 'gradproof[{entry.name}]'" if entry.name in BUILT_IN else ""
        raise AdapterError(f"adapter {entry.name!r} needs {missing}, which is not installed{hint}") from error
    except Exception as error:
        raise AdapterError(f"adapter {entry.name!r} cannot be imported: {message_of(error)}") from error


def _module(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a module beside the user is found
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AdapterError(f"cannot import {name!r}: {error}; expected {HOW_TO_ADD}") from error
    except Exception as error:
        raise AdapterError(f"cannot import {name!r}: {message_of(error)}; expected {HOW_TO_ADD}") from error


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise AdapterError(f"no file {str(path)!r}; expected {HOW_TO_ADD}")
    try:
        return module_from_file(path)
    except (Exception, SystemExit) as error:
        raise AdapterError(f"{path} cannot be imported: {message_of(error)}") from error


def _instance(factory: Any, name: str, options: Mapping[str, str]) -> Adapter:
    _require_options(factory, name, options)
    try:
        adapter = factory(**options)
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r}: {error}") from error
    except Exception as error:
        raise AdapterError(f"adapter {name!r} cannot be made: {message_of(error)}") from error
    lacking = [each for each in METHODS if not callable(getattr(adapter, each, None))]
    lacking += [] if isinstance(getattr(adapter, "name", None), str) else ["name"]
    if lacking:
        raise AdapterError(f"adapter {name!r} is no adapter: it lacks {', '.join(lacking)}")
    if options:
        adapter.name += f"[{','.join(f'{option}={value}' for option, value in options.items())}]"
    checked: Adapter = adapter
    try:
        checked.version()
    except Exception as error:
        raise AdapterError(f"adapter {name!r} cannot tell its version: {message_of(error)}") from error
    return checked


def _require_options(factory: Any, name: str, options: Mapping[str, str]) -> None:
    """Raise AdapterError where the constructor has no option of such a name."""
    if not options:
        return
    parameters = inspect.signature(factory).parameters.values()
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return
    valid = [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_POSITIONAL]
    for option in options:
        if option not in valid:
            raise AdapterError(f"adapter {name!r} has no option {option!r}; its options: {', '.join(valid) or 'none'}")
