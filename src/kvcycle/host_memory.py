"""Whether a run on virtual CPU devices fits into this machine's memory, asked before anything is allocated.

There the devices' memory is the host's, and who takes too much of that gets no error: the kernel kills the process.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

from kvcycle.errors import ProfileError
from kvcycle.profile import Profile
from kvcycle.sizing import estimate_params_bytes, predict_kv
from kvcycle.text import exact_bytes

#: What jax, the engine and the interpreter take beside the arrays.
_OVERHEAD_BYTES = 2 * 2**30

#: What Linux (cgroup v2) lets this process's container have, and what of it is in use; absent outside of one.
_CGROUP = Path("/sys/fs/cgroup")


def needed_bytes(profile: Profile) -> int | None:
    """Host memory at a run's peak: weights, KV cache and a second set of weights; None if that cannot be computed.

    Without the compilation and the temporaries of a generation, so a run that is let through may still be too large.
    """
    config = profile.model_config_json()
    engine = profile.engine_args("cpu")
    kv = predict_kv(config, engine) if config else None
    if config is None or kv is None:
        return None
    return 2 * estimate_params_bytes(config, engine) + kv.total_bytes + _OVERHEAD_BYTES


def free_bytes(cgroup: Path = _CGROUP) -> int:
    """Memory that this process may still take: the machine's, or its container's if that is less."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        limit = int((cgroup / "memory.max").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # Cached files count as used and are given up when memory is short.
        used = int((cgroup / "memory.current").read_text()) - int(statistics["inactive_file"])
        free = min(free, max(0, limit - used))
    return free


def check(profile: Profile) -> None:
    """Refuse a run on virtual CPU devices that this machine's free memory does not hold.

    Raises:
        ProfileError: with the bytes that are needed and those that are free.
    """
    needed, free = needed_bytes(profile), free_bytes()
    if needed is not None and free < needed:
        raise ProfileError(
            f"{profile.name} on virtual CPU devices needs about {exact_bytes(needed)} of memory (two sets of weights, "
            f"the KV cache, and 2 GiB beside them), and {exact_bytes(free)} is free. Use a machine with more, or fewer "
            "layers or tokens (engine.max_total_tokens)."
        )
