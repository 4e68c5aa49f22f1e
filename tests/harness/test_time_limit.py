"""The time limit: it ends what takes too long, and leaves other people's alarms alone."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from gradproof.verdict.running import TimeLimitError, time_limit


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """The alarms that come while a test has a handler of its own."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(signal.SIGALRM, note)
    yield received
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, before)


def test_a_limit_ends_what_takes_too_long() -> None:
    started = time.monotonic()
    with pytest.raises(TimeLimitError), time_limit(0.1):
        time.sleep(5.0)
    assert time.monotonic() - started < 2.0


def test_within_the_limit_nothing_happens(alarms: list[int]) -> None:
    with time_limit(0.1):
        pass
    time.sleep(0.2)
    assert alarms == []


@pytest.mark.parametrize("error", [None, ValueError, TimeLimitError])
def test_the_handler_of_others_comes_back(alarms: list[int], error: type[Exception] | None) -> None:
    mine = signal.getsignal(signal.SIGALRM)
    try:
        with time_limit(5.0):
            assert signal.getsignal(signal.SIGALRM) is not mine
            if error:
                raise error
    except (ValueError, TimeLimitError):
        pass
    assert signal.getsignal(signal.SIGALRM) is mine
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_that_others_set_still_comes(alarms: list[int]) -> None:
    """As pytest-timeout does."""
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with time_limit(5.0):
        pass
    time.sleep(0.4)
    assert alarms == [signal.SIGALRM]


def test_off_the_main_thread_there_is_no_limit() -> None:
    passed: list[bool] = []

    def work() -> None:
        with time_limit(0.05):
            time.sleep(0.1)
        passed.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert passed == [True]
