"""Faults of the drop: something keeps the memory, or something else loses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from kvcycle import internals
from kvcycle.buffers import Slot
from kvcycle.faults.catalogue import Target, before_drop, deletes, fault, wrapped

_FREES, _DELETES, _RESTORES = "drop.frees_kv", "drop.deletes_every_buffer", "rebuild.restores_bytes"
_GROWS, _AGREE = "cycles.no_growth", "controls.witnesses_agree"


@fault(_FREES, _DELETES, also=(_RESTORES,), says="4 were found): 3, expected 4")
def one_layer_is_not_deleted(target: Target) -> Iterator[None]:
    """delete() does nothing for one layer's buffer."""
    kept = id(target.arrays[-1])  # not the buffer itself: nobody else holds it, so the rebuild frees it after all
    with deletes(lambda array, delete: None if id(array) == kept else delete(array), target):
        yield


@fault(_FREES, _DELETES, also=(_RESTORES,), says="4 were found): 0, expected 4")
def delete_does_nothing(target: Target) -> Iterator[None]:
    """delete() does nothing for any KV buffer."""
    kept = {id(array) for array in target.arrays}
    with deletes(lambda array, delete: None if id(array) in kept else delete(array), target):
        yield


@fault(_FREES, also=(_RESTORES,), says="a buffer was not deleted, or something else still holds it")
def the_drop_returns_before_the_memory_is_free(target: Target) -> Iterator[None]:
    """The buffers say that they are deleted, and are freed only when the rebuild begins."""
    kv = {id(array): array for array in target.arrays}
    kind = type(target.arrays[0])
    real_delete, real_is_deleted = kind.delete, kind.is_deleted
    telling = False

    def pretend(array: jax.Array, delete: Any) -> None:
        nonlocal telling
        if id(array) in kv:
            telling = True
        else:
            delete(array)

    def free(original: Any) -> Any:
        for array in kv.values():
            real_delete(array)
        kv.clear()
        return original()

    def drop(original: Any, **options: Any) -> Any:
        nonlocal telling
        with mock.patch.object(kind, "is_deleted", lambda a: (telling and id(a) in kv) or real_is_deleted(a)):
            freed = original(**options)
        telling = False
        return freed

    with deletes(pretend, target), wrapped(target.buffers, "drop", drop), wrapped(target.buffers, "allocate", free):
        yield


@fault(_FREES, _DELETES, also=(_RESTORES, _GROWS), says="1 had no delete method")
def a_slot_holds_something_without_delete(target: Target) -> Iterator[None]:
    """One slot holds an object that has the buffer's shards and no delete()."""

    def drop(original: Any, **options: Any) -> Any:
        slots = target.buffers.slots
        target.buffers.slots = [*slots[:-1], Slot([_Undeletable(slots[-1].get())], 0, slots[-1].path)]
        try:
            return original(**options)
        finally:
            target.buffers.slots = slots

    with wrapped(target.buffers, "drop", drop):
        yield


class _Undeletable:
    def __init__(self, array: jax.Array) -> None:
        self.addressable_shards = array.addressable_shards

    def is_deleted(self) -> bool:
        return False


@fault(_FREES, _AGREE, says="the rss's numbers are stale")
def an_alias_keeps_the_memory(target: Target) -> Iterator[None]:
    """NumPy views of the buffers keep their memory after delete(): the ledger falls, the process does not."""
    views = [np.asarray(shard.data) for array in target.arrays for shard in array.addressable_shards]
    yield
    views.clear()


@fault(_FREES, also=(_GROWS,), says="a copy of the cache is alive under another name")
def a_hidden_copy_of_one_buffer(target: Target) -> Iterator[None]:
    """Somebody copies one buffer right before it is deleted."""
    _compile_the_copy(target)
    copies: list[jax.Array] = []
    with before_drop(target, lambda: copies.append(jax.block_until_ready(jnp.copy(target.arrays[0])))):
        yield
    _delete(copies)


@fault(_FREES, also=(_GROWS,), says="bytes in use changed by 0 B since flush_cache_before_kv_drop")
def a_hidden_copy_of_all_buffers(target: Target) -> Iterator[None]:
    """Somebody copies every buffer right before it is deleted: nothing is freed, every buffer is deleted."""
    _compile_the_copy(target)
    copies: list[jax.Array] = []
    with before_drop(target, lambda: copies.extend(jax.block_until_ready([jnp.copy(a) for a in target.arrays]))):
        yield
    _delete(copies)


@fault(_FREES, also=(_GROWS,), says="cycle0-device1, ledger: bytes in use changed by")
def equal_sums_on_unequal_devices(target: Target) -> Iterator[None]:
    """Device 0 keeps 4,096 bytes and device 1 loses as many more: the sum over the devices is what it should be."""
    first, second = (device for device in jax.local_devices()[:2])
    gone = jax.device_put(np.zeros(4096, np.uint8), second)
    kept: list[jax.Array] = []

    def trade() -> None:
        gone.delete()
        kept.append(jax.block_until_ready(jax.device_put(np.zeros(4096, np.uint8), first)))

    with before_drop(target, trade):
        yield
    _delete(kept)


@fault("drop.leaves_weights", also=(_FREES, "params2.fits", _RESTORES, _GROWS), says="belongs to the weights")
def the_drop_touches_a_weight(target: Target) -> Iterator[None]:
    """The drop leaves one weight in another precision."""
    weights = target.weights
    changed = list(weights)

    def touch() -> None:
        changed[0] = jax.block_until_ready(weights[0].astype(jnp.float32))
        internals.set_weights(target.engine, changed)

    with before_drop(target, touch):
        yield
    internals.set_weights(target.engine, weights)
    changed[0].delete()


@fault(_FREES, _AGREE, says="the process grew or shrank elsewhere meanwhile")
def the_process_grows_meanwhile(target: Target) -> Iterator[None]:
    """64 MiB of ordinary memory are taken while the cache is dropped."""
    taken: list[bytearray] = []
    with before_drop(target, lambda: taken.append(bytearray(b"\1") * 2**26)):
        yield
    taken.clear()


def _compile_the_copy(target: Target) -> None:
    """Now, and not in the drop: there the compiler's own memory would be seen beside the fault's."""
    jnp.copy(target.arrays[0]).delete()


def _delete(arrays: list[jax.Array]) -> None:
    for array in arrays:
        array.delete()
