"""Deadlines for what the main thread waits for: a signal ends a wait that nothing else would end.

Only Python code can be interrupted so. A main thread that is stuck in a C call (a device that does not answer) never
sees the signal; then :data:`unanswered` is called, on a thread of its own, which may still write reports and leave.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvcycle.errors import KVCycleError, StepTimeoutError
from kvcycle.profile import Profile

#: How long after its limit a block may still run before :data:`unanswered` is called.
GRACE_S = 30.0

#: Given the error of a block that neither ended nor took the error within :data:`GRACE_S`; the suite sets it.
unanswered: Callable[[KVCycleError], None] | None = None


@dataclass(frozen=True)
class Wait:
    """What the main thread is at: the innermost block with a deadline, since when, and how long it may take."""

    what: str
    seconds: float
    limit_s: float


def waiting() -> Wait | None:
    """What the main thread is at; None outside of every deadline. For whoever tells of it, on any thread."""
    running = _running[-1:]  # the main thread may be leaving it
    if not running:
        return None
    clock = running[0]
    return Wait(clock.what, time.monotonic() - clock.began, clock.limit_s)


@contextmanager
def deadline(limit_s: float, error: Callable[[], KVCycleError], what: str = "") -> Iterator[None]:
    """Raise ``error()`` in the ``with`` block if it has not ended after ``limit_s`` seconds; ``what`` names the block.

    A deadline inside another one stops the outer one's clock, which starts anew when the inner one has ended. On
    another thread than the main one, where Python delivers no signals, there is no deadline.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = _running[-1] if _running else None
    if outer is not None:
        outer.stop()
    handler = signal.getsignal(signal.SIGALRM)  # another's, if this is the outermost: pytest-timeout has one
    before_s, interval_s = signal.setitimer(signal.ITIMER_REAL, 0)
    clock = _Clock(limit_s, error, what)
    _running.append(clock)
    try:
        clock.start()
        yield
    except _Passed:
        clock.stop()
        raise error() from None
    except Exception as instead:
        if clock.passed:  # native code that called back into Python made another error of it
            raise error() from instead
        raise
    finally:
        clock.stop()
        _running.remove(clock)
        signal.signal(signal.SIGALRM, handler)
        if outer is not None:
            outer.start()
        else:
            signal.setitimer(signal.ITIMER_REAL, before_s, interval_s)


@contextmanager
def step_deadline(engine: Any, profile: Profile, what: str) -> Iterator[None]:
    """End a step that does not end by itself, and give up the engine with it.

    Raises:
        StepTimeoutError: it did not end within the profile's ``timeouts.step_s``.
    """
    from kvcycle import inband, internals  # they import jax, and who imports this may not have chosen its platform yet

    limit_s = profile.timeouts.step_s

    def error() -> StepTimeoutError:
        channel = inband.channel_of(engine)
        held = f"{what} did not end within {limit_s:g} s (timeouts.step_s)"
        channel.crash = channel.crash or held
        counts = internals.unfinished_requests(channel.scheduler)
        return StepTimeoutError(
            f"{held}. The engine, which has {counts['running']} running and {counts['waiting']} waiting requests, "
            "can only be closed now. If the step just needs longer, allow it more: --kv-set timeouts.step_s=…"
        )

    with deadline(limit_s, error, what):
        yield


class _Passed(KeyboardInterrupt):
    """On its way to the deadline's block: the one kind that event loops and ``except Exception`` let through."""


class _Clock:
    """The signal for the main thread, and behind it a thread for the case that it does not come through."""

    def __init__(self, limit_s: float, error: Callable[[], KVCycleError], what: str) -> None:
        self.limit_s, self._error, self.what = limit_s, error, what
        self.began = time.monotonic()
        self.passed = False
        self._runs = False
        self._stuck: threading.Timer | None = None

    def start(self) -> None:
        self._runs = True
        self._stuck = threading.Timer(self.limit_s + GRACE_S, self._give_up)
        self._stuck.daemon = True
        self._stuck.start()
        signal.signal(signal.SIGALRM, self._raise)
        # Again after as long, should the first be raised where Python swallows it, as in a destructor.
        signal.setitimer(signal.ITIMER_REAL, self.limit_s, self.limit_s)

    def stop(self) -> None:
        self._runs = False  # a signal may be on its way still
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._stuck is not None:
            self._stuck.cancel()

    def _raise(self, *_: Any) -> None:
        if self._runs:
            self.passed = True
            raise _Passed

    def _give_up(self) -> None:
        if unanswered is not None:
            unanswered(self._error())


_running: list[_Clock] = []
