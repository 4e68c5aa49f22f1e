"""An adapter in a process of its own, so that whatever it does to that process ends neither the run nor its results.

The parent sends a request and waits, which a time limit, Ctrl-C or too much memory can end: the child is then
killed, and the next request starts another. The adapter's tapes stay in the child.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from gradproof.model.adapter import (
    Adapter,
    AdapterError,
    EndedError,
    Forward,
    RelayedError,
    RelayedMemoryError,
    message_of,
)
from gradproof.model.layer import Layer
from gradproof.model.network import Network
from gradproof.model.options import Options, Shape
from gradproof.subject.ancestry import Ancestor
from gradproof.subject.messages import Answer, Loaded, Raised, pickled
from gradproof.subject.own_layers import loaded_layers
from gradproof.subject.registry import load_adapter
from gradproof.subject.watch import Remark, Watched

GIB = 2.0**30

SECONDS_BETWEEN_LOOKS = 0.1
"""How often the parent looks at the child's memory while it waits."""

SECONDS_TO_LOAD = 300.0
"""How long an adapter may take to be imported, and to say what it supports: no time limit of a network counts there."""

SECONDS_TO_LEAVE = 5.0
"""How long a child may take to end once it is no longer needed."""

LAST_NETWORKS = 3
"""How many of the networks that a process had run before it ended are named."""

SHOWN = 80
"""How many characters of such a name are shown."""

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

CHILD = "import sys; sys.path[:] = sys.argv[2:]; from gradproof.subject.server import serve; serve(int(sys.argv[1]))"
"""What a child runs. Not multiprocessing, which would run the caller's script once more."""


def loader(isolation: bool, memory: float | None = None) -> Callable[[str], Adapter]:
    """What loads an adapter by name: into a child that may take so many GiB, or into this process.

    memory: half of what the machine has where None. There are no children where the system is not Unix.
    """
    return partial(Isolated, memory=memory) if isolation and os.name == "posix" else load_adapter


def close(adapter: Adapter) -> None:
    """End the adapter's process, if it has one."""
    if isinstance(adapter, Isolated):
        adapter.close()


class _Ran:
    """What has run in a child since its start, the last of it by name."""

    def __init__(self) -> None:
        self._networks = 0
        self._last: deque[tuple[Network, str]] = deque(maxlen=LAST_NETWORKS + 1)

    def note(self, network: Network, dtype: str) -> None:
        """This network runs next; one that is run again counts once."""
        if (network, dtype) != (self._last[-1] if self._last else None):
            self._networks += 1
            self._last.append((network, dtype))

    def before(self) -> str:
        """What had run before the network that runs now; nothing where it is the first."""
        if self._networks < 2:
            return ""
        last = [f"{_layers(network)} in {dtype}" for network, dtype in self._last][:-1][-LAST_NETWORKS:]
        count = "1 network" if self._networks == 2 else f"{self._networks - 1} networks"
        return f"{count} ran in that process before, the last: {', '.join(last)}"


def _layers(network: Network) -> str:
    return textwrap.shorten(" -> ".join(node.layer.name for node in network.nodes), SHOWN, placeholder=" ...")


class Isolated(Watched):
    """The adapter of that name, in a child.

    memory: how many GiB the child may take. ancestry: where the adapter's class is written.

    Raises AdapterError as `load_adapter` does, and where the child does not survive loading.
    """

    def __init__(self, request: str, memory: float | None = None) -> None:
        self.remarks: list[Remark] = []
        self._request = request
        self._memory = half_of_memory() if memory is None else memory * GIB
        self._directory = os.getcwd()
        self._supports: dict[Any, bool | str] = {}
        self._numbers = count()
        self._dropped: list[int] = []
        self._child: _Child | None = None
        self._ran = _Ran()
        try:
            loaded = self._start()
        except RelayedError as error:
            raise AdapterError(f"adapter {request!r} cannot be loaded: {error}") from None
        self.name: str = loaded.name
        self._version: str = loaded.version
        self.ancestry: tuple[Ancestor, ...] = loaded.ancestry
        self.fused: bool = loaded.fused
        self._sees_shapes = loaded.sees_shapes

    def version(self) -> str:
        return self._version

    def supports(self, layer: Layer, options: Options, dtype: str, shapes: tuple[Shape, ...] = ()) -> bool | str:
        """What the child says, asked once for each."""
        shapes = shapes if self._sees_shapes else ()
        asked = (layer.name, tuple(options.items()), dtype, shapes)
        if asked not in self._supports:
            with off_the_clock():
                self._supports[asked] = self._ask(SECONDS_TO_LOAD, "supports", layer, dict(options), dtype, shapes)
        return self._supports[asked]

    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward:
        number = next(self._numbers)
        self._start_where_none_is()
        self._ran.note(network, dtype)
        answer: Answer = self._ask(None, "forward", number, network, dict(values), dtype)
        _write(answer.values, values)
        tape = _Tape(number, self._child, values, answer.overwritten)
        forward = Forward(answer.arrays, tape, tape.live)
        weakref.finalize(forward.tape, self._dropped.append, number)
        return forward

    def backward(self, forward: Forward, cotangent: np.ndarray) -> Mapping[str, np.ndarray]:
        tape: _Tape = forward.tape
        if tape.child is not self._child:
            raise EndedError("the process that made the forward pass has ended")
        answer: Answer = self._ask(None, "backward", tape.number, cotangent)
        self.remarks += answer.remarks
        _write(answer.values, tape.values)
        _write(answer.outputs, forward.outputs)
        tape.live.update(answer.overwritten)
        _write(answer.cotangent, {"": cotangent})
        return answer.arrays

    def backward_again(self, forward: Forward, cotangent: np.ndarray) -> Mapping[str, np.ndarray]:
        return self.backward(forward, cotangent)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.leave()
            self._child = None

    def _ask(self, seconds: float | None, method: str, *arguments: Any) -> Any:
        """What the child answers. Whatever interrupts this, the child is then gone."""
        self._start_where_none_is()
        child, self._child = self._child, None
        assert child is not None
        dropped = [self._dropped.pop() for _ in range(len(self._dropped))]
        try:
            reply = child.ask((dropped, method, arguments), seconds)
        except EndedError as error:
            raise EndedError(str(error), self._ran.before()) from None
        self._child = child
        return _answer(reply)

    def _start_where_none_is(self) -> None:
        if self._child is None:
            with off_the_clock():
                self._start()

    def _start(self) -> Loaded:
        child = _Child(self._directory, self._memory)
        try:
            loaded: Loaded = _answer(child.ask(((), "load", (self._request, loaded_layers())), SECONDS_TO_LOAD))
        except AdapterError:
            child.kill()
            raise
        self._child, self._ran = child, _Ran()
        return loaded


@dataclass(frozen=True, eq=False)
class _Tape:
    """Where a forward pass is kept, the arrays that it was given, and those of its outputs that were overwritten."""

    number: int
    child: _Child | None
    values: Mapping[str, np.ndarray]
    live: dict[str, np.ndarray]


def _write(changed: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> None:
    """Do to the caller's arrays what the adapter did to the child's."""
    for name, array in changed.items():
        arrays[name][...] = array


def _answer(reply: Any) -> Any:
    """The reply, or what it says was raised."""
    if isinstance(reply, Raised):
        raise reply.kind(reply.message)
    return reply


class _Child:
    """The process and the pipe to it. Each question is answered before the next; after any failure it is killed."""

    def __init__(self, directory: str, memory: float) -> None:
        self._memory = memory
        self._connection, theirs = Pipe()
        command = [sys.executable, "-c", CHILD, str(theirs.fileno()), *sys.path]
        # In a session of its own, Ctrl-C does not reach it, and what it starts in turn can be killed with it. What it
        # prints goes to standard error, for the output is the parent's.
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.kill = weakref.finalize(self, _kill, self._process, self._connection)

    def ask(self, question: Any, seconds: float | None) -> Any:
        """The reply, within so many seconds. Raises RelayedError, which says why there is none."""
        try:
            self._connection.send_bytes(pickled(question))
            self._wait(seconds)
            reply = self._connection.recv_bytes()
        except (EOFError, OSError):
            raise EndedError(self._end()) from None
        except BaseException:
            self.kill()
            raise
        try:
            return pickle.loads(reply)
        except Exception as error:
            raise RelayedError(f"its results cannot be read: {message_of(error)}") from error

    def _wait(self, seconds: float | None) -> None:
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            if _resident(self._process.pid) > self._memory:
                raise RelayedMemoryError(f"took more than {self._memory / GIB:.3g} GiB of memory")
            if self._connection.poll(SECONDS_BETWEEN_LOOKS):
                return
            # The pipe of a process that ended may be kept open by another that it had started.
            if self._process.poll() is not None and not self._connection.poll(0):
                raise EOFError
            if deadline is not None and time.monotonic() > deadline:
                raise RelayedError(f"no answer after {seconds:g} s")

    def _end(self) -> str:
        """How the process ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS_TO_LEAVE)
        code = self._process.returncode
        self.kill()
        if code is None:
            return "the process closed its connection"
        return f"the process was ended by {_signal(-code)}" if code < 0 else f"the process ended with exit code {code}"

    def leave(self) -> None:
        """Let it end by itself, and kill it where it does not."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS_TO_LEAVE)
        self.kill()


def _kill(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _resident(pid: int) -> int:
    """How many bytes of memory the process takes; 0 where that cannot be told."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def half_of_memory() -> float:
    """Half of the bytes of memory that this machine, or the container that this runs in, has."""
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max", where there is no limit
            limits.append(float(Path(path).read_text()))
    return min(limits) / 2.0


@contextmanager
def off_the_clock() -> Iterator[None]:
    """Let no alarm come in the block, and the time that was left begin again after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
