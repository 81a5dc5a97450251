"""Faults of the rebuild: another size, another layout, another place, other contents, or a compilation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvcycle import internals
from kvcycle.buffers import ZeroAllocator
from kvcycle.faults.catalogue import Target, after_rebuild, fault, rebuilt_as, wrapped

_RESTORES, _LAYOUT, _ZEROED = "rebuild.restores_bytes", "rebuild.same_layout", "rebuild.zeroed"
_GROWS, _AGREE = "cycles.no_growth", "controls.witnesses_agree"


def _zeros(shape: tuple[int, ...], dtype: Any, where: Any) -> jax.Array:
    zeros: jax.Array = jax.device_put(np.zeros(shape, dtype), where)
    return zeros


def _placed(array: jax.Array) -> NamedSharding:
    assert isinstance(array.sharding, NamedSharding)
    return array.sharding


@fault(_RESTORES, _LAYOUT, also=(_GROWS,), says="shape was (")
def a_rebuild_with_one_page_less(target: Target) -> Iterator[None]:
    """One layer's buffer is one page short."""

    def change(arrays: list[jax.Array]) -> list[jax.Array]:
        last = arrays[-1]
        return [*arrays[:-1], _zeros((last.shape[0] - 1, *last.shape[1:]), last.dtype, last.sharding)]

    with rebuilt_as(target, change):
        yield


@fault(_RESTORES, _LAYOUT, _ZEROED, also=("rebuild.in_place", _GROWS), says="kv_buffer[3]: is gone")
def a_rebuild_with_one_layer_less(target: Target) -> Iterator[None]:
    """The pool's list has one buffer less."""
    owner, spare = target.kv.slots[-1].owner, target.arrays[-1]

    def pop() -> None:
        owner.pop().delete()

    with after_rebuild(target, pop):
        yield
    if len(owner) < len(target.kv.slots):
        owner.append(spare)  # deleted, as a drop finds and a rebuild replaces it


@fault(_RESTORES, _ZEROED, also=(_GROWS,), says="a slot was left empty, or an old buffer is still alive")
def a_slot_is_left_empty(target: Target) -> Iterator[None]:
    """One slot holds a deleted buffer after the rebuild."""
    with after_rebuild(target, lambda: target.arrays[-1].delete()):
        yield


@fault(_LAYOUT, says="dtype was bfloat16 and is float16")
def a_rebuild_with_another_dtype(target: Target) -> Iterator[None]:
    """One layer's buffer is float16 instead of bfloat16: the bytes are the same."""

    def change(arrays: list[jax.Array]) -> list[jax.Array]:
        last = arrays[-1]
        assert last.dtype == ml_dtypes.bfloat16
        return [*arrays[:-1], _zeros(last.shape, np.float16, last.sharding)]

    with rebuilt_as(target, change):
        yield


@fault(_LAYOUT, says="sharding was")
def a_rebuild_with_another_spec(target: Target) -> Iterator[None]:
    """One layer's buffer is sharded over another axis: the bytes are the same."""

    def change(arrays: list[jax.Array]) -> list[jax.Array]:
        last = arrays[-1]
        other = NamedSharding(_placed(last).mesh, PartitionSpec(None, None, None, None, "tensor"))
        return [*arrays[:-1], _zeros(last.shape, last.dtype, other)]

    with rebuilt_as(target, change):
        yield


@fault(_LAYOUT, "generate.no_compile", run="generate", also=("generate.below_threshold",), says="sharding was")
def a_rebuild_that_drops_the_size_1_axis(target: Target) -> Iterator[None]:
    """The spec leaves out the data axis, which has one device: the same bytes at the same place, and a compilation."""

    def change(arrays: list[jax.Array]) -> list[jax.Array]:
        return [
            _zeros(a.shape, a.dtype, NamedSharding(_placed(a).mesh, PartitionSpec(None, *_placed(a).spec[1:])))
            for a in arrays
        ]

    with rebuilt_as(target, change):
        yield


@fault(_RESTORES, _LAYOUT, also=(_AGREE, _GROWS), says="memory_kind was device and is pinned_host")
def a_rebuild_in_another_memory(target: Target) -> Iterator[None]:
    """One layer's buffer lies in the host's memory."""

    def change(arrays: list[jax.Array]) -> list[jax.Array]:
        last = arrays[-1]
        return [*arrays[:-1], _zeros(last.shape, last.dtype, _placed(last).with_memory_kind("pinned_host"))]

    with rebuilt_as(target, change):
        yield


@fault(_RESTORES, _LAYOUT, also=(_GROWS,), says="committed was True and is False")
def an_uncommitted_rebuild(target: Target) -> Iterator[None]:
    """One layer's buffer is left to jax, which puts it on the first device."""
    with rebuilt_as(target, lambda arrays: [*arrays[:-1], jnp.zeros(arrays[-1].shape, arrays[-1].dtype)]):
        yield


@fault(_ZEROED, says="the buffers were not initialised")
def a_rebuild_that_is_not_zeroed(target: Target) -> Iterator[None]:
    """One element of one buffer is NaN."""

    def change(arrays: list[jax.Array]) -> list[jax.Array]:
        contents = np.zeros(arrays[-1].shape, arrays[-1].dtype)
        contents.flat[-1] = np.nan
        return [*arrays[:-1], jax.device_put(contents, arrays[-1].sharding)]

    with rebuilt_as(target, change):
        yield


@fault("rebuild.in_place", says="the pool object or its list was replaced")
def another_pool_object(target: Target) -> Iterator[None]:
    """The runner gets a new pool object that holds the new buffers."""
    pools = internals.runner_of(target.engine).memory_pools._pools
    before = dict(pools)

    def replace() -> None:
        for name, pool in before.items():
            pools[name] = copy.copy(pool)
            if isinstance(getattr(pool, "kv_buffer", None), list):
                pools[name].kv_buffer = list(pool.kv_buffer)

    with after_rebuild(target, replace):
        yield
    pools.update(before)


@fault("generate.no_compile", run="generate", says="compilations and traces while rebuilding")
def a_rebuild_that_compiles(target: Target) -> Iterator[None]:
    """Every rebuild jits its allocator anew."""
    with wrapped(target.buffers, "allocate", lambda _: ZeroAllocator(target.kv.specs)()):
        yield
