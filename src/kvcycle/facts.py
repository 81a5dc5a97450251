"""What a record says of the engine itself, before anything is done to it: one host's part of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from kvcycle import capacity
from kvcycle.kv_cache import KVCache
from kvcycle.params import ParamSet
from kvcycle.pools import claimed_bytes, pool_facts
from kvcycle.record_parts import KV, Device, Params
from kvcycle.sizing import KVPrediction


def device_facts(devices: Iterable[jax.Device], host: int) -> tuple[Device, ...]:
    """A host's devices: what they are and can hold."""
    return tuple(
        Device(id=device.id, kind=device.device_kind, limit_bytes=capacity.limit_bytes(device), host=host)
        for device in devices
    )


def kv_facts(engine: Any, kv: KVCache, predicted: KVPrediction | None) -> KV:
    """The KV buffers: the shards' sum, what is predicted, what the engine claims."""
    by_device = dict.fromkeys(kv.bytes_by_device, predicted.bytes_per_device) if predicted else None
    return KV(
        buffers=kv.buffers,
        bytes=kv.bytes,
        bytes_by_device=kv.bytes_by_device,
        predicted_bytes=predicted.total_bytes if predicted else None,
        predicted_bytes_by_device=by_device,
        predicted_by=predicted.by if predicted else None,
        predicted_how=predicted.formula if predicted else None,
        claimed_bytes=claimed_bytes(engine),
        pools=pool_facts(engine, kv.slots),
    )


def params_facts(engine: Any) -> Params:
    """The engine's weights."""
    weights = ParamSet.of(engine)
    return Params(arrays=len(weights.leaves), bytes_on_devices=weights.bytes, bytes_by_device=weights.bytes_by_device)
