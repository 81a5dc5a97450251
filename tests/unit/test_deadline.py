"""Deadlines on the main thread: raised, nested, given back, and what happens where no signal reaches it."""

from __future__ import annotations

import signal
import threading

import pytest

from kvcycle import deadline as deadlines
from kvcycle.deadline import deadline
from kvcycle.errors import KVCycleError, StepTimeoutError

Never = threading.Event


def late(what: str = "it") -> KVCycleError:
    return StepTimeoutError(f"{what} took too long")


def test_a_wait_without_end_is_ended() -> None:
    with pytest.raises(StepTimeoutError, match="it took too long"), deadline(0.05, late):
        Never().wait()


def test_a_time_that_is_up_before_the_block_has_begun_is_the_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    start = deadlines._Clock.start

    def start_on_a_busy_machine(clock: deadlines._Clock) -> None:
        start(clock)
        signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(deadlines._Clock, "start", start_on_a_busy_machine)
    with pytest.raises(StepTimeoutError, match="it took too long"), deadline(60, late):
        pytest.fail("it has begun")
    assert deadlines.waiting() is None


def test_a_block_that_ends_leaves_timer_and_handler_as_they_were() -> None:
    fired = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: fired.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 3600)
        with deadline(60, late):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        assert 60 < signal.getitimer(signal.ITIMER_REAL)[0] <= 3600
        signal.raise_signal(signal.SIGALRM)
        assert fired.is_set()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_one_inside_another_stops_the_outer_ones_clock() -> None:
    def nested() -> None:
        with deadline(3600, lambda: late("inner")):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 60  # longer than the outer one allows
        with pytest.raises(StepTimeoutError, match="inner"), deadline(0.05, lambda: late("inner")):
            Never().wait()
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        signal.raise_signal(signal.SIGALRM)

    with pytest.raises(StepTimeoutError, match="outer"), deadline(60, lambda: late("outer")):
        nested()


def test_an_error_that_was_swallowed_is_raised_again() -> None:
    swallowed: list[BaseException] = []

    def swallow() -> None:
        try:
            signal.raise_signal(signal.SIGALRM)
        except KeyboardInterrupt as error:
            swallowed.append(error)
        assert signal.getitimer(signal.ITIMER_REAL)[1] == 60  # it comes again after as long
        signal.raise_signal(signal.SIGALRM)

    with pytest.raises(StepTimeoutError), deadline(60, late):
        swallow()
    assert len(swallowed) == 1


def test_an_error_that_native_code_made_of_it_is_still_the_deadlines() -> None:
    def call_back() -> None:
        try:
            signal.raise_signal(signal.SIGALRM)
        except KeyboardInterrupt as error:
            raise RuntimeError("INTERNAL: CpuCallback error") from error

    with pytest.raises(StepTimeoutError, match="it took too long") as raised, deadline(60, late):
        call_back()
    assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="its own"), deadline(60, late):
        raise RuntimeError("its own")


def test_a_main_thread_that_no_signal_reaches_is_told_of_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []
    heard = threading.Event()

    def unanswered(error: KVCycleError) -> None:
        told.append((str(error), threading.current_thread().name))
        heard.set()

    monkeypatch.setattr(deadlines, "GRACE_S", 0.05)
    monkeypatch.setattr(deadlines, "unanswered", unanswered)
    monkeypatch.setattr(signal, "setitimer", lambda *_: (0.0, 0.0))  # as in a call that the signal does not interrupt
    with deadline(0.05, late):
        assert heard.wait(60)
    assert [text for text, _ in told] == ["it took too long"]
    assert told[0][1] != threading.main_thread().name


def test_on_another_thread_there_is_none() -> None:
    ended = threading.Event()

    def block() -> None:
        with deadline(0.01, late):
            Never().wait(0.1)
        ended.set()

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert ended.is_set()
