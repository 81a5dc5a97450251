"""Every real pool class of sglang-jax, in every geometry, dropped and rebuilt on eight virtual devices: a script.

``pool_cells.py PART PARTS`` prints one line of JSON for each cell that the installed version has (see
:func:`kvcycle.compatibility.pool_cells`) in that part of them. A process of its own, since the tests' process has four
devices; no engine, so nothing in it can kill its parent.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from kvcycle import memory, platform, sizing, versions
from kvcycle.buffers import Attribute, BufferSpec, Slot, ZeroAllocator, bytes_by_device, find_slots
from kvcycle.compatibility import Geometry, pool_cells
from kvcycle.compiles import counting

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 64  # fewer heads than most tp, and narrower than they are stored
LORA_RANK, ROPE_DIM, INDEXER_DIM, INDEXER_LAYERS = 192, 64, 100, 1  # none of them whole lanes
STATE_LAYERS, STATE_HEADS, STATE_DIM, CONV_KERNEL, STATES = 2, 8, 16, 4, 6
REQUESTS, STEPS, HIDDEN = 5, 3, 48


class Cell:
    """One geometry: what the constructors are given, as the engine's runner gives it."""

    def __init__(self, geometry: Geometry) -> None:
        self.page, self.tp, self.dp = geometry.page_size, geometry.tp_size, geometry.dp_size
        self.tensor = self.tp // self.dp
        self.dtype = jnp.dtype(geometry.dtype)
        self.tokens = 2 * 128 * self.dp
        self.heads = sizing.kv_heads_on_devices(KV_HEADS, self.tensor)
        self.mesh: Mesh = jax.make_mesh(
            (self.dp, self.tensor), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2,
            devices=jax.devices()[: self.tp],
        )  # fmt: skip

    def common(self, layers: int | None = LAYERS) -> dict[str, Any]:
        named = {"page_size": self.page, "dtype": self.dtype, "mesh": self.mesh, "dp_size": self.dp}
        return named | ({"layer_num": layers} if layers is not None else {})

    def heads_of(self) -> dict[str, Any]:
        return {"head_num": self.heads, "head_dim": sizing.lanes(HEAD_DIM)}

    def mha_bytes(self, layers: int = LAYERS, tokens: int | None = None) -> int:
        return sizing.mha_pool_bytes(
            layers=layers, tokens=tokens or self.tokens, page_size=self.page, dp_size=self.dp, heads=self.heads,
            head_dim=HEAD_DIM, item_bytes=self.dtype.itemsize,
        )  # fmt: skip

    def mla_bytes(self, **indexer: int) -> int:
        return sizing.mla_pool_bytes(
            layers=LAYERS, tokens=self.tokens, page_size=self.page, dp_size=self.dp, copies=self.tensor,
            lora_rank=LORA_RANK, rope_dim=ROPE_DIM, item_bytes=self.dtype.itemsize, **indexer,
        )  # fmt: skip


Built = tuple[dict[str, Any], int]


def mha(cell: Cell) -> Built:
    from sgl_jax.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = MHATokenToKVPool(size=cell.tokens, **cell.common(), **cell.heads_of())
    return {"token_to_kv_pool": pool}, cell.mha_bytes()


def swa(cell: Cell) -> Built:
    from sgl_jax.srt.mem_cache.memory_pool import MHATokenToKVPool, SWAKVPool

    full, window = sizing.swa_tokens(
        cell.tokens, full_layers=1, window_layers=2, ratio=0.8, alignment=cell.page * cell.dp
    )
    pool = SWAKVPool(
        size=full, size_swa=window, swa_attention_layer_ids=[0, 2], full_attention_layer_ids=[1],
        token_to_kv_pool_class=MHATokenToKVPool, **cell.common(None), **cell.heads_of(),
    )  # fmt: skip
    return {"token_to_kv_pool": pool}, cell.mha_bytes(1, full) + cell.mha_bytes(2, window)


def mla(cell: Cell) -> Built:
    from sgl_jax.srt.mem_cache.memory_pool import MLATokenToKVPool

    pool = MLATokenToKVPool(
        size=cell.tokens, kv_lora_rank=LORA_RANK, qk_rope_head_dim=ROPE_DIM, **cell.common()
    )  # fmt: skip
    return {"token_to_kv_pool": pool}, cell.mla_bytes()


def mla_indexer(cell: Cell) -> Built:
    from sgl_jax.srt.mem_cache.memory_pool import MLATokenToKVPool

    pool = MLATokenToKVPool(
        size=cell.tokens, kv_lora_rank=LORA_RANK, qk_rope_head_dim=ROPE_DIM, indexer_key_dim=INDEXER_DIM,
        num_indexer_layers=INDEXER_LAYERS, **cell.common(),
    )  # fmt: skip
    return {"token_to_kv_pool": pool}, cell.mla_bytes(indexer_layers=INDEXER_LAYERS, indexer_dim=INDEXER_DIM)


def _hybrid(cell: Cell, pool_class: type[Any], **arguments: Any) -> dict[str, Any]:
    """As the runner's ``_init_pools``: the full-attention layers' pool, the states, and who holds them."""
    from sgl_jax.srt.mem_cache.memory_pool import HybridLinearKVPool, HybridReqToTokenPool, MemoryPools
    from sgl_jax.srt.mem_cache.recurrent_state_pool import RecurrentStatePool

    kv = HybridLinearKVPool(
        size=cell.tokens, full_attention_layer_ids=[1, 3], token_to_kv_pool_class=pool_class, **cell.common(None),
        **arguments,
    )  # fmt: skip
    states = RecurrentStatePool(
        linear_recurrent_layer_ids=[0, 2], size=STATES, num_heads=STATE_HEADS, head_dim=STATE_DIM,
        conv_kernel_size=CONV_KERNEL, mesh=cell.mesh, dp_size=cell.dp,
    )  # fmt: skip
    requests = HybridReqToTokenPool(STATES, 64, np.dtype(np.int32), states, dp_size=cell.dp)
    held: dict[str, Any] = dict(MemoryPools(token_to_kv_pool=kv, recurrent_state_pool=states)._pools)
    # The engine walks its memory pools only; the requests' pool holds the states too, and adds no slot of its own.
    return held | {"req_to_token_pool": requests}


def _state_bytes(cell: Cell) -> int:
    return sizing.recurrent_pool_bytes(
        layers=STATE_LAYERS, slots=STATES, dp_size=cell.dp, heads=STATE_HEADS, head_dim=STATE_DIM,
        conv_kernel=CONV_KERNEL,
    )  # fmt: skip


def hybrid_mha(cell: Cell) -> Built:
    from sgl_jax.srt.mem_cache.memory_pool import MHATokenToKVPool

    return _hybrid(cell, MHATokenToKVPool, **cell.heads_of()), cell.mha_bytes() + _state_bytes(cell)


def hybrid_mla(cell: Cell) -> Built:
    from sgl_jax.srt.mem_cache.memory_pool import MLATokenToKVPool

    pools = _hybrid(cell, MLATokenToKVPool, kv_lora_rank=LORA_RANK, qk_rope_head_dim=ROPE_DIM)
    return pools, cell.mla_bytes() + _state_bytes(cell)


def draft(cell: Cell) -> Built:
    """The target's pool, a draft model's of one layer, and beside them the relay buffers, if this version has any."""
    from sgl_jax.srt.mem_cache.memory_pool import MHATokenToKVPool

    pools: dict[str, Any] = {
        "token_to_kv_pool": MHATokenToKVPool(size=cell.tokens, **cell.common(), **cell.heads_of()),
        "draft.token_to_kv_pool": MHATokenToKVPool(size=cell.tokens, **cell.common(1), **cell.heads_of()),
    }
    predicted = cell.mha_bytes(LAYERS) + cell.mha_bytes(1)
    if not versions.has(versions.RELAY_BUFFERS, versions.installed()):
        return pools, predicted
    relays, of_relays = _relays(cell)
    return pools | relays, predicted + of_relays


def _relays(cell: Cell) -> Built:
    """The relay buffers of EAGLE and of DFlash."""
    from sgl_jax.srt.mem_cache.memory_pool import ReqToTokenPool
    from sgl_jax.srt.speculative import relay_buffer

    requests = ReqToTokenPool(REQUESTS, 16)
    # In the place of the orchestrators, which load models when they are made.
    eagle = SimpleNamespace(
        spec_relay_buffers=relay_buffer.create_spec_relay_buffers(
            cell.mesh, requests, dp_size=cell.dp, num_steps=STEPS, hidden_size=HIDDEN, hidden_dtype=cell.dtype
        )
    )
    dflash = SimpleNamespace(
        spec_relay_buffers=relay_buffer.create_dflash_relay_buffers(cell.mesh, requests, dp_size=cell.dp)
    )
    relays = {
        "spec_relay_buffers": Attribute(eagle, "spec_relay_buffers"),
        "dflash.spec_relay_buffers": Attribute(dflash, "spec_relay_buffers"),
    }
    predicted = sizing.relay_buffer_bytes(
        requests=REQUESTS, dp_size=cell.dp, copies=cell.tensor, steps=STEPS, hidden=HIDDEN,
        item_bytes=cell.dtype.itemsize,
    )  # fmt: skip
    return relays, predicted + sizing.relay_buffer_bytes(requests=REQUESTS, dp_size=cell.dp, copies=cell.tensor)


BUILDERS: dict[str, Callable[[Cell], Built]] = {
    "mha": mha, "swa": swa, "mla": mla, "mla-indexer": mla_indexer, "hybrid-mha": hybrid_mha,
    "hybrid-mla": hybrid_mla, "draft": draft,
}  # fmt: skip


def in_use() -> dict[int, int]:
    gc.collect()  # else arrays of an earlier cell go when the collector happens to come
    return {use.id: use.ledger_bytes for use in memory.snapshot().devices if use.ledger_bytes}


def nonzero(slot: Slot) -> bool:
    return any(np.any(np.asarray(shard.data).view(np.uint8)) for shard in slot.get().addressable_shards)


def drop_and_rebuild(pool: str, geometry: Geometry) -> dict[str, Any]:
    """What a live engine's KVCache does with its pools, and everything that can be said of it."""
    pools, predicted = BUILDERS[pool](Cell(geometry))
    slots = find_slots(pools)
    arrays = [slot.get() for slot in slots]
    specs, owners = [BufferSpec.of(array) for array in arrays], [slot.owner for slot in slots]
    held = bytes_by_device(arrays)
    with counting() as control:
        allocate = ZeroAllocator(specs)
    for slot, array in zip(slots, arrays, strict=True):
        # From numpy, which compiles nothing: hundreds of cells are mostly compilations.
        slot.set(jax.device_put(np.ones(array.shape, array.dtype), array.sharding))
    del arrays, array
    dirty = [nonzero(slot) for slot in slots]  # the control: this is what the rebuild must not leave
    before = in_use()
    for slot in slots:
        slot.get().delete()
    dropped = in_use()
    with counting() as span:
        rebuilt = allocate()
    for slot, fresh in zip(slots, rebuilt, strict=True):
        slot.set(fresh)
    again = find_slots(pools)
    return {
        "predicted": predicted,
        "held": sum(held.values()),
        "devices": len(held),
        "even": len(set(held.values())) == 1,
        "freed_exactly": {device: freed for device in before if (freed := before[device] - dropped.get(device, 0))}
        == held,
        "restored_exactly": in_use() == before,
        "buffers": len(slots),
        "control_dirty": all(dirty),
        "control_compiled": control.compiles.any_work > 0,
        "zeroed": not any(nonzero(slot) for slot in slots),
        "same_layout": [BufferSpec.of(slot.get()) for slot in again] == specs,
        "in_place": all(slot.owner is owner for slot, owner in zip(again, owners, strict=True)),
        "compiled": span.compiles.any_work,
    }


def main(part: int, parts: int) -> None:
    # Zeros need no optimizer, and hundreds of cells are mostly compilations; without its emitters they take half.
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_use_fusion_emitters=false"
    )
    platform.prepare("cpu", 8)
    for cell in pool_cells(versions.installed())[part::parts]:
        result = drop_and_rebuild(cell.pool, cell.geometry)
        gc.collect()
        gc.freeze()  # what is left is caches and modules, and would make every collection slow
        print(json.dumps({"id": cell.id} | result), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
