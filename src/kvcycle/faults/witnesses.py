"""Faults of the witnesses: a ledger that is blind, a boot that nobody saw, an allocator whose statistics lie.

CPU devices keep no statistics, so the allocator here is a simulated one that tells the ledger's bytes and what no array
owns; each fault lets it lie in another way. The clean run shows that it is believed while it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import numpy as np

from kvcycle import engine as engines
from kvcycle import memory
from kvcycle.faults.catalogue import Target, after_drop, fault, wrapped

_FREES, _RESTORES, _FITS = "drop.frees_kv", "rebuild.restores_bytes", "params2.fits"
_SEES, _AGREE, _GROWS = "controls.witness_sees_allocation", "controls.witnesses_agree", "cycles.no_growth"

#: What the simulated allocator has in use beside the arrays: compiled programs, for example.
UNOWNED_BYTES = 3 * 2**20
Stats = dict[str, int] | None
#: (device id, true bytes in use) → what the allocator says.
Lie = Callable[[int, int], Stats]


def truth(_: int, used_bytes: int) -> Stats:
    """An allocator that does not lie."""
    return {"bytes_in_use": used_bytes}


@contextmanager
def simulated_allocator(lie: Lie = truth) -> Iterator[None]:
    """Let every device keep statistics, as a TPU does, and say what ``lie`` makes of the bytes in use."""
    asking = False

    def stats(device: jax.Device) -> Stats:
        nonlocal asking
        if asking:  # by the snapshot below: there the device is a CPU's
            return None
        asking = True
        try:
            used = memory.snapshot(devices=[device]).devices[0].ledger_bytes
        finally:
            asking = False
        return lie(device.id, used + UNOWNED_BYTES)

    with mock.patch.object(memory, "device_stats", stats):
        yield


@fault(_SEES, _FREES, _RESTORES, _FITS, _GROWS, says="the ledger did not see an allocation of known size")
def the_ledger_is_blind_to_a_device(target: Target) -> Iterator[None]:
    """The ledger does not count the canary's arrays."""
    with wrapped(jax, "live_arrays", lambda original: [a for a in original() if a.dtype != np.uint8]):
        yield


@fault("controls.witness_saw_boot", says="the boot brought 0 B by the ledger")
def nobody_saw_the_boot(target: Target) -> Iterator[None]:
    """The witnesses read the same before and after the boot."""
    evidence = engines.boot_evidence(target.engine)
    assert evidence is not None
    unseen = evidence.model_copy(update={"before": evidence.after})
    with mock.patch.object(target.engine, engines._EVIDENCE, unseen):
        yield


@fault(
    _SEES, _FREES, _RESTORES, _FITS, _AGREE, run="allocator", also=(_GROWS, "controls.witness_saw_boot"),
    says="the allocator's numbers are stale",
)  # fmt: skip
def the_allocator_is_stale(target: Target) -> Iterator[None]:
    """The statistics never change."""
    first: dict[int, int] = {}
    with simulated_allocator(lambda device, used: {"bytes_in_use": first.setdefault(device, used)}):
        yield


@fault(_FREES, _AGREE, run="allocator", also=(_FITS,), says="the allocator keeps freed memory for itself")
def the_allocator_keeps_what_was_freed(target: Target) -> Iterator[None]:
    """The buffers are deleted, and the device counts them until the next allocation."""
    kept: dict[int, int] = {}

    def lie(device: int, used: int) -> Stats:
        return {"bytes_in_use": used + kept.pop(device, 0)}

    with simulated_allocator(lie), after_drop(target, lambda: kept.update(target.kv.bytes_by_device)):
        yield


@fault(_FREES, run="allocator", also=(_RESTORES, _FITS, _GROWS), says="this device was not sampled")
def the_allocator_keeps_no_statistics_any_more(target: Target) -> Iterator[None]:
    """memory_stats() is None from the drop on."""
    with _after_the_drop(target, lambda _: None):
        yield


@fault(_FREES, run="allocator", also=(_RESTORES, _FITS, _GROWS), says="this device was not sampled")
def the_allocator_lacks_a_key(target: Target) -> Iterator[None]:
    """memory_stats() has no bytes_in_use from the drop on."""
    with _after_the_drop(target, lambda used: {"peak_bytes_in_use": used}):
        yield


@fault(_AGREE, run="allocator", also=(_FREES, _RESTORES, _SEES, _FITS, _GROWS), says="allowed 0 B")
def the_allocator_jumps(target: Target) -> Iterator[None]:
    """Every third reading is 4,096 bytes too high."""
    readings: dict[int, int] = {}

    def lie(device: int, used: int) -> Stats:
        readings[device] = readings.get(device, 0) + 1
        return {"bytes_in_use": used + 4096 * (readings[device] % 3 == 0)}

    with simulated_allocator(lie):
        yield


@contextmanager
def _after_the_drop(target: Target, lie: Callable[[int], Stats]) -> Iterator[None]:
    dropped: list[Any] = []

    def stats(_: int, used: int) -> Stats:
        return lie(used) if dropped else {"bytes_in_use": used}

    with simulated_allocator(stats), after_drop(target, lambda: dropped.append(True)):
        yield
