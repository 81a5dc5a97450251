"""The full-size cycle on virtual CPU devices with dummy weights: the SOP's bytes, reproduced without a TPU.

Generation is left out, since at this width it takes more memory than the machine has; the record says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvcycle import checks, host_memory
from kvcycle.errors import ProfileError
from kvcycle.profile import Profile
from kvcycle.record import Record


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
    resolved.check_one_host("A replay")
    if host_memory.needed_bytes(resolved) is None:
        raise ProfileError(
            f"The profile {profile.name!r} cannot be replayed: its size cannot be computed. It needs model.config and "
            "engine.max_total_tokens."
        )
    host_memory.check(resolved)
    say(f"booting {resolved.name} with dummy weights on {resolved.devices_needed} virtual CPU devices (about a minute)")
    with kvcycle.boot(resolved, "cpu") as engine:
        measured = kvcycle.run_cycle(engine, resolved, save_to=save_to, progress=say)
    record = measured.model_copy(update={"checks": tuple(checks.judge(measured))})
    record.save(save_to)
    return record
