"""How hosts meet, over real sockets on loopback, and how they notice that one has gone, on the test's own clock."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from kvcycle import hosts, rendezvous
from kvcycle.errors import PlatformError
from kvcycle.rendezvous import SILENT_S, Watch
from tests.unit.hosts import DictStore, no_loss

pytestmark = pytest.mark.usefixtures(no_loss.__name__)
__all__ = ["no_loss"]


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        return int(found.getsockname()[1])


def meet(address: str, *places: tuple[int, int], timeout_s: float = 20.0) -> list[Exception | None]:
    """What each place, a rank and a count, gets out of it: None, or its error."""

    def run(place: tuple[int, int]) -> Exception | None:
        try:
            rendezvous._meet(*place, address, timeout_s)
        except PlatformError as error:
            return error
        return None

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(run, places))


def test_hosts_meet_in_whatever_order_they_come() -> None:
    assert meet(f"127.0.0.1:{free_port()}", (2, 3), (1, 3), (0, 3)) == [None, None, None]


def test_a_host_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    read, come = rendezvous._read, threading.Event()

    def read_and_note(connection: socket.socket) -> dict[str, Any]:
        said = read(connection)
        come.set()
        return said

    monkeypatch.setattr(rendezvous, "_read", read_and_note)
    once_one_has_come = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * come.is_set(), sleep=time.sleep)
    monkeypatch.setattr(rendezvous, "time", once_one_has_come)
    first, second = meet(f"127.0.0.1:{(port := free_port())}", (0, 3), (1, 3), timeout_s=60.0)
    assert str(first) == (
        f"Of 3 hosts these did not come to host 0 (port {port}) within 60 s: 2. Start the suite on every host, with "
        "the same settings."
    )
    assert str(second).startswith(f"Host 1 of 3 found no host 0 at 127.0.0.1:{port} within 60 s.")


def test_a_host_that_counts_otherwise_is_sent_away_and_so_is_what_is_no_host() -> None:
    port = free_port()
    done = threading.Event()

    def knock() -> bytes | None:
        while not done.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return stranger.makefile("rb").readline()
            except ConnectionRefusedError:
                done.wait(0.05)
        return None

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, f"127.0.0.1:{port}", (0, 2), timeout_s=300.0)
        stranger = pool.submit(knock)
        try:
            (third,) = meet(f"127.0.0.1:{port}", (1, 4), timeout_s=60.0)
            assert stranger.result(60) == b"host 0 expects hosts [1] of 2, not {}\n"
        finally:
            done.set()
            hosts.lose("It has waited long enough.")  # for the one that does not come
    assert str(third) == (
        f"Host 1 of 4 was sent away from 127.0.0.1:{port}: host 0 expects hosts [1] of 2, not "
        "{'rank': 1, 'count': 4}."
    )
    assert [str(error) for error in first.result()] == ["It has waited long enough."]


def test_a_port_that_is_taken_is_a_sentence() -> None:
    with closing(socket.create_server(("", 0))) as taken:
        (error,) = meet(f"127.0.0.1:{taken.getsockname()[1]}", (0, 2))
    assert "at which the hosts meet, cannot be used on host 0: Address already in use" in str(error)


def test_a_host_that_ended_is_not_waited_for() -> None:
    hosts.lose("Host 1 ended with exit code 3.")
    (error,) = meet(f"127.0.0.1:{free_port()}", (0, 2), timeout_s=300)
    assert str(error) == "Host 1 ended with exit code 3."


# Signs of life -------------------------------------------------------------------------------------------------------


def beat(*watches: Watch, at_s: float) -> None:
    for watch in watches:
        watch.look(at_s)


def started(count: int) -> list[Watch]:
    store = DictStore()
    watches = [Watch(rank, count, store) for rank in range(count)]
    for watch in watches:
        watch._looked_s = 0.0
    return watches


def test_a_host_that_falls_silent_is_missed_by_the_first() -> None:
    first, second, third = started(3)
    for now_s in range(5):
        beat(second, third, first, at_s=now_s)
    for now_s in range(5, 5 + int(SILENT_S)):
        beat(third, first, at_s=now_s)
        assert hosts.lost() is None
    beat(third, first, at_s=5 + SILENT_S)
    assert hosts.lost() == f"Host 1 has given no sign of life for {SILENT_S:g} s; see its log."


def test_a_first_host_that_falls_silent_is_missed_by_every_other() -> None:
    first, second = started(2)
    beat(first, second, at_s=1)
    for now_s in range(2, 2 + int(SILENT_S)):
        beat(second, at_s=now_s)
    assert hosts.lost() is None
    beat(second, at_s=2 + SILENT_S)
    assert hosts.lost() == f"Host 0 has given no sign of life for {SILENT_S:g} s; see its log."


def test_a_host_that_stood_still_itself_blames_nobody() -> None:
    first, second = started(2)
    beat(second, first, at_s=1)
    first.look(10 * SILENT_S)
    assert hosts.lost() is None


def test_what_one_host_has_lost_or_ended_by_every_other_hears() -> None:
    store = DictStore()
    hosts.lose("Host 2 ended its run: the disk is full")
    Watch(2, 3, store).run()
    hosts._lost.clear()
    Watch(0, 3, store).look(0.0)
    assert hosts.lost() == "Host 2 ended its run: the disk is full"


def test_a_store_that_does_not_answer_is_a_first_host_that_is_lost() -> None:
    class Gone(DictStore):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Socket closed")

    Watch(1, 2, Gone()).run()
    assert hosts.lost() == "Host 0, which holds what the hosts share, does not answer host 1: Socket closed"
