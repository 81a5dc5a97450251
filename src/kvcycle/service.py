"""The end of ``remote.py`` in the scheduler's process: takes messages and answers them between two of its iterations.

:func:`install` lets every Scheduler that this process makes from now on be served, as the last thing of its making,
when no request has come yet. What cannot be served fails the boot, not the first release. Requests that arrive while
something is released wait in the scheduler's queue.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import jax
import zmq

from kvcycle import compiles, inband, internals, internals_processes
from kvcycle.calls import Ask, Withdraw, encoded, encoded_error
from kvcycle.errors import UnsupportedEngineError
from kvcycle.kv_buffers import Buffers
from kvcycle.occupation import Occupier
from kvcycle.weights import Holder

#: What can be asked for, by name: the public methods of these.
_PARTS: dict[str, type[Any]] = {part.__name__: part for part in (Buffers, Holder, Occupier)}

_log = logging.getLogger(__name__)


def install() -> None:
    """Serve every Scheduler that this process makes from now on; once is enough."""
    internals_processes.after_making_schedulers(Service)


def check_served(arguments: Any) -> None:
    """Refuse, before anything boots, an engine that could not be served; ``arguments`` is sglang-jax's ServerArgs.

    Raises:
        UnsupportedEngineError: it is on several hosts, disaggregated, or multimodal with several stages.
    """
    refused = {
        "nnodes": 1,
        "multimodal": False,
        "disaggregation_mode": "null",
        "pd_disaggregation": None,
    }
    for name, usual in refused.items():
        value = getattr(arguments, name, usual)
        if value and value != usual:
            raise UnsupportedEngineError(
                f"kvcycle cannot serve an engine with {name}={value!r}: its memory is not one scheduler's to release. "
                f"Start it without that, or with sgl_jax.launch_server and without release_memory_occupation."
            )


class Service:
    """Takes and answers the messages of one scheduler.

    Raises:
        UnsupportedEngineError: the engine is of a kind that cannot be dropped and rebuilt.
    """

    def __init__(self, scheduler: Any) -> None:
        check_served(getattr(scheduler, "server_args", None))
        # What kvcycle calls an engine, as far as it is in this process; without the requests' side.
        self._channel = inband.Channel(SimpleNamespace(scheduler_info={"scheduler": scheduler}))
        compiles.total()  # counts from now on: the first generation is the control of every zero after it
        for part in _PARTS.values():
            self._channel.part(part)
        self._socket = internals_processes.answer_socket(scheduler)
        self._unanswered: dict[int, inband.Pending] = {}
        self._channel.take(Ask, self._receive)
        self._channel.take(Withdraw, self._withdraw)
        if jax.default_backend() == "cpu":
            internals.rest_when_idle(scheduler)
            internals.own_batch_arrays()

    def _receive(self, message: Ask) -> None:
        """On the scheduler's thread, as all of this; whatever is wrong is an answer, never the loop's."""
        try:
            operation = _operation(message)
        except UnsupportedEngineError as error:
            self._send(encoded_error(message.ticket, error))
            return
        args, kwargs = message.arguments
        part = _PARTS[message.part]
        pending = inband.Pending(
            lambda: operation(self._channel.part(part), *args, **kwargs),
            message.at,
            message.wait_for_requests,
            message.expires_s,
        )
        self._unanswered[message.ticket] = pending
        pending.future.add_done_callback(functools.partial(self._answer, message.ticket, operation))
        self._channel.admit(pending)

    def _withdraw(self, message: Withdraw) -> None:
        if (pending := self._unanswered.get(message.ticket)) is not None:
            self._channel.withdraw(pending)

    def _answer(self, ticket: int, operation: Callable[..., Any], future: Future[Any]) -> None:
        self._unanswered.pop(ticket, None)
        error = future.exception()
        try:
            answer = encoded(ticket, operation, future.result()) if error is None else encoded_error(ticket, error)
        except (TypeError, ValueError) as unknown:  # not JSON: it happened all the same, and the caller must be told
            answer = encoded_error(ticket, unknown)
        self._send(answer)

    def _send(self, answer: bytes) -> None:
        try:
            self._socket.send(answer, zmq.NOBLOCK)
        except zmq.ZMQError as error:  # nobody is there to be told
            _log.error("kvcycle could not answer: %s", error)


def _operation(message: Ask) -> Callable[..., Any]:
    part = _PARTS.get(message.part)
    found = getattr(part, message.operation, None)
    if part is None or message.operation.startswith("_") or not inspect.isfunction(found):
        raise UnsupportedEngineError(
            f"The scheduler's process knows no operation {message.part}.{message.operation}(); both processes need the "
            "same kvcycle."
        )
    return found
