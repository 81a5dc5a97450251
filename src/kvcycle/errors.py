"""Every error kvcycle raises on purpose, each a sentence that says what happened and what to do."""

from __future__ import annotations


class KVCycleError(Exception):
    """Base of all errors raised by kvcycle; its text is a whole sentence for a person."""


class UntestedStackWarning(UserWarning):
    """The installed sglang-jax, or its jax, is none that kvcycle was tested with; nothing is refused for that."""


class ProfileError(KVCycleError):
    """A profile, or an override of one, cannot be used; raised before anything expensive starts."""


class PlatformError(KVCycleError):
    """The process cannot run on the platform that was asked for (for example: no TPU)."""


class EngineBootError(KVCycleError):
    """The engine did not come up; carries the engine's own last words."""


class EngineCrashedError(KVCycleError):
    """The engine's scheduler or forward thread died; the engine can only be closed."""


class StepTimeoutError(EngineCrashedError):
    """A step did not end by its deadline; whatever it waited for, the engine can only be closed."""


class HostLostError(EngineCrashedError):
    """Another host of the engine has ended, or does not answer; the engine can only be closed, on every host."""


class HostsDisagreeError(HostLostError):
    """The hosts of an engine do not make the same calls in the same order; none of them was done."""


class UnsupportedEngineError(KVCycleError):
    """The object is no in-process sglang-jax engine, or one whose parts kvcycle does not know."""


class UnknownBufferError(UnsupportedEngineError):
    """The walk over a pool met a device array in a place from which it could not be replaced."""


class EngineBusyError(KVCycleError):
    """Requests are queued or running, so the buffers cannot be dropped now.

    Attributes:
        counts: requests by where they are, for example ``{"waiting": 1, "running": 2}``.
    """

    def __init__(self, message: str, counts: dict[str, int]) -> None:
        super().__init__(message)
        self.counts = counts


class KVCacheStateError(KVCycleError):
    """The call does not fit the state of the KV cache (dropped twice, rebuilt while resident, …)."""


class KVCacheDroppedError(KVCacheStateError):
    """A request reached the engine while its KV cache was dropped."""


class MemoryOccupationError(KVCycleError):
    """A tag of release_memory_occupation() or resume_memory_occupation() that is none, or does not fit the state."""


class OccupationStateError(MemoryOccupationError):
    """A tag that is released, or resident, already."""


class WeightsStateError(OccupationStateError):
    """The call does not fit the state of the weights (released twice, resumed while resident, nothing to resume)."""


class HostMemoryError(WeightsStateError):
    """The host has no room for the copy of the weights that a release keeps."""


class WeightsReleasedError(KVCycleError):
    """A request reached the engine while its weights were released."""


class RebuildError(KVCycleError):
    """The buffers could not be allocated again; the cache stays dropped and can be rebuilt later.

    Attributes:
        needed_bytes_by_device: what one rebuild allocates on each device, by device id.
        free_bytes_by_device: what was free on each device; absent for a device that states no capacity.
    """

    def __init__(
        self,
        message: str,
        needed_bytes_by_device: dict[int, int],
        free_bytes_by_device: dict[int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.needed_bytes_by_device = needed_bytes_by_device
        self.free_bytes_by_device = free_bytes_by_device or {}


class ParamSetError(KVCycleError):
    """A parameter set does not match the engine's, or could not be allocated."""


class RecordError(KVCycleError):
    """A record file is not one, or not one that this version reads."""


class RecoveryError(KVCycleError):
    """A run's folder from which no JUnit file can be made, or none needs to be."""


class VMError(KVCycleError):
    """A step on a TPU VM was refused or failed before the suite was started there."""


class VMRunLostError(VMError):
    """The suite was started on a TPU VM, and how it ended is not known here."""
