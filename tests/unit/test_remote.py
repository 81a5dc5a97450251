"""Calls to a scheduler in another process: the messages, the answers and what becomes of both, over real sockets.

The other process is a thread here, with a scheduler made of plain objects whose loop takes one message at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zmq

from kvcycle import errors, remote, service
from kvcycle.calls import NOW, Ask, When, Withdraw
from kvcycle.errors import EngineBusyError, EngineCrashedError, KVCycleError, RebuildError, UnsupportedEngineError
from kvcycle.inband import Channel
from kvcycle.kv_buffers import Freed
from kvcycle.remote import Remote
from tests.unit.engines import Scheduler010

FREED = Freed(bytes=3, bytes_by_device={0: 1, 2048: 2}, buffers=4, deleted_buffers=4, missing_delete_method=0)


class Toy:
    """A part with operations that tell what reached them."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.did: list[str] = []

    def freed(self) -> Freed:
        return FREED

    def note(self, what: str, *, times: int = 1) -> list[str]:
        self.did += [what] * times
        return self.did

    def thread(self) -> str:
        return threading.current_thread().name

    def fail(self, kind: str) -> None:
        if kind == "busy":
            raise EngineBusyError("Busy it is.", {"waiting": 1, "running": 2})
        if kind == "no room":
            raise RebuildError("No room.", {0: 10, 2048: 20}, {0: 5})
        if kind == "state":
            raise errors.KVCacheStateError("Not now.")
        raise ZeroDivisionError("by zero")

    def not_json(self) -> Any:
        return threading.Lock()

    def _hidden(self) -> None:
        self.did.append("hidden")


class Host:
    """The scheduler's process: a loop in a thread that takes a message, then asks for a batch, or idles."""

    def __init__(self, socket: Any, near: Any) -> None:
        self.near = near
        self.scheduler: Any = Scheduler010()
        vars(self.scheduler).update(recv_from_rpc=socket, get_next_batch_to_run=lambda: "batch")
        self.service = service.Service(self.scheduler)
        self.toy = self.service._channel.part(Toy)
        self.answers = True
        self.stop = False
        self.thread = threading.Thread(target=self._loop, name="scheduler")
        self.thread.start()

    def _loop(self) -> None:
        while not self.stop:
            if self.scheduler.recv_from_rpc.poll(10) and self.answers:
                message = self.scheduler.recv_from_rpc.recv_pyobj()
                for kind, handler in self.scheduler._request_dispatcher._mapping:
                    if isinstance(message, kind):
                        handler(message)
            if self.answers:
                self.scheduler.get_next_batch_to_run()
                self.scheduler.idle_iteration()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(service, "_PARTS", {"Toy": Toy})
    context: Any = zmq.Context.instance()
    near, far = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    address = f"inproc://{uuid.uuid4()}"  # a socket that is closed keeps its address a little longer
    near.bind(address)
    far.connect(address)
    host = Host(far, near)
    yield host
    host.stop = True
    host.thread.join()
    far.close()


@pytest.fixture
def way(host: Host) -> Iterator[Remote]:
    remote = Remote(host.near)
    yield remote
    remote.close()


def test_an_operation_runs_on_the_schedulers_thread_and_its_result_keeps_its_type(way: Remote, host: Host) -> None:
    assert way.here(Toy) is None
    assert way.ask(Toy, Toy.thread, NOW) == "scheduler"
    assert way.ask(Toy, Toy.freed, NOW) == FREED  # with devices' ids as numbers, which JSON has not
    assert way.ask(Toy, Toy.note, NOW, "a", times=2) == ["a", "a"]


@pytest.mark.parametrize(
    ("kind", "error", "sentence", "figures"),
    [
        ("busy", EngineBusyError, "Busy it is.", {"counts": {"waiting": 1, "running": 2}}),
        (
            "no room",
            RebuildError,
            "No room.",
            {"needed_bytes_by_device": {0: 10, 2048: 20}, "free_bytes_by_device": {0: 5}},
        ),
        ("state", errors.KVCacheStateError, "Not now.", {}),
        ("other", KVCycleError, "ZeroDivisionError: by zero", {}),
    ],
)
def test_an_error_comes_back_as_what_it_was(
    way: Remote, kind: str, error: type[KVCycleError], sentence: str, figures: dict[str, Any]
) -> None:
    with pytest.raises(error) as caught:
        way.ask(Toy, Toy.fail, NOW, kind)
    assert type(caught.value) is error
    assert str(caught.value) == sentence
    assert vars(caught.value) == figures
    assert way.ask(Toy, Toy.thread, NOW) == "scheduler"  # and the loop lives


def test_a_result_that_is_not_json_is_an_error_and_no_silence(way: Remote) -> None:
    with pytest.raises(KVCycleError, match="Unable to serialize unknown type"):
        way.ask(Toy, Toy.not_json, NOW)


def test_what_is_no_operation_is_refused(way: Remote, host: Host) -> None:
    with pytest.raises(UnsupportedEngineError, match=r"knows no operation Toy\._hidden\(\); both processes need the"):
        way.ask(Toy, Toy._hidden, NOW)
    for part, operation in (("Tay", "note"), ("Toy", "channel"), ("Toy", "__init__"), ("Toy", "fly")):
        with pytest.raises(UnsupportedEngineError):
            service._operation(Ask(1, part, operation, ((), {}), "now", False, 0))
    assert host.toy.did == []


def test_arrays_are_not_handed_over(way: Remote, host: Host) -> None:
    with pytest.raises(UnsupportedEngineError, match=r"note\(\) was given what cannot be handed to the engine"):
        way.ask(Toy, Toy.note, NOW, [np.zeros(1)])  # type: ignore[arg-type] # on purpose
    assert host.toy.did == []


def test_a_busy_engine_is_refused_at_once_or_waited_for(way: Remote, host: Host) -> None:
    host.scheduler.waiting_queue.append("request")
    with pytest.raises(EngineBusyError, match=r"The engine is busy: requests 1 waiting\.") as caught:
        way.ask(Toy, Toy.note, When("idle"), "at once")
    assert caught.value.counts == {"waiting": 1, "running": 0}
    threading.Timer(0.1, host.scheduler.waiting_queue.clear).start()
    assert way.ask(Toy, Toy.note, When("idle", wait_for_requests=True), "later") == ["later"]


@pytest.mark.parametrize("how", ["deadline", "abandoned"])
def test_what_did_not_begin_in_time_never_begins(
    way: Remote, host: Host, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.scheduler.waiting_queue.append("request")

    def waits() -> bool:
        return bool(host.service._unanswered)

    when = When("idle", 60, wait_for_requests=True, abandoned=waits)
    if how == "deadline":
        when = When("idle", 60, wait_for_requests=True)
        an_hour_later = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * waits())
        monkeypatch.setattr(remote, "time", an_hour_later)
    with pytest.raises(EngineBusyError, match=r"did not become idle within [\d.]+ s: requests 1 waiting\."):
        way.ask(Toy, Toy.note, when, "too late")
    host.scheduler.waiting_queue.clear()
    assert way.ask(Toy, Toy.note, When("idle"), "in time") == ["in time"]


def answer_once_it_is_withdrawn(way: Remote, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that reads nothing until its caller has given up."""
    host.answers = False
    send = way._wire.send_only

    def send_then_answer(message: object) -> None:
        send(message)
        if isinstance(message, Withdraw):
            host.answers = True

    monkeypatch.setattr(way._wire, "send_only", send_then_answer)


def test_what_arrives_after_its_deadline_does_not_begin(
    way: Remote, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that compiles for a minute reads the call and its withdrawal in one go, and is idle then."""
    monkeypatch.setattr(remote, "_POLL_S", 0.01)
    answer_once_it_is_withdrawn(way, host, monkeypatch)
    with pytest.raises(EngineBusyError, match="was asked too late"):
        way.ask(Toy, Toy.note, When(timeout_s=0.05), "too late")
    assert way.ask(Toy, Toy.note, NOW, "in time") == ["in time"]


def test_a_scheduler_without_a_word_is_told_after_the_grace(
    way: Remote, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_POLL_S", 0.01)
    monkeypatch.setattr(remote, "GRACE_S", 0.1)
    host.answers = False
    with pytest.raises(EngineCrashedError) as caught:
        way.ask(Toy, Toy.note, When(timeout_s=0.1), "lost")
    assert str(caught.value) == (
        "The engine's scheduler does not answer: note() was withdrawn from it after 0.1 s, and 0.1 s later there is no "
        "word. If it lives, it begins nothing of this any more; what it had begun, its state will say."
    )
    host.answers = True
    assert way.ask(Toy, Toy.note, NOW, "in time") == ["in time"]  # and the late answer is nobody's


@pytest.mark.parametrize("ended", [False, True])
def test_a_scheduler_whose_process_has_ended_is_told_at_once(
    way: Remote, host: Host, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    way.ask(Toy, Toy.thread, NOW)  # by whose answer its process is known
    answer_once_it_is_withdrawn(way, host, monkeypatch)
    monkeypatch.setattr(remote, "_lives", lambda pid: not (ended and pid == os.getpid()))
    with pytest.raises(EngineCrashedError if ended else EngineBusyError) as caught:
        way.ask(Toy, Toy.note, When(timeout_s=60 if ended else 0.01), "lost")
    if ended:
        assert str(caught.value) == (
            f"The engine's scheduler does not answer: its process (pid {os.getpid()}) has ended. Boot the engine anew."
        )


def test_a_process_that_was_killed_does_not_live_while_nobody_has_asked_for_its_end() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert remote._lives(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not remote._lives(process.pid)
    assert not remote._lives(process.pid)


def test_an_interrupted_caller_finds_it_undone_or_knows_what_was_done(
    way: Remote, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            if timeout is not None:
                time.sleep(self.after_s)
                raise KeyboardInterrupt
            return super().result()

        after_s = 0.0

    monkeypatch.setattr(remote, "Future", Interrupted)
    host.scheduler.waiting_queue.append("request")
    done: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        way.ask(Toy, Toy.note, When("idle", wait_for_requests=True, done=done), "undone")
    host.scheduler.waiting_queue.clear()
    monkeypatch.setattr(Interrupted, "after_s", 0.3)
    with pytest.raises(KeyboardInterrupt):
        way.ask(Toy, Toy.note, When("idle", done=done), "done")
    assert done == [["done"]]
    assert host.toy.did == ["done"]


def test_callers_on_many_threads_get_their_own_answers(way: Remote) -> None:
    answers: dict[int, Any] = {}

    def ask(number: int) -> None:
        try:
            way.ask(Toy, Toy.fail, NOW, "busy" if number % 2 else "state")
        except KVCycleError as error:
            answers[number] = type(error).__name__

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: "EngineBusyError" if n % 2 else "KVCacheStateError" for n in range(32)}


def test_while_something_is_released_no_batch_is_made_and_requests_wait(way: Remote, host: Host) -> None:
    """Of an engine in another process nothing refuses requests: they stay in the queue until the resume."""
    channel = host.service._channel
    channel.refuse_requests(lambda: KVCycleError("in process, a caller would wait for itself"))
    assert host.scheduler.get_next_batch_to_run() == "batch"
    channel.lacking.add("kv_cache")
    assert host.scheduler.get_next_batch_to_run() is None
    host.scheduler.waiting_queue.append("request")
    assert way.ask(Toy, Toy.note, When("idle"), "held counts as idle") == ["held counts as idle"]
    assert host.scheduler.waiting_queue == ["request"]
    channel.lacking.clear()
    assert host.scheduler.get_next_batch_to_run() == "batch"


def test_an_engine_elsewhere_without_kvcycle_is_told_what_to_boot() -> None:
    stock = SimpleNamespace(scheduler_info={"status": "ready"}, server_args=SimpleNamespace(), send_to_rpc=None)
    with pytest.raises(UnsupportedEngineError) as caught:
        remote.way_to(stock)
    assert str(caught.value) == (
        "The engine's scheduler runs in another process; boot the Engine with enable_single_process=True, or, to drop "
        "and rebuild its KV cache from here, with Engine(server_args=kvcycle.ServerArgs(...))."
    )
