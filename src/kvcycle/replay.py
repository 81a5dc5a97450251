"""The full-size cycle on virtual CPU devices with dummy weights: the SOP's bytes, reproduced without a TPU.

Generation is left out, since at this width it takes more memory than the machine has; the record says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil

from kvcycle import checks
from kvcycle.errors import ProfileError
from kvcycle.profile import Profile
from kvcycle.record import Record
from kvcycle.sizing import estimate_params_bytes, predict_kv
from kvcycle.text import exact_bytes

#: What jax, the engine and the interpreter take beside the arrays.
_OVERHEAD_BYTES = 2 * 2**30


def needed_bytes(profile: Profile) -> int:
    """Host memory that a replay needs at its peak: weights, KV cache and a second set of weights at once."""
    config = profile.model_config_json()
    engine = profile.engine_args("cpu")
    kv = predict_kv(config, engine) if config else None
    if config is None or kv is None:
        raise ProfileError(
            f"The profile {profile.name!r} cannot be replayed: its size cannot be computed. It needs model.config and "
            "engine.max_total_tokens."
        )
    return 2 * estimate_params_bytes(config, engine) + kv.total_bytes + _OVERHEAD_BYTES


def check_memory(profile: Profile) -> None:
    """Refuse before anything boots if the machine has not enough free memory.

    Raises:
        ProfileError: with the bytes that are needed and those that are free.
    """
    needed, free = needed_bytes(profile), int(psutil.virtual_memory().available)
    if free < needed:
        raise ProfileError(
            f"A replay of {profile.name} needs about {exact_bytes(needed)} of memory, and {exact_bytes(free)} is free. "
            "Use a machine with more, or fewer layers or tokens (--set engine.max_total_tokens=…)."
        )


def replay(profile: Profile, save_to: Path, say: Callable[[str], None]) -> Record:
    """Run one cycle of the profile on virtual CPU devices; returns the judged record, which is also in ``save_to``.

    Raises:
        ProfileError: the profile or the machine's memory does not allow it.
        EngineBootError: the engine did not come up.
    """
    import kvcycle

    resolved = profile.on("cpu")
    resolved = resolved.model_copy(update={"cycle": resolved.cycle.model_copy(update={"cycles": 1})})
    resolved.check_geometry("cpu")
    check_memory(resolved)
    say(f"booting {resolved.name} with dummy weights on {resolved.devices_needed} virtual CPU devices (about a minute)")
    with kvcycle.boot(resolved, "cpu") as engine:
        measured = kvcycle.run_cycle(engine, resolved, save_to=save_to, progress=say)
    record = measured.model_copy(update={"checks": tuple(checks.judge(measured))})
    record.save(save_to)
    return record
