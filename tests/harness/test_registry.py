"""Adapters by name, module and file; and what is said, in one line, where there is none to be had."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import AdapterError
from gradproof.reference import NumpyReference
from gradproof.subject.registry import GROUP, adapter_names, describe_adapter, load_adapter, load_adapters
from gradproof.verdict.divergence import divergences_of
from helpers.frameworks import load

EXPECTED = "expected package.module:Class or path/to/file.py:Class"

MINE = """
from gradproof.reference import NumpyReference


class Mine(NumpyReference):
    name = "mine"

    def version(self):
        return "1.0"


class Other(NumpyReference):
    name = "other"
"""

ENTRY = """
[[divergence]]
layer = "tanh"
dtypes = ["float64"]
argument = "x"
between = [0.0, 1.0]
kinds = ["gradient"]
versions = ["1.0"]
witness = {{ x = 0.5 }}
reason = "{reason}"
link = "https://example.org"
"""


@pytest.fixture(autouse=True)
def _forget_the_modules_of_a_test(tmp_path: Path) -> Iterator[None]:
    yield
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file below an empty working directory, which Python also imports from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write_file(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()
        return path

    return write_file


def refusal(name: str) -> str:
    """What load_adapter says where it refuses, in one line."""
    with pytest.raises(AdapterError) as caught:
        load_adapter(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def registered(monkeypatch: pytest.MonkeyPatch, **entries: str) -> None:
    """Let these entry points, name="module:attribute", be all that are installed."""
    found = [EntryPoint(name, value, GROUP) for name, value in entries.items()]
    monkeypatch.setattr(
        "gradproof.subject.registry.entry_points", lambda group: [each for each in found if group == GROUP]
    )


# Found.


def test_the_names_that_are_built_in() -> None:
    assert {"jax", "reference", "torch"} <= set(adapter_names())
    assert adapter_names() == sorted(adapter_names())


def test_by_name() -> None:
    adapter = load_adapter("reference")
    assert isinstance(adapter, NumpyReference)
    assert load_adapter("reference") is not adapter


def test_by_file(write: Write) -> None:
    write("deep/my_adapter.py", MINE)
    adapter = load_adapter("deep/my_adapter.py:Mine")
    assert (adapter.name, adapter.version()) == ("mine", "1.0")


def test_by_absolute_file(write: Write) -> None:
    path = write("my_adapter.py", MINE).absolute()
    assert load_adapter(f"{path}:Other").name == "other"


def test_by_module(write: Write) -> None:
    write("my_package/__init__.py", "")
    write("my_package/adapters.py", MINE)
    assert load_adapter("my_package.adapters:Mine").name == "mine"


def test_by_function(write: Write) -> None:
    write("my_adapter.py", MINE + "\n\ndef make():\n    return Mine()\n")
    assert load_adapter("my_adapter.py:make").name == "mine"


def test_by_entry_point(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("my_module.py", MINE)
    registered(monkeypatch, theirs="my_module:Mine")
    assert adapter_names() == ["theirs"]
    assert load_adapter("theirs").name == "mine"


def test_a_file_is_read_again_when_it_has_changed(write: Write) -> None:
    write("my_adapter.py", MINE)
    assert load_adapter("my_adapter.py:Mine").version() == "1.0"
    write("my_adapter.py", MINE.replace('"1.0"', '"2.00"'))
    assert load_adapter("my_adapter.py:Mine").version() == "2.00"


def test_a_file_may_hold_dataclasses(write: Write) -> None:
    header = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    write("my_adapter.py", header + MINE + "\n\n@dataclass\nclass Tape:\n    size: int\n")
    assert load_adapter("my_adapter.py:Mine").name == "mine"


# Files with the names of modules.


def test_a_file_does_not_hide_a_module_of_the_same_name(write: Write) -> None:
    sys.modules.pop("colorsys", None)
    write("mine/colorsys.py", MINE)
    assert load_adapter("mine/colorsys.py:Mine").name == "mine"
    assert hasattr(importlib.import_module("colorsys"), "rgb_to_hsv")


def test_a_file_may_import_the_module_whose_name_it_has(write: Write) -> None:
    sys.modules.pop("colorsys", None)
    write("mine/colorsys.py", "import colorsys\n\nBLACK = colorsys.rgb_to_hsv(0, 0, 0)\n" + MINE)
    assert load_adapter("mine/colorsys.py:Mine").name == "mine"


def test_files_of_the_same_name_each_keep_their_own_known_divergences(write: Write) -> None:
    for directory in ("first", "second"):
        write(f"{directory}/my_adapter.py", MINE)
        write(f"{directory}/my_adapter.toml", ENTRY.format(reason=directory))
    adapters = [load_adapter(f"{directory}/my_adapter.py:Mine") for directory in ("first", "second")]
    assert [[entry.reason for entry in divergences_of(adapter)] for adapter in adapters] == [["first"], ["second"]]


def test_a_file_that_fails_leaves_no_module_behind(write: Write) -> None:
    write("mine/half_an_adapter.py", "raise ValueError\n")
    before = set(sys.modules)
    refusal("mine/half_an_adapter.py:Mine")
    assert set(sys.modules) == before


# Several at once.


def test_several_under_the_names_asked_for(write: Write) -> None:
    write("my_adapter.py", MINE)
    given = NumpyReference()
    adapters = load_adapters(["my_adapter.py:Mine", given, "my_adapter.py:Other", "my_adapter.py:Mine"])
    assert list(adapters) == ["my_adapter.py:Mine", "reference", "my_adapter.py:Other"]
    assert [adapter.name for adapter in adapters.values()] == ["mine", "reference", "other"]
    assert adapters["reference"] is given


def test_none_at_all() -> None:
    assert load_adapters([]) == {}


def test_two_of_the_same_name(write: Write) -> None:
    write("my_adapter.py", MINE)
    with pytest.raises(AdapterError) as caught:
        load_adapters(["my_adapter.py:Mine", "reference", "./my_adapter.py:Mine"])
    assert str(caught.value) == "two of the adapters are named 'mine'; give each a name of its own"


def test_two_objects_of_the_same_name() -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapters([NumpyReference(), NumpyReference()])
    assert str(caught.value) == "two of the adapters are named 'reference'; give each a name of its own"


# Not found.


def test_an_unknown_name() -> None:
    valid = ", ".join(adapter_names())
    assert refusal("tensorflow") == (
        f"unknown adapter 'tensorflow'; valid adapters: {valid}, or package.module:Class or path/to/file.py:Class"
    )


def test_an_empty_name() -> None:
    assert refusal("").startswith("unknown adapter ''; valid adapters: ")


def test_a_missing_file(write: Write) -> None:
    assert refusal("my_adapter.py:Mine") == f"no file 'my_adapter.py'; {EXPECTED}"


def test_a_directory_that_ends_like_a_file(write: Write) -> None:
    Path("my_adapter.py").mkdir()
    assert refusal("my_adapter.py:Mine") == f"no file 'my_adapter.py'; {EXPECTED}"


def test_a_missing_module() -> None:
    assert refusal("no_such_module:Mine") == (
        f"cannot import 'no_such_module': No module named 'no_such_module'; {EXPECTED}"
    )


@pytest.mark.parametrize("name", [":Mine", ".relative:Mine", "..:Mine"])
def test_a_name_that_no_module_can_have(name: str) -> None:
    message = refusal(name)
    assert message.startswith(f"cannot import {name.rpartition(':')[0]!r}: ")
    assert message.endswith(EXPECTED)


def test_a_missing_class(write: Write) -> None:
    write("my_adapter.py", MINE)
    assert refusal("my_adapter.py:Yours") == "my_adapter.py has no class 'Yours'; its classes: Mine, Other"
    assert refusal("my_adapter.py:") == "my_adapter.py has no class ''; its classes: Mine, Other"


def test_a_missing_class_in_a_module(write: Write) -> None:
    write("my_module.py", "from gradproof.reference import NumpyReference\n")
    assert refusal("my_module:Yours") == "my_module has no class 'Yours'; its classes: none"


# Found, and broken.

BROKEN = [
    ("import no_such_framework\n", "ModuleNotFoundError: No module named 'no_such_framework'"),
    ("raise ValueError('no such device')\n", "ValueError: no such device"),
    ("raise ValueError('two\\n  lines')\n", "ValueError: two lines"),
    ("class Mine\n", "SyntaxError: expected ':' (my_adapter.py, line 1)"),
]


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_a_file_that_does_not_import(write: Write, text: str, reason: str) -> None:
    write("my_adapter.py", text)
    assert refusal("my_adapter.py:Mine") == f"my_adapter.py cannot be imported: {reason}"


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_a_module_that_does_not_import(write: Write, text: str, reason: str) -> None:
    write("my_module.py", text)
    message = refusal("my_module:Mine")
    assert message.startswith("cannot import 'my_module': ")
    assert reason.partition(": ")[2].partition(" (")[0] in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        ("raise RuntimeError('no GPU\\n  at all')", "RuntimeError: no GPU at all"),
        ("assert False", "AssertionError"),
    ],
)
def test_a_constructor_that_raises(write: Write, line: str, reason: str) -> None:
    write("my_adapter.py", f"class Mine:\n    def __init__(self):\n        {line}\n")
    message = refusal("my_adapter.py:Mine")
    assert message.startswith(f"adapter 'my_adapter.py:Mine' cannot be made: {reason}")


def test_a_constructor_that_needs_arguments(write: Write) -> None:
    write("my_adapter.py", "class Mine:\n    def __init__(self, device):\n        pass\n")
    assert refusal("my_adapter.py:Mine") == (
        "adapter 'my_adapter.py:Mine' cannot be made: TypeError: Mine.__init__() missing 1 required positional "
        "argument: 'device'"
    )


def test_a_name_that_is_no_class(write: Write) -> None:
    write("my_adapter.py", "Mine = 3\n")
    assert refusal("my_adapter.py:Mine") == (
        "adapter 'my_adapter.py:Mine' cannot be made: TypeError: 'int' object is not callable"
    )


COMPLETE = ("name = 'mine'", *(f"def {each}(self): pass" for each in ("version", "supports", "forward", "backward")))


@pytest.mark.parametrize(
    ("lines", "lacking"),
    [
        (COMPLETE[:1], "version, supports, forward, backward"),
        (COMPLETE[:3], "forward, backward"),
        (COMPLETE[1:], "name"),
        ((*COMPLETE[1:], "name = 3"), "name"),
        ((*COMPLETE, "version = '1.0'"), "version"),
    ],
)
def test_a_class_that_lacks_something(write: Write, lines: tuple[str, ...], lacking: str) -> None:
    write("my_adapter.py", "class Mine:\n" + "".join(f"    {line}\n" for line in lines))
    assert refusal("my_adapter.py:Mine") == f"adapter 'my_adapter.py:Mine' is no adapter: it lacks {lacking}"


def test_a_class_that_lacks_its_name_and_a_method_is_told_both(write: Write) -> None:
    write("my_adapter.py", "class Mine:\n" + "".join(f"    {line}\n" for line in COMPLETE[1:4]))
    message = refusal("my_adapter.py:Mine")
    assert message.startswith("adapter 'my_adapter.py:Mine' is no adapter: it lacks ")
    assert set(message.rpartition("lacks ")[2].split(", ")) == {"name", "backward"}


# Registered, and broken.


@pytest.mark.parametrize(
    ("error", "missing"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "torch"),
        (ModuleNotFoundError("No module named 'optax'", name="optax"), "optax"),
        (ImportError("libtorch.so: cannot open shared object file"), "libtorch.so: cannot open shared object file"),
    ],
)
def test_a_framework_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, error: ImportError, missing: str) -> None:
    def load(entry: EntryPoint) -> None:
        raise error

    monkeypatch.setattr(EntryPoint, "load", load)
    assert refusal("torch") == (
        f"adapter 'torch' needs {missing}, which is not installed: pip install 'gradproof[torch]'"
    )


def test_another_projects_adapter_is_not_to_be_had_from_gradproof(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("their_module.py", "import no_such_framework\n")
    registered(monkeypatch, theirs="their_module:Mine")
    message = refusal("theirs")
    assert "no_such_framework" in message
    assert "gradproof[theirs]" not in message


@pytest.mark.parametrize(
    ("text", "reason"), [("Other = 1\n", "has no attribute 'Mine'"), ("raise ValueError('no device')\n", "no device")]
)
def test_an_entry_point_that_does_not_load(
    write: Write, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    write("their_module.py", text)
    registered(monkeypatch, theirs="their_module:Mine")
    message = refusal("theirs")
    assert "'theirs'" in message
    assert reason in message


# Described.


def test_description_of_what_is_built_in() -> None:
    assert describe_adapter("reference") == f"reference {np.__version__}"


def test_description_of_a_framework_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("gradproof.subject.registry.version", not_installed)
    assert describe_adapter("torch") == "torch not installed"


def test_description_of_a_file(write: Write) -> None:
    write("my_adapter.py", MINE)
    assert describe_adapter("my_adapter.py:Mine") == "mine 1.0"


def test_description_of_another_projects_adapter(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("their_module.py", MINE)
    registered(monkeypatch, theirs="their_module:Mine")
    assert describe_adapter("theirs") == "mine 1.0"


DESCRIBE = """
import sys
from gradproof.subject.registry import describe_adapter
print(*map(describe_adapter, ("torch", "jax")), sep="\\n")
print(sorted({"torch", "jax", "optax", "hypothesis", "rich"} & sys.modules.keys()))
"""


def test_description_imports_no_framework() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    done = subprocess.run([sys.executable, "-c", DESCRIBE], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"torch {version('torch')}"
    assert lines[1].startswith("jax ")
    assert lines[2] == "[]"


# Options in brackets.

CONFIGURABLE = """
class Mine:
    name = "mine"

    def __init__(self, device="cpu", level="1"):
        if device == "none":
            raise ValueError("no such device")
        self.given = (device, level)

    def version(self):
        return "1.0"

    def supports(self, layer, options, dtype):
        return True

    def forward(self, network, values, dtype):
        raise NotImplementedError

    def backward(self, forward, cotangent):
        raise NotImplementedError
"""


@pytest.mark.parametrize(
    ("brackets", "given", "name"),
    [
        ("", ("cpu", "1"), "mine"),
        ("[]", ("cpu", "1"), "mine"),
        ("[device=gpu]", ("gpu", "1"), "mine[device=gpu]"),
        ("[level=3, device=gpu:1]", ("gpu:1", "3"), "mine[level=3,device=gpu:1]"),
    ],
)
def test_options_go_to_the_constructor_and_into_the_name(
    tmp_path: Path, brackets: str, given: tuple[str, str], name: str
) -> None:
    (tmp_path / "mine.py").write_text(CONFIGURABLE)
    adapter: Any = load_adapter(f"{tmp_path}/mine.py:Mine{brackets}")
    assert (adapter.given, adapter.name) == (given, name)


def test_one_adapter_with_other_options_is_another_adapter() -> None:
    load("jax")
    assert list(load_adapters(["jax", "jax[jit=network]"])) == ["jax", "jax[jit=network]"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("reference[kinks=1]", "adapter 'reference' has no option 'kinks'; its options: conventions, rows"),
        (
            "reference[conventions]",
            "adapter 'reference[conventions]' cannot be read; expected NAME or NAME[option=value,",
        ),
        ("reference[", "adapter 'reference[' cannot be read; expected NAME or NAME[option=value,...]"),
        ("jax[jit=all]", "adapter 'jax': unknown jit 'all'; valid: layer, network"),
        ("torch[device=nowhere]", "adapter 'torch': device 'nowhere' cannot be used: "),
    ],
)
def test_options_that_cannot_be_had_are_refused_in_one_line(request_: str, message: str) -> None:
    load(request_.partition("[")[0])
    with pytest.raises(AdapterError) as refusal:
        load_adapter(request_)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)
