"""The KV buffers of one engine as its scheduler's thread handles them: dropped, and rebuilt in place.

Callers have :class:`kvcycle.kv_cache.KVCache` instead, which runs these operations there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax

from kvcycle import capacity, internals, memory
from kvcycle.buffers import BufferSpec, ZeroAllocator, ZeroTester, bytes_by_device, delete
from kvcycle.errors import KVCacheDroppedError, KVCacheStateError, RebuildError, UnknownBufferError
from kvcycle.inband import Channel
from kvcycle.pools import slots_of, weight_arrays
from kvcycle.record_parts import Owner

State = Literal["resident", "dropped"]

#: What a channel lacks while the cache is dropped.
KV_CACHE = "kv_cache"


@dataclass(frozen=True)
class Freed:
    """What a drop freed: bytes on every device, and how many buffers were deleted of how many.

    ``missing_delete_method`` counts slots whose object could not be deleted; it is 0 unless something is wrong.
    ``aborted`` and ``retracted`` are the ids of the requests that were, see :meth:`KVCache.drop`.
    """

    bytes: int
    bytes_by_device: dict[int, int]
    buffers: int
    deleted_buffers: int
    missing_delete_method: int
    aborted: tuple[str, ...] = ()
    retracted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """How many buffers there are, and their bytes on every device, by device id."""

    buffers: int
    bytes_by_device: dict[int, int]


class Buffers:
    """The buffers as the scheduler's thread handles them; one per engine, shared by its KVCache objects.

    Public methods are the operations that a caller may ask for (see ``calls.py``), on the scheduler's thread.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.state: State = "resident"
        #: Requests are being aborted for a drop, so no new one may start.
        self._closing = False
        self.slots = slots_of(channel.engine)
        if not self.slots:
            raise UnknownBufferError("The engine's pools hold no device array, so there is nothing to drop.")
        arrays = [slot.get() for slot in self.slots]
        self.specs = [BufferSpec.of(array) for array in arrays]
        self.bytes_by_device = bytes_by_device(arrays)
        self.allocate = ZeroAllocator(self.specs)
        self._nonzero = ZeroTester(self.specs)
        # In process a waiting caller would wait for itself, so a request while dropped fails in its caller.
        channel.refuse_requests(self._refusal)

    def facts(self) -> Facts:
        """What does not change while the engine lives."""
        return Facts(buffers=len(self.slots), bytes_by_device=self.bytes_by_device)

    def current_state(self) -> State:
        """The state, for a caller in another process."""
        return self.state

    def snapshot(self, largest: int = 0) -> memory.MemorySnapshot:
        """What is in use in this process, by owner."""
        resident = [array for slot in self.slots if (array := slot.find()) is not None]
        owners: dict[Owner, list[jax.Array]] = {"weights": weight_arrays(self.channel.engine), "kv": resident}
        return memory.snapshot(owners, largest=largest)

    def expect(self, state: State, otherwise: str, way_out: str) -> None:
        """Refuse, with the way out, if the cache is in another state."""
        if self.state != state:
            raise KVCacheStateError(f"The KV cache is {otherwise}; {way_out}.")

    def retract_and_drop(self) -> Freed:
        """On the scheduler's thread, between batches."""
        self.expect("resident", "dropped already", "another caller dropped it first; one rebuild() serves both")
        # Back in the queue they are safe: should the drop fail, they are computed again.
        retracted = internals.retract_requests(self.channel.scheduler)
        return replace(self.drop(keep_waiting=True), retracted=tuple(retracted))

    def drop(self, *, keep_waiting: bool = False, aborted: tuple[str, ...] = ()) -> Freed:
        """On the scheduler's thread: nothing is running and nothing can start before this returns."""
        # Asked again here: of two callers that both found it resident, one comes second.
        self.expect("resident", "dropped already", "another caller dropped it first; one rebuild() serves both")
        with self.channel.hosts.all_or_none("drop the KV cache: see that its buffers are there"):
            self._found()
        with self.channel.hosts.all_or_none("drop the KV cache"):
            # While something else is released no request runs, and those that wait have computed nothing.
            internals.flush(self.channel.scheduler, keep_waiting=keep_waiting or self.channel.held)
            arrays = self._found()
            # A buffer in use by a pending computation would be freed later; a donated one has no bytes to sum.
            jax.block_until_ready(arrays)
            freed_by_device = bytes_by_device(arrays)
        self.channel.lacking.add(KV_CACHE)
        self.state = "dropped"
        deleted = missing = 0
        for array in arrays:
            delete = getattr(array, "delete", None)
            if delete is None:
                missing += 1
                continue
            delete()
            deleted += array.is_deleted()
        return Freed(
            bytes=sum(freed_by_device.values()),
            bytes_by_device=freed_by_device,
            buffers=len(arrays),
            deleted_buffers=deleted,
            missing_delete_method=missing,
            aborted=aborted,
        )

    def _found(self) -> list[Any]:
        found = {slot.path: slot.find() for slot in self.slots}
        gone = [path for path, array in found.items() if array is None or array.is_deleted()]
        if gone:
            raise KVCacheStateError(
                f"The KV cache cannot be dropped: {len(gone)} of its {len(found)} buffers are deleted already, first "
                f"{gone[0]}. Something else than its KVCache deleted them; boot the engine anew."
            )
        return list(found.values())

    def abort_requests(self) -> list[str]:
        """Abort every request and let no new one start, where that can be seen to, until :meth:`reopen`."""
        self._closing = True
        return internals.abort_requests(self.channel.scheduler)

    def reopen(self) -> None:
        """Let new requests start again after :meth:`abort_requests`."""
        self._closing = False

    def flush(self) -> None:
        """Empty the prefix cache; when idle."""
        internals.flush(self.channel.scheduler)

    def rebuild(self) -> None:
        """On the scheduler's thread."""
        self.expect("dropped", "resident already", "another caller rebuilt it first")
        arrays: list[jax.Array] = []
        with self.channel.hosts.all_or_none("rebuild the KV cache", undo=lambda: delete(arrays)):
            try:
                arrays += self.allocate()
            except jax.errors.JaxRuntimeError as error:
                raise self._no_room(error) from error
        for slot, array in zip(self.slots, arrays, strict=True):
            slot.set(array)
        self.state = "resident"
        self.channel.lacking.discard(KV_CACHE)

    def nonzero_slots(self) -> list[str]:
        """Paths of the slots that hold anything but zeros."""
        self.expect("resident", "dropped", "rebuild() first")
        flags = self._nonzero([slot.find() for slot in self.slots])
        return [slot.path for slot, nonzero in zip(self.slots, flags, strict=True) if nonzero]

    def _no_room(self, error: Exception) -> RebuildError:
        needed = self.bytes_by_device
        return RebuildError(
            f"The KV cache could not be rebuilt: "
            f"{capacity.shortage(error, needed, weight_arrays(self.channel.engine))} It stays dropped: delete what is "
            "no longer needed, then call rebuild() again.",
            dict(needed),
            capacity.free_bytes_by_device(needed),
        )

    def _refusal(self) -> KVCacheDroppedError | None:
        if self.state == "resident":
            return (
                KVCacheDroppedError(
                    "The engine cannot serve a request: its KV cache is being dropped, and those before it are aborted."
                )
                if self._closing
                else None
            )
        return KVCacheDroppedError(
            "The engine cannot serve a request: its KV cache is dropped. Call rebuild() on its KVCache, or leave the "
            "`with kv.released():` block, first."
        )
