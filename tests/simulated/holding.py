"""Forwards that wait until a test has done what must come before they end, however slow its own threads are."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvcycle import inband, internals


@dataclass(frozen=True)
class Hold:
    """A forward that waits: ``reached`` once it does, until ``go_on``."""

    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@contextmanager
def held(engine: Any, begins: Callable[[], bool], messages: int = 1) -> Iterator[Hold]:
    """Let no forward go on at which ``begins()`` is true, until that many messages were sent to the scheduler.

    Or until ``go_on`` is set. ``begins`` is asked on the scheduler's thread, before each forward.
    """
    channel, worker = inband.channel_of(engine), internals.worker_of(engine)
    forward, send, sent, hold = worker.forward_batch_generation, channel.send, itertools.count(1), Hold()

    def wait_then_forward(*arguments: Any, **further: Any) -> Any:
        if begins():
            hold.reached.set()
            hold.go_on.wait()
        return forward(*arguments, **further)

    def send_and_count(pending: inband.Pending) -> None:
        send(pending)
        if next(sent) == messages:
            hold.go_on.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "forward_batch_generation", wait_then_forward)
        patch.setattr(channel, "send", send_and_count)
        try:
            yield hold
        finally:
            hold.go_on.set()  # also for a test that fails: the engine is the others' as well


def each_has_two_tokens(engine: Any, requests: int) -> Callable[[], bool]:
    """Whether so many requests run and each has been answered with two tokens: none of them is about to end."""
    scheduler = internals.scheduler_of(engine)

    def begins() -> bool:
        running = internals._running_requests(scheduler)
        return [len(request.output_ids) >= 2 for request in running] == [True] * requests

    return begins


def after_forwards(number: int) -> Callable[[], bool]:
    """Whether so many forwards have begun before."""
    begun = itertools.count()
    return lambda: next(begun) >= number
