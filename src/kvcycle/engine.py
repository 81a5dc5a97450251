"""Boots a profile's engine in this process, contains its crashes, and closes it."""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import platform as python_platform
import time
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvcycle import host_memory
from kvcycle import platform as platforms
from kvcycle.errors import KVCycleError, PlatformError, ProfileError
from kvcycle.profile import Platform, Profile
from kvcycle.record_parts import Boot, Stack
from kvcycle.spending import spending

if TYPE_CHECKING:
    from kvcycle.containment import Containment

_EVIDENCE = "_kvcycle_boot"
#: By this sglang-jax decides whether Engine() returns on a host that is not the first; by default it never does.
_BLOCKS = "SGLANG_BLOCK_NONZERO_RANK_CHILDREN"
_STOP_S = 60.0
_STOP_DEAD_S = 5.0


def boot(profile: Profile, platform: Platform | None = None) -> BootedEngine:
    """Boot the profile's engine in this process; use it in a ``with`` block, or call :meth:`BootedEngine.close`.

    Everything cheap is checked first: the profile against the model and the platform, the platform against what jax
    finds.

    Args:
        profile: what to boot.
        platform: ``"tpu"`` or ``"cpu"`` (virtual devices). By default the one that ``JAX_PLATFORMS`` names, else tpu.

    Raises:
        ProfileError: the profile cannot run on the platform; on CPU also: not in this machine's free memory.
        PlatformError: jax runs on another platform, or has too few devices; of several hosts one did not come.
        EngineBootError: the engine did not come up, with its last words.
    """
    chosen = platform or ("cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" else "tpu")
    profile.check_geometry(chosen)
    folder = profile.boot_folder(chosen)
    if chosen == "cpu":
        host_memory.check(profile)
    join_hosts(profile, chosen)
    _check_devices(chosen, profile)

    import jax

    from kvcycle import capacity, compiles, inband, internals, memory
    from kvcycle.containment import Containment

    if chosen == "cpu":
        capacity.check_fits(profile)
        capacity.simulate(profile.on_cpu.limit_bytes)
        internals.own_batch_arrays()
    before = memory.snapshot().devices
    span = compiles.Span()
    containment = Containment()
    started = time.perf_counter()
    with spending("boot"), containment.booting(profile.timeouts.boot_s):
        from sgl_jax.srt.entrypoints.engine import Engine

        # Made before it is booted: its shutdown(), which kills every child process of this one, must go from atexit
        # also where the boot fails.
        engine = Engine.__new__(Engine)
        blocks, os.environ[_BLOCKS] = os.environ.get(_BLOCKS), "0"
        try:
            engine.__init__(
                model_path=str(folder or profile.model.path),
                enable_single_process=True,
                log_level="error",
                **profile.engine_args(chosen),
            )
        finally:
            atexit.unregister(engine.shutdown)
            if blocks is not None:
                os.environ[_BLOCKS] = blocks
            else:
                del os.environ[_BLOCKS]
        seconds = time.perf_counter() - started
        channel = inband.channel_of(engine)
        containment.surround(channel)
        if chosen == "cpu" and channel.hosts.is_first:  # the others wait for its messages
            internals.rest_when_idle(channel.scheduler)
        jax.block_until_ready(internals.weight_leaves(engine))
    if chosen == "cpu":
        platforms.keep_large_allocations()
    evidence = Boot(seconds=seconds, before=before, after=memory.snapshot().devices, compiles=span.end())
    setattr(engine, _EVIDENCE, evidence)
    return BootedEngine(engine, containment)


def join_hosts(profile: Profile, platform: Platform) -> None:
    """Prepare the process for the profile's share of the devices and, of several hosts, meet the others.

    Raises:
        PlatformError: jax runs already, on another platform or alone; or a host did not come.
    """
    engine = profile.engine
    platforms.prepare(platform, profile.devices_here, engine.nnodes)
    if engine.nnodes > 1:
        from kvcycle import rendezvous

        rendezvous.join(engine.node_rank, engine.nnodes, str(engine.dist_init_addr), profile.timeouts.boot_s)


def boot_evidence(engine: Any) -> Boot | None:
    """What :func:`boot` measured of this engine's boot; None if somebody else booted it."""
    evidence = getattr(engine, _EVIDENCE, None)
    return evidence if isinstance(evidence, Boot) else None


@dataclass(eq=False)
class BootedEngine:
    """An engine that :func:`boot` brought up; ``with`` gives the sglang-jax Engine itself and closes it at the end."""

    engine: Any
    containment: Containment
    closed: bool = False
    #: Whether the engine's threads have ended; if not after close(), the interpreter cannot be left in the usual way.
    stopped: bool = False

    def __post_init__(self) -> None:
        # Leaving the interpreter with the scheduler's thread alive ends in a segmentation fault.
        atexit.register(self.close)

    @property
    def crash(self) -> str | None:
        """What killed the engine; None while it lives."""
        return self.containment.crash

    def __enter__(self) -> Any:
        return self.engine

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from kvcycle import inband, rendezvous

        hosts = inband.channel_of(self.engine).hosts
        if error is not None and hosts.several:  # the others would wait for this one
            rendezvous.tell_of_the_end(hosts.rank, f"{type(error).__name__}: {error}")
        self.close()

    def close(self, stop_s: float | None = None) -> None:
        """Stop the engine's threads and free its device memory; the Engine cannot be used again.

        ``Engine.shutdown()`` is not called: it kills every child process of this one and stops no thread.

        Args:
            stop_s: how long its threads may take to end; see :attr:`stopped`. By default a minute, since a forward may
                still run, and 5 s where the engine is dead.
        """
        if self.closed:
            return
        self.closed = True
        from kvcycle import capacity, inband
        from kvcycle.pools import weight_arrays

        channel = inband.channel_of(self.engine)
        if stop_s is None:
            stop_s = _STOP_DEAD_S if channel.crash is not None else _STOP_S
        self.stopped = inband.stop_scheduler(channel, timeout_s=stop_s)
        if not self.stopped:  # what its threads may still use is left to them
            self.containment.note_crash("its threads did not end when it was closed")
        else:
            for slot_array in _pool_arrays(self.engine):
                slot_array.delete()
            for leaf in weight_arrays(self.engine):
                leaf.delete()
            self.engine.send_to_rpc.close()
        capacity.simulate(None)
        self.containment.end()
        atexit.unregister(self.close)


def _pool_arrays(engine: Any) -> list[Any]:
    from kvcycle.pools import slots_of

    try:
        return [slot.get() for slot in slots_of(engine)]
    except KVCycleError:  # pools that kvcycle cannot place keep their memory until the process ends
        return []


def _check_devices(platform: Platform, profile: Profile) -> None:
    import jax

    if platform == "tpu" and not platforms.tpu_is_present():
        raise PlatformError(
            f"jax finds no TPU here (its backend is {jax.default_backend()}). Run on a TPU VM with jax[tpu] installed, "
            "or on virtual CPU devices (--kv-platform cpu, or kvcycle.boot(profile, platform='cpu'))."
        )
    found, hosts = len(jax.devices()), profile.engine.nnodes
    if hosts > 1 and (found != profile.devices_needed or len(jax.local_devices()) != profile.devices_here):
        raise ProfileError(
            f"Over several hosts an engine takes every device: engine.tp_size={profile.engine.tp_size} asks for "
            f"{profile.devices_here} on each of {hosts} hosts, jax finds {found} on {jax.process_count()} host(s), "
            f"{len(jax.local_devices())} of them here. Set engine.tp_size to {found}, or start on every host there is."
        )
    if found < profile.devices_needed:
        raise ProfileError(
            f"engine.tp_size={profile.engine.tp_size} needs {profile.devices_needed} devices, jax finds {found} on "
            f"{platform}; lower tp_size or use a larger slice."
        )


@cache
def stack() -> Stack:
    """The versions of what runs here."""
    versions = {name: _version(name) for name in ("kvcycle", "jax", "jaxlib", "sglang-jax", "libtpu")}
    return Stack(
        kvcycle=versions["kvcycle"] or "unknown",
        jax=versions["jax"] or "not installed",
        jaxlib=versions["jaxlib"] or "not installed",
        sglang_jax=versions["sglang-jax"] or "not installed",
        python=python_platform.python_version(),
        libtpu=versions["libtpu"],
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
