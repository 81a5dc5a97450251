"""What a plan says, as data: a Record of evidence ``compiled-for-tpu``, and what fits.

All sizes are exact bytes. A size "on a device" holds for every device of the topology: sglang-jax's programs are
SPMD, so no device holds more than another.
"""

from __future__ import annotations

import resource
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvcycle.errors import KVCycleError
from kvcycle.record import Record
from kvcycle.record_limits import Bytes, Count
from kvcycle.record_parts import Owner, PhaseName

#: Bytes that may be negative: then so many are missing.
Headroom = Annotated[int, Field(strict=True)]


class PlanError(KVCycleError):
    """The plan could not be made: the stack, or the compiler, refuses for another reason than memory."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PhasePlan(_Part):
    """One phase: what a device holds in it, and whether the compiler lets it.

    Attributes:
        name: the phase.
        held: whose buffers are held, for example ``("weights", "kv")``.
        bytes_per_device: the buffers in the compiler's own layouts, padding included.
        bytes_sum: the same over all devices.
        exact: False if one buffer alone is more than the compiler takes; ``bytes_per_device`` is then its size without
            padding, a lower bound.
        program_bytes: what the program with which the compiler was asked takes itself (some ten KiB).
        headroom_bytes: what is left of the device's capacity; negative if that many bytes are missing.
        fits: the compiler's verdict.
        refusal: its words, if it refused.
    """

    name: PhaseName
    held: tuple[Owner, ...]
    bytes_per_device: Bytes
    bytes_sum: Bytes
    exact: bool = True
    program_bytes: Bytes
    headroom_bytes: Headroom
    fits: bool
    refusal: str | None = None


class ForwardPlan(_Part):
    """One of the model's real steps, compiled from abstract inputs of the engine's own bucket sizes.

    Attributes:
        step: ``prefill`` or ``decode``.
        batch: requests in the batch, after padding to the engine's bucket.
        tokens: tokens in the batch, after padding to the engine's bucket.
        argument_bytes: weights, KV buffers and inputs on a device; None if the compiler refused.
        output_bytes: what the step returns on a device, the KV buffers included.
        alias_bytes: what of the output reuses an argument's memory.
        temporary_bytes: scratch memory while the step runs.
        program_bytes: the step's own code, resident while it is loaded.
        kv_bytes: the KV buffers on a device.
        kv_donated: the KV buffers are aliased in full, so no second copy of them ever exists.
        headroom_bytes: what is left on a device while the step runs; None if the compiler refused.
        headroom_with_params2_bytes: the same while a second parameter set is held as well.
        fits: the compiler accepts the step.
        fits_with_params2: it also fits beside a second parameter set.
        refusal: the compiler's words, if it refused.
        seconds: how long lowering and compiling took.
    """

    step: Literal["prefill", "decode"]
    batch: Count
    tokens: Count
    argument_bytes: Bytes | None = None
    output_bytes: Bytes | None = None
    alias_bytes: Bytes | None = None
    temporary_bytes: Bytes | None = None
    program_bytes: Bytes | None = None
    kv_bytes: Bytes
    kv_donated: bool | None = None
    headroom_bytes: Headroom | None = None
    headroom_with_params2_bytes: Headroom | None = None
    fits: bool
    fits_with_params2: bool
    refusal: str | None = None
    seconds: float


class Plan(_Part):
    """What the TPU compiler says about a profile on a topology.

    Attributes:
        record: the phases as a Record, to be compared with a measured one.
        topology: the slice's name.
        capacity_bytes: HBM of one device that the compiler grants a program.
        phases: every phase of the cycle, in order.
        forward: the model's steps, if they were asked for.
        largest_prefill_tokens: the largest prefill that the engine runs with this profile, in tokens.
        engine_token_cap: what the engine lowers max_total_tokens to, by its own mem_fraction_static, if that is less
            than the profile asks for; an estimate, since the VM's own capacity decides.
        fits: every phase fits, and every step does beside the second parameter set.
        headroom_bytes: the least of the phases' and of the steps' headroom beside the second parameter set.
        seconds: how long the plan took, the start of jax and libtpu included.
        peak_rss_bytes: the most memory that the planning process took.
    """

    record: Record
    topology: str
    capacity_bytes: Bytes
    phases: tuple[PhasePlan, ...]
    forward: tuple[ForwardPlan, ...] = ()
    largest_prefill_tokens: Count
    engine_token_cap: Count | None = None
    fits: bool
    headroom_bytes: Headroom
    seconds: float
    peak_rss_bytes: Bytes

    @property
    def first_misfit(self) -> PhasePlan | None:
        """The first phase that does not fit, None if all do."""
        return next((phase for phase in self.phases if not phase.fits), None)


class TokenLimit(_Part):
    """The largest max_total_tokens that the compiler accepts, and the proof that it is the largest.

    Attributes:
        tokens: max_total_tokens, a multiple of the page size, for each data-parallel rank as the engine counts; 0 if
            not even one page fits.
        headroom_bytes: what is left on a device at ``tokens``; None at 0.
        refused_tokens: one page more, which the compiler refused.
        missing_bytes: by how much ``refused_tokens`` is over on a device.
    """

    tokens: Count
    headroom_bytes: Headroom | None = None
    refused_tokens: Count
    missing_bytes: Bytes
    refusal: str


class MaxTokens(_Part):
    """How many tokens fit on a topology, with a second parameter set beside the KV cache and without one.

    Attributes:
        with_params2: the second set stays while the KV cache is resident (the whole cycle, as the SOP runs it).
        without_params2: the second set is given back before the rebuild, or there is none.
        params2_fits_alone: both parameter sets fit while the KV cache is dropped.
        compiles: how often the compiler was asked.
    """

    profile: str
    topology: str
    page_size: Count
    capacity_bytes: Bytes
    with_params2: TokenLimit
    without_params2: TokenLimit
    params2_fits_alone: bool
    compiles: Count
    seconds: float
    peak_rss_bytes: Bytes


def peak_rss_bytes() -> int:
    """The most memory that this process had resident so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
