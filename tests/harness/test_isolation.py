"""Adapters that misbehave in processes of their own: each ends at most its own process, and is told as what it is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradproof.cli import AGREEMENT, DISAGREEMENT, USAGE
from gradproof.draw.drawing import Drawn
from gradproof.model.adapter import AdapterError, EndedError, RelayedError
from gradproof.model.case import Case
from gradproof.model.network import Input, Network, Node
from gradproof.model.spec import save_case
from gradproof.reference import LAYERS, NumpyReference
from gradproof.run.check import check, replay
from gradproof.run.results import Report, disagreements
from gradproof.subject.isolation import SECONDS_TO_LEAVE, Isolated, half_of_memory, loader
from gradproof.subject.registry import load_adapter
from gradproof.verdict.divergence import divergences_of
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject

pytestmark = pytest.mark.skipif(os.name != "posix", reason="adapters have processes of their own on Unix alone")

MODULE = '''
import ctypes, os, pathlib, signal, time
import numpy as np
from gradproof.reference import LAYERS, NumpyReference

pathlib.Path("pid").write_text(str(os.getpid()))


class Right(NumpyReference):
    name = "right"


class Mine(NumpyReference):
    """Does something in the backward pass wherever a tanh takes part."""

    name = "mine"

    def forward(self, network, values, dtype):
        self.network, self.values = network, values
        return super().forward(network, values, dtype)

    def backward(self, forward, cotangent):
        gradients = super().backward(forward, cotangent)
        if all(node.layer.name != "tanh" for node in self.network.nodes):
            return gradients
        x = self.network.inputs[0].name
        return self.spoil(forward, cotangent, gradients, x)

    def spoil(self, forward, cotangent, gradients, x):
'''


def mine(body: str, loading: str = "") -> str:
    """The request for an adapter that does this wherever a tanh takes part."""
    spoil = textwrap.indent(textwrap.dedent(body).strip(), " " * 8)
    Path("mine.py").write_text(f"{MODULE}{spoil}\n{textwrap.dedent(loading)}")
    return "mine.py:Mine"


def case(*layers: str) -> Case:
    """A chain of these layers."""
    names = ["x", *(f"h{i + 1}" for i in range(len(layers)))]
    nodes = (Node.of(names[i + 1], LAYERS[layer], names[i]) for i, layer in enumerate(layers))
    network = Network((Input("x", (2, 3)),), tuple(nodes))
    return Drawn(network, seed=11, edge_share=0.0, scale=1.0).case("float64")


WITH = case("sigmoid", "tanh")
WITHOUT = case("sigmoid", "softplus")


def examined(adapter: Any, of: Case, timeout: float = 60.0) -> Examination:
    return examine(Subject(adapter, {}, timeout=timeout), of)


def told(examination: Examination) -> list[tuple[str, str | None, str]]:
    """Key, kind and what was got of everything that is wrong."""
    return [(each.key, each.kind, str(each.got)) for each in examination.wrong]


def culprits(examination: Examination) -> list[str]:
    return [culprit.node.layer.name for culprit in examination.culprits]


def gone(process: int) -> bool:
    """Whether the process ends within some seconds."""
    deadline = time.monotonic() + SECONDS_TO_LEAVE
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def last_child() -> int:
    """The process that loaded the adapter last."""
    return int(Path("pid").read_text())


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty directory; after the test, none of the processes is left."""
    monkeypatch.chdir(tmp_path)
    yield
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]
    if Path("pid").exists() and last_child() != os.getpid():
        assert gone(last_child())


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
        found = examined(adapter, WITH, timeout)
        after = examined(adapter, WITHOUT)
    assert told(found) == [("value:h2", kind, message)]
    assert culprits(found) == ["tanh"]
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
        assert told(found) == [("value:h2", "crash", "the process was ended by SIGKILL")]
        assert culprits(found) == []
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
        assert examined(adapter, case("exp")).agrees
        assert examined(adapter, WITH).agrees
        found = examined(adapter, WITHOUT)
        before = "2 networks ran in that process before, the last: exp in float64, sigmoid -> tanh in float64"
        message = f"the process was ended by SIGSEGV, {ALONE}; {before}"
        assert told(found) == [("value:h2", "crash", message)]
        assert culprits(found) == []
        assert examined(adapter, WITHOUT).agrees
        assert [each.kind for each in disagreements(found, None)] == ["crash"]


def test_a_layer_is_named_only_where_it_ends_a_fresh_process_too() -> None:
    """Sigmoid leaves something behind of which any other layer dies, in its own network as in a later one."""
    dies = 'layers != {"sigmoid"} and ("sigmoid" in layers or self.damaged)'
    with closing(delayed("os._exit(3)", dies, 'self.damaged or "sigmoid" in layers')) as adapter:
        found = examined(adapter, WITHOUT)
        assert told(found) == [("value:h2", "crash", "the process ended with exit code 3")]
        assert culprits(found) == []


def test_few_of_the_networks_that_had_run_are_named() -> None:
    with closing(Isolated(mine("os._exit(3)"))) as adapter:
        for layer in ("exp", "sigmoid", "softplus", "square", "exp"):
            adapter.backward(adapter.forward((of := case(layer)).network, of.values, "float64"), of.cotangent)
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
            assert (key, kind) == ("value:h2", "crash")
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
            assert (name, told(found), culprits(found)) == (name, told(expected), culprits(expected))
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
        found = examined(adapter, case("flatten", "tanh"))
        assert told(found) == [("value:h1", "view", message)]
        assert culprits(found) == ["flatten"]
        if isinstance(adapter, Isolated):
            adapter.close()


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


# The whole of it.


def gradproof(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gradproof", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


CHECK = ("check", "--adapter", "mine.py:Mine", "--dtype", "float64", "--layer", "tanh", "--seed", "1")


def read(path: str) -> Any:
    return json.loads(Path(path).read_text())


def test_the_other_networks_and_the_other_adapter_are_examined() -> None:
    mine("ctypes.string_at(0)")
    options = ("--adapter", "mine.py:Right", "--max-nodes", "2", "--networks", "3", "--json", "report.json")
    with gradproof(*CHECK, *options) as running:
        output, errors = running.communicate(timeout=100)
    assert running.returncode == DISAGREEMENT, errors
    report = read("report.json")
    kinds = {(each["adapter"], each["layer"], each["kind"], each["got"]) for each in report["disagreements"]}
    assert kinds == {("mine", "tanh", "crash", "the process was ended by SIGSEGV")}
    assert report["networks"] == 3
    for adapter in ("mine", "right"):
        assert re.search(rf"^{adapter} +float64 +3 ", output, re.MULTILINE)
    assert "mine float64: tanh (node h1) is wrong: crash: the process was ended by SIGSEGV" in output
    assert "Traceback" not in errors
    assert len(list(Path("gradproof-failures").iterdir())) >= 3


def test_what_an_adapter_prints_is_no_output() -> None:
    mine("print('noise'); os.write(1, b'more noise'); return gradients", loading="print('loud')")
    with gradproof(*CHECK, "--networks", "2") as running:
        output, errors = running.communicate(timeout=100)
    assert running.returncode == AGREEMENT
    assert "noise" not in output
    assert "loud" not in output
    assert all(word in errors for word in ("loud", "noise", "more noise"))


def test_without_isolation_the_adapter_is_in_this_process() -> None:
    mine("print('noise'); return gradients")
    with gradproof(*CHECK, "--networks", "2", "--no-isolation") as running:
        output, _ = running.communicate(timeout=100)
        assert running.returncode == AGREEMENT
    assert "noise" in output
    assert int(Path("pid").read_text()) == running.pid


def test_a_crash_without_isolation_ends_the_run() -> None:
    """What isolation is for."""
    mine("os._exit(3)")
    with gradproof(*CHECK, "--networks", "2", "--no-isolation") as running:
        output, _ = running.communicate(timeout=100)
    assert (running.returncode, output) == (3, "")


def test_the_memory_that_is_allowed_can_be_set() -> None:
    mine("return gradients")
    with gradproof(*CHECK, "--networks", "2", "--memory", "0.001") as running:
        _, errors = running.communicate(timeout=100)
    assert running.returncode == USAGE
    assert "adapter 'mine.py:Mine' cannot be loaded: took more than 0.001 GiB of memory" in errors


def test_replay_is_isolated_too() -> None:
    request = mine("os._exit(3)")
    report: Report = replay(WITH, [request])
    assert {each.kind for each in report.disagreements} == {"crash"}
    save_case(WITH, Path("."), "spec")
    with gradproof("replay", "spec.json", "--adapter", request) as running:
        output, _ = running.communicate(timeout=100)
    assert running.returncode == DISAGREEMENT
    assert "crash: the process ended with exit code 3" in output


HANGING = """
    if not pathlib.Path('gradproof-failures').exists():
        os._exit(3)
    pathlib.Path('hangs').touch()
    ctypes.PyDLL(None).sleep(60)
"""
"""Ends at the first network with a tanh, hangs in C at the second, and holds the interpreter's lock."""


def hanging(*options: str) -> subprocess.Popen[str]:
    """A check whose adapter hangs by now."""
    mine(HANGING)
    running = gradproof(*CHECK, "--max-nodes", "1", *options)
    deadline = time.monotonic() + 60.0
    while not Path("hangs").exists() and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return running


def test_an_interrupt_ends_a_hanging_adapter_and_keeps_what_was_found() -> None:
    with hanging("--json", "report.json") as running:
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=30)
    assert running.returncode == DISAGREEMENT
    assert "interrupted: 1 tensor disagrees: " in output
    assert "Traceback" not in errors
    report = read("report.json")
    assert report["interrupted"] is True
    assert [each["kind"] for each in report["disagreements"]] == ["crash"]
    assert gone(last_child())


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_killed_run_takes_its_children_along_and_leaves_its_specs() -> None:
    with hanging() as running:
        running.kill()
        running.communicate(timeout=30)
        assert gone(last_child())
    (spec,) = Path("gradproof-failures").glob("*.json")
    assert read(str(spec))["schema"] == 1
