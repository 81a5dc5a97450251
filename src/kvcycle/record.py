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
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, FailFast, Field, ValidationError, model_validator

from kvcycle import record_file
from kvcycle.collecting import no_collections
from kvcycle.profile import MAX_CYCLES
from kvcycle.record_index import remembered
from kvcycle.record_info import Part
from kvcycle.record_limits import (
    MAX_CANARIES,
    MAX_CYCLES_TIMES_DEVICES,
    MAX_VERDICTS,
    check_judged_tables,
)
from kvcycle.record_parts import (
    KV,
    Boot,
    Canary,
    Cycle,
    Device,
    Devices,
    Evidence,
    Generate,
    Params,
    Phase,
    PhaseName,
    Soak,
    Stack,
    Verdict,
    When,
    Witness,
)

#: Cycles x devices of a record that is still written line by line.
_MOST_INDENTED = 1024


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
