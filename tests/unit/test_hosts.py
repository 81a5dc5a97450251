"""All hosts or none: what is told arrives exactly, a refusal is every host's, and nobody waits for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvcycle import hosts
from kvcycle.errors import EngineBusyError, HostLostError, HostsDisagreeError, KVCycleError, RebuildError
from kvcycle.hosts import Hosts
from tests.unit.hosts import DictStore, no_loss, on_all

pytestmark = pytest.mark.usefixtures(no_loss.__name__)
__all__ = ["no_loss"]


def test_what_every_host_tells_reaches_the_first_by_rank_and_exactly() -> None:
    sizes = [2**63 - 1 - rank for rank in range(3)]  # 32 bits would cut them
    assert on_all(3, lambda host: host.gather("bytes", str(sizes[host.rank]))) == [
        [str(size) for size in sizes],
        [],
        [],
    ]


def test_what_all_can_do_is_done_and_leaves_no_key_behind() -> None:
    store = DictStore()

    def many_times(host: Hosts) -> int:
        for _ in range(20):
            host.agree("drop")
        with host.in_call(7):
            host.agree("begin")
        return host.rank

    assert on_all(3, many_times, store) == [0, 1, 2]
    # The last word of each of the two threads, which the next meeting would delete.
    assert sorted(store.held) == ["kvcycle/engine0/call7/0/first", "kvcycle/engine0/callers/19/first"]


def test_what_one_host_cannot_none_does() -> None:
    done: list[int] = []

    def drop(host: Hosts) -> None:
        with host.all_or_none("drop"):
            if host.rank == 1:
                raise RebuildError("no room here", {2: 512}, {2: 100})
        done.append(host.rank)

    first, second, third = on_all(3, drop)
    assert done == []
    assert str(second) == "no room here"
    for other in (first, third):
        assert type(other) is RebuildError
        assert str(other) == "Host 1 could not (drop), so no host did. It says: no room here"
        assert other.needed_bytes_by_device == {2: 512}
        assert other.free_bytes_by_device == {2: 100}


def test_a_host_that_could_takes_back_what_it_did() -> None:
    undone: list[int] = []

    def allocate(host: Hosts) -> None:
        with host.all_or_none("rebuild", undo=lambda: undone.append(host.rank)):
            if host.rank == 0:
                raise ValueError("planted")

    first, second = on_all(2, allocate)
    assert isinstance(first, ValueError)
    assert (type(second), str(second)) == (
        KVCycleError,
        "Host 0 could not (rebuild), so no host did. It says: ValueError: planted",
    )
    assert undone == [1]


def test_the_first_refusal_counts_where_several_refuse() -> None:
    def drop(host: Hosts) -> None:
        host.agree("drop", EngineBusyError(f"busy {host.rank}", {"running": host.rank}) if host.rank else None)

    first, second, third = on_all(3, drop)
    assert [str(error) for error in (second, third)] == ["busy 1", "busy 2"]
    assert str(first) == "Host 1 could not (drop), so no host did. It says: busy 1"


def test_hosts_that_do_not_do_the_same_are_told_so() -> None:
    first, second = on_all(2, lambda host: host.agree(("drop", "rebuild")[host.rank]))
    sentence = (
        "Host 1 is at 'rebuild' while host 0 is at 'drop': every host must make the same calls in the same order."
    )
    assert [type(error) for error in (first, second)] == [HostsDisagreeError, HostsDisagreeError]
    assert str(first) == str(second) == sentence
    assert hosts.lost() == sentence


def test_who_hears_of_a_disagreement_hears_it_when_the_other_hosts_can_read_why() -> None:
    store, readable = DictStore(), []
    forget = hosts.listen(lambda _: readable.append("kvcycle/engine0/callers/0/first" in store.held))
    on_all(2, lambda host: host.agree(("drop", "rebuild")[host.rank]), store)
    forget()
    assert readable == [True]


def test_hosts_that_tell_something_else_are_lost() -> None:
    first, _ = on_all(2, lambda host: host.gather(("bytes", "tokens")[host.rank], "1"))
    assert type(first) is HostsDisagreeError
    assert hosts.lost() == str(first)


def test_a_host_that_does_not_come_is_named_and_nothing_is_done_from_then_on() -> None:
    host = Hosts(0, 2, DictStore(), name="engine0")
    with pytest.raises(
        HostLostError, match=r"^Host 1 did not come to 'drop' within 0\.1 s, so it was not done on host 0"
    ):
        host.agree("drop", timeout_s=0.1)
    began = time.monotonic()
    with pytest.raises(HostLostError, match=r"^Host 1 did not come to 'drop'"):
        host.gather("another", "thing")  # and does not wait
    assert time.monotonic() - began < 60


def test_a_loss_ends_a_wait() -> None:
    heard: list[str] = []
    forget = hosts.listen(heard.append)

    def lose(host: Hosts) -> None:
        if host.rank:
            hosts.lose("Host 1 was killed.")
        else:
            host.agree("drop")

    first, _ = on_all(2, lose)
    forget()
    hosts.lose("and another")
    assert (type(first), str(first)) == (HostLostError, "Host 1 was killed.")
    assert heard == ["Host 1 was killed."]


def test_what_the_first_host_makes_is_every_hosts_and_so_is_its_error() -> None:
    made: list[int] = []

    def make(host: Hosts) -> str:
        def ask() -> str:
            made.append(host.rank)
            return f"answer {len(made)}"

        return host.from_first("generate", ask)

    assert on_all(3, make) == ["answer 1"] * 3
    assert made == [0]

    def fail() -> str:
        raise EngineBusyError("1 request runs", {"running": 1})

    for error in on_all(3, lambda host: host.from_first("generate", fail)):
        assert isinstance(error, EngineBusyError)
        assert (str(error), error.counts) == ("1 request runs", {"running": 1})


def test_one_host_asks_nobody() -> None:
    class NoStore:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(name)

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    alone = Hosts(store=NoStore())  # type: ignore[arg-type] # anything asked of it fails
    assert not alone.several
    assert alone.is_first
    assert alone.gather("bytes", "1") == ["1"]
    assert alone.from_first("generate", lambda: "answer") == "answer"
    with alone.in_call(1), alone.all_or_none("drop"):
        alone.agree("drop")
    error = EngineBusyError("busy", {})
    with pytest.raises(EngineBusyError) as caught, alone.all_or_none("drop"):
        raise error
    assert caught.value is error
