"""What a regression is between two runs. It is defined here and nowhere else; docs/compare.md says it in words.

The second record is held against the first:

- a check that passed and does not any more (fails, or is inconclusive; what the profile leaves out is no regression),
- bytes that differ beyond the second profile's tolerances, where the geometry is the same: weights, KV cache and
  second set by the ledger (0 bytes), the changes by the allocator (``tolerances.allocator_bytes``),
- a generation after the rebuild beyond the second record's own threshold, where the first one's was not beyond its own.

A prediction has neither verdicts nor latencies, so only bytes are compared with one; and it must be of the geometry
that was measured, so there is no geometry that would excuse them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvcycle.checks import CHECKS
from kvcycle.checks.generation import thresholds_s
from kvcycle.checks.verdicts import tolerance_bytes, use_of
from kvcycle.record import Record
from kvcycle.record_parts import Outcome, PhaseName, Verdict
from kvcycle.report.phases import by_check, worst
from kvcycle.report.scopes import named
from kvcycle.report.side_by_side import differences
from kvcycle.text import seconds

#: The engine's arguments that decide how many bytes it takes.
_SIZING = (
    "tp_size",
    "dp_size",
    "page_size",
    "max_total_tokens",
    "mem_fraction_static",
    "dtype",
    "kv_cache_dtype",
    "quantization_config_path",
    "speculative_algorithm",
)
#: Phases whose change is judged to the byte, and the phase before each.
_CHANGES: tuple[tuple[PhaseName, PhaseName], ...] = (
    ("flush_cache_before_kv_drop", "kv_cache_dropped"),
    ("kv_cache_dropped", "sglang_param_dict2_ready"),
    ("sglang_param_dict2_ready", "kv_cache_rebuilt"),
)


@dataclass(frozen=True)
class Regression:
    """One place where the second run is worse than the first, and the sentence that says how."""

    kind: Literal["check", "bytes", "latency"]
    where: str
    text: str


@dataclass(frozen=True)
class Changed:
    """A check whose worst verdict is another one in the second record; None where a record has no verdict of it."""

    check: str
    first: Outcome | None
    second: Outcome | None


def is_prediction(record: Record) -> bool:
    """Whether nothing ran: the compiler laid the arrays out."""
    return record.evidence == "compiled-for-tpu"


def geometry(record: Record) -> dict[str, Any]:
    """What decides a run's bytes: model, number of devices, and the engine's sizing arguments as they held there."""
    model, engine = _table(record, "model"), _table(record, "engine")
    if record.evidence == "simulated-on-cpu":
        on_cpu = _table(record, "on_cpu").get("engine")
        engine = engine | (on_cpu if isinstance(on_cpu, dict) else {})
    # The folder's name: the same model lies elsewhere on another machine.
    name = str(model.get("path", "?")).rstrip("/").rsplit("/", 1)[-1]
    found = {"model": name, "devices": len(record.devices)}
    found |= {key: engine[key] for key in _SIZING if engine.get(key) is not None}
    limits = [device.limit_bytes for device in record.devices if device.limit_bytes is not None]
    if engine.get("max_total_tokens") is None and limits:
        found["capacity_bytes"] = min(limits)  # the engine then takes what is free
    return found


def other_geometry(first: Record, second: Record) -> list[str]:
    """In what the two geometries differ, as ``page_size 1 and 16``; [] if they are the same, or one is a prediction."""
    if is_prediction(first) or is_prediction(second):
        return []
    one, two = geometry(first), geometry(second)
    return [
        f"{key} {one.get(key, 'default')} and {two.get(key, 'default')}"
        for key in dict.fromkeys([*one, *two])
        if one.get(key) != two.get(key)
    ]


def changed_checks(first: Sequence[Verdict], second: Sequence[Verdict]) -> list[Changed]:
    """Every check whose worst verdict is not the same in both, in the checks' order."""
    found = []
    for check in CHECKS:
        one, two = (worst(v for v in verdicts if v.id == check) for verdicts in (first, second))
        if one != two:
            found.append(Changed(check, one, two))
    return found


def regressions(
    first: Record, second: Record, first_verdicts: Sequence[Verdict], second_verdicts: Sequence[Verdict]
) -> list[Regression]:
    """Every regression from the first record to the second, as the module's docstring defines it."""
    found = [] if other_geometry(first, second) else [*_bytes(first, second)]
    if is_prediction(first) or is_prediction(second):
        return found
    checks = _checks(first_verdicts, second_verdicts)
    found += checks
    if "generate.below_threshold" not in {regression.where for regression in checks}:
        found += _latency(first, second)
    return found


def _checks(first: Sequence[Verdict], second: Sequence[Verdict]) -> list[Regression]:
    before = {(verdict.id, verdict.name): verdict.verdict for verdict in first}
    of_check = {check: worst(found) for check, found in by_check(first).items()}
    bad: dict[str, list[Verdict]] = {}
    for verdict in second:
        # A place that the first record does not have (a third cycle) stands for the whole check.
        was = before.get((verdict.id, verdict.name), of_check.get(verdict.id))
        if was == "pass" and verdict.verdict in ("fail", "inconclusive"):
            bad.setdefault(verdict.id, []).append(verdict)
    found = []
    for check, verdicts in bad.items():
        verdicts.sort(key=lambda verdict: verdict.verdict)  # "fail" comes before "inconclusive"
        more = f" (and {len(verdicts) - 1} more)" if len(verdicts) > 1 else ""
        text = f"{check} passed, and now: {verdicts[0].verdict}: {verdicts[0].message}{more}"
        found.append(Regression("check", check, text))
    return found


def _bytes(first: Record, second: Record) -> list[Regression]:
    found = [
        Regression(
            "bytes",
            f"{entry.phase} device {entry.device}",
            f"{entry.phase}, {named('device', [entry.device], first.host_of)}, {entry.owner}: {entry.first_bytes:,} "
            f"and {entry.second_bytes:,} B, {entry.off_bytes:+,} B",
        )
        for entry in differences(first, second)
    ]
    if not first.cycles or not second.cycles:
        return found
    allowed = tolerance_bytes(second, "allocator", 0)
    for before, after in _CHANGES:
        for (device, one), (_, two) in zip(
            _allocated(first, before, after), _allocated(second, before, after), strict=False
        ):
            if one is not None and two is not None and abs(two - one) > allowed:
                found.append(
                    Regression(
                        "bytes",
                        f"{after} device {device}",
                        f"{after}, {named('device', [device], first.host_of)}, allocator: changed by {one:+,} and "
                        f"{two:+,} B, {two - one:+,} B, allowed {allowed:,} B",
                    )
                )
    return found


def _allocated(record: Record, before: PhaseName, after: PhaseName) -> list[tuple[int, int | None]]:
    """By how much the allocator's figure changed between two phases of the first cycle, by device, in their order."""
    one, two = record.cycles[0].phase(before), record.cycles[0].phase(after)
    changes: list[tuple[int, int | None]] = []
    for device in record.devices:
        low = use_of(one.device(device.id), "allocator") if one else None
        high = use_of(two.device(device.id), "allocator") if two else None
        changes.append((device.id, high - low if low is not None and high is not None else None))
    return changes


def _latency(first: Record, second: Record) -> list[Regression]:
    slow = _beyond_its_threshold(second)
    if slow is None or _beyond_its_threshold(first) is not None:
        return []
    took_s, allowed_s = slow
    text = (
        f"the generation after the rebuild took {seconds(took_s)}, the record's own threshold is {seconds(allowed_s)}"
    )
    return [Regression("latency", "generate.below_threshold", text)]


def _beyond_its_threshold(record: Record) -> tuple[float, float] | None:
    """(seconds of the slowest generation after the rebuild, its threshold), if it is beyond it."""
    limits, found = thresholds_s(record), record.generates_when("after_rebuild")
    if limits is None or not found:
        return None
    slowest = max(generate.seconds for generate in found)
    return (slowest, limits[1]) if slowest > limits[1] else None


def _table(record: Record, name: str) -> dict[str, Any]:
    table = record.profile.get(name)
    return dict(table) if isinstance(table, dict) else {}
