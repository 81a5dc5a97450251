"""``release_memory_occupation`` and ``resume_memory_occupation`` of an engine, alive.

sglang's two calls by which an RL framework takes the memory for training and gives it back. sglang-jax 0.1.0rc0 has
them in its client and nothing behind them: they raise a TypeError. After :func:`enable_memory_occupation` they work,
with sglang's signature and tags, so that a framework which calls them needs no change:

    kvcycle.enable_memory_occupation(engine)
    engine.release_memory_occupation(tags=["kv_cache", "weights"])
    train_step()
    engine.resume_memory_occupation(tags=["weights"])
    engine.resume_memory_occupation(tags=["kv_cache"])
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import jax

from kvcycle import compiles, internals
from kvcycle.calls import NOW, Way, When
from kvcycle.errors import EngineBusyError, MemoryOccupationError, OccupationStateError
from kvcycle.inband import ATTACH_S, Channel
from kvcycle.kv_buffers import Buffers, Freed
from kvcycle.kv_cache import Mode, check_mode, clear_then
from kvcycle.memory import MemorySnapshot
from kvcycle.params import ParamSet
from kvcycle.record_parts import Compiles
from kvcycle.remote import way_to
from kvcycle.text import nearest
from kvcycle.weights import Holder

#: sglang's tags. There are no CUDA graphs here: the tag is taken, so that frameworks may name it, and holds no bytes.
Tag = Literal["kv_cache", "weights", "cuda_graph"]
TAGS: tuple[Tag, ...] = get_args(Tag)
#: What becomes of the weights' bits at a release.
WeightsMode = Literal["keep", "discard"]

_OCCUPATION = "_kvcycle_occupation"
#: How many kinds of remaining arrays are named.
_NAMED = 8


@dataclass(frozen=True)
class Occupation:
    """What a release freed, and what stays on the devices.

    Attributes:
        tags: what was released by this call.
        bytes_by_device: freed bytes by device id.
        host_bytes: host memory that the weights' bits take meanwhile; 0 if they were discarded or stay.
        remaining_bytes_by_device: bytes of every live array of the process that is left on the engine's devices.
        remaining: those of them that are neither weights nor KV cache, alike ones together, the largest first:
            (dtype and shape, bytes summed over the devices).
        aborted: ids of the requests that were aborted for it.
        retracted: ids of the requests that were put back into the queue for it, and go on after the resume.
    """

    tags: tuple[Tag, ...]
    bytes_by_device: dict[int, int]
    host_bytes: int
    remaining_bytes_by_device: dict[int, int]
    remaining: tuple[tuple[str, int], ...]
    aborted: tuple[str, ...] = ()
    retracted: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Freed bytes, summed over the devices."""
        return sum(self.bytes_by_device.values())


@dataclass(frozen=True)
class OccupationState:
    """What is released, what a release of each part would free, and what is in use where the scheduler runs.

    Attributes:
        released: the tags that are released now.
        bytes_by_device: by tag, the device bytes that it frees or has freed.
        requests: how many are queued or running, by place; while something is released they wait.
        memory: what is in use in the scheduler's process now.
        compiles: what jax's compiler has done in that process since it was first asked, or since it is served.
    """

    released: tuple[Tag, ...]
    bytes_by_device: dict[Tag, dict[int, int]]
    requests: dict[str, int]
    memory: MemorySnapshot
    compiles: Compiles


class Occupier:
    """What an engine occupies by sglang's tags, as the scheduler's thread handles it; one per engine.

    Public methods are the operations that a caller may ask for (see ``calls.py``).
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._buffers, self._holder = channel.part(Buffers), channel.part(Holder)
        self._graphs_released = False

    def released(self) -> tuple[Tag, ...]:
        """The tags that are released now, in the order of :data:`TAGS`."""
        states = (self._buffers.state == "dropped", self._holder.state == "released", self._graphs_released)
        return tuple(tag for tag, released in zip(TAGS, states, strict=True) if released)

    def state(self) -> OccupationState:
        """What is released and what is in use."""
        return OccupationState(
            released=self.released(),
            bytes_by_device={
                "kv_cache": self._buffers.bytes_by_device,
                "weights": self._holder.bytes_by_device,
                "cuda_graph": {},
            },
            requests=internals.unfinished_requests(self._channel.scheduler),
            memory=self._buffers.snapshot(),
            compiles=compiles.total(),
        )

    def to_release(self, tags: Sequence[str] | None) -> tuple[Tag, ...]:
        """What a release of the tags would release; raises what it would."""
        return _wanted(tags, "release", lambda tag: tag not in self.released())

    def to_resume(self, tags: Sequence[str] | None) -> tuple[Tag, ...]:
        """What a resume of the tags would resume; raises what it would."""
        return _wanted(tags, "resume", lambda tag: tag in self.released())

    def release(
        self, tags: Sequence[str] | None, keep: bool, retract: bool = False, aborted: tuple[str, ...] = ()
    ) -> Occupation:
        """Free what the tags name, all or none; when idle, or between batches with ``retract``."""
        wanted = self.to_release(tags)
        retracted = tuple(internals.retract_requests(self._channel.scheduler)) if retract else ()
        freed = Counter[int]()
        host_bytes = 0
        dropped: Freed | None = None
        try:
            if "kv_cache" in wanted:
                dropped = self._buffers.drop(keep_waiting=retract)
                freed.update(dropped.bytes_by_device)
            if "weights" in wanted:
                weights = self._holder.release(keep)
                freed.update(weights.bytes_by_device)
                host_bytes = weights.host_bytes
        except BaseException:
            if dropped is not None:
                self._buffers.rebuild()
            raise
        self._graphs_released |= "cuda_graph" in wanted
        left = self._buffers.snapshot(largest=_NAMED)
        return Occupation(
            tags=wanted,
            bytes_by_device=dict(freed),
            host_bytes=host_bytes,
            remaining_bytes_by_device={
                use.id: use.ledger_bytes for use in left.devices if use.id in self._buffers.bytes_by_device
            },
            remaining=left.largest_other,
            aborted=aborted,
            retracted=retracted,
        )

    def resume(self, tags: Sequence[str] | None, update: ParamSet | None = None) -> tuple[Tag, ...]:
        """Take back what the tags name, the weights first; between two iterations."""
        wanted = self.to_resume(tags)
        if update is not None and "weights" not in wanted:
            raise MemoryOccupationError(
                f"resume_memory_occupation(tags={list(wanted)}) was given new weights (update=…) and does not "
                "resume the weights; name them as well, or use kvcycle.swap() on weights that are resident."
            )
        if "weights" in wanted:
            self._holder.resume(update)
        if "kv_cache" in wanted:
            self._buffers.rebuild()
        self._graphs_released &= "cuda_graph" not in wanted
        return wanted


def _wanted(tags: Sequence[str] | None, verb: str, fits: Callable[[Tag], bool]) -> tuple[Tag, ...]:
    call, other = f"{verb}_memory_occupation", "resume" if verb == "release" else "release"
    if isinstance(tags, str):
        raise MemoryOccupationError(f"{call}(tags={tags!r}): tags are a list; write tags=[{tags!r}].")
    for tag in tags or ():
        if tag not in TAGS:
            raise MemoryOccupationError(
                f"{call}(tags={list(tags or ())}): {tag!r} is no tag{nearest(str(tag), TAGS)}; there are "
                f"{', '.join(TAGS)}, and None for all."
            )
    state = "resident" if verb == "resume" else "released"
    for tag in cast("Sequence[Tag]", tags or ()):
        if not fits(tag):
            raise OccupationStateError(
                f"{call}(tags={list(tags or ())}): {tag!r} is {state} already, so nothing was {verb}d; call "
                f"{other}_memory_occupation(tags=[{tag!r}]) first."
            )
    wanted = tuple(tag for tag in TAGS if (tag in tags if tags else fits(tag)))
    if not wanted:
        raise OccupationStateError(
            f"{call}() was called, and everything is {state} already; call {other}_memory_occupation() first."
        )
    return wanted


class MemoryOccupation:
    """What an engine occupies by sglang's tags, released and resumed; made by :func:`enable_memory_occupation`.

    Args:
        channel: the way to the engine.
        weights: as :func:`enable_memory_occupation` has it.
    """

    def __init__(self, channel: Way, weights: WeightsMode = "keep") -> None:
        self.mode: WeightsMode = weights
        self._channel = channel
        channel.here(Occupier)  # made now: what cannot be released should say so before the first release

    @property
    def released(self) -> tuple[Tag, ...]:
        """The tags that are released now, in the order of :data:`TAGS`."""
        here = self._channel.here(Occupier)
        return here.released() if here else self._channel.ask(Occupier, Occupier.released, NOW)

    def state(self) -> OccupationState:
        """What is released, and what is in use where the scheduler runs."""
        return self._channel.ask(Occupier, Occupier.state, NOW)

    def release(
        self,
        tags: Sequence[str] | None = None,
        *,
        wait_s: float | None = None,
        mode: Mode = "refuse",
        abandoned: Callable[[], bool] = lambda: False,
    ) -> Occupation:
        """Free what the tags name; all of them or, if one cannot be, none.

        Requests meanwhile fail in their caller, or wait where the engine is in another process. What the prefix cache
        knew is gone with ``kv_cache``, and stays without it.

        Args:
            tags: any of ``kv_cache``, ``weights``, ``cuda_graph``; None or none for whatever is not released yet.
            wait_s: wait this many seconds for queued and running requests, before ``mode`` decides.
            mode: what becomes of requests that are queued or running then, see :meth:`kvcycle.KVCache.drop`.
            abandoned: asked now and then while waiting; True gives up.

        Raises:
            MemoryOccupationError: a tag that is none, or is released already.
            EngineBusyError: requests are queued or running; nothing was released.
        """
        check_mode(mode)
        keep = self.mode == "keep"
        self._channel.ask(Occupier, Occupier.to_release, NOW, tags)  # what is wrong from the start needs no wait
        try:
            return clear_then(
                self._channel,
                wait_s,
                mode,
                idle=lambda when, aborted: self._channel.ask(
                    Occupier, Occupier.release, when, tags, keep, aborted=aborted
                ),
                retract=lambda when: self._channel.ask(Occupier, Occupier.release, when, tags, keep, retract=True),
                abandoned=abandoned,
            )
        except EngineBusyError as error:
            counts = ", ".join(f"{number} {place}" for place, number in error.counts.items())
            waited = "" if wait_s is None else f" after {wait_s:g} s"
            raise EngineBusyError(
                f"release_memory_occupation() needs an idle engine, and it has requests{waited}: {counts}. Nothing was "
                "released. Wait for them, or end them with engine.abort_request(abort_all=True).",
                error.counts,
            ) from error

    def resume(
        self, tags: Sequence[str] | None = None, update: ParamSet | Sequence[jax.Array] | None = None
    ) -> tuple[Tag, ...]:
        """Take back what the tags name, the weights first; compiles nothing.

        Args:
            tags: any of ``kv_cache``, ``weights``, ``cuda_graph``; None or none for whatever is released.
            update: new weights, as :meth:`kvcycle.weights.Weights.resume` takes them; only with the weights.

        Returns:
            What was resumed.

        Raises:
            MemoryOccupationError: a tag that is none, or is not released; weights that were discarded and no new ones.
            ParamSetError: the new weights do not match the engine's, or there is no room for the old ones.
            RebuildError: there is no room for the KV cache. What was resumed before it stays so.
        """
        given = None if update is None else update if isinstance(update, ParamSet) else ParamSet(tuple(update))
        return self._channel.ask(Occupier, Occupier.resume, When(timeout_s=ATTACH_S), tags, given)


def enable_memory_occupation(engine: Any, weights: WeightsMode = "keep") -> MemoryOccupation:
    """Make an engine's ``release_memory_occupation`` and ``resume_memory_occupation`` work.

    Also ``async_release_memory_occupation`` and ``async_resume_memory_occupation``, which do not block the event loop,
    and the tokenizer manager's two coroutines, which frameworks call that keep an event loop of their own. A release
    returns an :class:`Occupation`; a resume also takes ``update=``, new weights instead of the old ones. Enabling it
    compiles the one call by which the KV cache comes back. Calling this again changes the mode only.

    Args:
        engine: an Engine booted with ``enable_single_process=True``, by kvcycle or by anybody else; or one in another
            process that was booted with :class:`kvcycle.ServerArgs`, whose requests wait meanwhile.
        weights: ``"keep"``: a release copies them to host memory, and a resume brings back the same bits.
            ``"discard"``: a release deletes them, and a resume needs ``update=``, or :func:`kvcycle.swap` before it.

    Raises:
        UnsupportedEngineError: the engine's scheduler is out of reach, or of an unknown build.
        ValueError: ``weights`` is no mode.
    """
    if weights not in get_args(WeightsMode):
        raise ValueError(f"weights={weights!r} is none; use one of {', '.join(get_args(WeightsMode))}.")

    found = getattr(engine, _OCCUPATION, None)
    if not isinstance(found, MemoryOccupation):
        found = MemoryOccupation(way_to(engine))
        _install(engine, found)
        setattr(engine, _OCCUPATION, found)
    found.mode = weights
    return found


def _install(engine: Any, occupation: MemoryOccupation) -> None:
    def release(tags: list[str] | None = None) -> Occupation:
        return occupation.release(tags)

    def resume(tags: list[str] | None = None, *, update: ParamSet | Sequence[jax.Array] | None = None) -> None:
        occupation.resume(tags, update)

    async def async_release(tags: list[str] | None = None) -> Occupation:
        return await asyncio.to_thread(occupation.release, tags)

    async def async_resume(
        tags: list[str] | None = None, *, update: ParamSet | Sequence[jax.Array] | None = None
    ) -> None:
        await asyncio.to_thread(occupation.resume, tags, update)

    # Requests of sglang carry the tags, those of 0.1.0rc0 have no such field: then all are meant.
    async def manager_release(obj: Any, request: Any = None) -> Occupation:  # noqa: ARG001 - sglang's signature
        return await async_release(getattr(obj, "tags", None))

    async def manager_resume(obj: Any, request: Any = None) -> None:  # noqa: ARG001 - sglang's signature
        await async_resume(getattr(obj, "tags", None))

    engine.release_memory_occupation, engine.resume_memory_occupation = release, resume
    engine.async_release_memory_occupation, engine.async_resume_memory_occupation = async_release, async_resume
    manager = engine.tokenizer_manager
    manager.release_memory_occupation, manager.resume_memory_occupation = manager_release, manager_resume
