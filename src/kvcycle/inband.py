"""Runs calls on the engine's own scheduler thread, between two iterations of its loop.

What touches the buffers must not race a forward, and a forward takes them away (donates) and puts new ones back. So it
is sent to the scheduler as a message, which its dispatcher hands to us on its thread. The private API that this needs,
seen on sglang-jax 0.1.0rc0 and 0.0.3rc0 (the rest stands in ``internals.py`` and ``internals_processes.py``):

- ``scheduler._request_dispatcher._mapping``: (type, handler) pairs, tried in order;
- ``engine.send_to_rpc``: a socket whose messages the scheduler's loop receives;
- the loop's idle work: done when nothing runs and the pipeline is empty; not while the user has paused the engine;
- ``scheduler.get_next_batch_to_run()``: called once an iteration; while the channel is *held* it returns no batch, so
  that requests queue and nothing is forwarded, whatever else continues or pauses the engine.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Concatenate, cast

from kvcycle import rendezvous
from kvcycle.calls import At, When
from kvcycle.errors import EngineBusyError, EngineCrashedError
from kvcycle.hosts import Hosts
from kvcycle.internals import (
    after_idle_work,
    between_batches,
    is_fully_idle,
    rank_and_count,
    refuse_requests,
    scheduler_of,
    unfinished_requests,
    warn_if_untested,
)
from kvcycle.internals_processes import SharedStore

#: How often a waiting caller looks whether the engine has died meanwhile.
_POLL_S = 0.25

#: The longest that making a part, or anything else that allocates and copies whole caches, may take.
ATTACH_S = 600.0

#: How long an interrupted caller waits for the end of what has begun; what takes longer may never end.
_INTERRUPTED_S = 10.0


@dataclass(frozen=True)
class Call:
    """The message: only a ticket, since it is pickled on its way to the scheduler's thread."""

    ticket: int


@dataclass(frozen=True)
class Stop:
    """The message that ends the scheduler's thread, on every host."""


@dataclass
class Pending:
    """A call on its way to the right moment on the scheduler's thread, and what becomes of it."""

    function: Callable[[], Any]
    at: At
    wait_for_requests: bool
    #: By time.monotonic(): a call that comes to be looked at later is not begun.
    expires_s: float = math.inf
    since_s: float = field(default_factory=time.monotonic)
    #: What is called, for hosts that compare; and its number, the same on every host.
    what: str = "a call"
    ticket: int = 0
    future: Future[Any] = field(default_factory=Future)

    def refuse(self, error: Exception) -> None:
        """Answer with the error, unless the caller has given up."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Channel:
    """The way into one engine's scheduler thread; made once per engine by :func:`channel_of`."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.scheduler = scheduler_of(engine)
        #: The engine's hosts: what one of them cannot do, none does.
        self.hosts = _hosts_of(self.scheduler)
        #: What killed the engine, set by whoever notices (see containment.py); None while it lives.
        self.crash: str | None = None
        #: The scheduler's thread, known after the first call.
        self.thread: threading.Thread | None = None
        #: What the engine lacks for a forward ("kv_cache", "weights"); set and cleared on the scheduler's thread.
        self.lacking: set[str] = set()
        self._tickets = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._deferred: list[Pending] = []
        self._send_lock = threading.Lock()
        self._parts: dict[Callable[..., Any], Any] = {}
        self._install()

    @property
    def held(self) -> bool:
        """While True no batch is forwarded; requests that reach the scheduler wait in its queue."""
        return bool(self.lacking)

    def part[Part](self, part: Callable[[Channel], Part]) -> Part:
        """The engine's one object of this part (see ``calls.py``); on the scheduler's thread, where it is made."""
        if part not in self._parts:
            self._parts[part] = part(self)
        return cast(Part, self._parts[part])

    def here[Part](self, part: Callable[[Channel], Part]) -> Part:
        """The same for a caller on any thread: made, where it is new, once the engine is idle."""
        if (found := self._parts.get(part)) is not None:
            return cast(Part, found)
        return self.call(
            lambda: self.part(part), at="idle", timeout_s=ATTACH_S, what=f"attach {getattr(part, '__qualname__', part)}"
        )

    def ask[Part, **P, T](
        self,
        part: Callable[[Channel], Part],
        operation: Callable[Concatenate[Part, P], T],
        when: When,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run an operation of a part, as :class:`kvcycle.calls.Way` has it; raises what :meth:`call` raises."""

        def run() -> T:
            result: T = getattr(self.part(part), operation.__name__)(*args, **kwargs)
            if when.done is not None:
                when.done.append(result)
            return result

        return self.call(
            run,
            at=when.at,
            timeout_s=when.timeout_s,
            wait_for_requests=when.wait_for_requests,
            abandoned=when.abandoned,
            what=operation.__qualname__,
        )

    def take[Message](self, kind: type[Message], handler: Callable[[Message], None]) -> None:
        """Let the scheduler's loop hand messages of this kind to ``handler``, on its thread; it must not raise."""
        self.scheduler._request_dispatcher._mapping.append((kind, handler))

    def refuse_requests(self, reason: Callable[[], Exception | None]) -> None:
        """Let requests fail in their callers with what ``reason()`` returns, where their callers are in this process.

        In process a waiting caller would wait for itself. Another process's requests wait in the scheduler's queue.
        """
        if getattr(self.engine, "tokenizer_manager", None) is not None:
            refuse_requests(self.engine, reason)

    def call[T](
        self,
        function: Callable[[], T],
        *,
        at: At = "now",
        timeout_s: float = 60.0,
        wait_for_requests: bool = False,
        abandoned: Callable[[], bool] = lambda: False,
        what: str = "a call",
    ) -> T:
        """Run ``function`` on the scheduler's thread and return what it returns.

        Args:
            function: what to run; whatever it raises is raised here, and never reaches the scheduler's loop.
            at: the moment, see :data:`At`. ``"idle"`` also waits for the pipeline of finished requests to drain.
            timeout_s: how long to wait for the moment; a call that was not started by then is withdrawn.
            wait_for_requests: with ``"idle"``, wait for queued and running requests instead of refusing.
            abandoned: asked now and then while waiting; True withdraws a call that was not started.
            what: on several hosts each makes the call, and they compare this.

        Raises:
            EngineBusyError: requests are queued or running, or still were when the time was up.
            EngineCrashedError: the engine is dead, or died meanwhile.
        """
        if self.crash is not None:
            raise EngineCrashedError(f"The engine is dead and can only be closed: {self.crash}")
        pending = Pending(function, at, wait_for_requests, what=what)
        self.send(pending)
        return cast(T, self._await(pending, timeout_s, abandoned))

    def send(self, pending: Pending) -> None:
        """Send the message to the scheduler's thread, and do not wait for an answer."""
        with self._send_lock:  # the socket is not thread-safe
            pending.ticket = next(self._tickets)
            self._pending[pending.ticket] = pending
            self.hosts.agree(pending.what)  # every host has its function ready when the message comes
            if self.hosts.is_first:  # sglang-jax hands on to the others what the first receives
                self.engine.send_to_rpc.send_pyobj(Call(pending.ticket))

    def tell_to_stop(self) -> None:
        """Send the message that ends the scheduler's thread."""
        with self._send_lock:
            self.engine.send_to_rpc.send_pyobj(Stop())

    def _await(self, pending: Pending, timeout_s: float, abandoned: Callable[[], bool]) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                left_s = deadline - time.monotonic()
                return pending.future.result(timeout=min(left_s, _POLL_S) if left_s > 0 else _POLL_S)
            except FutureTimeoutError:
                if pending.future.done():
                    return pending.future.result()
            except (KeyboardInterrupt, SystemExit):
                # Either it never happens, or it has happened: the caller must not be left in between.
                if not pending.future.cancel():
                    wait([pending.future], timeout=_INTERRUPTED_S)
                raise
            if self.crash is not None:
                raise EngineCrashedError(f"The engine died while it was asked: {self.crash}")
            # A call that has begun is not withdrawn: cancel() says False, and its end is awaited.
            if (time.monotonic() > deadline or abandoned()) and pending.future.cancel():
                raise not_idle(timeout_s, unfinished_requests(self.scheduler))

    def _install(self) -> None:
        self.take(Call, self._receive)
        self.take(Stop, _stop)
        next_batch = self.scheduler.get_next_batch_to_run

        def next_batch_unless_held() -> Any:
            self._run_deferred("between")
            return None if self.held else next_batch()

        after_idle_work(self.scheduler, lambda: self._run_deferred("idle"))
        self.scheduler.get_next_batch_to_run = next_batch_unless_held

    def _run_deferred(self, at: At) -> None:
        if any(pending.at == at for pending in self._deferred) and self._has_come(at):
            due = [pending for pending in self._deferred if pending.at == at]
            self._deferred = [pending for pending in self._deferred if pending.at != at]
            for pending in due:
                self._run(pending)

    def _has_come(self, at: At) -> bool:
        if at == "idle":
            return self.held or is_fully_idle(self.scheduler)
        return at == "now" or between_batches(self.scheduler)

    def _receive(self, message: Call) -> None:
        self.thread = threading.current_thread()
        if (pending := self._pending.pop(message.ticket, None)) is not None:
            self.admit(pending)

    def admit(self, pending: Pending) -> None:
        """On the scheduler's thread: run now, put off to the right moment, or refuse."""
        if time.monotonic() <= pending.expires_s and self._has_come(pending.at):
            self._run(pending)
            return
        counts = unfinished_requests(self.scheduler)
        if time.monotonic() > pending.expires_s:
            pending.refuse(EngineBusyError(f"The engine was asked too late: {_counts_text(counts)}.", counts))
        elif pending.at == "idle" and any(counts.values()) and not pending.wait_for_requests:
            pending.refuse(
                EngineBusyError(
                    f"The engine is busy: {_counts_text(counts)}. Wait for the requests, or see drop(wait_s=…) "
                    "and drop(mode='abort' or 'retract').",
                    counts,
                )
            )
        else:
            # A reply is sent before the pipeline behind it has drained, so a call right after a generate() waits here.
            self._deferred.append(pending)

    def _run(self, pending: Pending) -> None:
        begins = pending.future.set_running_or_notify_cancel()
        try:
            with self.hosts.in_call(pending.ticket):
                self.hosts.agree(f"begin {pending.what}", None if begins else _withdrawn())
                result = pending.function()
        except BaseException as error:  # noqa: BLE001 - the scheduler's loop must never see it: it would kill the process
            if begins:
                pending.future.set_exception(error)
        else:
            pending.future.set_result(result)

    def withdraw(self, pending: Pending) -> None:
        """On the scheduler's thread: a call that was not begun shall not be."""
        waited_s = time.monotonic() - pending.since_s
        pending.refuse(not_idle(waited_s, unfinished_requests(self.scheduler)))
        self._deferred = [other for other in self._deferred if other is not pending]


def not_idle(timeout_s: float, counts: dict[str, int]) -> EngineBusyError:
    """What a call that was withdrawn at its deadline raises."""
    return EngineBusyError(
        f"The engine did not become idle within {round(timeout_s, 2):g} s: {_counts_text(counts)}. "
        "Wait for the requests, abort them, or allow more time.",
        counts,
    )


def _withdrawn() -> EngineBusyError:
    """What a host whose caller has given up tells the others, so that none begins."""
    return EngineBusyError("The call was withdrawn before it had begun: the engine did not become idle in time.", {})


def _hosts_of(scheduler: Any) -> Hosts:
    rank, count = rank_and_count(scheduler)
    if count == 1:
        return Hosts()
    rendezvous.watch(rank, count)
    return Hosts(rank, count, SharedStore(), name=f"engine{next(_engines)}")


_engines = itertools.count()


def _stop(_message: Stop) -> None:
    raise SystemExit  # threading ends the thread quietly on it, and the loop catches only Exception


def _counts_text(counts: dict[str, int]) -> str:
    named = [f"{number} {place}" for place, number in counts.items() if number]
    return "requests " + ", ".join(named) if named else "no request is left, but its pipeline has not drained"


_CHANNEL = "_kvcycle_channel"
_install_lock = threading.Lock()


def channel_of(engine: Any) -> Channel:
    """The engine's channel, made at the first call.

    Raises:
        UnsupportedEngineError: ``engine`` is not an in-process sglang-jax Engine, or lacks what the channel needs.
    """
    with _install_lock:
        channel = getattr(engine, _CHANNEL, None)
        if not isinstance(channel, Channel):
            channel = Channel(engine)
            warn_if_untested()
            setattr(engine, _CHANNEL, channel)
        return channel


def stop_scheduler(channel: Channel, *, timeout_s: float = 30.0) -> bool:
    """End the scheduler's thread, and under overlap the forward thread, so that leaving the process does not crash.

    The loop catches ``Exception``, so ``SystemExit`` from a message ends just this thread; ``Engine.shutdown()`` does
    not stop it, and an interpreter that ends under a running forward dies of a segmentation fault.

    Returns:
        Whether both threads have ended; one that waits for a device which does not answer cannot be ended.
    """
    deadline = time.monotonic() + timeout_s
    threads = [channel.thread]
    with _quiet_exit():
        if channel.thread is not None and channel.thread.is_alive():
            if channel.hosts.is_first:
                channel.tell_to_stop()
            channel.thread.join(timeout_s)
    worker = channel.scheduler.tp_worker
    if (queue := getattr(worker, "input_queue", None)) is not None:
        queue.put((None, None, None, None))  # what forward_thread_func_ takes for the end
        worker.forward_thread.join(max(0.0, deadline - time.monotonic()))
        threads.append(worker.forward_thread)
    return not any(thread is None or thread.is_alive() for thread in threads)


@contextmanager
def _quiet_exit() -> Iterator[None]:
    """Keep a thread's SystemExit from hooks that report it: Python's own ignores it, pytest's does not."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs, /) -> None:
        if arguments.exc_type is not SystemExit:
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
