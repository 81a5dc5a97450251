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
from typing import Any, Literal, get_args

import jax

from kvcycle.buffers import BufferSpec, Slot
from kvcycle.calls import DRAIN_S, NOW, At, Way, When
from kvcycle.errors import EngineBusyError, RebuildError, UnsupportedEngineError
from kvcycle.inband import ATTACH_S
from kvcycle.kv_buffers import Buffers, Freed, State
from kvcycle.memory import MemorySnapshot
from kvcycle.remote import way_to

#: What becomes of queued and running requests at a drop: see :meth:`KVCache.drop`.
Mode = Literal["refuse", "abort", "retract"]


class KVCache:
    """The KV (and state) buffers of one sglang-jax Engine, which can be dropped and rebuilt.

    Works on any engine booted with ``enable_single_process=True``, and on one in another process that was booted with
    :class:`kvcycle.ServerArgs`. Several of these on one engine are the same cache. Attaching compiles the one call that
    the rebuild makes, so that a rebuild compiles nothing.

    Raises:
        UnsupportedEngineError: the engine's scheduler is out of reach, or a pool holds arrays in unknown places.
    """

    def __init__(self, engine: Any) -> None:
        self._channel: Way = way_to(engine)
        # Walked on the scheduler's thread when idle: a forward would hold the arrays.
        self._here = self._channel.here(Buffers)
        self._facts = self._here.facts() if self._here else self._channel.ask(Buffers, Buffers.facts, NOW)

    @property
    def state(self) -> State:
        """``"resident"`` or ``"dropped"``."""
        return self._here.state if self._here else self._channel.ask(Buffers, Buffers.current_state, NOW)

    @property
    def buffers(self) -> int:
        """How many device arrays the pools hold."""
        return self._facts.buffers

    @property
    def bytes_by_device(self) -> dict[int, int]:
        """Device bytes of all buffers on each device when resident, by device id."""
        return dict(self._facts.bytes_by_device)

    @property
    def bytes(self) -> int:
        """Device bytes of all buffers, summed over the devices."""
        return sum(self._facts.bytes_by_device.values())

    @property
    def _buffers(self) -> Buffers:
        if self._here is None:
            raise UnsupportedEngineError(
                "The engine's scheduler runs in another process, and so do its buffers: slots, specs and arrays cannot "
                "be handed over. Ask for bytes_by_device, or snapshot()."
            )
        return self._here

    @property
    def slots(self) -> list[Slot]:
        """The places of the engine's pools that hold the buffers."""
        return list(self._buffers.slots)

    @property
    def specs(self) -> list[BufferSpec]:
        """Shape, dtype, sharding and committedness of the buffer in each slot, as found when attached."""
        return list(self._buffers.specs)

    def snapshot(self, *, largest: int = 0) -> MemorySnapshot:
        """What is in use on the devices of the process that holds the buffers, by owner (weights, KV cache, other).

        :func:`kvcycle.snapshot` is about the caller's own process, which is another where the engine is.

        Args:
            largest: how many kinds of unowned arrays to name, those that hold most first.
        """
        return self._channel.ask(Buffers, Buffers.snapshot, NOW, largest)

    def arrays(self) -> list[jax.Array]:
        """The arrays in the slots now; [] while dropped. A forward replaces them, so do not hold on to them."""
        if self.state == "dropped":
            return []
        return [array for slot in self._buffers.slots if (array := slot.find()) is not None]

    def drop(self, *, wait_s: float | None = None, mode: Mode = "refuse") -> Freed:
        """Delete the buffers and give their memory back.

        The pipeline of finished requests is let drain and the prefix cache is flushed first: what the cache knew is
        gone. Requests meanwhile raise :class:`~kvcycle.errors.KVCacheDroppedError` in their callers; one that had
        reached the engine already waits for the rebuild, and so does every one of an engine in another process.

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
        check_mode(mode)
        self._expect("resident", "dropped already", "call rebuild() first, or use `with kv.released():`")
        return clear_then(
            self._channel,
            wait_s,
            mode,
            idle=lambda when, aborted: self._channel.ask(Buffers, Buffers.drop, when, aborted=aborted),
            retract=lambda when: self._channel.ask(Buffers, Buffers.retract_and_drop, when),
            done=done,
        )

    def _expect(self, state: State, otherwise: str, way_out: str) -> None:
        """What is wrong from the start needs no wait for requests."""
        if self._here:
            self._here.expect(state, otherwise, way_out)
        else:
            self._channel.ask(Buffers, Buffers.expect, NOW, state, otherwise, way_out)

    def rebuild(self) -> None:
        """Allocate all buffers anew, as zeros, in the same slots of the same objects; compiles nothing.

        Raises:
            KVCacheStateError: not dropped.
            RebuildError: not enough memory; nothing stays allocated, the cache stays dropped, and this may be called
                again when room was made.
        """
        self._expect("dropped", "resident already", "there is nothing to rebuild before a drop()")
        self._channel.ask(Buffers, Buffers.rebuild, When(timeout_s=ATTACH_S))

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
        self._expect("resident", "dropped", "it has no prefix cache to empty; rebuild() first")
        self._channel.ask(Buffers, Buffers.flush, When("idle", DRAIN_S))

    def nonzero_slots(self) -> list[str]:
        """Paths of the slots that hold anything but zeros, or nothing at all: [] right after a rebuild."""
        return self._channel.ask(Buffers, Buffers.nonzero_slots, NOW)


def check_mode(mode: str) -> None:
    """Refuse a mode that is none."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} is none; use one of {', '.join(get_args(Mode))}.")


def clear_then[T](
    channel: Way,
    wait_s: float | None,
    mode: Mode,
    *,
    idle: Callable[[When, tuple[str, ...]], T],
    retract: Callable[[When], T],
    done: list[Any] | None = None,
    abandoned: Callable[[], bool] = lambda: False,
) -> T:
    """Do something that needs the engine idle, when it is or after its requests were made to give way.

    Args:
        channel: the way to the engine.
        wait_s: as :meth:`KVCache.drop` has it.
        mode: as :meth:`KVCache.drop` has it.
        idle: does it on an idle engine, given the moment and the ids of the requests that were aborted for it.
        retract: does it between two batches, after putting the running requests back.
        done: see :class:`kvcycle.calls.When`.
        abandoned: see :class:`kvcycle.calls.When`.
    """

    def when(at: At, timeout_s: float, *, wait_for_requests: bool = False) -> When:
        return When(at, timeout_s, wait_for_requests=wait_for_requests, done=done, abandoned=abandoned)

    if mode == "refuse" or wait_s is not None:
        try:
            return idle(when("idle", DRAIN_S if wait_s is None else wait_s, wait_for_requests=wait_s is not None), ())
        except EngineBusyError:
            if mode == "refuse":
                raise
    if mode == "retract":
        return retract(when("between", DRAIN_S))
    try:
        aborted = tuple(channel.ask(Buffers, Buffers.abort_requests, NOW))
        return idle(when("idle", DRAIN_S, wait_for_requests=True), aborted)
    finally:
        channel.ask(Buffers, Buffers.reopen, NOW)
