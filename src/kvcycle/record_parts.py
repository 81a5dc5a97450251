"""The parts of a Record: what was run, what one phase or one generation measured, and one check's word on it.

All byte counts are exact integers; times are seconds. :mod:`kvcycle.record` puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, FailFast, Field, model_validator

from kvcycle.record_index import remembered
from kvcycle.record_info import Part, PhaseInfo
from kvcycle.record_limits import MAX_DEVICES, Bytes, Count, Finite, Integer, LogProb, Seconds, each_once

Evidence = Literal["measured-on-tpu", "measured-on-gpu", "simulated-on-cpu", "compiled-for-tpu"]
Witness = Literal["ledger", "allocator", "rss"]
Owner = Literal["weights", "kv", "params2", "other"]
Outcome = Literal["pass", "fail", "inconclusive", "not-run"]
When = Literal[
    "cold",
    "warm",
    "prefix_hit",
    "after_rebuild",
    "with_params2",
    "after_swap_back",
    "after_weights",
    "after_clear_caches",
]
PhaseName = Literal[
    "engine_ready",
    "generate_result",
    "flush_cache_before_kv_drop",
    "kv_cache_dropped",
    "sglang_param_dict2_ready",
    "kv_cache_rebuilt",
    "generate_result_after_kv_rebuild",
    "after_drop_param_dict2",
    "weights_released",
    "weights_resumed",
]

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
OWNERS: tuple[Owner, ...] = get_args(Owner)
#: The SOP's, which every cycle has, in its order; then those of a profile with ``cycle.release_weights``.
PHASES: tuple[PhaseName, ...] = get_args(PhaseName)[:8]
WEIGHTS_PHASES: tuple[PhaseName, ...] = get_args(PhaseName)[8:]


class Stack(Part):
    """Versions of what was run; ``libtpu`` is None where it is not installed."""

    kvcycle: str
    jax: str
    jaxlib: str
    sglang_jax: str
    python: str
    libtpu: str | None = None


class Device(Part):
    """One accelerator (or virtual) device; ``limit_bytes`` is its capacity, None where nothing states one.

    ``host`` is the rank of the process whose device it is (JAX's ``process_index``): 0 where there is one host.
    """

    id: Count
    kind: str
    limit_bytes: Bytes | None = None
    host: Count = 0


class Compiles(Part):
    """Work the compiler did in a span, process-wide: traces, lowerings, backend compilations, persistent-cache hits."""

    trace: Count = 0
    lower: Count = 0
    backend: Count = 0
    cache_hits: Count = 0

    @property
    def any_work(self) -> int:
        """Lowerings plus backend compilations: what a generate after a warm one must not cause."""
        return self.lower + self.backend


def sum_of(by_host: Sequence[Compiles]) -> Compiles:
    """What the compilers of all hosts did together."""
    return Compiles(**{kind: sum(getattr(host, kind) for host in by_host) for kind in Compiles.model_fields})


class Spans(Part):
    """A part with the compiler's work in it: all hosts' together, and of several hosts each one's, by rank."""

    compiles: Compiles = Compiles()
    compiles_by_host: tuple[Compiles, ...] = Field(default=(), max_length=MAX_DEVICES)

    @model_validator(mode="after")
    def _compiles_are_the_sum(self) -> Self:
        if self.compiles_by_host and sum_of(self.compiles_by_host) != self.compiles:
            raise ValueError("compiles is not what compiles_by_host adds up to")
        return self

    @property
    def each_hosts_compiles(self) -> tuple[Compiles, ...]:
        """By rank; on one host the one there is."""
        return self.compiles_by_host or (self.compiles,)


class DeviceUse(Part):
    """Bytes in use on one device at one moment, by every witness that speaks for a device.

    ``ledger_bytes`` sums the shards of the live arrays, each buffer once; ``allocator_bytes`` is the device's own
    ``bytes_in_use`` or None where it keeps no statistics; ``by_owner`` splits the ledger.
    """

    id: Count
    ledger_bytes: Bytes
    allocator_bytes: Bytes | None = None
    by_owner: dict[Owner, Bytes] = Field(default_factory=dict)


# The first wrong one of many is named, and the others are not gone through: a file could hold millions of them.
Devices = Annotated[tuple[Device, ...], Field(max_length=MAX_DEVICES), FailFast(), AfterValidator(each_once)]
Uses = Annotated[tuple[DeviceUse, ...], Field(max_length=MAX_DEVICES), FailFast(), AfterValidator(each_once)]


class Phase(Spans):
    """One phase of the cycle: when it ended, how long it took, and what was in use then.

    Of several hosts ``rss_bytes_by_host`` has each process's resident bytes by rank, None for one that was not sampled;
    ``rss_bytes`` is their sum, and the seconds are the slowest host's.
    """

    name: PhaseName
    t_s: Seconds
    seconds: Seconds
    rss_bytes: Bytes | None = None
    rss_bytes_by_host: tuple[Bytes | None, ...] = Field(default=(), max_length=MAX_DEVICES)
    devices: Uses
    ledger_bytes_sum: Bytes
    info: PhaseInfo | None = None

    @model_validator(mode="after")
    def _sum_is_the_sum(self) -> Phase:
        total = sum(device.ledger_bytes for device in self.devices)
        if total != self.ledger_bytes_sum:
            raise ValueError(f"ledger_bytes_sum is {self.ledger_bytes_sum} but the devices add up to {total}")
        if self.rss_bytes_by_host:
            known = [size for size in self.rss_bytes_by_host if size is not None]
            expected = sum(known) if len(known) == len(self.rss_bytes_by_host) else None
            if self.rss_bytes != expected:
                raise ValueError(f"rss_bytes is {self.rss_bytes} but the hosts add up to {expected}")
        return self

    @property
    def by_id(self) -> dict[int, DeviceUse]:
        """The uses by their device's id; who asks for many devices asks once for this."""
        return remembered(self, "by_id", self.devices, _by_id)

    def rss_bytes_of(self, host: int | None) -> int | None:
        """The resident bytes of one host's process, None where it was not sampled; of the only host for ``None``."""
        if host is None:
            return self.rss_bytes
        return self.rss_bytes_by_host[host] if host < len(self.rss_bytes_by_host) else None

    def device(self, device_id: int) -> DeviceUse | None:
        """The use of one device, None if this phase has no sample of it."""
        return self.by_id.get(device_id)


def _by_id(uses: Uses) -> dict[int, DeviceUse]:
    return {use.id: use for use in uses}


class SwapInfo(Part):
    """The second set given to the engine and taken back: of ``leaves``, how many the engine then really used.

    ``runner_shared`` counts the runner's state leaves that *are* the given arrays, ``model_shared`` the model's own
    parameters; ``restored`` counts the leaves that are the first set's arrays again after the swap back.
    """

    leaves: Count
    runner_shared: Count
    model_shared: Count
    model_params: Count
    restored: Count


class Cycle(Part):
    """One pass through the phases, in their order; a cycle that ended early, or left one out, lacks some."""

    phases: Annotated[tuple[Phase, ...], FailFast()] = Field(max_length=len(PHASES + WEIGHTS_PHASES))
    swap: SwapInfo | None = None
    #: Bytes of owner "other" by device at the idle points before the drop, and at those after the rebuild: what the
    #: engine keeps of its last batch differs by an array of a few bytes from one generation to the next.
    residue_before: Annotated[tuple[dict[int, Bytes], ...], FailFast()] = Field(default=(), max_length=1000)
    residue_after: Annotated[tuple[dict[int, Bytes], ...], FailFast()] = Field(default=(), max_length=1000)

    @model_validator(mode="after")
    def _phases_are_in_order(self) -> Cycle:
        names = [phase.name for phase in self.phases]
        if names != [name for name in PHASES + WEIGHTS_PHASES if name in names]:
            raise ValueError(f"the phases are not in the cycle's order, each once: {', '.join(names)}")
        return self

    def phase(self, name: PhaseName) -> Phase | None:
        """The phase of that name, None if the cycle did not reach it."""
        return next((phase for phase in self.phases if phase.name == name), None)


class Generate(Spans):
    """One greedy generation: its tokens, what the prefix cache supplied, and what the compiler did meanwhile."""

    when: When
    cycle: Count
    seconds: Seconds
    token_ids: Annotated[tuple[Integer, ...], FailFast()]
    logprobs: Annotated[tuple[LogProb, ...], FailFast()] = ()
    cached_tokens: Count = 0


#: All of them are judged after each: more would make the judging slower than the cycles.
MAX_SOAK_CYCLES = 10_000


class SoakPoint(Part):
    """One idle point of a soak: what was in use then, and what the cycle before it cost and answered.

    ``by_owner`` is the ledger by owner and device, ``allocator_bytes`` the devices' own count, {} where they keep none.
    ``different_tokens`` and ``logprobs_off`` compare the cycle's generation with the beginning of the warm one; None
    where the profile leaves generation out.
    """

    seconds: Seconds
    rss_bytes: Bytes | None = None
    by_owner: dict[Owner, dict[int, Bytes]]
    allocator_bytes: dict[int, Bytes] = Field(default_factory=dict)
    compiles: Compiles = Compiles()
    different_tokens: Count | None = None
    logprobs_off: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    def ledger_bytes(self, device_id: int) -> int | None:
        """The ledger on one device, all owners together; None if this point has no sample of it."""
        held = [by_device[device_id] for by_device in self.by_owner.values() if device_id in by_device]
        return sum(held) if held else None


class Soak(Part):
    """Many cycles on one engine, with one sample at the idle point after each; see :mod:`kvcycle.soak`.

    ``before`` are idle points before the first of these cycles, each after a generation, so that what the engine keeps
    of its last batch is in them; ``points[n - 1]`` is the idle point after cycle n.
    """

    cycles: Count
    new_tokens: Count
    before: Annotated[tuple[SoakPoint, ...], FailFast()] = Field(default=(), max_length=1000)
    points: Annotated[tuple[SoakPoint, ...], FailFast()] = Field(default=(), max_length=MAX_SOAK_CYCLES)


class Pool(Part):
    """One pool object of the engine and what it holds."""

    type: str
    buffers: Count
    bytes: Bytes


class KV(Part):
    """The KV (and state) buffers: what the shards add up to, what was predicted and by whom, what the engine claims."""

    buffers: Count
    bytes: Bytes
    bytes_by_device: dict[int, Bytes]
    predicted_bytes: Bytes | None = None
    predicted_bytes_by_device: dict[int, Bytes] | None = None
    predicted_by: str | None = None
    predicted_how: str | None = None
    claimed_bytes: Bytes | None = None
    pools: Annotated[tuple[Pool, ...], FailFast()] = ()


class Params(Part):
    """The engine's weights: how many arrays, and their bytes summed over devices and by device."""

    arrays: Count
    bytes_on_devices: Bytes
    bytes_by_device: dict[int, Bytes] = Field(default_factory=dict)


class Boot(Spans):
    """What the boot cost and what each witness saw of it; absent when the user booted the engine."""

    seconds: Seconds
    before: Uses
    after: Uses


class Canary(Part):
    """A known allocation, made and freed: what each witness saw of it (the control of every memory check).

    ``rise_bytes`` and ``fall_bytes`` are None where the witness does not speak; ``device`` is None for the process,
    which is that of ``host``.
    """

    witness: Witness
    device: Count | None
    host: Count = 0
    allocated_bytes: Bytes
    rise_bytes: Integer
    fall_bytes: Integer


class Verdict(Part):
    """One check's word on one scope: what was expected, what was measured, by which witness, and what it means.

    ``host`` is that of the scope's device; None where it names no device, or where the record has one host.
    """

    id: str
    scope: str
    host: Count | None = None
    witness: Witness | None = None
    verdict: Outcome
    expected: int | Finite | str | None = None
    measured: int | Finite | str | None = None
    unit: str = ""
    message: str
    causes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``cycle0-device2-ledger``: the scope and the witness, as test ids write it."""
        return f"{self.scope}-{self.witness}" if self.witness else self.scope

    @property
    def place(self) -> str:
        """``cycle0-device2-ledger (host 1)``: the name as people read it."""
        return self.name if self.host is None else f"{self.name} (host {self.host})"
