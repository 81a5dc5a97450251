"""``release_memory_occupation`` and ``resume_memory_occupation`` of an in-process engine, alive.

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
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import jax

from kvcycle import inband, internals, memory
from kvcycle.errors import EngineBusyError, MemoryOccupationError
from kvcycle.kv_cache import KVCache
from kvcycle.params import ParamSet
from kvcycle.record import Owner
from kvcycle.text import nearest
from kvcycle.weights import Weights

#: sglang's tags. There are no CUDA graphs here: the tag is taken, so that frameworks may name it, and holds no bytes.
Tag = Literal["kv_cache", "weights", "cuda_graph"]
TAGS: tuple[Tag, ...] = get_args(Tag)
#: What becomes of the weights' bits at a release.
WeightsMode = Literal["keep", "discard"]

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
    """

    tags: tuple[Tag, ...]
    bytes_by_device: dict[int, int]
    host_bytes: int
    remaining_bytes_by_device: dict[int, int]
    remaining: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        """Freed bytes, summed over the devices."""
        return sum(self.bytes_by_device.values())


class MemoryOccupation:
    """What an engine occupies by sglang's tags, released and resumed; made by :func:`enable_memory_occupation`.

    Args:
        engine: an in-process sglang-jax Engine.
        weights: as :func:`enable_memory_occupation` has it.
    """

    def __init__(self, engine: Any, weights: WeightsMode = "keep") -> None:
        self.mode: WeightsMode = weights
        self._engine = engine
        self._kv, self._weights = KVCache(engine), Weights(engine)
        self._graphs_released = False
        #: One call at a time: of two that find the same state, one comes second.
        self._lock = threading.RLock()

    @property
    def released(self) -> tuple[Tag, ...]:
        """The tags that are released now, in the order of :data:`TAGS`."""
        states = (self._kv.state == "dropped", self._weights.state == "released", self._graphs_released)
        return tuple(tag for tag, released in zip(TAGS, states, strict=True) if released)

    def release(self, tags: Sequence[str] | None = None) -> Occupation:
        """Free what the tags name; all of them or, if one cannot be, none.

        Requests meanwhile fail in their caller. What the prefix cache knew is gone with ``kv_cache``, and stays
        without it.

        Args:
            tags: any of ``kv_cache``, ``weights``, ``cuda_graph``; None or none for whatever is not released yet.

        Raises:
            MemoryOccupationError: a tag that is none, or is released already.
            EngineBusyError: requests are queued or running; nothing was released.
        """
        with self._lock:
            wanted = self._wanted(tags, "release", lambda tag: tag not in self.released)
            freed = Counter[int]()
            host_bytes = 0
            dropped = False
            try:
                if "kv_cache" in wanted:
                    freed.update(self._kv.drop().bytes_by_device)
                    dropped = True
                if "weights" in wanted:
                    weights = self._weights.release(keep=self.mode == "keep")
                    freed.update(weights.bytes_by_device)
                    host_bytes = weights.host_bytes
            except BaseException as error:
                if dropped:
                    self._kv.rebuild()
                if isinstance(error, EngineBusyError):
                    counts = ", ".join(f"{number} {place}" for place, number in error.counts.items())
                    raise EngineBusyError(
                        f"release_memory_occupation() needs an idle engine, and it has requests: {counts}. Nothing was "
                        "released. Wait for them, or end them with engine.abort_request(abort_all=True).",
                        error.counts,
                    ) from error
                raise
            self._graphs_released |= "cuda_graph" in wanted
            return self._occupation(wanted, dict(freed), host_bytes)

    def resume(self, tags: Sequence[str] | None = None, update: ParamSet | Sequence[jax.Array] | None = None) -> None:
        """Take back what the tags name, the weights first; compiles nothing.

        Args:
            tags: any of ``kv_cache``, ``weights``, ``cuda_graph``; None or none for whatever is released.
            update: new weights, as :meth:`kvcycle.weights.Weights.resume` takes them; only with the weights.

        Raises:
            MemoryOccupationError: a tag that is none, or is not released; weights that were discarded and no new ones.
            ParamSetError: the new weights do not match the engine's, or there is no room for the old ones.
            RebuildError: there is no room for the KV cache. What was resumed before it stays so.
        """
        with self._lock:
            wanted = self._wanted(tags, "resume", lambda tag: tag in self.released)
            if update is not None and "weights" not in wanted:
                raise MemoryOccupationError(
                    f"resume_memory_occupation(tags={list(wanted)}) was given new weights (update=…) and does not "
                    "resume the weights; name them as well, or use kvcycle.swap() on weights that are resident."
                )
            if "weights" in wanted:
                self._weights.resume(update)
            if "kv_cache" in wanted:
                self._kv.rebuild()
            self._graphs_released &= "cuda_graph" not in wanted

    def _wanted(self, tags: Sequence[str] | None, verb: str, fits: Callable[[Tag], bool]) -> tuple[Tag, ...]:
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
                raise MemoryOccupationError(
                    f"{call}(tags={list(tags or ())}): {tag!r} is {state} already, so nothing was {verb}d; call "
                    f"{other}_memory_occupation(tags=[{tag!r}]) first."
                )
        wanted = tuple(tag for tag in TAGS if (tag in tags if tags else fits(tag)))
        if not wanted:
            raise MemoryOccupationError(
                f"{call}() was called, and everything is {state} already; call {other}_memory_occupation() first."
            )
        return wanted

    def _occupation(self, tags: tuple[Tag, ...], freed: dict[int, int], host_bytes: int) -> Occupation:
        owners: dict[Owner, list[jax.Array]] = {
            "weights": internals.weight_leaves(self._engine),
            "kv": self._kv.arrays(),
        }
        devices = [device for device in jax.local_devices() if device.id in self._kv.bytes_by_device]
        left = memory.snapshot(owners, devices=devices, largest=_NAMED)
        return Occupation(
            tags=tags,
            bytes_by_device=freed,
            host_bytes=host_bytes,
            remaining_bytes_by_device={use.id: use.ledger_bytes for use in left.devices},
            remaining=left.largest_other,
        )


def enable_memory_occupation(engine: Any, weights: WeightsMode = "keep") -> MemoryOccupation:
    """Make an engine's ``release_memory_occupation`` and ``resume_memory_occupation`` work.

    Also ``async_release_memory_occupation`` and ``async_resume_memory_occupation``, which do not block the event loop,
    and the tokenizer manager's two coroutines, which frameworks call that keep an event loop of their own. A release
    returns an :class:`Occupation`; a resume also takes ``update=``, new weights instead of the old ones. Enabling it
    compiles the one call by which the KV cache comes back. Calling this again changes the mode only.

    Args:
        engine: an Engine booted with ``enable_single_process=True``, by kvcycle or by anybody else.
        weights: ``"keep"``: a release copies them to host memory, and a resume brings back the same bits.
            ``"discard"``: a release deletes them, and a resume needs ``update=``, or :func:`kvcycle.swap` before it.

    Raises:
        UnsupportedEngineError: the engine is in another process, or of an unknown build.
        ValueError: ``weights`` is no mode.
    """
    if weights not in get_args(WeightsMode):
        raise ValueError(f"weights={weights!r} is none; use one of {', '.join(get_args(WeightsMode))}.")

    def enable() -> MemoryOccupation:
        occupation = MemoryOccupation(engine)
        _install(engine, occupation)
        return occupation

    found = inband.channel_of(engine).part(MemoryOccupation, enable)
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
