"""What an adapter's calls leave behind: every piece of global state is told when it changes, and put back."""

from __future__ import annotations

import locale
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradproof.draw.drawing import Drawn
from gradproof.model.adapter import Forward
from gradproof.model.case import Case
from gradproof.model.network import Input, Network, Node
from gradproof.model.tensors import value_of
from gradproof.reference import LAYERS, NumpyReference
from gradproof.subject.watch import CHANGED_BY_IMPORTS, PROBES, Remark, watch
from gradproof.trust.faults import MISBEHAVIOUR

OF = Network((Input("x", (2, 3)),), (Node.of("h1", LAYERS["tanh"], "x"),))
CASE: Case = Drawn(OF, seed=11, edge_share=0.0, scale=1.0).case("float64")


class Doing(NumpyReference):
    """Does something in its forward or backward pass."""

    def __init__(self, deed: Callable[[], Any], where: str = "backward") -> None:
        super().__init__()
        self._deed, self._where = deed, where

    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward:
        if self._where == "forward":
            self._deed()
        return super().forward(network, values, dtype)

    def backward(self, forward: Forward, cotangent: np.ndarray) -> dict[str, np.ndarray]:
        if self._where == "backward":
            self._deed()
        return super().backward(forward, cotangent)


def remarks(adapter: NumpyReference) -> list[Remark]:
    watched = watch(adapter)
    watched.backward(watched.forward(OF, {"x": CASE.values["x"].copy()}, "float64"), CASE.cotangent.copy())
    return watched.remarks


def torch() -> Any:
    return pytest.importorskip("torch", reason="needs pip install 'gradproof[torch]'")


def jax() -> Any:
    return pytest.importorskip("jax", reason="needs pip install 'gradproof[jax]'")


def jax_changed(name: str, value: Any) -> Callable[[], Any]:
    return lambda: jax().config.update(name, value)


DEEDS: dict[str, Callable[[], Any]] = {
    "numpy.geterr()": lambda: np.seterr(over="raise"),
    "numpy.random's generator": lambda: np.random.uniform(),
    "random's generator": random.random,
    "os.environ": lambda: os.environ.update(GRADPROOF_LEFT_BEHIND="1"),
    "the working directory": lambda: os.chdir("/"),
    "warnings.filters": lambda: warnings.simplefilter("ignore"),
    "the locale": lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8" if PROBES["the locale"].get() == "C" else "C"),
    "the recursion limit": lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 1),
    "signal handlers": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "subnormal numbers": lambda: torch().set_flush_denormal(True),
    "torch.get_default_dtype()": lambda: torch().set_default_dtype(torch().float64),
    "torch.is_grad_enabled()": lambda: torch().set_grad_enabled(False),
    "torch.are_deterministic_algorithms_enabled()": lambda: torch().use_deterministic_algorithms(True),
    "torch.get_num_threads()": lambda: torch().set_num_threads(torch().get_num_threads() + 1),
    "torch's generator": lambda: torch().rand(1),
    "jax_enable_x64": lambda: jax().config.update("jax_enable_x64", not jax().config.jax_enable_x64),
    "jax_default_matmul_precision": jax_changed("jax_default_matmul_precision", "bfloat16"),
    "jax_disable_jit": jax_changed("jax_disable_jit", True),
}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_probe_is_tried() -> None:
    assert DEEDS.keys() == PROBES.keys()
    assert set(CHANGED_BY_IMPORTS) < PROBES.keys()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", PROBES)
def test_a_changed_state_is_named_and_put_back(name: str, where: str) -> None:
    module = PROBES[name].module
    if module != "sys":
        pytest.importorskip(module, reason=f"needs pip install 'gradproof[{module}]'")
    if name == "subnormal numbers" and not torch().set_flush_denormal(False):
        pytest.skip("this processor does not flush them")
    before = PROBES[name].get()
    (remark,) = remarks(Doing(DEEDS[name], where))
    assert (remark.kind, remark.key) == ("global_state", value_of(name))
    assert "left changed" in remark.message
    assert PROBES[name].get() == before


def test_what_is_put_back_by_the_adapter_is_no_change() -> None:
    def careful() -> None:
        with np.errstate(all="raise"), warnings.catch_warnings():
            warnings.simplefilter("ignore")

    assert remarks(Doing(careful)) == []
    assert remarks(NumpyReference()) == []


def test_the_message_says_what_changed() -> None:
    def messages(deed: Callable[[], Any]) -> list[str]:
        return [remark.message for remark in remarks(Doing(deed))]

    assert messages(DEEDS["os.environ"]) == ["GRADPROOF_LEFT_BEHIND left changed; put it back"]
    assert messages(DEEDS["random's generator"]) == ["left changed; put it back"]
    limit = sys.getrecursionlimit()
    assert messages(DEEDS["the recursion limit"]) == [f"left changed: {limit} became {limit + 1}; put it back"]


def test_the_state_is_put_back_after_an_exception() -> None:
    def fail() -> None:
        np.seterr(over="raise")
        raise RuntimeError("no kernel")

    before = np.geterr()
    for where in ("forward", "backward"):
        with pytest.raises(RuntimeError, match="no kernel"):
            remarks(Doing(fail, where))
        assert np.geterr() == before


def test_the_generators_go_on_as_if_nothing_had_been_drawn() -> None:
    np.random.seed(3)
    expected = np.random.uniform(size=4).tolist()
    np.random.seed(3)
    assert len(remarks(Doing(lambda: np.random.uniform(size=700)))) == 1
    assert np.random.uniform(size=4).tolist() == expected


def test_what_a_late_import_changes_is_no_change_of_the_adapters(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "imported_late.py").write_text("import os, warnings\nwarnings.simplefilter('ignore', ImportWarning)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with warnings.catch_warnings():
        assert remarks(Doing(lambda: __import__("imported_late"))) == []
    del sys.modules["imported_late"]


def test_results_of_the_reference_own_their_memory() -> None:
    assert remarks(NumpyReference()) == []
    hands_on = Network((Input("x", (2, 3)),), (Node.of("h1", LAYERS["identity"], "x"),))
    for adapter, expected in ((NumpyReference(), []), (MISBEHAVIOUR["view"].make(), [value_of("h1")])):
        watched = watch(adapter)
        watched.backward(watched.forward(hands_on, {"x": CASE.values["x"]}, "float64"), CASE.cotangent)
        assert [remark.key for remark in watched.remarks] == expected


def test_a_view_of_other_elements_is_none_of_those_given() -> None:
    """Bounds that overlap are not yet memory that is shared."""
    both = np.zeros((2, 6))

    class Interleaved(NumpyReference):
        def backward(self, forward: Forward, cotangent: np.ndarray) -> dict[str, np.ndarray]:
            both[:, 1::2] = super().backward(forward, cotangent)["x"]
            return {"x": both[:, 1::2], "h1": cotangent.copy()}

    watched = watch(Interleaved())
    given = both[:, ::2]
    given[...] = CASE.values["x"]
    watched.backward(watched.forward(OF, {"x": given}, "float64"), CASE.cotangent)
    assert watched.remarks == []
