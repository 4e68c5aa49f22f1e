"""Adapters in processes of their own: each ends at most its own, and gets the verdict that it would get here."""

from __future__ import annotations

import os
import re
import signal
import textwrap
from contextlib import closing
from pathlib import Path

import pytest

from gradproof.model.adapter import EndedError, RelayedError
from gradproof.model.tensors import value_of
from gradproof.run.results import disagreements
from gradproof.subject.isolation import Isolated
from gradproof.subject.registry import load_adapter
from helpers.examining import examined, guilty_layers
from helpers.isolation import WITH, WITHOUT, gone, last_child, mine, told
from helpers.networks import chain, ordinary

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="adapters have processes of their own on Unix alone"),
    pytest.mark.usefixtures("own_processes"),
]


# What ends the process.

ENDINGS = {
    "segmentation fault": ("ctypes.string_at(0)", "crash", "the process was ended by SIGSEGV"),
    "kill -9": ("os.kill(os.getpid(), signal.SIGKILL)", "crash", "the process was ended by SIGKILL"),
    "exit": ("os._exit(3)", "crash", "the process ended with exit code 3"),
    "exit as if all were well": ("os._exit(0)", "crash", "the process ended with exit code 0"),
    "connection closed": ("os.closerange(3, 100); time.sleep(60)", "crash", "the process closed its connection"),
    "hang in C": ("ctypes.PyDLL(None).sleep(60)", "timeout", "no result after 1 s"),
    "hang with signals blocked": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); time.sleep(60)",
        "timeout",
        "no result after 1 s",
    ),
    "memory": ("kept = [np.ones(2**20) for _ in iter(int, 1)]", "memory", "took more than 0.5 GiB of memory"),
}


@pytest.mark.parametrize(("body", "kind", "message"), ENDINGS.values(), ids=ENDINGS)
def test_what_ends_the_process_is_a_verdict(
    body: str, kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradproof.subject.isolation.SECONDS_TO_LEAVE", 1.0)
    with closing(Isolated(mine(body), memory=0.5)) as adapter:
        timeout = 1.0 if kind == "timeout" else 60.0
        before = examined(adapter, WITHOUT)
        found = examined(adapter, WITH, timeout=timeout)
        after = examined(adapter, WITHOUT)
    assert told(found) == [(value_of("h2"), kind, message)]
    assert guilty_layers(found) == ["tanh"]
    assert before.agrees
    assert after.agrees


def test_memory_that_grows_from_call_to_call_is_noticed() -> None:
    request = mine("self.kept = [*getattr(self, 'kept', []), np.ones(2**24)]; return gradients")
    with closing(Isolated(request, memory=0.75)) as adapter:
        found = [examined(adapter, WITH) for _ in range(8)]
    assert found[0].agrees
    assert "memory" in {check.kind for each in found for check in each.wrong}


def test_killed_from_outside_between_two_networks() -> None:
    with closing(Isolated(mine("return gradients"))) as adapter:
        assert examined(adapter, WITH).agrees
        os.kill(last_child(), signal.SIGKILL)
        found = examined(adapter, WITH)
        assert told(found) == [(value_of("h2"), "crash", "the process was ended by SIGKILL")]
        assert guilty_layers(found) == []
        assert examined(adapter, WITH).agrees


ALONE = "but not when this network ran alone in a fresh process: an earlier network may have done the damage"


def delayed(ends: str, dies: str, damages: str) -> Isolated:
    """An adapter whose backward pass ends its process so, and leaves something behind, under these conditions."""
    loading = f"""
        class Delayed(NumpyReference):
            name = "delayed"
            damaged = False

            def backward(self, forward, cotangent):
                layers = {{node.layer.name for node in forward.tape[0].nodes}}
                if {dies}:
                    {ends}
                self.damaged = {damages}
                return super().backward(forward, cotangent)
    """
    mine("return gradients", loading)
    return Isolated("mine.py:Delayed")


def test_what_an_earlier_network_has_spoilt_is_blamed_on_no_layer() -> None:
    """A tanh leaves something behind, of which the next network dies that has none."""
    killed = "os.kill(os.getpid(), signal.SIGSEGV)"
    with closing(delayed(killed, 'self.damaged and "tanh" not in layers', '"tanh" in layers')) as adapter:
        assert examined(adapter, ordinary(chain("exp"))).agrees
        assert examined(adapter, WITH).agrees
        found = examined(adapter, WITHOUT)
        before = "2 networks ran in that process before, the last: exp in float64, sigmoid -> tanh in float64"
        message = f"the process was ended by SIGSEGV, {ALONE}; {before}"
        assert told(found) == [(value_of("h2"), "crash", message)]
        assert guilty_layers(found) == []
        assert examined(adapter, WITHOUT).agrees
        assert [each.kind for each in disagreements(found, None)] == ["crash"]


def test_a_layer_is_named_only_where_it_ends_a_fresh_process_too() -> None:
    """Sigmoid leaves something behind of which any other layer dies, in its own network as in a later one."""
    dies = 'layers != {"sigmoid"} and ("sigmoid" in layers or self.damaged)'
    with closing(delayed("os._exit(3)", dies, 'self.damaged or "sigmoid" in layers')) as adapter:
        found = examined(adapter, WITHOUT)
        assert told(found) == [(value_of("h2"), "crash", "the process ended with exit code 3")]
        assert guilty_layers(found) == []


def test_few_of_the_networks_that_had_run_are_named() -> None:
    with closing(Isolated(mine("os._exit(3)"))) as adapter:
        for layer in ("exp", "sigmoid", "softplus", "square", "exp"):
            adapter.backward(
                adapter.forward((of := ordinary(chain(layer))).network, of.values, "float64"), of.cotangent
            )
        forward = adapter.forward(WITH.network, WITH.values, "float64")
        with pytest.raises(EndedError) as raised:
            adapter.backward(forward, WITH.cotangent)
        last = "softplus in float64, square in float64, exp in float64"
        assert raised.value.before == f"5 networks ran in that process before, the last: {last}"
        forward = adapter.forward(WITH.network, WITH.values, "float64")
        with pytest.raises(EndedError) as raised:
            adapter.backward(forward, WITH.cotangent)
        assert raised.value.before == ""


def test_a_crash_says_which_line_of_the_adapter_raised() -> None:
    body = """
        def inner(array):
            return array @ array
        return {**gradients, x: inner(cotangent)}
    """
    lines = "mine.py:N in spoil: return {**gradients, x: inner(cotangent)}; mine.py:N in inner: return array @ array"
    request = mine(body)
    with closing(Isolated(request)) as there:
        for adapter in (there, load_adapter(request)):
            ((key, kind, got),) = told(examined(adapter, WITH))
            assert (key, kind) == (value_of("h2"), "crash")
            assert got.startswith("ValueError: matmul: ")
            assert re.sub(r":\d+ in", ":N in", got).endswith(f" ({lines})")


def test_a_backward_pass_whose_forward_pass_is_lost() -> None:
    with closing(Isolated(mine("return gradients"))) as adapter:
        forward = adapter.forward(WITH.network, WITH.values, "float64")
        os.kill(last_child(), signal.SIGKILL)
        with pytest.raises(RelayedError, match="SIGKILL"):
            adapter.backward(forward, WITH.cotangent)
        with pytest.raises(RelayedError, match="the process that made the forward pass has ended"):
            adapter.backward(forward, WITH.cotangent)


def test_loading_again_is_not_on_the_clock_of_a_network() -> None:
    request = mine("os._exit(1)", loading="time.sleep(1.0)")
    with closing(Isolated(request)) as adapter:
        assert [check.kind for check in examined(adapter, WITH, timeout=0.5).wrong] == ["crash"]
        assert examined(adapter, WITHOUT, timeout=0.5).agrees


def test_what_an_adapter_has_started_ends_with_it() -> None:
    start = """
        import subprocess
        other = subprocess.Popen(["sleep", "60"])
        pathlib.Path("other").write_text(str(other.pid))
        os._exit(1)
    """
    with closing(Isolated(mine(start))) as adapter:
        assert not examined(adapter, WITH).agrees
        assert gone(int(Path("other").read_text()))


# What it would also be in this process.

BOTH_WAYS = {
    "exception": "raise RuntimeError('no\\nkernel')",
    "no message": "raise ZeroDivisionError",
    "exception that cannot be pickled": "class Odd(Exception): pass\nraise Odd(os.kill)",
    "exit": "raise SystemExit(3)",
    "no memory": "raise MemoryError('cannot allocate 1 TiB')",
    "nothing": "return None",
    "a list": "return [1, 2]",
    "None": "return {**gradients, x: None}",
    "a list for an array": "return {**gradients, x: [1.0]}",
    "what cannot be pickled": "return {**gradients, x: lambda: None}",
    "an array of objects": "return {**gradients, x: np.full((2, 3), lambda: None, object)}",
    "a number": "return {**gradients, x: np.float64(1.0)}",
    "dtype": "return {**gradients, x: gradients[x].astype(np.float16)}",
    "shape": "return {**gradients, x: gradients[x].ravel()}",
    "a name missing": "return {name: g for name, g in gradients.items() if name != x}",
    "a name too many": "return {**gradients, 'weight': gradients[x]}",
    "a name too many of no array": "return {**gradients, 'weight': 'w'}",
    "a name that is no string": "return {**gradients, 7: gradients[x]}",
    "NaN": "return {**gradients, x: gradients[x] * np.nan}",
    "infinity": "return {**gradients, x: gradients[x] * 0.0 + np.inf}",
    "a wrong number": "return {**gradients, x: gradients[x] * 2.0}",
    "input written to": "self.values[x][0] = 7.0; return gradients",
    "cotangent written to": "cotangent[...] = 7.0; return gradients",
    "value written to": "forward.outputs[self.network.output][0, 0] = 7.0; return gradients",
    "input": "return {**gradients, x: self.values[x]}",
    "a part of the input, backwards": "return {**gradients, x: self.values[x][::-1]}",
    "the cotangent": "return {**gradients, self.network.output: cotangent}",
    "global state": "np.seterr(over='raise'); return gradients",
    "a view of a gradient": "return {**gradients, x: np.broadcast_to(gradients[x], (2, 3))}",
    "nothing wrong": "return gradients",
}


FINE = ("nothing wrong", "a view of a gradient")

KINDS = {
    "no memory": {"memory"},
    "the cotangent": {"view"},
    "global state": {"global_state"},
    "input written to": {"mutated_input"},
    "value written to": {"mutated_input"},
}
"""What a process of its own could hide, or call by another name."""


def test_the_verdict_is_the_one_in_this_process() -> None:
    """One adapter does it all in turn, so that it is loaded once."""
    branches = [
        f"if pathlib.Path('now').read_text() == {name!r}:\n{textwrap.indent(body, '    ')}"
        for name, body in BOTH_WAYS.items()
    ]
    request = mine("\n".join(branches))
    here = load_adapter(request)
    with closing(Isolated(request)) as there:
        for name in BOTH_WAYS:
            Path("now").write_text(name)
            expected, found = examined(here, WITH), examined(there, WITH)
            assert (name, told(found), guilty_layers(found)) == (name, told(expected), guilty_layers(expected))
            assert found.agrees == (name in FINE), name
            assert {check.kind for check in found.wrong} == KINDS.get(name, {check.kind for check in found.wrong})
            assert examined(there, WITHOUT).agrees, name


def test_an_input_that_the_output_is_a_view_of() -> None:
    loading = """
        class Viewing(NumpyReference):
            name = "viewing"

            def __init__(self):
                super().__init__(rows={"flatten": (lambda x: (x.reshape(2, 3), x.shape), LAYERS["flatten"].backward)})

            def forward(self, network, values, dtype):
                forward = super().forward(network, values, dtype)
                return type(forward)({**forward.outputs, "h1": forward.live["h1"]}, forward.tape)
    """
    mine("return gradients", loading)
    message = "shares memory with 'x', which it was given; return a copy"
    for adapter in (load_adapter("mine.py:Viewing"), Isolated("mine.py:Viewing")):
        found = examined(adapter, ordinary(chain("flatten", "tanh")))
        assert told(found) == [(value_of("h1"), "view", message)]
        assert guilty_layers(found) == ["flatten"]
        if isinstance(adapter, Isolated):
            adapter.close()
