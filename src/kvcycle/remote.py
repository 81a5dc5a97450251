"""The way to a scheduler in another process: an operation's name goes there as a message, JSON comes back.

Used by ``KVCache`` and others for an Engine booted with :class:`kvcycle.ServerArgs`, and by ``kvcycle.serve``. The
other end is ``service.py``. The socket is the engine's own ``send_to_rpc``, an ipc socket that only this user can open;
stock sglang-jax reads nothing from it on this end, so the answers are ours alone.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Concatenate, cast

import psutil
import zmq

from kvcycle.calls import Ask, Way, When, Withdraw, decoded, result_of
from kvcycle.errors import EngineCrashedError, UnsupportedEngineError
from kvcycle.inband import channel_of
from kvcycle.internals_processes import is_served_elsewhere

#: How often a waiting caller looks at its deadline.
_POLL_S = 0.25

#: How long the scheduler may take to answer what was withdrawn: it does between two iterations of its loop.
GRACE_S = 30.0

_PLAIN = (bool, int, float, str, type(None))
_REMOTE = "_kvcycle_remote"
_attach_lock = threading.Lock()


def way_to(engine: Any) -> Way:
    """The way to the engine's scheduler thread, wherever that is; made at the first call.

    Raises:
        UnsupportedEngineError: it is no sglang-jax Engine, or its scheduler runs elsewhere and was not prepared for it.
    """
    if not is_served_elsewhere(engine):
        return channel_of(engine)
    with _attach_lock:
        remote = getattr(engine, _REMOTE, None)
        if not isinstance(remote, Remote):
            remote = Remote(engine.send_to_rpc)
            setattr(engine, _REMOTE, remote)
        return remote


class Remote:
    """The way to one scheduler in another process, over a socket that nobody else reads; for callers on any thread."""

    def __init__(self, socket: Any) -> None:
        self._wire = _Wire(socket)

    def here[Part](self, part: Callable[..., Part]) -> Part | None:  # noqa: ARG002 - as kvcycle.calls.Way has it
        """None: the parts are in the other process."""
        return None

    def ask[Part, **P, T](
        self,
        part: Callable[..., Part],
        operation: Callable[Concatenate[Part, P], T],
        when: When,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run an operation there, as :class:`kvcycle.calls.Way` has it.

        Raises:
            EngineBusyError: the moment did not come in time; nothing was done.
            EngineCrashedError: the scheduler does not answer.
            KVCycleError: whatever the operation raised.
        """
        name = f"{operation.__name__}()"
        if not _is_plain((args, kwargs)):
            raise UnsupportedEngineError(
                f"{name} was given what cannot be handed to the engine, whose scheduler runs in another process. "
                "Device arrays live in one process: use an Engine with enable_single_process=True."
            )
        deadline = time.monotonic() + when.timeout_s
        ticket = self._wire.new_ticket()
        plain: Any = (args, kwargs)
        future = self._wire.send(
            Ask(ticket, part.__name__, operation.__name__, plain, when.at, when.wait_for_requests, deadline)
        )
        if when.done is not None:
            done = when.done
            future.add_done_callback(lambda ended: _note(ended, operation, done))
        return cast(T, result_of(operation, self._await(name, ticket, future, deadline, when)))

    def close(self) -> None:
        """End the thread and close the socket; nothing can be asked any more."""
        self._wire.close()

    def _await(self, name: str, ticket: int, future: Future[Any], deadline: float, when: When) -> dict[str, Any]:
        withdrawn = False
        while True:
            try:
                answer: dict[str, Any] = future.result(timeout=_POLL_S)
                return answer
            except FutureTimeoutError:
                pass
            except (KeyboardInterrupt, SystemExit):
                # Either it never happens, or it has happened: the caller must not be left in between.
                self._wire.send_only(Withdraw(ticket))
                wait([future], timeout=GRACE_S)
                raise
            if self._wire.peer is not None and not _lives(self._wire.peer):
                self._wire.forget(ticket)
                raise EngineCrashedError(
                    f"The engine's scheduler does not answer: its process (pid {self._wire.peer}) has ended. Boot the "
                    "engine anew."
                )
            if not withdrawn and (time.monotonic() > deadline or when.abandoned()):
                withdrawn, deadline = True, time.monotonic()
                self._wire.send_only(Withdraw(ticket))
            if withdrawn and time.monotonic() > deadline + GRACE_S:
                self._wire.forget(ticket)
                raise EngineCrashedError(
                    f"The engine's scheduler does not answer: {name} was withdrawn from it after {when.timeout_s:g} s, "
                    f"and {GRACE_S:g} s later there is no word. If it lives, it begins nothing of this any more; what "
                    "it had begun, its state will say."
                )


def _note(ended: Future[Any], operation: Callable[..., Any], done: list[Any]) -> None:
    answer = ended.result()
    if "error" not in answer:
        done.append(result_of(operation, answer))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(_is_plain(item) for item in value))


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


class _Wire:
    """The thread that alone touches the socket: it sends what callers give it, and hands answers to who waits."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._tickets = itertools.count(1)
        #: The process that answers, known after its first answer.
        self.peer: int | None = None
        context: Any = zmq.Context.instance()
        receiver, self._bell = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self._bell_lock = threading.Lock()
        receiver.bind(f"inproc://kvcycle-{id(self)}")
        self._bell.connect(f"inproc://kvcycle-{id(self)}")
        self._thread = threading.Thread(target=self._run, args=(receiver,), name="kvcycle-remote", daemon=True)
        self._thread.start()

    def new_ticket(self) -> int:
        return next(self._tickets)

    def send(self, message: Ask) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        self._waiting[message.ticket] = future
        self.send_only(message)
        return future

    def send_only(self, message: object) -> None:
        self._outbox.put(message)
        with self._bell_lock:  # a socket is not thread-safe
            self._bell.send(b"")

    def forget(self, ticket: int) -> None:
        self._waiting.pop(ticket, None)

    def close(self) -> None:
        self.send_only(None)
        self._thread.join()
        self._bell.close()

    def _run(self, receiver: Any) -> None:
        poller = zmq.Poller()
        poller.register(receiver, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        while True:
            for socket, _ in poller.poll():
                if socket is receiver:
                    receiver.recv()
                    if (message := self._outbox.get()) is None:
                        receiver.close()
                        self._socket.close()
                        return
                    self._socket.send_pyobj(message)
                    continue
                answer = decoded(self._socket.recv())
                self.peer = answer["pid"]
                if (future := self._waiting.pop(answer["ticket"], None)) is not None:
                    future.set_result(answer)
