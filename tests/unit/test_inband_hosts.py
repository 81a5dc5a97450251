"""Calls on an engine of two hosts: begun on both or on none, and never on one because the other's caller gave up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from kvcycle.errors import EngineBusyError
from kvcycle.hosts import Hosts
from kvcycle.inband import Channel, stop_scheduler
from tests.unit.engines import Scheduler010, engine_of
from tests.unit.hosts import DictStore, no_loss

pytestmark = pytest.mark.usefixtures(no_loss.__name__)
__all__ = ["no_loss"]


class Loop:
    """One host's scheduler, whose loop takes what the first host was sent."""

    def __init__(self, rank: int, store: DictStore) -> None:
        self.scheduler = Scheduler010()
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        deliver = engine_of(self.scheduler).send_to_rpc.send_pyobj
        self.engine = engine_of(self.scheduler)
        self.channel = Channel(self.engine)
        self.channel.hosts = Hosts(rank, 2, store, name="engine0")
        self.thread = threading.Thread(target=self._run, args=(deliver,), daemon=True)

    def _run(self, deliver: Callable[[object], None]) -> None:
        # A host is stopped by it, and kvcycle's hook, which keeps it from pytest's, may be gone with the other host.
        with suppress(SystemExit):
            while True:
                message = self.inbox.get()
                if message is not None:
                    deliver(message)
                self.scheduler.get_next_batch_to_run()
                if self.scheduler.is_fully_idle():
                    self.scheduler.idle_iteration()


class TwoHosts:
    """Both loops, and an iteration of both."""

    def __init__(self) -> None:
        store = DictStore()
        self.loops = [Loop(rank, store) for rank in (0, 1)]
        # What the first receives it hands on; a later host's own socket is connected to nothing.
        self.loops[0].engine.send_to_rpc = SimpleNamespace(send_pyobj=self.iterate)
        for loop in self.loops:
            loop.thread.start()

    def iterate(self, message: object = None) -> None:
        for loop in self.loops:
            loop.inbox.put(message)

    def on_both(self, call: Callable[[Channel, int], Any]) -> list[Any]:
        def run(rank: int) -> Any:
            try:
                return call(self.loops[rank].channel, rank)
            except Exception as error:  # noqa: BLE001 - for the test
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, (0, 1)))


@pytest.fixture
def two() -> Iterator[TwoHosts]:
    hosts = TwoHosts()
    yield hosts
    for loop in hosts.loops:
        loop.channel.thread = loop.thread
    assert hosts.on_both(lambda channel, _rank: stop_scheduler(channel, timeout_s=10)) == [True, True]


def test_a_call_runs_on_both_on_their_schedulers_threads(two: TwoHosts) -> None:
    threads = two.on_both(lambda channel, _rank: channel.call(threading.current_thread, at="idle"))
    assert threads == [loop.thread for loop in two.loops]


def test_a_call_that_fails_on_one_can_fail_on_both_and_the_next_one_runs(two: TwoHosts) -> None:
    done: list[int] = []

    def drop(channel: Channel, rank: int) -> None:
        with channel.hosts.all_or_none("drop"):
            if rank == 1:
                raise EngineBusyError("planted", {"running": 1})
        done.append(rank)

    first, second = two.on_both(lambda channel, rank: channel.call(lambda: drop(channel, rank), at="idle"))
    assert str(second) == "planted"
    assert str(first) == "Host 1 could not (drop), so no host did. It says: planted"
    assert done == []
    assert two.on_both(lambda channel, rank: channel.call(lambda: rank)) == [0, 1]


def test_a_caller_that_gives_up_on_one_host_withdraws_the_call_on_both(two: TwoHosts) -> None:
    for loop in two.loops:
        loop.scheduler.waiting_queue.append("a request")
    began: list[int] = []
    gave_up = threading.Event()

    def call(channel: Channel, rank: int) -> None:
        try:
            timeout_s = 60 if rank == 0 else 0.1
            channel.call(lambda: began.append(rank), at="idle", timeout_s=timeout_s, wait_for_requests=True)
        finally:
            if rank == 1:
                gave_up.set()

    def become_idle() -> None:
        gave_up.wait(60)
        for loop in two.loops:
            loop.scheduler.waiting_queue.clear()
        two.iterate()

    idler = threading.Thread(target=become_idle)
    idler.start()
    first, second = two.on_both(call)
    idler.join()
    assert began == []
    assert isinstance(second, EngineBusyError)
    assert str(second).startswith("The engine did not become idle within 0.1 s: requests 1 waiting.")
    assert isinstance(first, EngineBusyError)
    assert str(first) == (
        "Host 1 could not (begin a call), so no host did. It says: The call was withdrawn before it had begun: the "
        "engine did not become idle in time."
    )
