"""The hosts of one engine: JAX processes that each own some of the devices, of which the first takes the requests.

Every host makes the same calls in the same order. What must happen on all or on none is agreed upon first, and what one
host has measured is told to the first. Both go as text through the key-value store of ``jax.distributed``: exact, with
deadlines, and without compiling anything, where a collective that one host does not reach would wait for ever.

On one host all of this does nothing.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from kvcycle.calls import encoded_error, error_in
from kvcycle.errors import HostLostError, HostsDisagreeError

#: How long a host may take to come to where the others are; it may be compiling. One that dies is noticed earlier.
ANSWER_S = 600.0

#: How often a host that waits looks whether another was lost meanwhile.
_POLL_S = 0.5


class Store(Protocol):
    """The key-value store that all hosts share: :class:`kvcycle.internals_processes.SharedStore`."""

    def set(self, key: str, value: str) -> None:
        """Set a key, also one that is set already."""

    def wait_for(self, key: str, timeout_s: float) -> str | None:
        """The value of a key, once it is set; None if it was not within ``timeout_s``."""

    def below(self, folder: str) -> dict[str, str]:
        """The keys that are set below ``folder/``, without it, and their values."""

    def delete(self, key: str) -> None:
        """Delete a key, or all below it."""


# A loss is the process's, as jax's own view of the other hosts is ---------------------------------------------------

_lost: list[str] = []
_listeners: list[Callable[[str], None]] = []


def lose(sentence: str) -> None:
    """Note that another host is lost, once and for all: whoever waits for it raises, and who listens is told."""
    if not _lost:
        _lost.append(sentence)
        for listener in _listeners:
            listener(sentence)


def lost() -> str | None:
    """Why the hosts can do nothing together any more; None while they can."""
    return _lost[0] if _lost else None


def listen(listener: Callable[[str], None]) -> Callable[[], None]:
    """Tell ``listener`` when a host is lost, on whatever thread finds out; returns what ends that."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


class Hosts:
    """The hosts of one engine as one of them sees them.

    Args:
        rank: this host's number.
        count: how many there are.
        store: what they share; None for one host.
        name: the same on every host, and no other engine's.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Store | None = None, name: str = "") -> None:
        self.rank, self.count = rank, count
        self._store, self._name = store, name
        self._callers_turns = itertools.count()
        # The scheduler's thread and its callers' meet the other hosts independently of each other.
        self._call = threading.local()
        #: Keys that every host has read once it has come to the next meeting, by the thread that meets there.
        self._read_by_then: dict[bool, list[str]] = {False: [], True: []}

    @property
    def several(self) -> bool:
        """Whether there is another host than this one."""
        return self.count > 1

    @property
    def is_first(self) -> bool:
        """Whether this host takes the requests, judges and writes."""
        return self.rank == 0

    @contextmanager
    def in_call(self, ticket: int) -> Iterator[None]:
        """On the scheduler's thread: the meetings in the ``with`` block are this call's."""
        self._call.turns = (f"call{ticket}", itertools.count())
        try:
            yield
        finally:
            del self._call.turns

    def gather(self, what: str, mine: str, timeout_s: float = ANSWER_S) -> list[str]:
        """Tell the first host ``mine``; it gets what every host has told, by rank, the others get [].

        Args:
            what: what is told, the same on every host.
            mine: any text.
            timeout_s: how long the first waits for the others.

        Raises:
            HostLostError: a host is lost, or did not tell in time.
            HostsDisagreeError: a host is somewhere else.
        """
        if not self.several:
            return [mine]
        turn = self._next_turn()
        self._tell(turn, what, mine)
        if not self.is_first:
            return []
        try:
            return self._collected(turn, what, timeout_s)
        except HostsDisagreeError as error:
            lose(str(error))
            raise

    def from_first(self, what: str, make: Callable[[], str], timeout_s: float = ANSWER_S) -> str:
        """What ``make()`` returns on the first host, on every host; what it raises there is raised on all.

        Raises:
            HostLostError: a host is lost, or the first did not tell in time.
        """
        if not self.several:
            return make()
        turn = self._next_turn()
        if not self.is_first:
            return _told(self._wait(f"{turn}/first", 0, what, timeout_s))
        try:
            said = make()
        except BaseException as error:
            self._say(turn, error=error)
            raise
        self._say(turn, said)
        return said

    def agree(self, what: str, error: BaseException | None = None, timeout_s: float = ANSWER_S) -> None:
        """Go on if every host can; else raise on all of them: this host's own error, or one of that host's class.

        Args:
            what: what the hosts are about to do, the same on every host.
            error: why this host cannot; None if it can.
            timeout_s: how long to wait for the others.

        Raises:
            HostLostError: a host is lost, or did not answer in time.
            HostsDisagreeError: a host is about to do something else.
            KVCycleError: of the class of the error of the first host that cannot.
        """
        if not self.several:
            if error is not None:
                raise error
            return
        turn = self._next_turn()
        self._tell(turn, what, "" if error is None else encoded_error(self.rank, error).decode())
        if self.is_first:
            refusal = ""
            try:
                answers = self._collected(turn, what, timeout_s)
                refusal = next((_of_host(rank, what, answer) for rank, answer in enumerate(answers) if answer), "")
            except BaseException as failure:
                self._say(turn, error=failure)
                if isinstance(failure, HostsDisagreeError):
                    lose(str(failure))  # not before the others can read why
                raise
            self._say(turn, refusal)
        else:
            refusal = _told(self._wait(f"{turn}/first", 0, what, timeout_s))
        if error is not None:
            raise error
        if refusal:
            raise error_in(json.loads(refusal))

    @contextmanager
    def all_or_none(self, what: str, undo: Callable[[], None] | None = None) -> Iterator[None]:
        """Let the ``with`` block succeed on every host or fail on all; ``undo`` takes back what it did on this one."""
        try:
            yield
        except BaseException as error:
            self.agree(what, error)  # raises it
            raise
        try:
            self.agree(what)
        except BaseException:
            if undo is not None:
                undo()
            raise

    @property
    def _in_call(self) -> bool:
        return hasattr(self._call, "turns")

    def _next_turn(self) -> str:
        place, turns = self._call.turns if self._in_call else ("callers", self._callers_turns)
        return f"kvcycle/{self._name}/{place}/{next(turns)}"

    def _tell(self, turn: str, what: str, mine: str) -> None:
        assert self._store is not None
        self._store.set(f"{turn}/host{self.rank}", json.dumps([what, mine]))

    def _say(self, turn: str, said: str = "", error: BaseException | None = None) -> None:
        """The first host's word to all others."""
        assert self._store is not None
        failure = encoded_error(0, error).decode() if error is not None else None
        self._store.set(f"{turn}/first", json.dumps([said, failure]))
        self._read_by_then[self._in_call].append(f"{turn}/first")

    def _collected(self, turn: str, what: str, timeout_s: float) -> list[str]:
        """What every host told. Who disagrees is not called lost here: the caller may have to tell the others first."""
        assert self._store is not None
        deadline = time.monotonic() + timeout_s
        while missing := set(range(self.count)) - (told := self._told_by_rank(turn)).keys():
            # Waits for one of them, and then reads all that have come meanwhile at once: there may be many.
            rank = max(missing)
            self._wait(f"{turn}/host{rank}", rank, what, timeout_s, deadline)
        texts: list[str] = []
        for rank in range(self.count):
            theirs, text = json.loads(told[rank])
            if theirs != what:
                raise HostsDisagreeError(
                    f"Host {rank} is at {theirs!r} while host 0 is at {what!r}: every host must make the same calls in "
                    "the same order."
                )
            texts.append(text)
        for key in [*self._read_by_then[self._in_call], turn]:
            self._store.delete(key)
        self._read_by_then[self._in_call].clear()
        return texts

    def _told_by_rank(self, turn: str) -> dict[int, str]:
        assert self._store is not None
        return {int(key.removeprefix("host")): told for key, told in self._store.below(turn).items()}

    def _wait(self, key: str, rank: int, what: str, timeout_s: float, deadline: float | None = None) -> str:
        assert self._store is not None
        deadline = time.monotonic() + timeout_s if deadline is None else deadline
        while True:
            if (sentence := lost()) is not None:
                raise HostLostError(sentence)
            left_s = deadline - time.monotonic()
            value = self._store.wait_for(key, max(0.001, min(_POLL_S, left_s)))
            if value is not None:
                return value
            if time.monotonic() > deadline:
                lose(
                    f"Host {rank} did not come to {what!r} within {timeout_s:g} s, so it was not done on host "
                    f"{self.rank} either. See that host's log, and start all hosts anew."
                )


def _told(answer: str) -> str:
    said, failure = json.loads(answer)
    if failure is not None:
        raise error_in(json.loads(failure))
    return str(said)


def _of_host(rank: int, what: str, answer: str) -> str:
    """A host's refusal as the other hosts raise it: with its name."""
    refusal: dict[str, Any] = json.loads(answer)
    refusal["sentence"] = f"Host {rank} could not ({what}), so no host did. It says: {refusal['sentence']}"
    return json.dumps(refusal)
