"""What passes between an adapter's process and this one, and adapters that cannot be loaded into one."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gradproof.model.adapter import AdapterError
from gradproof.reference import LAYERS, NumpyReference
from gradproof.run.check import check
from gradproof.subject.isolation import Isolated, half_of_memory, loader
from gradproof.subject.registry import load_adapter
from gradproof.verdict.divergence import divergences_of
from helpers.examining import examined
from helpers.isolation import WITH, mine

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="adapters have processes of their own on Unix alone"),
    pytest.mark.usefixtures("own_processes"),
]


# What the two sides pass.


def test_the_numbers_are_the_same_bit_for_bit() -> None:
    reference = NumpyReference()
    expected = reference.forward(WITH.network, WITH.values, "float64")
    with closing(Isolated(mine("return gradients"))) as adapter:
        forward = adapter.forward(WITH.network, WITH.values, "float64")
        gradients = adapter.backward(forward, WITH.cotangent)
        again = adapter.backward(forward, WITH.cotangent)
        assert (adapter.name, adapter.version()) == ("mine", reference.version())
    for name, array in expected.outputs.items():
        np.testing.assert_array_equal(forward.outputs[name], array)
    for name, array in reference.backward(expected, WITH.cotangent).items():
        np.testing.assert_array_equal(gradients[name], array)
        np.testing.assert_array_equal(again[name], array)


def test_tapes_of_forward_passes_that_are_dropped_are_dropped_there() -> None:
    held = """
        import gc
        forwards = [each for each in gc.get_objects() if type(each).__name__ == "Forward"]
        pathlib.Path("held").write_text(str(len(forwards)))
        return gradients
    """
    with closing(Isolated(mine(held))) as adapter:
        for _ in range(5):
            examined(adapter, WITH)
        assert int(Path("held").read_text()) <= 2


def test_what_is_supported_is_asked_once() -> None:
    loading = """
        class Partial(NumpyReference):
            name = "partial"

            def supports(self, layer, options, dtype):
                with open("asked", "a") as file:
                    print(layer.name, dtype, file=file)
                return layer.name == "tanh"
    """
    mine("return gradients", loading)
    with closing(Isolated("mine.py:Partial")) as adapter:
        answers = [adapter.supports(LAYERS[name], {}, "float64") for name in ("tanh", "sigmoid", "tanh", "sigmoid")]
    assert answers == [True, False, True, False]
    assert Path("asked").read_text() == "tanh float64\nsigmoid float64\n"


def test_the_known_divergences_stand_beside_the_class() -> None:
    pytest.importorskip("torch", reason="needs pip install 'gradproof[torch]'")
    with closing(Isolated("torch")) as adapter:
        assert divergences_of(adapter) == divergences_of(load_adapter("torch")) != ()


def test_isolation_is_for_names_alone() -> None:
    mine("return gradients")
    adapter = loader(True)("mine.py:Right")
    assert isinstance(adapter, Isolated)
    adapter.close()
    assert type(loader(False)("mine.py:Right")).__name__ == "Right"


def test_half_of_the_memory() -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < half_of_memory() <= physical / 2


# Loading.


@pytest.mark.parametrize(
    ("loading", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process was ended by SIGSEGV"),
        ("os._exit(0)", "the process ended with exit code 0"),
        ("kept = [np.ones(2**20) for _ in iter(int, 1)]", "took more than 0.5 GiB of memory"),
        ("raise KeyError('k')", "mine.py cannot be imported: KeyError: 'k'"),
        ("del Mine", "mine.py has no class 'Mine'; its classes: Right"),
    ],
)
def test_an_adapter_that_cannot_be_loaded(loading: str, message: str) -> None:
    request = mine("return gradients", loading)
    with pytest.raises(AdapterError) as raised:
        Isolated(request, memory=0.5)
    own = ("mine.py cannot", "mine.py has no")
    expected = message if message.startswith(own) else f"adapter 'mine.py:Mine' cannot be loaded: {message}"
    assert str(raised.value) == expected


def test_an_adapter_that_hangs_while_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradproof.subject.isolation.SECONDS_TO_LOAD", 1.5)
    with pytest.raises(AdapterError, match=r"cannot be loaded: no answer after 1.5 s"):
        Isolated(mine("return gradients", "time.sleep(60)"))


def test_an_adapter_that_ends_when_asked_what_it_supports() -> None:
    loading = """
        class Unsure(NumpyReference):
            name = "unsure"

            def supports(self, layer, options, dtype):
                os._exit(3)
    """
    mine("return gradients", loading)
    with pytest.raises(AdapterError, match=r"cannot tell whether it supports \w+: the process ended with exit code 3"):
        check(["mine.py:Unsure"], networks=1, seed=1, failures=None)
