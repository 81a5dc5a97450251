"""How the hosts of one engine find each other, and notice that one of them has gone.

Before ``jax.distributed`` starts they meet at its address over plain sockets: a host that never comes is then a
sentence, where jax would abort the process. From then on each host leaves a sign of life in the store that they share.
"""

from __future__ import annotations

import atexit
import json
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from kvcycle import hosts
from kvcycle.errors import PlatformError
from kvcycle.hosts import Store

#: How often a host leaves a sign of life, and how long it may be silent: its whole machine may be compiling.
BEAT_S = 1.0
SILENT_S = 30.0

#: jax itself ends a process whose first host is silent for so long, without a report; the above comes first.
_JAX_SILENT_S = 100

#: Folders of the store. The later hosts look at the first one's sign alone: they may be many.
_FIRST, _LATER, _LOST = "kvcycle-life-first", "kvcycle-life-later", "kvcycle-lost"


def join(rank: int, count: int, address: str, timeout_s: float) -> None:
    """Become one of ``count`` hosts; does nothing where ``jax.distributed`` was started already.

    Args:
        rank: this host's number.
        count: how many hosts there are.
        address: ``host:port`` of the first one, free and reachable from all. sglang-jax also binds port + 5 and + 6.
        timeout_s: how long the others may take to come.

    Raises:
        PlatformError: a host did not come, is another's, or jax has started its devices already.
    """
    import jax

    if not jax.distributed.is_initialized():
        _meet(rank, count, address, timeout_s)
        at_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            jax.distributed.initialize(
                address,
                count,
                rank,
                heartbeat_timeout_seconds=_JAX_SILENT_S,
                # By default it listens on every interface, also where the hosts are processes of one machine.
                coordinator_bind_address=address if _interface(address) else None,
            )
        except RuntimeError as error:
            raise PlatformError(f"jax could not join the {count} hosts at {address}: {error}") from error
        with suppress(ValueError, TypeError):  # not the main thread, or a handler that Python does not know
            signal.signal(signal.SIGTERM, at_sigterm)  # jax's notice of preemption takes it, and ends nothing
    watch(rank, count)


def leave(timeout_s: float = 60.0) -> bool:
    """Let go of the other hosts, once all of them do; False if they did not within ``timeout_s``.

    jax does this when the interpreter ends, and there waits for minutes, or aborts.
    """
    import jax

    if hosts.lost() is not None:
        return False
    if _watcher is not None:
        _stop_watching(_watcher)
    ended = threading.Thread(target=jax.distributed.shutdown, name="kvcycle-leave", daemon=True)
    ended.start()
    ended.join(timeout_s)
    return not ended.is_alive()


def joined() -> bool:
    """Whether this process has joined other hosts, by :func:`join` or :func:`watch`."""
    return _watcher is not None


# Meeting -------------------------------------------------------------------------------------------------------------


def _meet(rank: int, count: int, address: str, timeout_s: float) -> None:
    place, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        _await_the_others(count, (_interface(address), int(port)), deadline, timeout_s)
    else:
        _announce(rank, count, (place.strip("[]"), int(port)), deadline, timeout_s)


def _interface(address: str) -> str:
    """Where to listen: on loopback alone if that is where the hosts meet, else ("") on every interface."""
    place = address.rpartition(":")[0].strip("[]")
    return place if place.startswith("127.") or place == "localhost" else ""


def _await_the_others(count: int, listen_at: tuple[str, int], deadline: float, timeout_s: float) -> None:
    missing = set(range(1, count))
    arrived: list[socket.socket] = []
    port = listen_at[1]
    try:
        with _listening_at(listen_at) as server:
            while missing:
                if (sentence := hosts.lost()) is not None:
                    raise PlatformError(sentence)
                if time.monotonic() > deadline:
                    named = ", ".join(str(rank) for rank in sorted(missing))
                    raise PlatformError(
                        f"Of {count} hosts these did not come to host 0 (port {port}) within {timeout_s:g} s: {named}. "
                        "Start the suite on every host, with the same settings."
                    )
                with suppress(TimeoutError):
                    server.settimeout(0.5)
                    connection, _ = server.accept()
                    said = _read(connection)
                    if said.get("count") == count and said.get("rank") in missing:
                        missing.remove(said["rank"])
                        arrived.append(connection)
                    else:  # another run's, a port scanner, or a host that counts otherwise: it will say so
                        _send(connection, f"host 0 expects hosts {sorted(missing)} of {count}, not {said}")
                        connection.close()
        for connection in arrived:
            _send(connection, "come")
    finally:
        for connection in arrived:
            connection.close()


def _listening_at(listen_at: tuple[str, int]) -> socket.socket:
    try:
        return socket.create_server(listen_at)
    except OSError as error:
        raise PlatformError(
            f"Port {listen_at[1]}, at which the hosts meet, cannot be used on host 0: {error.strerror}. Give another "
            "one (engine.dist_init_addr, or KVCYCLE_COORDINATOR)."
        ) from error


def _announce(rank: int, count: int, address: tuple[str, int], deadline: float, timeout_s: float) -> None:
    shown = f"{address[0]}:{address[1]}"
    while True:
        try:
            with socket.create_connection(address, timeout=5) as connection:
                connection.sendall(json.dumps({"rank": rank, "count": count}).encode() + b"\n")
                connection.settimeout(max(1.0, deadline - time.monotonic()))
                answer = connection.makefile("rb").readline(4096).decode(errors="replace").strip()
        except OSError:
            answer = ""
        if answer == "come":
            return
        if answer:
            raise PlatformError(f"Host {rank} of {count} was sent away from {shown}: {answer}.")
        if time.monotonic() > deadline:
            raise PlatformError(
                f"Host {rank} of {count} found no host 0 at {shown} within {timeout_s:g} s. Start the suite on every "
                "host, and see that this address is reachable from here."
            )
        time.sleep(0.2)


def _read(connection: socket.socket) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        connection.settimeout(5)
        said = json.loads(connection.makefile("rb").readline(4096))
        if isinstance(said, dict):
            return said
    return {}


def _send(connection: socket.socket, sentence: str) -> None:
    with suppress(OSError):
        connection.sendall(sentence.encode() + b"\n")


# Signs of life -------------------------------------------------------------------------------------------------------

_ended = threading.Event()
_watcher: threading.Thread | None = None


def watch(rank: int, count: int, store: Store | None = None) -> None:
    """From now on leave signs of life, and call :func:`kvcycle.hosts.lose` when another host leaves none; once."""
    global _watcher  # one process is one host
    if _watcher is not None and _watcher.is_alive():
        return
    if store is None:
        from kvcycle.internals_processes import SharedStore

        store = SharedStore()
    _watcher = threading.Thread(target=Watch(rank, count, store).run, name="kvcycle-hosts", daemon=True)
    _watcher.start()
    atexit.register(_stop_watching, _watcher)  # before jax lets go of the store


def _stop_watching(watcher: threading.Thread) -> None:
    _ended.set()
    watcher.join(5 * BEAT_S)


class Watch:
    """One host's look at the others. The first looks at all and says whom it lost; the others look at the first."""

    def __init__(self, rank: int, count: int, store: Store) -> None:
        self.rank, self.count, self._store = rank, count, store
        self._beats = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._looked_s = time.monotonic()

    def run(self) -> None:
        """Until the hosts have left, or one is lost."""
        while hosts.lost() is None and not _ended.is_set():
            try:
                self.look(time.monotonic())
            except Exception as error:  # noqa: BLE001 - whatever the store says, the first host holds it
                if not _ended.is_set():
                    hosts.lose(f"Host 0, which holds what the hosts share, does not answer host {self.rank}: {error}")
            _ended.wait(BEAT_S)
        if (sentence := hosts.lost()) is not None:
            with suppress(Exception):  # the store may be what was lost
                self._store.set(f"{_LOST}/by{self.rank}", sentence)

    def look(self, now_s: float) -> None:
        """Leave a sign of life, and see who else did."""
        self._beats += 1
        self._store.set(f"{_LATER if self.rank else _FIRST}/{self.rank}", str(self._beats))
        for by, sentence in self._store.below(_LOST).items():
            if by != f"by{self.rank}":
                hosts.lose(f"{sentence} (host {by.removeprefix('by')} says so)" if self.rank else sentence)
        if now_s - self._looked_s > SILENT_S / 3:  # it was this host that stood still
            self._seen.clear()
        self._looked_s = now_s
        beats = self._store.below(_FIRST if self.rank else _LATER)
        for other in (0,) if self.rank else range(1, self.count):
            beat = beats.get(str(other), "")
            before, since_s = self._seen.setdefault(other, (beat, now_s))
            if beat != before:
                self._seen[other] = (beat, now_s)
            elif now_s - since_s > SILENT_S:
                hosts.lose(f"Host {other} has given no sign of life for {SILENT_S:g} s; see its log.")


def tell_of_the_end(rank: int, sentence: str) -> None:
    """Tell the other hosts that this one cannot go on, so that none waits for it."""
    hosts.lose(f"Host {rank} ended its run: {sentence}")
    if _watcher is not None:
        _watcher.join(2 * BEAT_S)  # it says so
