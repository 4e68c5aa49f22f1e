"""The process of an adapter: it answers until the run hangs up."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from gradproof.model.adapter import (
    AdapterError,
    Forward,
    RelayedError,
    RelayedMemoryError,
    asked,
    message_with_place,
    sees_shapes,
)
from gradproof.model.layer import Layer
from gradproof.model.network import Network
from gradproof.model.options import Options, Shape
from gradproof.subject.ancestry import ancestry
from gradproof.subject.messages import Answer, Loaded, Raised, passed_on
from gradproof.subject.own_layers import load_layers
from gradproof.subject.registry import load_adapter
from gradproof.subject.watch import WatchedInProcess


def _overwritten(forward: Forward) -> dict[str, np.ndarray]:
    """The outputs that the framework now holds with other numbers than it gave."""
    held = {name: array for name, array in forward.live.items() if isinstance(forward.outputs.get(name), np.ndarray)}
    return {name: array for name, array in held.items() if array.tobytes() != forward.outputs[name].tobytes()}


class _Snapshot:
    """The numbers in some arrays, to tell afterwards which were written to."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
        self._bytes = {name: array.tobytes() for name, array in self._arrays.items()}

    def changed(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in self._arrays.items() if array.tobytes() != self._bytes[name]}


def serve(file_descriptor: int) -> None:
    """Answer until the parent hangs up."""
    os.set_inheritable(file_descriptor, False)
    _end_with_parent()
    connection = Connection(file_descriptor)
    server = _Server()
    with suppress(EOFError, OSError):
        while True:
            connection.send_bytes(server.reply(connection.recv_bytes()))


def _end_with_parent() -> None:
    """On Linux: be killed when the parent ends, even in the midst of work, and before it where memory runs out."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


class _Server:
    """The adapter, and the forward passes that the parent may still ask a backward pass of."""

    def __init__(self) -> None:
        self._adapter: Any = None
        self._held: dict[int, tuple[WatchedInProcess, Forward, dict[str, np.ndarray]]] = {}

    def reply(self, question: bytes) -> bytes:
        """The answer to a question, or what was raised."""
        dropped, method, arguments = pickle.loads(question)
        for number in dropped:
            self._held.pop(number, None)
        try:
            return pickle.dumps(getattr(self, method)(*arguments), pickle.HIGHEST_PROTOCOL)
        except KeyboardInterrupt:
            raised = Raised(KeyboardInterrupt, "")
        except MemoryError as error:
            raised = Raised(RelayedMemoryError, message_with_place(error))
        except BaseException as error:  # a verdict on the adapter, whatever it is
            raised = Raised(RelayedError, message_with_place(error))
        return pickle.dumps(raised)

    def load(self, request: str, layers: tuple[str, ...]) -> Loaded | Raised:
        try:
            for each in layers:
                load_layers(each)
            self._adapter = load_adapter(request)
        except AdapterError as error:
            return Raised(AdapterError, str(error))
        fused = bool(getattr(self._adapter, "fused", False))
        shapes = sees_shapes(self._adapter)
        return Loaded(self._adapter.name, self._adapter.version(), ancestry(self._adapter), fused, shapes)

    def supports(self, layer: Layer, options: Options, dtype: str, shapes: tuple[Shape, ...]) -> bool | str:
        return asked(self._adapter, layer, options, dtype, shapes)

    def forward(self, number: int, network: Network, values: dict[str, np.ndarray], dtype: str) -> Answer:
        watched = WatchedInProcess(self._adapter)
        given = _Snapshot(values)
        forward = watched.forward(network, values, dtype)
        self._held[number] = watched, forward, values
        return Answer(passed_on(forward.outputs), given.changed(), overwritten=_overwritten(forward))

    def backward(self, number: int, cotangent: np.ndarray) -> Answer:
        watched, forward, values = self._held[number]
        given, made, seed = (_Snapshot(each) for each in (values, forward.outputs, {"": cotangent}))
        gradients = watched.backward(forward, cotangent)
        remarks, watched.remarks = watched.remarks, []
        return Answer(
            passed_on(gradients), given.changed(), made.changed(), seed.changed(), remarks, _overwritten(forward)
        )
