"""Hosts without an engine: threads instead of processes, and a dict instead of what jax.distributed keeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvcycle import hosts
from kvcycle.hosts import Hosts
from kvcycle.record import Record
from kvcycle.record_parts import Cycle, Device, Phase


class DictStore:
    """A :class:`kvcycle.hosts.Store` of one process."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self.held[key] = value
            self._changed.notify_all()

    def wait_for(self, key: str, timeout_s: float) -> str | None:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while key not in self.held and (left_s := deadline - time.monotonic()) > 0:
                self._changed.wait(left_s)
            return self.held.get(key)

    def below(self, folder: str) -> dict[str, str]:
        with self._changed:
            return {
                key.removeprefix(f"{folder}/"): value
                for key, value in self.held.items()
                if key.startswith(f"{folder}/")
            }

    def delete(self, key: str) -> None:
        with self._changed:
            for held in [held for held in self.held if held == key or held.startswith(f"{key}/")]:
                del self.held[held]


@pytest.fixture
def no_loss() -> Iterator[None]:
    """A loss is the process's: none before the test, and none after it."""
    hosts._lost.clear()
    yield
    hosts._lost.clear()


def on_all(count: int, do: Callable[[Hosts], Any], store: DictStore | None = None) -> list[Any]:
    """What ``do`` returns, or raises, on each host, by rank."""
    shared = store or DictStore()

    def run(rank: int) -> Any:
        try:
            return do(Hosts(rank, count, shared, name="engine0"))
        except Exception as error:  # noqa: BLE001 - for the test
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


# A record of several hosts -------------------------------------------------------------------------------------------


def of_hosts(record: Record, count: int) -> Record:
    """The same run as if its devices were shared by so many hosts: in order, as many to each."""
    each = len(record.devices) // count
    devices = tuple(device.model_copy(update={"host": device.id // each}) for device in record.devices)
    canaries = [canary for canary in record.canaries if canary.device is not None]
    for canary in record.canaries:
        if canary.device is None:
            share = {name: getattr(canary, name) // count for name in ("allocated_bytes", "rise_bytes", "fall_bytes")}
            canaries += [canary.model_copy(update={"host": host, **share}) for host in range(count)]
    return record.model_copy(
        update={
            "devices": devices,
            "canaries": tuple(canaries),
            "boot": record.boot and _shared(record.boot, count),
            "cycles": tuple(_cycle(cycle, devices, count) for cycle in record.cycles),
            "generates": tuple(_shared(generate, count) for generate in record.generates),
        }
    )


def _shared[Span: Any](span: Span, count: int) -> Span:
    """Each host's compiler did the same: ``count`` times what one did."""
    by_host = (span.compiles,) * count
    copied: Span = span.model_copy(update={"compiles": hosts_sum(by_host), "compiles_by_host": by_host})
    return copied


def hosts_sum(by_host: Sequence[Any]) -> Any:
    return type(by_host[0])(**{kind: sum(getattr(one, kind) for one in by_host) for kind in by_host[0].model_dump()})


def _cycle(cycle: Cycle, devices: tuple[Device, ...], count: int) -> Cycle:
    return cycle.model_copy(update={"phases": tuple(_phase(phase, devices, count) for phase in cycle.phases)})


def _phase(phase: Phase, devices: tuple[Device, ...], count: int) -> Phase:
    """A host's process holds what its devices do, beside an equal share of the rest."""
    shared = _shared(phase, count)
    if phase.rss_bytes is None:
        return shared
    rest = (phase.rss_bytes - phase.ledger_bytes_sum) // count
    by_host = tuple(
        rest + sum(use.ledger_bytes for use, device in zip(phase.devices, devices, strict=True) if device.host == host)
        for host in range(count)
    )
    return shared.model_copy(update={"rss_bytes": sum(by_host), "rss_bytes_by_host": by_host})
