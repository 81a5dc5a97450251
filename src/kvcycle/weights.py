"""The weights of a live engine, released and resumed: kept in host memory meanwhile, or taken from a new set.

    weights = Weights(engine)
    weights.release()           # their HBM is yours, as bits in host memory they wait
    weights.resume()            # the same bits, in the same places; or resume(update) with a training step's new set

States: ``resident`` → :meth:`Weights.release` → ``released`` → :meth:`Weights.resume` → ``resident``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from kvcycle import capacity, host_memory, inband, internals
from kvcycle.buffers import BufferSpec, bytes_by_device, delete
from kvcycle.calls import DRAIN_S, NOW, Way, When
from kvcycle.errors import (
    HostMemoryError,
    ParamSetError,
    UnsupportedEngineError,
    WeightsReleasedError,
    WeightsStateError,
)
from kvcycle.params import ParamSet, check_same_layout
from kvcycle.platform import large_allocations_mapped
from kvcycle.remote import way_to
from kvcycle.text import exact_bytes

State = Literal["resident", "released"]

#: What a channel lacks while they are released.
_WEIGHTS = "weights"


@dataclass(frozen=True)
class Released:
    """What a release of the weights freed: bytes on every device, how many arrays, and bytes kept in host memory."""

    bytes: int
    bytes_by_device: dict[int, int]
    arrays: int
    deleted_arrays: int
    host_bytes: int


class Weights:
    """The weights of one sglang-jax Engine, in this process or in another one that was booted with kvcycle.ServerArgs.

    Several of these on one engine are the same weights.

    Raises:
        UnsupportedEngineError: the engine's scheduler is out of reach.
    """

    def __init__(self, engine: Any) -> None:
        self._channel: Way = way_to(engine)
        self._here = self._channel.here(Holder)

    @property
    def state(self) -> State:
        """``"resident"``, or ``"released"``: the engine has no weights until they are resumed, or swapped in."""
        return self._here.state if self._here else self._channel.ask(Holder, Holder.current_state, NOW)

    def release(self, *, keep: bool = True) -> Released:
        """Delete the weights and give their memory back, once the pipeline of finished requests has drained.

        Requests meanwhile raise :class:`~kvcycle.errors.WeightsReleasedError` in their caller. The KV cache and what
        it knows stay as they are.

        Args:
            keep: keep a copy in host memory, each replicated block once, for a resume bit for bit. Without it a
                resume needs a new set.

        Raises:
            EngineBusyError: requests are queued or running (with the counts); nothing was deleted.
            WeightsStateError: released already, or the host has no room for the copy; nothing was deleted.
        """
        return self._channel.ask(Holder, Holder.release, When("idle", DRAIN_S), keep)

    def resume(self, update: ParamSet | Sequence[jax.Array] | None = None) -> None:
        """Give the engine its weights again, in both of their owners; compiles nothing.

        Args:
            update: a new set in the runner's order, with the engine's shapes, dtypes and shardings: its arrays become
                the engine's, uncopied, and the prefix cache is flushed. Without it the weights are those that were
                released, bit for bit, or those that :func:`kvcycle.swap` has put in since.

        Raises:
            WeightsStateError: not released, or nothing was kept and no new set is given.
            ParamSetError: the set does not match the engine's, or there is no room. The weights stay released, nothing
                stays allocated, and this may be called again.
        """
        given = None if update is None else update if isinstance(update, ParamSet) else ParamSet(tuple(update))
        self._channel.ask(Holder, Holder.resume, When(timeout_s=inband.ATTACH_S), given)


class Holder:
    """The weights as the scheduler's thread handles them; one per engine.

    Public methods are the operations that a caller may ask for (see ``calls.py``).
    """

    def __init__(self, channel: inband.Channel) -> None:
        self.channel = channel
        self._released = False
        self._kept: list[HostCopy] = []
        self._keeps_all = True
        #: The id() of the runner's arrays that were released; the deleted arrays live on in ``_kept`` and in the model.
        self._of_leaves: set[int] = set()
        #: Device bytes of all weights on each device when resident, by device id.
        self.bytes_by_device = bytes_by_device(self._arrays())
        channel.refuse_requests(self._refusal)

    @property
    def state(self) -> State:
        """``"resident"`` or ``"released"``."""
        return "released" if self._released else "resident"

    def current_state(self) -> State:
        """The state, for a caller in another process."""
        return self.state

    def release(self, keep: bool) -> Released:
        """Delete the weights; when idle."""
        if self._released:
            raise WeightsStateError("The weights are released already; resume them first, one resume serves all.")
        leaves = {id(leaf) for leaf in internals.weight_leaves(self.channel.engine)}
        with self.channel.hosts.all_or_none("release the weights"):
            arrays = self._arrays()
            gone = [number for number, array in enumerate(arrays) if array.is_deleted()]
            if gone:
                raise WeightsStateError(
                    f"The weights cannot be released: {len(gone)} of their {len(arrays)} arrays are deleted already. "
                    "Something else than their release deleted them; boot the engine anew."
                )
            jax.block_until_ready(arrays)
            freed_by_device = bytes_by_device(arrays)
            # What only the model holds is in no new set, so it is kept in any case.
            kept = _copied_to_host([array for array in arrays if keep or id(array) not in leaves])
        self._kept, self._of_leaves = kept, leaves
        self._keeps_all, self._released = keep, True
        self.channel.lacking.add(_WEIGHTS)
        for array in arrays:
            array.delete()
        return Released(
            bytes=sum(freed_by_device.values()),
            bytes_by_device=freed_by_device,
            arrays=len(arrays),
            deleted_arrays=sum(array.is_deleted() for array in arrays),
            host_bytes=sum(copy.bytes for copy in self._kept),
        )

    def resume(self, update: ParamSet | None) -> None:
        """Bring the weights back, or others instead; between two iterations."""
        if not self._released:
            raise WeightsStateError("The weights are resident already; there is nothing to resume before a release.")
        engine = self.channel.engine
        before = internals.weight_leaves(engine)
        swapped_in = not any(leaf.is_deleted() for leaf in before)
        with self.channel.hosts.all_or_none("resume the weights: see that there is what to resume from"):
            if update is not None:
                check_same_layout(ParamSet(tuple(before)), update)
            elif not swapped_in and not self._keeps_all:
                raise WeightsStateError(
                    "The weights were discarded when they were released, so there is nothing to resume them from; give "
                    "a new set (update=…), or swap one in with kvcycle.swap() first."
                )
        own = update is None and not swapped_in
        wanted = [copy for copy in self._kept if own or id(copy.of) not in self._of_leaves]
        restored: list[jax.Array] = []
        with self.channel.hosts.all_or_none("resume the weights", undo=lambda: delete(restored)):
            restored += self._allocate(wanted)
        successor = {id(copy.of): new for copy, new in zip(wanted, restored, strict=True)}
        if update is not None and "kv_cache" not in self.channel.lacking:
            # Keys and values computed with other weights would be stale. Those of a dropped cache are gone already.
            internals.flush(self.channel.scheduler, keep_waiting=True)
        # Both owners: the runner's list, and the model's own parameters.
        after = update.leaves if update is not None else [successor.get(id(leaf), leaf) for leaf in before]
        internals.set_weights(engine, after)
        for variable in internals.model_variables(engine):
            if (new := successor.get(id(variable.get_value()))) is not None:
                variable.set_value(new)
        self._kept, self._released = [], False
        self.channel.lacking.discard(_WEIGHTS)

    def _allocate(self, kept: list[HostCopy]) -> list[jax.Array]:
        needed = Counter[int]()
        for copy in kept:
            needed.update(copy.bytes_by_device)
        restored: list[jax.Array] = []
        try:
            capacity.claim(needed)
            restored.extend(copy.restore() for copy in kept)
            jax.block_until_ready(restored)
        except jax.errors.JaxRuntimeError as error:
            delete(restored)
            raise self._no_room(error, needed) from error
        return restored

    def _no_room(self, error: Exception, needed: Mapping[int, int]) -> ParamSetError:
        return ParamSetError(
            f"The weights could not be resumed: {capacity.shortage(error, needed)} They stay released: delete what is "
            "no longer needed, then resume again."
        )

    def _arrays(self) -> list[jax.Array]:
        """Every array of both owners, each once: the runner's leaves, then what only the model holds."""
        engine = self.channel.engine
        held = [*internals.weight_leaves(engine), *(v.get_value() for v in internals.model_variables(engine))]
        arrays = list({id(array): array for array in held}.values())
        for array in arrays:
            if jnp.issubdtype(array.dtype, jax.dtypes.extended):
                raise UnsupportedEngineError(
                    f"The model holds an array of {array.dtype}, of which kvcycle cannot keep a copy in host memory."
                )
        return arrays

    def _refusal(self) -> WeightsReleasedError | None:
        if not self._released:
            return None
        return WeightsReleasedError(
            "The engine cannot serve a request: its weights are released. Resume them first "
            "(engine.resume_memory_occupation(), or Weights.resume())."
        )


class HostCopy:
    """One device array as blocks in host memory, and how to make it again where it was; ``of`` is that array."""

    def __init__(self, array: jax.Array) -> None:
        self.of = array
        self._spec = BufferSpec.of(array)
        self.bytes_by_device = bytes_by_device([array])
        #: Blocks by where they are in the whole; a replicated one is kept once.
        self._blocks: dict[str, np.ndarray[Any, Any]] = {}
        self._places: list[tuple[Any, str]] = []
        for shard in array.addressable_shards:
            place = str(shard.index)
            self._places.append((shard.device, place))
            if place not in self._blocks:
                # np.asarray would be a view on CPU, which keeps the memory after the delete.
                self._blocks[place] = np.array(shard.data)

    @property
    def bytes(self) -> int:
        """Bytes of host memory."""
        return sum(block.nbytes for block in self._blocks.values())

    def restore(self) -> jax.Array:
        """The array anew: same contents, sharding, memory kind, committed; compiles nothing."""
        kind = self._spec.sharding.memory_kind
        with large_allocations_mapped():
            shards = [
                # On CPU device_put makes the numpy array's own memory the device's: each device gets its own copy.
                jax.device_put(
                    self._blocks[place].copy() if device.platform == "cpu" else self._blocks[place],
                    SingleDeviceSharding(device, memory_kind=kind),
                )
                for device, place in self._places
            ]
        return jax.make_array_from_single_device_arrays(self._spec.shape, self._spec.sharding, shards)


def _copied_to_host(arrays: Sequence[jax.Array]) -> list[HostCopy]:
    needed, free = sum(array.nbytes for array in arrays), host_memory.free_bytes()
    if needed > free:
        raise HostMemoryError(
            f"The weights cannot be kept in host memory: they need {exact_bytes(needed)}, and {exact_bytes(free)} "
            "is free. Nothing was released. Discard them, where a training step has new ones (keep=False)."
        )
    return [HostCopy(array) for array in arrays]


def leaf_names(engine: Any) -> list[str]:
    """Number and name of every array of the engine's weights, in the runner's order: ``0 lm_head.embedding``."""
    names = internals.weight_names(engine)
    return [f"{number} {names.get(id(leaf), '?')}" for number, leaf in enumerate(internals.weight_leaves(engine))]


def digests(engine: Any, names: Sequence[str] | None = None) -> dict[str, str]:
    """A digest of every array of the engine's weights by name: its layout, and the bits of its shards on every device.

    An array that is deleted has the digest ``"deleted"``. Reads all weights to the host, so it takes a while.

    Args:
        engine: whose weights.
        names: what :func:`leaf_names` said before, for arrays that the model may not know any more.
    """
    leaves = internals.weight_leaves(engine)
    return {name: _digest(leaf) for name, leaf in zip(names or leaf_names(engine), leaves, strict=True)}


def _digest(array: jax.Array) -> str:
    if array.is_deleted():
        return "deleted"
    whole = hashlib.blake2b(BufferSpec.of(array).layout.model_dump_json().encode(), digest_size=16)
    for shard in array.addressable_shards:
        whole.update(f"device {shard.device.id}, {shard.index}".encode())
        whole.update(np.ascontiguousarray(shard.data).reshape(-1).view(np.uint8).data)
    return whole.hexdigest()
