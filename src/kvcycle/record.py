"""The Record: everything one run measured, as data. Every check and every report reads this and nothing else.

A run on a TPU, a run on virtual CPU devices and the TPU compiler's prediction all produce a ``Record``. It is plain
JSON with a schema number, so that a record from a VM can be judged again and drawn again anywhere. All byte counts are
exact integers; times are seconds.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, ConfigDict, FailFast, Field, ValidationError, model_validator

from kvcycle import record_file
from kvcycle.collecting import no_collections
from kvcycle.profile import MAX_CYCLES
from kvcycle.record_index import remembered
from kvcycle.record_info import Part, PhaseInfo
from kvcycle.record_limits import (
    MAX_CANARIES,
    MAX_CYCLES_TIMES_DEVICES,
    MAX_DEVICES,
    MAX_VERDICTS,
    Bytes,
    Count,
    Finite,
    Integer,
    LogProb,
    Seconds,
    check_judged_tables,
    each_once,
)

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


#: Cycles x devices of a record that is still written line by line.
_MOST_INDENTED = 1024


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


class Record(Part):
    """One run: what was run, on what, what was measured, and the verdicts on it."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    evidence: Evidence
    created: str
    #: As it was when the run began; of its tables those that checks read are held to the profile's own rules.
    profile: Annotated[dict[str, Any], AfterValidator(check_judged_tables)]
    stack: Stack
    devices: Devices
    kv: KV
    params: Params
    boot: Boot | None = None
    canaries: Annotated[tuple[Canary, ...], FailFast()] = Field(default=(), max_length=MAX_CANARIES)
    cycles: Annotated[tuple[Cycle, ...], FailFast()] = Field(default=(), max_length=MAX_CYCLES)
    generates: Annotated[tuple[Generate, ...], FailFast()] = Field(default=(), max_length=10_000)
    checks: Annotated[tuple[Verdict, ...], FailFast()] = ()
    soak: Soak | None = None

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _is_judged_in_seconds(self) -> Record:
        if len(self.cycles) * len(self.devices) > MAX_CYCLES_TIMES_DEVICES:
            raise ValueError(
                f"{len(self.cycles)} cycles of {len(self.devices)} devices are more than a record may hold "
                f"(cycles x devices at most {MAX_CYCLES_TIMES_DEVICES:,})"
            )
        return self

    @property
    def host_of(self) -> dict[int, int]:
        """Each device's host, by the device's id, where there is more than one host; {} where all are on one."""
        return remembered(self, "host_of", self.devices, _host_of)

    def canaries_of(self, witness: Witness, device_id: int | None) -> list[Canary]:
        """The canaries that one witness was shown on a device or (None) in the process."""
        return remembered(self, "canaries_of", self.canaries, _by_witness).get((witness, device_id), [])

    @property
    def hosts(self) -> tuple[int | None, ...]:
        """The ranks of its hosts; ``(None,)`` where there is one, so that nothing needs to say which."""
        return remembered(self, "hosts", self.devices, _ranks)

    def devices_of(self, host: int | None) -> Sequence[Device]:
        """The devices of one host, or all for ``None``."""
        return self.devices if host is None else remembered(self, "by_host", self.devices, _by_host).get(host, [])

    def generates_when(self, when: When, cycle: int | None = None) -> list[Generate]:
        """The generations of one kind, of one cycle or of all, in order."""
        return [g for g in self.generates if g.when == when and (cycle is None or g.cycle == cycle)]

    def phases(self, name: PhaseName) -> Iterator[tuple[int, Phase]]:
        """(cycle index, phase) of every cycle that has the phase."""
        for index, cycle in enumerate(self.cycles):
            if (phase := cycle.phase(name)) is not None:
                yield index, phase

    def to_json(self) -> str:
        """The record as JSON: indented for people, but of so many devices in so many cycles that nobody reads it.

        Of more than :data:`~kvcycle.record_limits.MAX_VERDICTS` verdicts only so many are in it, those that did not
        pass first: judging the record again gives them all.
        """
        cells = len(self.cycles) * len(self.devices)
        return self._as_kept().model_dump_json(by_alias=True, indent=1 if cells <= _MOST_INDENTED else None)

    def _as_kept(self) -> Record:
        if len(self.checks) <= MAX_VERDICTS:
            return self
        # Sorting keeps the order of those that are equal.
        first = sorted(self.checks, key=lambda verdict: verdict.verdict in ("pass", "not-run"))[:MAX_VERDICTS]
        return self.model_copy(update={"checks": tuple(first)})

    def save(self, path: Path) -> None:
        """Write the record to ``path`` atomically: a reader, or a crash, never meets half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(self.to_json().encode() + b"\n")
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record.

        Raises:
            RecordError: the file cannot be read, is too large, is no JSON, has another schema number, or does not
                validate; the sentence names the file and the first place that is wrong, and is safe to print.
        """
        try:
            with no_collections():
                required = (name for name, field in cls.model_fields.items() if field.is_required())
                return cls.model_validate_json(record_file.read(path, required), strict=True)
        except ValidationError as error:
            raise record_file.invalid(path, error) from error


def _host_of(devices: Devices) -> dict[int, int]:
    found = {device.id: device.host for device in devices}
    return found if len(set(found.values())) > 1 else {}


def _ranks(devices: Devices) -> tuple[int | None, ...]:
    ranks = sorted({device.host for device in devices})
    return tuple(ranks) if len(ranks) > 1 else (None,)


def _by_host(devices: Devices) -> dict[int, list[Device]]:
    found: dict[int, list[Device]] = {}
    for device in devices:
        found.setdefault(device.host, []).append(device)
    return found


def _by_witness(canaries: tuple[Canary, ...]) -> dict[tuple[Witness, int | None], list[Canary]]:
    found: dict[tuple[Witness, int | None], list[Canary]] = {}
    for canary in canaries:
        found.setdefault((canary.witness, canary.device), []).append(canary)
    return found


def now() -> str:
    """The current time in UTC, to the second, as records write it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
