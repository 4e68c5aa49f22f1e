"""What an adapter's calls leave behind: views of what it was given, results that change later, changed global state."""

from __future__ import annotations

import ctypes
import locale
import os
import random
import signal
import sys
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.random.mtrand import get_bit_generator

from gradproof.model.adapter import Adapter, Forward
from gradproof.model.network import Network
from gradproof.model.tensors import Role, Tensor, Wrong, tensors, value_of

SHOWN = 40
"""How many characters of a state's value are shown."""

TINY = 5e-324
"""The smallest subnormal number, which is lost where subnormal numbers are flushed to zero."""


@dataclass(frozen=True)
class Remark:
    """Something wrong with a run beside its numbers.

    key: the tensor, or a value of the name of the state where the kind is global_state.
    message: what happened. network: the one whose tensor it was, where that is another run's.
    """

    kind: Wrong
    key: Tensor
    message: str
    network: str = ""


class Watched(ABC):
    """Runs an adapter, and remarks on what it sees of one forward and one backward pass."""

    remarks: list[Remark]

    @abstractmethod
    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward: ...

    @abstractmethod
    def backward(self, forward: Forward, cotangent: np.ndarray) -> Mapping[str, Any]: ...

    @abstractmethod
    def backward_again(self, forward: Forward, cotangent: np.ndarray) -> Mapping[str, Any]:
        """A second backward pass on the tape of a first."""


class WatchedInProcess(Watched):
    """An adapter in this process. Global state is put back."""

    def __init__(self, adapter: Adapter) -> None:
        self.remarks = []
        self.network: Network | None = None
        self._adapter = adapter
        self._values: Mapping[str, np.ndarray] = {}
        self._state: dict[str, Any] = {}
        self._modules = 0

    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward:
        self.network = network
        self._values = dict(values)
        self._modules = len(sys.modules)
        self._state = _global_state()
        try:
            forward = self._adapter.forward(network, values, dtype)
            self.remarks += _views(Role.VALUE, forward.outputs, self._values)
        except BaseException:
            self._put_back()
            raise
        return forward

    def backward(self, forward: Forward, cotangent: np.ndarray) -> Mapping[str, Any]:
        """The gradients; the state is compared with what it was before the forward pass."""
        try:
            gradients = self._adapter.backward(forward, cotangent)
            self.remarks += _views(Role.GRADIENT, gradients, self._values, cotangent)
        finally:
            self.remarks += self._put_back()
        self._look_again(forward, gradients)
        return gradients

    def backward_again(self, forward: Forward, cotangent: np.ndarray) -> Mapping[str, Any]:
        """The state is not looked at, for others have run meanwhile."""
        gradients = self._adapter.backward(forward, cotangent)
        self._look_again(forward, gradients)
        return gradients

    def _look_again(self, forward: Forward, gradients: Mapping[str, Any]) -> None:
        """Compare what the adapter's last run gave out with what it was, and keep what this one gives out."""
        earlier = _given_out.get(id(self._adapter))
        self.remarks += earlier.changed(self) if earlier else ()
        _keep(self._adapter, _GivenOut(self, forward.outputs, gradients))

    def _put_back(self) -> list[Remark]:
        """Undo what changed, and say what that was. What an import changes, it may."""
        after = _global_state()
        imported = len(sys.modules) > self._modules
        remarks = []
        for name, before in self._state.items():
            if after[name] == before or (imported and name in CHANGED_BY_IMPORTS):
                continue
            with suppress(Exception):
                PROBES[name].put(before)
            remarks.append(Remark(Wrong.GLOBAL_STATE, value_of(name), _change(before, after[name])))
        return remarks


def watch(adapter: Adapter) -> Watched:
    """The adapter, watched for one forward and one backward pass."""
    if isinstance(adapter, Watched):  # in a process of its own, where it is watched
        adapter.remarks = []
        return adapter
    return WatchedInProcess(adapter)


REUSED = "the next call overwrote it: it is no longer what was returned; return a new array"


class _GivenOut:
    """The results of one run, and what they were then."""

    def __init__(self, run: WatchedInProcess, outputs: Mapping[str, Any], gradients: Mapping[str, Any]) -> None:
        self._run, self._network = weakref.ref(run), run.network
        found = tensors(outputs, gradients).items()
        self._arrays = {key: array for key, array in found if isinstance(array, np.ndarray)}
        self._bytes = {key: array.tobytes() for key, array in self._arrays.items()}

    def changed(self, run: WatchedInProcess) -> Iterator[Remark]:
        """A remark for every result that this run has changed; in its second backward pass, for every gradient."""
        again = self._run() is run
        for key, array in self._arrays.items():
            if not (again and key.role is Role.VALUE) and array.tobytes() != self._bytes[key]:
                network = "" if self._network == run.network else str(self._network)
                yield Remark(Wrong.REUSED_BUFFER, key, REUSED, network)


_given_out: dict[int, _GivenOut] = {}
"""id of an adapter -> what its last run gave out, until its next."""


def _keep(adapter: Adapter, results: _GivenOut) -> None:
    if id(adapter) not in _given_out:
        try:
            weakref.finalize(adapter, _given_out.pop, id(adapter), None)
        except TypeError:  # nothing tells when it is gone
            return
    _given_out[id(adapter)] = results


def _views(
    role: Role,
    found: Mapping[str, Any],
    values: Mapping[str, np.ndarray],
    cotangent: np.ndarray | None = None,
) -> Iterator[Remark]:
    """A remark for every result that shares memory with an array that was given."""
    given = [(repr(name), value, *_bounds(value)) for name, value in values.items()]
    given += [] if cotangent is None else [("the cotangent", cotangent, *_bounds(cotangent))]
    for name, array in found.items():
        if not isinstance(array, np.ndarray):
            continue
        low, high = _bounds(array)
        for source, value, start, stop in given:
            if low < stop and start < high and np.shares_memory(array, value):
                message = f"shares memory with {source}, which it was given; return a copy"
                yield Remark(Wrong.VIEW, Tensor(role, str(name)), message)
                break


def _bounds(array: np.ndarray) -> tuple[int, int]:
    """The addresses between which the array lies; fast where it is of one piece."""
    if not array.flags.c_contiguous:
        return byte_bounds(array)
    start = array.__array_interface__["data"][0]
    return start, start + array.nbytes


@dataclass(frozen=True)
class Probe:
    """One piece of global state. get: its value, of a type that can be compared. put: sets it back.

    module: where the state lives; it is left alone until something else has imported that module.
    """

    get: Callable[[], Any]
    put: Callable[[Any], Any]
    module: str = "sys"


def _torch() -> Any:
    return sys.modules["torch"]


def _jax(name: str) -> Probe:
    return Probe(
        lambda: getattr(sys.modules["jax"].config, name),
        lambda value: sys.modules["jax"].config.update(name, value),
        "jax",
    )


MT19937_BYTES = 2500
"""624 words of 32 bits, and the position among them."""


def _numpy_generator() -> bytes:
    """The state of the generator behind np.random's functions; get_state() takes a hundred times as long."""
    generator = get_bit_generator()
    held = isinstance(generator, np.random.MT19937)
    return ctypes.string_at(generator.ctypes.state_address, MT19937_BYTES) if held else b""


def _put_numpy_generator(state: bytes) -> None:
    ctypes.memmove(get_bit_generator().ctypes.state_address, state, len(state))


def _environment() -> dict[Any, Any]:
    """The variables as the system has them; decoding each takes a hundred times as long."""
    variables: dict[Any, Any] = os.environ._data.copy()  # type: ignore[attr-defined]
    return variables


def _put_environment(variables: Mapping[Any, Any]) -> None:
    decoded = {os.fsdecode(name): os.fsdecode(value) for name, value in variables.items()}
    for name in os.environ.keys() - decoded.keys():
        del os.environ[name]
    os.environ.update(decoded)


def _directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _put_filters(filters: Iterable[Any]) -> None:
    warnings.resetwarnings()  # which also makes warnings forget what they had decided
    warnings.filters[:] = filters  # type: ignore[index]


SIGNALS = {name: getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name)}


def _put_handlers(handlers: Mapping[str, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for name, number in SIGNALS.items():
            signal.signal(number, handlers[name])


def _put_flushing(kept: bool) -> None:
    if "torch" in sys.modules:
        _torch().set_flush_denormal(not kept)


def _put_torch_generator(state: bytes) -> None:
    _torch().set_rng_state(_torch().frombuffer(bytearray(state), dtype=_torch().uint8))


PROBES: dict[str, Probe] = {
    "numpy.geterr()": Probe(np.geterr, lambda before: np.seterr(**before)),
    "numpy.random's generator": Probe(_numpy_generator, _put_numpy_generator),
    "random's generator": Probe(random.getstate, random.setstate),
    "os.environ": Probe(_environment, _put_environment),
    "the working directory": Probe(_directory, os.chdir),
    "warnings.filters": Probe(lambda: tuple(warnings.filters), _put_filters),
    "the locale": Probe(
        lambda: locale.setlocale(locale.LC_ALL), lambda before: locale.setlocale(locale.LC_ALL, before)
    ),
    "the recursion limit": Probe(sys.getrecursionlimit, sys.setrecursionlimit),
    "signal handlers": Probe(lambda: {name: signal.getsignal(each) for name, each in SIGNALS.items()}, _put_handlers),
    "subnormal numbers": Probe(lambda: TINY * np.float64(1.0) > 0.0, _put_flushing),
    "torch.get_default_dtype()": Probe(
        lambda: _torch().get_default_dtype(), lambda before: _torch().set_default_dtype(before), "torch"
    ),
    "torch.is_grad_enabled()": Probe(
        lambda: _torch().is_grad_enabled(), lambda before: _torch().set_grad_enabled(before), "torch"
    ),
    "torch.are_deterministic_algorithms_enabled()": Probe(
        lambda: _torch().are_deterministic_algorithms_enabled(),
        lambda before: _torch().use_deterministic_algorithms(before),
        "torch",
    ),
    "torch.get_num_threads()": Probe(
        lambda: _torch().get_num_threads(), lambda before: _torch().set_num_threads(before), "torch"
    ),
    "torch's generator": Probe(lambda: _torch().get_rng_state().numpy().tobytes(), _put_torch_generator, "torch"),
    "jax_enable_x64": _jax("jax_enable_x64"),
    "jax_default_matmul_precision": _jax("jax_default_matmul_precision"),
    "jax_disable_jit": _jax("jax_disable_jit"),
}
"""What is compared before and after, by the name under which a change is told."""

CHANGED_BY_IMPORTS = ("os.environ", "warnings.filters", "the recursion limit", "subnormal numbers")
"""What a module may change when it is imported, which adapters may do late."""


def _global_state() -> dict[str, Any]:
    return {name: probe.get() for name, probe in PROBES.items() if probe.module in sys.modules}


def _change(before: Any, after: Any) -> str:
    """What a piece of global state became, as far as that fits on a line."""
    if isinstance(before, dict):
        names = [os.fsdecode(name) for name in {**before, **after} if before.get(name) != after.get(name)]
        return f"{', '.join(names)} left changed; put it back"
    shown = f"{before} became {after}"
    return f"left changed: {shown}; put it back" if len(shown) <= 2 * SHOWN else "left changed; put it back"
