"""How a caller reaches what runs on an engine's scheduler thread: the same calls, whether that thread is here or not.

What handles the buffers (a *part*: the KV cache's, the weights') lives on the scheduler's thread. Its public methods
are its operations: a caller names one and the moment, and gets what it returns or raises. In process that is a function
call handed over (``inband.py``). To another process (``remote.py``) go the operation's name and plain arguments, and
JSON comes back: nothing is unpickled from an answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Concatenate, Literal, Protocol, get_type_hints

from pydantic import TypeAdapter

from kvcycle import errors
from kvcycle.errors import KVCycleError

#: "now": between two iterations. "between": between two iterations, and no request is half-way from the prefill to the
#: running batch. "idle": no request is queued or running and the pipeline has drained, or the channel is held.
At = Literal["idle", "between", "now"]

#: How long finished requests may take to drain, where nobody says otherwise.
DRAIN_S = 60.0

_JSON: TypeAdapter[Any] = TypeAdapter(Any)


@dataclass(frozen=True)
class When:
    """The moment at which an operation runs, and how long its caller waits for that moment.

    Attributes:
        at: see :data:`At`.
        timeout_s: how long to wait; what was not started by then is withdrawn.
        wait_for_requests: with ``"idle"``, wait for queued and running requests instead of refusing.
        done: what the operation returned is put here the moment it has: a caller who is interrupted can look there.
        abandoned: asked now and then while waiting; True withdraws what was not started.
    """

    at: At = "now"
    timeout_s: float = 60.0
    wait_for_requests: bool = False
    done: list[Any] | None = None
    abandoned: Callable[[], bool] = field(default=lambda: False)


NOW = When()


class Way(Protocol):
    """The way to one engine's scheduler thread: :class:`kvcycle.inband.Channel`, or :class:`kvcycle.remote.Remote`."""

    def ask[Part, **P, T](
        self,
        part: Callable[..., Part],
        operation: Callable[Concatenate[Part, P], T],
        when: When,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run an operation of the engine's one object of that part, and return what it returns."""

    def here[Part](self, part: Callable[..., Part]) -> Part | None:
        """The part itself, made at the first call and once the engine is idle; None if it is in another process."""


@dataclass(frozen=True)
class Ask:
    """The message to a scheduler in another process: an operation by name, with plain arguments.

    ``expires_s`` is by ``time.monotonic()``, one clock for all processes of a machine: what arrives later is not begun.
    """

    ticket: int
    part: str
    operation: str
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    at: At
    wait_for_requests: bool
    expires_s: float


@dataclass(frozen=True)
class Withdraw:
    """The message that an :class:`Ask` which was not begun shall not be."""

    ticket: int


# Answers -------------------------------------------------------------------------------------------------------------


@cache
def _returns(operation: Callable[..., Any]) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(operation)["return"])


def encoded(ticket: int, operation: Callable[..., Any], result: Any) -> bytes:
    """The answer of an operation as JSON, with the id of the process that gives it."""
    plain = _returns(operation).dump_python(result, mode="json")
    return _JSON.dump_json({"ticket": ticket, "pid": os.getpid(), "result": plain})


def encoded_error(ticket: int, error: BaseException) -> bytes:
    """The answer of an operation that failed: the error's class, its sentence and its figures."""
    known = isinstance(error, KVCycleError)
    sentence = str(error) if known else f"{type(error).__name__}: {error}"
    return _JSON.dump_json(
        {
            "ticket": ticket,
            "pid": os.getpid(),
            "error": type(error).__name__,
            "sentence": sentence,
            "figures": {name: value for name, value in vars(error).items() if known and not name.startswith("_")},
        }
    )


def decoded(answer: bytes) -> dict[str, Any]:
    """The answer as a dict: ``ticket``, ``pid``, and ``result`` or ``error``, ``sentence``, ``figures``."""
    read: dict[str, Any] = _JSON.validate_json(answer)
    return read


def result_of(operation: Callable[..., Any], answer: dict[str, Any]) -> Any:
    """What the operation returned, of its own type.

    Raises:
        KVCycleError: of the class that it raised there, with the same sentence and figures.
    """
    if "error" not in answer:
        return _returns(operation).validate_python(answer["result"], strict=False)
    raise error_in(answer)


def error_in(answer: dict[str, Any]) -> KVCycleError:
    """The error in an answer: of the class that was raised there, with the same sentence and figures."""
    kind = getattr(errors, answer["error"], KVCycleError)
    if not (isinstance(kind, type) and issubclass(kind, KVCycleError)):
        kind = KVCycleError
    return kind(answer["sentence"], **{name: _figures(name, value) for name, value in answer["figures"].items()})


def _figures(name: str, value: Any) -> Any:
    """JSON has no numbers as keys, and a device's id is one."""
    return {int(device): size for device, size in value.items()} if name.endswith("_by_device") else value
