"""The heart: drop the KV cache's device buffers of a live engine, and rebuild them in place.

    kv = KVCache(engine)
    with kv.released() as freed:
        train_step()            # freed.bytes of HBM are yours
    engine.generate(...)        # goes on, without compiling

States: ``resident`` → :meth:`KVCache.drop` → ``dropped`` → :meth:`KVCache.rebuild` → ``resident``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax

from kvcycle import capacity, inband, internals
from kvcycle.buffers import BufferSpec, Slot, ZeroAllocator, ZeroTester, bytes_by_device
from kvcycle.errors import EngineBusyError, KVCacheDroppedError, KVCacheStateError, RebuildError, UnknownBufferError
from kvcycle.pools import slots_of, weight_arrays

State = Literal["resident", "dropped"]
#: What becomes of queued and running requests at a drop: see :meth:`KVCache.drop`.
Mode = Literal["refuse", "abort", "retract"]


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


class KVCache:
    """The KV (and state) buffers of one in-process sglang-jax Engine, which can be dropped and rebuilt.

    Works on any engine booted with ``enable_single_process=True``. Several of these on one engine are the same cache.
    Attaching compiles the one call that the rebuild makes, so that a rebuild compiles nothing.

    Raises:
        UnsupportedEngineError: the engine's scheduler is out of reach, or a pool holds arrays in unknown places.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._channel = inband.channel_of(engine)
        # Walked on the scheduler's thread when idle: a forward would hold the arrays.
        self._buffers = self._channel.part(
            _Buffers, lambda: self._channel.call(lambda: _Buffers(self._channel), at="idle", timeout_s=_REBUILD_S)
        )

    @property
    def state(self) -> State:
        """``"resident"`` or ``"dropped"``."""
        return self._buffers.state

    @property
    def buffers(self) -> int:
        """How many device arrays the pools hold."""
        return len(self._buffers.slots)

    @property
    def bytes_by_device(self) -> dict[int, int]:
        """Device bytes of all buffers on each device when resident, by device id."""
        return dict(self._buffers.bytes_by_device)

    @property
    def bytes(self) -> int:
        """Device bytes of all buffers, summed over the devices."""
        return sum(self._buffers.bytes_by_device.values())

    @property
    def slots(self) -> list[Slot]:
        """The places of the engine's pools that hold the buffers."""
        return list(self._buffers.slots)

    @property
    def specs(self) -> list[BufferSpec]:
        """Shape, dtype, sharding and committedness of the buffer in each slot, as found when attached."""
        return list(self._buffers.specs)

    def arrays(self) -> list[jax.Array]:
        """The arrays in the slots now; [] while dropped. A forward replaces them, so do not hold on to them."""
        if self.state == "dropped":
            return []
        return [array for slot in self._buffers.slots if (array := slot.find()) is not None]

    def drop(self, *, wait_s: float | None = None, mode: Mode = "refuse") -> Freed:
        """Delete the buffers and give their memory back.

        The pipeline of finished requests is let drain and the prefix cache is flushed first: what the cache knew is
        gone. Requests meanwhile raise :class:`~kvcycle.errors.KVCacheDroppedError` in their caller; one that had
        reached the engine already waits for the rebuild.

        Args:
            wait_s: wait this many seconds for queued and running requests, before ``mode`` decides.
            mode: what becomes of requests that are queued or running then. ``"refuse"``: they go on, nothing is
                dropped. ``"abort"``: they end now, with finish reason ``abort`` and the tokens they have.
                ``"retract"``: they go back into the queue, and after the rebuild they go on to the same end.

        Returns:
            What was freed, and the ids of the requests that were aborted or retracted.

        Raises:
            EngineBusyError: requests are queued or running (with the counts); nothing was deleted.
            KVCacheStateError: already dropped.
        """
        return self._drop(wait_s, mode, [])

    def _drop(self, wait_s: float | None, mode: Mode, done: list[Freed]) -> Freed:
        """Drop, and put what was freed into ``done`` the moment it is: an interrupted caller can look there."""
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r} is none; use one of {', '.join(get_args(Mode))}.")
        self._buffers.expect("resident", "dropped already", "call rebuild() first, or use `with kv.released():`")

        def noting(drop: Callable[[], Freed]) -> Callable[[], Freed]:
            def run() -> Freed:
                done.append(drop())
                return done[-1]

            return run

        if mode == "refuse" or wait_s is not None:
            try:
                return self._channel.call(
                    noting(self._buffers.drop),
                    at="idle",
                    timeout_s=wait_s if wait_s is not None else inband.DRAIN_S,
                    wait_for_requests=wait_s is not None,
                )
            except EngineBusyError:
                if mode == "refuse":
                    raise
        if mode == "retract":
            return self._channel.call(noting(self._buffers.retract_and_drop), at="between", timeout_s=inband.DRAIN_S)
        with self._buffers.closing():
            aborted = tuple(self._channel.call(lambda: internals.abort_requests(self._channel.scheduler)))
            return self._channel.call(
                noting(lambda: replace(self._buffers.drop(), aborted=aborted)),
                at="idle",
                timeout_s=inband.DRAIN_S,
                wait_for_requests=True,
            )

    def rebuild(self) -> None:
        """Allocate all buffers anew, as zeros, in the same slots of the same objects; compiles nothing.

        Raises:
            KVCacheStateError: not dropped.
            RebuildError: not enough memory; nothing stays allocated, the cache stays dropped, and this may be called
                again when room was made.
        """
        self._buffers.expect("dropped", "resident already", "there is nothing to rebuild before a drop()")
        self._channel.call(self._buffers.rebuild, at="now", timeout_s=_REBUILD_S)

    @contextmanager
    def released(self, *, wait_s: float | None = None, mode: Mode = "refuse") -> Iterator[Freed]:
        """Drop on the way in (as :meth:`drop` does), rebuild on the way out, also when the block raises.

        Also a Ctrl-C that arrives during the drop leaves the cache resident. Should the rebuild fail as well, its
        :class:`~kvcycle.errors.RebuildError` is raised from the block's exception, so that both are told.
        """
        done: list[Freed] = []
        try:
            yield self._drop(wait_s, mode, done)
        except BaseException as error:
            if done and self.state == "dropped":
                try:
                    self.rebuild()
                except RebuildError as failure:
                    raise failure from error
            raise
        if self.state == "dropped":  # the block may have rebuilt it by hand
            self.rebuild()

    def flush(self) -> None:
        """Empty the prefix cache, once the pipeline of finished requests has drained; frees no device memory.

        The engine's own ``flush_cache()`` refuses right after a ``generate()``, while the pipeline drains, and only
        says so in its return value.
        """
        self._buffers.expect("resident", "dropped", "it has no prefix cache to empty; rebuild() first")
        self._channel.call(lambda: internals.flush(self._channel.scheduler), at="idle", timeout_s=inband.DRAIN_S)

    def nonzero_slots(self) -> list[str]:
        """Paths of the slots that hold anything but zeros, or nothing at all: [] right after a rebuild."""
        return self._channel.call(self._buffers.nonzero_slots, at="now")


#: The longest that a rebuild may take.
_REBUILD_S = 600.0
#: What a channel lacks while the cache is dropped.
_KV_CACHE = "kv_cache"


class _Buffers:
    """The buffers as the scheduler's thread handles them; one per engine, shared by its KVCache objects."""

    def __init__(self, channel: inband.Channel) -> None:
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
        internals.refuse_requests(channel.engine, self._refusal)

    def expect(self, state: State, otherwise: str, way_out: str) -> None:
        if self.state != state:
            raise KVCacheStateError(f"The KV cache is {otherwise}; {way_out}.")

    def retract_and_drop(self) -> Freed:
        """On the scheduler's thread, between batches."""
        self.expect("resident", "dropped already", "another caller dropped it first; one rebuild() serves both")
        # Back in the queue they are safe: should the drop fail, they are computed again.
        retracted = internals.retract_requests(self.channel.scheduler)
        return replace(self.drop(keep_waiting=True), retracted=tuple(retracted))

    def drop(self, *, keep_waiting: bool = False) -> Freed:
        """On the scheduler's thread: nothing is running and nothing can start before this returns."""
        # Asked again here: of two callers that both found it resident, one comes second.
        self.expect("resident", "dropped already", "another caller dropped it first; one rebuild() serves both")
        internals.flush(self.channel.scheduler, keep_waiting=keep_waiting)
        found = {slot.path: slot.find() for slot in self.slots}
        gone = [path for path, array in found.items() if array is None or array.is_deleted()]
        if gone:
            raise KVCacheStateError(
                f"The KV cache cannot be dropped: {len(gone)} of its {len(found)} buffers are deleted already, first "
                f"{gone[0]}. Something else than its KVCache deleted them; boot the engine anew."
            )
        arrays: list[Any] = list(found.values())
        # A buffer in use by a pending computation would be freed later; a donated one has no bytes to sum.
        jax.block_until_ready(arrays)
        freed_by_device = bytes_by_device(arrays)
        self.channel.lacking.add(_KV_CACHE)
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
        )

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Refuse new requests in their callers meanwhile."""
        self._closing = True
        try:
            yield
        finally:
            self._closing = False

    def rebuild(self) -> None:
        """On the scheduler's thread."""
        self.expect("dropped", "resident already", "another caller rebuilt it first")
        try:
            arrays = self.allocate()
        except jax.errors.JaxRuntimeError as error:
            raise self._no_room(error) from error
        for slot, array in zip(self.slots, arrays, strict=True):
            slot.set(array)
        self.state = "resident"
        self.channel.lacking.discard(_KV_CACHE)

    def nonzero_slots(self) -> list[str]:
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
