"""The KV cache's size from elsewhere: the TPU compiler where libtpu is installed, else the config's arithmetic."""

from __future__ import annotations

import importlib.util

from kvcycle.errors import KVCycleError
from kvcycle.profile import Platform, Profile
from kvcycle.sizing import KVPrediction, predict_kv


def predict_by_arithmetic(profile: Profile, platform: Platform) -> KVPrediction | None:
    """The prediction from the model's config and the engine's arguments; None where they do not decide it."""
    config = profile.model_config_json()
    return predict_kv(config, profile.engine_args(platform)) if config else None


def predict(profile: Profile, platform: Platform) -> KVPrediction | None:
    """The TPU compiler's size for the profile's topology, if it can be asked; else the config's arithmetic.

    Asks in a process of its own, some ten seconds, before the engine takes the devices. Where the compiler was asked
    and refused, ``formula`` says why the arithmetic stands in.
    """
    arithmetic = predict_by_arithmetic(profile, platform)
    if profile.topology is None or importlib.util.find_spec("libtpu") is None:
        return arithmetic
    from kvcycle.plan.api import plan

    try:
        answer = plan(profile, profile.topology)
    except KVCycleError as error:
        if arithmetic is None:
            return None
        return KVPrediction(
            arithmetic.total_bytes, arithmetic.bytes_per_device, f"{arithmetic.formula}; the compiler: {error}"
        )
    kv = answer.record.kv
    formula = f"{kv.buffers} buffers for {answer.topology} in its own layouts = {kv.bytes:,} B"
    if arithmetic is not None:
        formula += f"; the config's arithmetic: {arithmetic.total_bytes:,} B"
    return KVPrediction(kv.bytes, max(kv.bytes_by_device.values()), formula, by="the TPU compiler")
