"""A run on several hosts: which of them are alike, and which device on which host did not pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvcycle.record import Record
from kvcycle.record_parts import Outcome, Verdict
from kvcycle.report.phases import worst
from kvcycle.report.scopes import named, parts
from kvcycle.text import exact_bytes

_HOST = re.compile(r"(?:^|-)host(\d{1,9})(?:-|$)")

#: Kinds of hosts that are told apart in a report; the others are counted.
MOST_ROWS = 20
#: Devices, and checks, that a row names.
_MOST_NAMED = 6


@dataclass(frozen=True)
class HostRow:
    """Hosts that are alike: how many, the devices and bytes on each, the worst verdict, and what did not pass."""

    hosts: str
    count: int
    devices: int
    held: str
    outcome: Outcome | None
    what: str


@dataclass(frozen=True)
class Hosts:
    """The hosts of a record that has more than one: a sentence or two, and the kinds of hosts, the odd ones first."""

    summary: str
    rows: tuple[HostRow, ...]
    left_out: int


@dataclass(frozen=True)
class _Kind:
    """What makes two hosts alike."""

    devices: int
    bytes: int
    outcome: Outcome | None
    checks: tuple[str, ...]
    bad_devices: int


def hosts_of(record: Record, verdicts: Sequence[Verdict]) -> Hosts | None:
    """The hosts of a judged record, None where it has one."""
    host_of = record.host_of
    if not host_of:
        return None
    bad: dict[int, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.verdict in ("fail", "inconclusive") and (on := _host(verdict)) is not None:
            bad.setdefault(on, []).append(verdict)
    devices, held = Counter(host_of.values()), Counter[int]()
    for device, host in host_of.items():
        held[host] += record.kv.bytes_by_device.get(device, 0) + record.params.bytes_by_device.get(device, 0)
    kinds: dict[_Kind, list[int]] = {}
    bad_devices = {host: _devices(found) for host, found in bad.items()}
    judged: Outcome | None = "pass" if verdicts else None
    for host in sorted(devices):
        found = bad.get(host, [])
        checks = tuple(sorted({verdict.id for verdict in found}))
        odd = len(bad_devices.get(host, ()))
        kinds.setdefault(_Kind(devices[host], held[host], worst(found) or judged, checks, odd), []).append(host)
    ordered = sorted(kinds.items(), key=lambda entry: (not entry[0].checks, len(entry[1])))
    rows = []
    for kind, alike in ordered[:MOST_ROWS]:
        odd_devices = sorted(device for host in alike for device in bad_devices.get(host, ()))
        rows.append(
            HostRow(
                hosts=named("host", alike),
                count=len(alike),
                devices=kind.devices,
                held=exact_bytes(kind.bytes),
                outcome=kind.outcome,
                what=_what(odd_devices, kind.checks),
            )
        )
    return Hosts(
        summary=_summary(devices, bad_devices, host_of),
        rows=tuple(rows),
        left_out=sum(len(alike) for _, alike in ordered[MOST_ROWS:]),
    )


def count_of_devices(record: Record) -> str:
    """``4 devices``; ``10,000 devices of 2,500 hosts`` where there is more than one."""
    count = len(record.devices)
    text = f"{count:,} device{'' if count == 1 else 's'}"
    return text + of_hosts(record)


def of_hosts(record: Record) -> str:
    """`` of 2,500 hosts``, after the number of devices; nothing where there is one."""
    return f" of {len(set(record.host_of.values())):,} hosts" if record.host_of else ""


def _host(verdict: Verdict) -> int | None:
    """The host that a verdict is on: its device's, or one that its scope names itself (``cycle0-host1``)."""
    if verdict.host is not None:
        return verdict.host
    named_host = _HOST.search(verdict.scope)
    return int(named_host[1]) if named_host else None


def _devices(verdicts: Sequence[Verdict]) -> set[int]:
    return {device for verdict in verdicts if (device := parts(verdict.scope)[1]) is not None}


def _what(devices: Sequence[int], checks: Sequence[str]) -> str:
    """What did not pass: the devices, where it is they and not the host, and the checks; nothing if all passed."""
    text = ", ".join(checks[:_MOST_NAMED])
    if len(checks) > _MOST_NAMED:
        text += f" and {len(checks) - _MOST_NAMED} more checks"
    return f"{named('device', devices)}: {text}" if devices else text


def _summary(devices: Counter[int], bad: dict[int, set[int]], host_of: dict[int, int]) -> str:
    sizes = sorted(set(devices.values()))
    each = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    text = f"{devices.total():,} devices on {len(devices):,} hosts, {each} on each."
    if not bad:
        return f"{text} On none did a verdict on a device not pass."
    odd = sorted(device for found in bad.values() for device in found)
    if not all(bad.values()):  # a host's own memory or compiler, not a device's
        names = named("host", bad)
    elif len(odd) <= _MOST_NAMED:
        names = ", ".join(f"device {device} (host {host_of[device]})" for device in odd if device in host_of)
    else:
        names = f"{len(odd):,} devices: {named('device', odd, host_of)}"
    return f"{text} What did not pass is on {len(bad):,} of {len(devices):,} hosts: {names}."
