"""A capacity for virtual devices, which have none of their own: an allocation beyond it fails as on a real device.

XLA's CPU client takes whatever the host has, so the limit is enforced where kvcycle allocates: the second parameter set
and the rebuild. What others allocate is not refused, but counts (by the ledger) from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from kvcycle import memory
from kvcycle.errors import ProfileError
from kvcycle.profile import Profile
from kvcycle.sizing import estimate_params_bytes, predict_kv
from kvcycle.text import exact_bytes, first_line

#: Of every virtual device of this process; None while nothing is simulated.
_simulated_bytes: int | None = None


def simulate(limit_bytes: int | None) -> None:
    """Give every CPU device of this process this capacity from now on; None takes it away."""
    global _simulated_bytes  # jax's devices are the process's, and so is what they can hold
    _simulated_bytes = limit_bytes


def limit_bytes(device: jax.Device) -> int | None:
    """The device's capacity: by its own word, else the simulated one; None where neither is."""
    stated = memory.limit_bytes(device)
    if stated is not None or device.platform != "cpu":
        return stated
    return _simulated_bytes


def free_bytes_by_device(devices: Mapping[int, Any] | None = None) -> dict[int, int]:
    """Bytes still free on each local device with a capacity: the limit less its allocator's word or the ledger's."""
    free: dict[int, int] = {}
    local = {device.id: device for device in jax.local_devices() if devices is None or device.id in devices}
    for use in memory.snapshot(devices=local.values()).devices:
        if (limit := limit_bytes(local[use.id])) is not None:
            used = use.allocator_bytes if use.allocator_bytes is not None else use.ledger_bytes
            free[use.id] = limit - used
    return free


def shortage(error: BaseException, needed_bytes_by_device: Mapping[int, int], weights: Iterable[jax.Array] = ()) -> str:
    """Sentences on an allocation that failed: why, what is needed and free on every device, and what holds most.

    Args:
        error: what the device said.
        needed_bytes_by_device: what was to be allocated.
        weights: arrays that are named as the engine's weights; without them those count as any others.
    """
    free = free_bytes_by_device(needed_bytes_by_device)
    per_device = "; ".join(
        f"device {device}: {exact_bytes(size)}" + (f", free {exact_bytes(free[device])}" if device in free else "")
        for device, size in sorted(needed_bytes_by_device.items())
    )
    snapshot = memory.snapshot({"weights": weights}, largest=3)
    holders = [*([("the engine's weights", size)] if (size := snapshot.bytes_of("weights")) else [])]
    named = ", ".join(f"{what} ({exact_bytes(size)})" for what, size in [*holders, *snapshot.largest_other])
    return f"{first_line(error)}. Needed: {per_device}. What holds most, summed over the devices: {named}."


def claim(needed_bytes_by_device: Mapping[int, int]) -> None:
    """Fail if an allocation would exceed the simulated capacity of a device; does nothing where none is simulated.

    Raises:
        jax.errors.JaxRuntimeError: ``RESOURCE_EXHAUSTED``, the class and the status that a real device raises.
    """
    if _simulated_bytes is None:
        return
    free = free_bytes_by_device(needed_bytes_by_device)
    for device, needed in needed_bytes_by_device.items():
        if device in free and needed > free[device]:
            raise jax.errors.JaxRuntimeError(
                f"RESOURCE_EXHAUSTED: Attempting to allocate {exact_bytes(needed)} on device {device}. That was not "
                f"possible. There are {exact_bytes(free[device])} free of {exact_bytes(_simulated_bytes)} (simulated, "
                "on_cpu.limit_bytes)."
            )


def check_fits(profile: Profile) -> None:
    """Refuse, before anything boots, an engine that could not even boot within the simulated capacity.

    Raises:
        ProfileError: its weights and KV cache, as computed from the config, exceed on_cpu.limit_bytes.
    """
    limit, config = profile.on_cpu.limit_bytes, profile.model_config_json()
    if limit is None or config is None:
        return
    engine = profile.engine_args("cpu")
    kv = predict_kv(config, engine)
    if kv is None:
        return
    weights = estimate_params_bytes(config, engine) // profile.devices_needed
    if weights + kv.bytes_per_device > limit:
        raise ProfileError(
            f"on_cpu.limit_bytes={limit:,}: the weights (about {exact_bytes(weights)}) and the KV cache "
            f"({exact_bytes(kv.bytes_per_device)}) do not fit on one device; raise it, or lower "
            f"engine.max_total_tokens ({engine['max_total_tokens']})."
        )
