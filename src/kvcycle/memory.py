"""What is in use where, by three witnesses that do not share a source.

``allocator`` is the device's own ``memory_stats()`` (TPU, GPU; None on CPU). ``ledger`` sums the shards of all live
arrays, each buffer once, and splits them by owner; it is exact everywhere. ``rss`` is the process's resident memory,
which follows on CPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import psutil

from kvcycle.collecting import no_collections
from kvcycle.record_parts import OWNERS, DeviceUse, Owner

#: Where a shard's buffer is: (device id, address).
_Place = tuple[int, int]
#: Place and bytes of every shard of one array.
_Shards = tuple[tuple[_Place, int], ...]


@dataclass(frozen=True)
class MemorySnapshot:
    """Memory in use at one moment: per device (ledger, allocator, by owner) and the process's resident bytes."""

    t_s: float
    devices: tuple[DeviceUse, ...]
    rss_bytes: int | None
    #: Largest live arrays that no owner claims, alike ones together, largest first: (description, bytes, all devices).
    largest_other: tuple[tuple[str, int], ...] = field(default=())

    @property
    def ledger_bytes_sum(self) -> int:
        """The ledger summed over the devices."""
        return sum(device.ledger_bytes for device in self.devices)

    def bytes_of(self, owner: Owner) -> int:
        """What one owner holds, summed over the devices."""
        return sum(device.by_owner.get(owner, 0) for device in self.devices)


#: Where an array keeps what was read of it, which goes with it. An attribute, since a lookup by ``id()`` takes longer
#: than all the sums once an audit hook is set, as filelock does when jax imports it.
_SHARDS = "_kvcycle_shards"
#: What ``id()`` says, in other words of which no audit hook hears.
_identity = object.__hash__


def shards_of(array: jax.Array) -> _Shards:
    """The shards of a live array on its devices' own memory; () for a deleted array or one in host memory.

    Waits for an array that is still being computed: its address is not known before. Read once for each array.
    """
    if array.is_deleted():
        return ()
    known: _Shards | None = getattr(array, _SHARDS, None)
    if known is None:
        known = _read(array)
        setattr(array, _SHARDS, known)
    return known


def _read(array: jax.Array) -> _Shards:
    try:
        if _in_host_memory(array) or not _is_listed(array):
            return ()
        array.block_until_ready()
        local = array.sharding.addressable_devices
        if len(local) == 1:
            # Its only shard's data would be the array itself: jax 0.8.1 keeps that cycle, and with it the buffer,
            # until the garbage collector comes by; and of an array over several hosts jax may fail to make that shard.
            (device,) = local
            place, size = _entry(device, array)
            return ((place, size // len(array.sharding.device_set)),)  # which counts as often as there are devices
        return tuple(_entry(shard.device, shard.data) for shard in _alias(array).addressable_shards)
    except (RuntimeError, TypeError) as error:
        # Another thread deleted or donated it since live_arrays() listed it: it is no longer in use. A donation
        # marks the shards' buffers a moment before the array, and a deletion inside jax itself is a TypeError.
        if array.is_deleted() or "deleted or donated" in str(error):
            return ()
        raise


def _alias(array: Any) -> jax.Array:
    """Another array of the same buffers, whose single-device views go with it; where jax makes none, the array itself.

    It makes none of an array over several hosts.

    The array's own views would stay for as long as it lives, and be listed: on four devices four of five live arrays
    would be views, each to be looked at in every snapshot.
    """
    alias: jax.Array = array.clone() if hasattr(array, "clone") and array.is_fully_addressable else array
    return alias


def _entry(device: jax.Device, view: jax.Array) -> tuple[_Place, int]:
    return (device.id, view.unsafe_buffer_pointer()), view.on_device_size_in_bytes()


def _in_host_memory(array: jax.Array) -> bool:
    """Whether a live array sits in a memory that is not its device's own (pinned_host on a TPU)."""
    kind = array.sharding.memory_kind
    if kind is None:
        return False
    device: Any = next(iter(array.sharding.device_set))  # default_memory() is missing from its stub
    return bool(kind != device.default_memory().kind)


def _is_listed(array: jax.Array) -> bool:
    """Whether ``jax.live_arrays()`` lists it: not where the devices are another platform's, whose ids are the same."""
    device: Any = next(iter(array.sharding.addressable_devices))
    return bool(device.platform == jax.default_backend())


class _Tally:
    """Bytes by device and owner, each buffer once, of the arrays that are added; who comes first owns a shared one."""

    def __init__(self, devices: Iterable[jax.Device], largest: int) -> None:
        self.use: dict[int, dict[Owner, int]] = {device.id: dict.fromkeys(OWNERS, 0) for device in devices}
        #: Identities of arrays that were added.
        self.seen: set[int] = set()
        #: Sizes of unowned arrays by their description, if any are to be named.
        self.unowned: dict[str, list[int]] = {}
        self._named = largest > 0
        self._added: list[jax.Array] = []  # kept meanwhile, so that their identities are theirs
        self._counted: set[_Place] = set()

    def add(self, array: jax.Array, owner: Owner) -> None:
        shards, counted, use = shards_of(array), self._counted, self.use
        self._added.append(array)
        self.seen.add(_identity(array))
        added_bytes = 0
        for place, size in shards:
            if place in counted or not size or (on_device := use.get(place[0])) is None:
                continue
            counted.add(place)
            on_device[owner] += size
            added_bytes += size
        if self._named and added_bytes and owner == "other":
            self.unowned.setdefault(f"{array.dtype}{list(array.shape)}", []).append(added_bytes)


def snapshot(
    owners: Mapping[Owner, Iterable[jax.Array]] | None = None,
    *,
    devices: Iterable[jax.Device] | None = None,
    largest: int = 0,
) -> MemorySnapshot:
    """Take stock of this process's devices.

    Args:
        owners: arrays by owner; a live buffer that none of them holds is ``other``. A buffer held by two owners is
            the first one's.
        devices: the devices to report; all local ones by default.
        largest: how many kinds (dtype and shape) of unowned arrays to name, those that hold most first.
    """
    local = list(devices) if devices is not None else jax.local_devices()
    with no_collections():
        tally = _Tally(local, largest)
        for owner, arrays in (owners or {}).items():
            for array in arrays:
                tally.add(array, owner)
        live = jax.live_arrays()
        if largest:
            # A whole array before single-device views of it: then the largest unowned arrays are named whole. The sums
            # are the same in any order.
            live.sort(key=lambda array: -len(array.sharding.device_set))
        for array in live:
            if _identity(array) not in tally.seen:
                tally.add(array, "other")
    use = tally.use
    return MemorySnapshot(
        t_s=time.perf_counter(),
        devices=tuple(
            DeviceUse(
                id=device.id,
                ledger_bytes=sum(use[device.id].values()),
                allocator_bytes=allocator_bytes(device),
                by_owner=use[device.id],
            )
            for device in local
        ),
        rss_bytes=rss_bytes(),
        largest_other=_largest(tally.unowned, largest),
    )


def _largest(sizes_by_description: Mapping[str, list[int]], number: int) -> tuple[tuple[str, int], ...]:
    held = [
        (f"{len(sizes)} x {description}" if len(sizes) > 1 else description, sum(sizes))
        for description, sizes in sizes_by_description.items()
    ]
    return tuple(sorted(held, key=lambda entry: -entry[1])[:number])


def allocator_bytes(device: jax.Device) -> int | None:
    """The device's own ``bytes_in_use``; None where it keeps no statistics or none of that name."""
    return _stat(device, "bytes_in_use")


def limit_bytes(device: jax.Device) -> int | None:
    """The device's capacity by its own word (``bytes_limit``); None where it does not say."""
    return _stat(device, "bytes_limit")


def _stat(device: jax.Device, name: str) -> int | None:
    stats = device_stats(device)
    value = stats.get(name) if stats else None
    return int(value) if value is not None else None


def device_stats(device: jax.Device) -> Mapping[str, int] | None:
    """The allocator's statistics; None on devices that keep none (CPU)."""
    stats: Mapping[str, int] | None = device.memory_stats()
    return stats


def rss_bytes() -> int | None:
    """The process's resident memory where device memory is host memory (CPU); None on accelerators."""
    if jax.default_backend() != "cpu":
        return None
    return int(psutil.Process().memory_info().rss)
