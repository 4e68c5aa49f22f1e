"""Running one adapter on one case: what it gave, and every way in which a run can go wrong beside its numbers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradproof.model.adapter import Adapter, EndedError, Forward, message_of, message_with_place
from gradproof.model.case import Case
from gradproof.model.options import Shape
from gradproof.model.tensors import Role, Tensor, Wrong, tensors, value_of
from gradproof.subject.watch import Remark, Watched, watch
from gradproof.verdict.agreement import TensorCheck

SECOND_PASS = "a second backward pass on the same tape"


@dataclass(frozen=True, eq=False)
class Trace:
    """What one run left behind.

    got: key -> what the adapter gave, the values as they were when they were computed. failure: the verdict where it
    gave nothing. ended: whether that is because its process ended. before: what had run in that process, if anything.
    checks: what is wrong beside the numbers. views: key -> what is wrong with the memory of a result.
    reused: results of the adapter's last run, or of the first backward pass, that this one has overwritten.
    forward, watched: what a second backward pass starts from.
    """

    got: Mapping[Tensor, Any] = field(default_factory=dict)
    failure: TensorCheck | None = None
    ended: bool = False
    before: str = ""
    checks: tuple[TensorCheck, ...] = ()
    views: Mapping[Tensor, str] = field(default_factory=dict)
    reused: tuple[Remark, ...] = ()
    forward: Forward | None = None
    watched: Watched | None = None


def run(adapter: Adapter, case: Case, timeout: float) -> Trace:
    """One forward and one backward pass. Whatever the adapter raises is a verdict on it, not the end of the run."""
    values = {name: value.copy() for name, value in case.values.items()}
    cotangent = case.cotangent.copy()
    watched = watch(adapter)
    try:
        with time_limit(timeout):
            forward = watched.forward(case.network, values, case.dtype)
            outputs = {name: _copied(array) for name, array in forward.outputs.items()}
            overwritten = dict.fromkeys(_changed(outputs, forward.live), "a later layer's forward pass")
            found = watched.backward(forward, cotangent)
            gradients = {name: _copied(array) for name, array in found.items()}
    except TimeLimitError:
        return Trace(failure=failed(Wrong.TIMEOUT, case, f"no result after {timeout:g} s"))
    except MemoryError as error:
        return Trace(failure=failed(Wrong.MEMORY, case, message_with_place(error)))
    except EndedError as error:
        return Trace(failure=failed(Wrong.CRASH, case, message_of(error)), ended=True, before=error.before)
    except (Exception, SystemExit) as error:
        return Trace(failure=failed(Wrong.CRASH, case, message_with_place(error)))
    changed = [*_changed(outputs, forward.outputs), *_changed(outputs, forward.live)]
    overwritten |= {name: "the backward pass" for name in changed if name not in overwritten}
    remarks = tuple(watched.remarks)
    checks = (
        *_written_to(case, values, cotangent),
        *(_remarked(remark) for remark in remarks if remark.kind is Wrong.GLOBAL_STATE),
        *(_overwritten(case, name, by) for name, by in overwritten.items()),
    )
    views = {remark.key: remark.message for remark in remarks if remark.kind is Wrong.VIEW}
    reused = tuple(remark for remark in remarks if remark.kind is Wrong.REUSED_BUFFER)
    got = tensors(outputs, gradients)
    return Trace(got, checks=checks, views=views, reused=reused, forward=forward, watched=watched)


def run_backward_again(adapter: Adapter, case: Case, trace: Trace, timeout: float) -> Trace | None:
    """A second backward pass on the same tape; None where it is refused, or gives the same to the bit."""
    assert trace.forward is not None
    assert trace.watched is not None
    trace.watched.remarks = []
    first = {key: array for key, array in trace.got.items() if key.role is Role.GRADIENT}
    try:
        with time_limit(timeout):
            found = trace.watched.backward_again(trace.forward, case.cotangent.copy())
            second = tensors({}, {name: _copied(array) for name, array in found.items()})
    except TimeLimitError:
        return Trace(failure=failed(Wrong.TIMEOUT, case, f"{SECOND_PASS} gave no result after {timeout:g} s", True))
    except (MemoryError, EndedError) as error:
        kind = Wrong.MEMORY if isinstance(error, MemoryError) else Wrong.CRASH
        return Trace(failure=failed(kind, case, f"{SECOND_PASS}: {message_with_place(error)}", True))
    except (Exception, SystemExit):  # a tape that serves once and says so has given nothing wrong
        return None
    if second.keys() == first.keys() and all(_identical(first[key], second[key]) for key in first):
        return None
    reused = tuple(remark for remark in trace.watched.remarks if remark.kind is Wrong.REUSED_BUFFER)
    return Trace({**trace.got, **dict.fromkeys(first), **second}, reused=reused)


def run_again(adapter: Adapter, case: Case, timeout: float) -> Mapping[Tensor, Any]:
    """What a second identical call gives: nothing where it fails this time."""
    values = {name: value.copy() for name, value in case.values.items()}
    with suppress(Exception, SystemExit, TimeLimitError), time_limit(timeout):
        forward = adapter.forward(case.network, values, case.dtype)
        outputs = {name: _copied(array) for name, array in forward.outputs.items()}
        gradients = adapter.backward(forward, case.cotangent.copy())
        return tensors(outputs, {name: _copied(array) for name, array in gradients.items()})
    return {}


def failed(kind: Wrong, case: Case, message: str, second_pass: bool = False) -> TensorCheck:
    """The verdict on a run that gave nothing."""
    output = case.network.output
    return TensorCheck(
        value_of(output), case.network.shapes[output], kind, float("inf"), got=message, second_pass=second_pass
    )


def reused_check(remark: Remark, shape: Shape = (), second_pass: bool = False) -> TensorCheck:
    """The verdict on a result that a later call has overwritten."""
    of = f" (a tensor of the network before: {remark.network})" if remark.network else ""
    message = f"{remark.message}{of}"
    return TensorCheck(remark.key, shape, Wrong.REUSED_BUFFER, float("inf"), got=message, second_pass=second_pass)


def _copied(array: Any) -> Any:
    return np.copy(array) if isinstance(array, np.ndarray) else array


def _changed(outputs: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of the outputs that are no longer what they were."""
    return [
        n for n, array in now.items() if isinstance(outputs.get(n), np.ndarray) and not _identical(outputs[n], array)
    ]


def _identical(first: np.ndarray, second: Any) -> bool:
    same = isinstance(second, np.ndarray) and (first.shape, first.dtype) == (second.shape, second.dtype)
    return same and np.array_equal(first, second, equal_nan=first.dtype.kind not in "OSU")


def _remarked(remark: Remark) -> TensorCheck:
    return TensorCheck(remark.key, (), Wrong.GLOBAL_STATE, float("inf"), got=remark.message)


def _overwritten(case: Case, name: str, by: str) -> TensorCheck:
    message = f"{by} overwrote it: it is no longer what was computed"
    return TensorCheck(value_of(name), case.network.shapes[name], Wrong.MUTATED_INPUT, float("inf"), got=message)


def _written_to(case: Case, values: Mapping[str, np.ndarray], cotangent: np.ndarray) -> Iterator[TensorCheck]:
    """A check for every array that is no longer what the adapter was given."""
    pairs = [(name, case.values[name], value) for name, value in values.items()]
    for name, before, after in (*pairs, ("cotangent", case.cotangent, cotangent)):
        if not np.array_equal(before, after, equal_nan=True):
            yield TensorCheck(value_of(name), before.shape, Wrong.MUTATED_INPUT, float("inf"))


class TimeLimitError(BaseException):
    """An adapter took longer than it may. No Exception, so that no adapter catches it by accident."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError in the block after that many seconds (on the main thread of a Unix process)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def give_up(signal_number: int, frame: Any) -> None:
        raise TimeLimitError

    handler = signal.signal(signal.SIGALRM, give_up)
    started = time.monotonic()
    due, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # An alarm that somebody else had set still comes, at once if it was due meanwhile.
        left = max(due - (time.monotonic() - started), 1e-6) if due else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
