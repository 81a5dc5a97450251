"""The control of every memory check: a known allocation on every device, made and freed, and what each witness saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvcycle.buffers import BufferSpec, ZeroAllocator
from kvcycle.memory import MemorySnapshot
from kvcycle.record_parts import Canary, Witness


def release_canaries(
    devices: Sequence[jax.Device], size_bytes: int, sample: Callable[[], MemorySnapshot]
) -> tuple[Canary, ...]:
    """Allocate ``size_bytes`` on each device and free them again.

    Args:
        devices: where to allocate.
        size_bytes: how much on each; large enough to be a memory mapping of its own, or RSS does not follow.
        sample: takes stock by every witness; called before, during and after.

    Returns:
        What each witness that speaks saw, for each device; for RSS once, for the process.
    """
    everywhere = NamedSharding(Mesh(np.array(devices), ("device",)), PartitionSpec("device"))
    spec = BufferSpec((size_bytes * len(devices),), np.dtype(np.uint8), everywhere, committed=True, weak_type=False)
    allocate = ZeroAllocator([spec])  # compiles before the samples; the devices' own zeros, no copy from the host
    before = sample()
    birds = allocate()
    during = sample()
    for bird in birds:
        bird.delete()
    after = sample()

    seen: list[tuple[Witness, int | None, int, list[int | None]]] = []
    for uses in zip(before.devices, during.devices, after.devices, strict=True):
        seen.append(("ledger", uses[0].id, size_bytes, [use.ledger_bytes for use in uses]))
        seen.append(("allocator", uses[0].id, size_bytes, [use.allocator_bytes for use in uses]))
    seen.append(("rss", None, size_bytes * len(devices), [moment.rss_bytes for moment in (before, during, after)]))
    return tuple(
        Canary(witness=witness, device=device, allocated_bytes=size, rise_bytes=high - low, fall_bytes=high - end)
        for witness, device, size, (low, high, end) in seen
        if low is not None and high is not None and end is not None
    )
