"""Where an exception comes from: the adapter's own lines, not the harness's nor a library's."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gradproof.model import place as module
from gradproof.model.adapter import TOLD, message_with_place
from gradproof.model.network import Input, Network, Node
from gradproof.model.place import SHOWN, place
from gradproof.reference import LAYERS, NumpyReference

NETWORK = Network((Input("x", (2,)),), (Node.of("out", LAYERS["tanh"], "x"),))


def raised(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.value


def placed(call: Callable[[], Any]) -> str:
    """Where the call raised, without the lines of this file that led to it."""
    return re.sub(r":\d+ in", ":N in", place(raised(call)))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], ModuleType]]:
    """Writes a file and imports it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def write(path: str, code: str) -> ModuleType:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
        name = path.removesuffix(".py").replace("/", ".")
        names.append(name)
        __import__(name)
        return sys.modules[name]

    yield write
    for name in names:
        for each in (name, name.partition(".")[0]):
            sys.modules.pop(each, None)


def alone(call: Callable[[], Any]) -> str:
    """The last line alone."""
    return placed(call).rpartition("; ")[2]


def test_the_line_that_raised_and_the_one_before(written: Any) -> None:
    mine = written("mine_a.py", "def outer(x):\n    return inner(x)\n\ndef inner(x):\n    return x / 0\n")
    assert placed(lambda: mine.outer(1)) == "mine_a.py:N in outer: return inner(x); mine_a.py:N in inner: return x / 0"


def test_a_line_that_raises_by_itself_is_not_repeated(written: Any) -> None:
    mine = written("mine_b.py", "def outer():\n    raise ValueError('no')\n\ndef bare():\n    raise KeyError\n")
    assert alone(mine.outer) == "mine_b.py:N in outer"
    assert alone(mine.bare) == "mine_b.py:N in bare"


def test_a_file_is_named_as_its_package_has_it(written: Any) -> None:
    written("somebody/__init__.py", "")
    mine = written("somebody/deep.py", "def f():\n    return 1 / 0\n")
    assert alone(mine.f) == "somebody/deep.py:N in f: return 1 / 0"


def test_a_file_is_named_as_it_lies_in_the_working_directory(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "below"))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "mine_c.py").write_text("def f():\n    return 1 / 0\n")
    import mine_c  # type: ignore[import-not-found]

    monkeypatch.chdir(tmp_path)
    assert alone(mine_c.f) == "below/mine_c.py:N in f: return 1 / 0"
    del sys.modules["mine_c"]


def test_the_lines_of_libraries_are_left_out(written: Any) -> None:
    mine = written("mine_d.py", "import json\n\ndef f():\n    return json.loads('{')\n")
    assert alone(mine.f) == "mine_d.py:N in f: return json.loads('{')"


def test_the_lines_of_the_harness_are_left_out() -> None:
    def broken(dout: Any, cache: Any) -> Any:
        return np.ones(2) @ np.ones(3)

    adapter = NumpyReference(rows={"tanh": (LAYERS["tanh"].forward, broken)})
    forward = adapter.forward(NETWORK, {"x": np.ones(2)}, "float64")
    where = place(raised(lambda: adapter.backward(forward, np.ones(2))))
    assert "walk.py" not in where
    assert where.endswith("in broken: return np.ones(2) @ np.ones(3)")


def without_this_file(error: Exception) -> Exception:
    """As if the harness had called, and not this test."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return error.with_traceback(trace)


def test_an_adapter_that_is_a_library_is_shown(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that was called first, not one that it has called in turn."""
    monkeypatch.setattr(module, "LIBRARIES", (tmp_path, *module.LIBRARIES))
    mine = written("mine_e.py", "import json\n\ndef f():\n    return json.loads('{')\n")
    found = place(without_this_file(raised(mine.f)))
    assert re.fullmatch(r"\S*mine_e.py:4 in f: return json.loads\('{'\)", found)


def test_the_lines_of_gradproofs_own_adapters_are_shown() -> None:
    pytest.importorskip("torch", reason="needs pip install 'gradproof[torch]'")
    from gradproof.adapters.torch import TorchAdapter

    values: Any = {"x": "no array"}
    error = raised(lambda: TorchAdapter().forward(NETWORK, values, "float64"))
    assert re.search(r"adapters/(torch|base)\.py:\d+ in ", place(without_this_file(error)))


def test_nothing_is_said_of_an_error_that_was_never_raised() -> None:
    assert place(ValueError("v")) == ""
    assert message_with_place(ValueError("v")) == "ValueError: v"


def test_a_place_is_one_line_of_bounded_length(written: Any) -> None:
    long = " + ".join(["x"] * 200)
    mine = written("mine_f.py", f"def f(x):\n    return g(x) + {long}\n\ndef g(x):\n    return None + {long}\n")
    message = message_with_place(raised(lambda: mine.f(1)))
    assert "\n" not in message
    assert message.count(" ...") == 2
    assert len(message) <= TOLD + 2 * (SHOWN + 40)
