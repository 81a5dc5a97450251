"""The picture: bytes in use on a device at the end of every phase, stacked by owner.

Devices of the same bytes share a picture, in whatever cycle. "Other", and what the allocator has beyond the ledger, may
differ among them by less than can be drawn; the exact range is said. What did not pass has a picture of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvcycle.record import Record
from kvcycle.record_parts import OWNERS, DeviceUse, Outcome, Owner, PhaseName, Verdict
from kvcycle.report.phases import JUDGED, LABELS, expected_changes, worst
from kvcycle.report.scopes import cells, parts
from kvcycle.text import exact_bytes, signed_bytes

#: "unowned" is what the device's allocator has in use and no live array owns.
Layer = Owner | Literal["unowned"]

NAMES: dict[Layer, str] = {
    "weights": "Weights",
    "kv": "KV cache",
    "params2": "Second params",
    "other": "Other arrays",
    "unowned": "Allocator's rest",
}
#: The same place in every bar: what stays is at the bottom, what comes and goes above it.
_ORDER: tuple[Layer, ...] = ("weights", "kv", "params2", "other", "unowned")

#: A cell's worst outcome, and the phases whose change failed.
Red = tuple[Outcome | None, frozenset[PhaseName]]

#: Pictures of one record; the others are counted.
MOST_PICTURES = 6
#: Groups that are told apart at all, and as many that did not pass: ten thousand sizes are not to take a minute.
_MOST_GROUPS = 64
#: What is less than this share of the highest bar cannot be seen.
_VISIBLE = 1 / 500

_UNITS = ((2**60, "EiB"), (2**50, "PiB"), (2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class Segment:
    """One owner in one bar: its height as a share of the axis, and its bytes in words."""

    layer: Layer
    name: str
    fraction: float
    text: str
    short: str


@dataclass(frozen=True)
class Bar:
    """One phase: its segments from the bottom, the line where the prediction is, and every figure in words."""

    phase: PhaseName
    label: str
    total: str
    short: str
    segments: tuple[Segment, ...]
    expected_at: float | None
    facts: tuple[tuple[str, str], ...]
    flag: str

    @property
    def spoken(self) -> str:
        """All of it in a sentence, for a screen reader."""
        figures = "; ".join(f"{name} {text}" for name, text in (*_spoken(self.segments), *self.facts))
        return f"{self.label} ({self.phase}): {self.total} in use. {figures}."


@dataclass(frozen=True)
class Tick:
    """One line of the axis."""

    fraction: float
    text: str


@dataclass(frozen=True)
class Picture:
    """The bars of one group of devices; ``limit_scale`` is the device's limit as a share of the axis."""

    title: str
    count: int
    worst: Outcome | None
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    limit: str
    limit_scale: float | None
    limit_note: str
    whole_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Pictures:
    """All that is drawn, the owners that occur in it, and what is not drawn."""

    drawn: tuple[Picture, ...]
    legend: tuple[tuple[Layer, str], ...]
    predicted: bool
    left_out: str


@dataclass
class _Group:
    """Devices (in cycles) that look the same: the lowest and highest of every layer in every phase."""

    limit_bytes: int | None
    expected: dict[PhaseName, int]
    red: Red | None
    phases: tuple[PhaseName, ...]
    first: tuple[tuple[int, ...], ...]
    low: list[list[int]]
    high: list[list[int]]
    ledger: list[int]
    allocator: list[int | None]
    cells: list[tuple[int, int]] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max((sum(layers) for layers in self.high), default=0)


def picture(record: Record, verdicts: Sequence[Verdict]) -> Pictures:
    """The pictures of a record: the largest group of devices first, then those that differ."""
    marked = _marked(record)
    groups, undrawn = _groups(record, verdicts, marked)
    chosen, skipped = _chosen(groups, marked)
    top = max((group.peak for group in chosen), default=0)
    used = {
        layer for group in chosen for layers in group.high for layer, size in zip(_ORDER, layers, strict=True) if size
    }
    undrawn += sum(len(group.cells) for group in skipped)
    return Pictures(
        drawn=tuple(_draw(group, top, record.host_of) for group in chosen),
        legend=tuple((layer, NAMES[layer]) for layer in _ORDER if layer in used),
        predicted=any(bar for group in chosen for bar in group.expected),
        left_out=f"{undrawn:,} more devices (in their cycles) differ in bytes from these. Drawn are the most frequent "
        "bytes, two that did not pass, and the lowest, the median and the highest." if undrawn else "",
    )  # fmt: skip


def _marked(record: Record) -> frozenset[tuple[int, int]]:
    """The cells (cycle and device) with the lowest, the median and the highest peak."""
    peaks: dict[tuple[int, int], int] = {}
    for index, cycle in enumerate(record.cycles):
        for phase in cycle.phases:
            for use in phase.devices:
                held = max(use.ledger_bytes, use.allocator_bytes or 0)
                peaks[index, use.id] = max(held, peaks.get((index, use.id), 0))
    ordered = sorted(peaks, key=lambda cell: (peaks[cell], cell))
    return frozenset({ordered[0], ordered[len(ordered) // 2], ordered[-1]} if ordered else ())


def _groups(
    record: Record, verdicts: Sequence[Verdict], marked: frozenset[tuple[int, int]]
) -> tuple[list[_Group], int]:
    """The groups, and how many cells are in none since there are too many of them."""
    red = _red(verdicts)
    tolerance = round(_VISIBLE * max((use.ledger_bytes for use in _uses(record)), default=0))
    expected = {device.id: expected_changes(record, device.id) for device in record.devices}
    by_key: dict[object, list[_Group]] = {}
    groups: list[_Group] = []
    undrawn = 0
    for index, cycle in enumerate(record.cycles):
        by_device: dict[int, list[tuple[PhaseName, DeviceUse]]] = {}
        for phase in cycle.phases:
            for use in phase.devices:
                by_device.setdefault(use.id, []).append((phase.name, use))
        for device in record.devices:
            if not (uses := by_device.get(device.id)):
                continue
            layers = tuple(_layers(use) for _, use in uses)
            broken = red.get((index, device.id))
            phases = tuple(name for name, _ in uses)
            exact = tuple(sizes[:3] for sizes in layers)
            key = (device.limit_bytes, phases, exact, broken, tuple(expected[device.id].items()))
            alike = by_key.setdefault(key, [])
            group = next((known for known in alike if _looks_like(known.first, layers, tolerance)), None)
            if group is None:
                most = _MOST_GROUPS * (1 if broken is None else 2)
                if len(groups) >= most and (index, device.id) not in marked:
                    undrawn += 1
                    continue
                low, high = [list(sizes) for sizes in layers], [list(sizes) for sizes in layers]
                ledger, allocator = [use.ledger_bytes for _, use in uses], [use.allocator_bytes for _, use in uses]
                group = _Group(
                    device.limit_bytes, expected[device.id], broken, phases, layers, low, high, ledger, allocator
                )
                alike.append(group)
                groups.append(group)
            group.cells.append((index, device.id))
            for number, sizes in enumerate(layers):
                group.low[number] = [min(pair) for pair in zip(group.low[number], sizes, strict=True)]
                group.high[number] = [max(pair) for pair in zip(group.high[number], sizes, strict=True)]
    return sorted(groups, key=lambda group: -len(group.cells)), undrawn


def _uses(record: Record) -> Iterator[DeviceUse]:
    return (use for cycle in record.cycles for phase in cycle.phases for use in phase.devices)


def _layers(use: DeviceUse) -> tuple[int, ...]:
    """Bytes by layer, in their order; what the ledger has beyond its owners is "other"."""
    owned = {owner: use.by_owner.get(owner, 0) for owner in OWNERS}
    owned["other"] += max(0, use.ledger_bytes - sum(owned.values()))
    unowned = max(0, (use.allocator_bytes or 0) - use.ledger_bytes)
    return owned["weights"], owned["kv"], owned["params2"], owned["other"], unowned


def _looks_like(first: tuple[tuple[int, ...], ...], layers: tuple[tuple[int, ...], ...], tolerance: int) -> bool:
    return all(
        abs(one - two) <= tolerance
        for before, after in zip(first, layers, strict=True)
        for one, two in zip(before[3:], after[3:], strict=True)
    )


def _red(verdicts: Sequence[Verdict]) -> dict[tuple[int, int], Red]:
    """The cells with a verdict that did not pass: the worst, and the phases whose change failed."""
    phase_of = {check: phase for phase, check in JUDGED.items()}
    found: dict[tuple[int, int], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.verdict in ("fail", "inconclusive"):
            cycle, device, _ = parts(verdict.scope)
            if cycle is not None and device is not None:
                found.setdefault((cycle, device), []).append(verdict)
    return {
        cell: (worst(bad), frozenset(phase_of[v.id] for v in bad if v.verdict == "fail" and v.id in phase_of))
        for cell, bad in found.items()
    }


def _chosen(groups: list[_Group], marked: frozenset[tuple[int, int]]) -> tuple[list[_Group], list[_Group]]:
    """What is drawn if not all can be: the most frequent, those that did not pass, the lowest, median and highest."""
    if len(groups) <= MOST_PICTURES:
        return groups, []
    wanted = [groups[0], *[group for group in groups if group.red is not None][:2]]
    wanted += [group for group in groups if not marked.isdisjoint(group.cells)]
    chosen = list({id(group): group for group in wanted}.values())
    return chosen, [group for group in groups if all(group is not other for other in chosen)]


def _draw(group: _Group, top: int, hosts: Mapping[int, int]) -> Picture:
    """The group's picture: on an axis of what is used, or of the whole device where that is half of it or more."""
    limit, axis = group.limit_bytes, _axis(max(top, 1))
    whole = limit is not None and limit <= 2 * axis
    if whole and limit is not None:
        axis = max(limit, top)
    return Picture(
        title=_title(group, hosts),
        count=len(group.cells),
        worst=group.red[0] if group.red else None,
        bars=_bars(group, axis),
        ticks=_ticks(axis, 1.0),
        limit=exact_bytes(limit) if limit else "",
        limit_scale=limit / axis if limit else None,
        limit_note=f"limit {exact_bytes(limit)}: {group.peak / limit:.1%} of it in use at the fullest moment"
        if limit
        else "",
        whole_ticks=_ticks(limit, limit / axis) if limit and not whole else (),
    )


def _bars(group: _Group, axis: int) -> tuple[Bar, ...]:
    bars = []
    base: int | None = None
    for number, name in enumerate(group.phases):
        low, high, ledger = group.low[number], group.high[number], group.ledger[number]
        if name == "flush_cache_before_kv_drop":
            base = ledger
        elif base is not None:
            base += group.expected.get(name, 0)
        wanted = base if name in JUDGED and name in group.expected else None
        segments = tuple(
            Segment(layer, NAMES[layer], most / axis, _range(least, most), _short(most))
            for layer, least, most in zip(_ORDER, low, high, strict=True)
            if most
        )
        facts = []
        if (allocator := group.allocator[number]) is not None:
            facts.append(("Allocator's own count", exact_bytes(allocator)))
        if wanted is not None:
            facts.append(("Predicted", exact_bytes(wanted)))
            facts.append(("Difference", signed_bytes(ledger - wanted)))
        if group.limit_bytes is not None:
            facts.append(("Left to the limit", exact_bytes(group.limit_bytes - max(ledger, allocator or 0))))
        failed = group.red is not None and name in group.red[1]
        bars.append(
            Bar(
                phase=name,
                label=LABELS[name],
                total=_range(sum(low[:4]), sum(high[:4])),
                short=_short(sum(high)),
                segments=segments,
                expected_at=None if wanted is None else max(0, wanted) / axis,
                facts=tuple(facts),
                flag="did not pass" if failed else "",
            )
        )
    return tuple(bars)


def _spoken(segments: tuple[Segment, ...]) -> list[tuple[str, str]]:
    return [(segment.name, segment.text) for segment in segments]


def _title(group: _Group, hosts: Mapping[int, int]) -> str:
    pieces = cells(group.cells, hosts)
    text = "; ".join(pieces[:4])
    return text if len(pieces) <= 4 else f"{text}; and {len(pieces) - 4:,} more"


def _range(low: int, high: int) -> str:
    return exact_bytes(low) if low == high else f"{low:,} to {high:,} B"


def _short(size: int) -> str:
    return exact_bytes(size).split(" (")[0]


def _axis(top: int) -> int:
    """The end of an axis that holds ``top``: a whole number of steps."""
    step = _step(top)
    return -(-top // step) * step


def _step(top: int) -> int:
    """Between two lines: 1, 2, 2.5 or 5 times a power of ten, of the unit in which ``top`` is said."""
    unit = next((size for size, _ in _UNITS if top >= size), 1)
    wanted = top / 5 / unit
    power = 10.0 ** (len(str(int(wanted))) - 1) if wanted >= 1 else 0.1 if wanted >= 0.1 else 0.01
    factor = next((factor for factor in (1, 2, 2.5, 5) if factor * power >= wanted), 10)
    return max(1, round(factor * power * unit))


def _ticks(end: int, scale: float) -> tuple[Tick, ...]:
    """The lines of an axis up to ``end``, which lies at ``scale``."""
    step = _step(end)
    unit, word = next(((size, word) for size, word in _UNITS if end >= size), (1, "B"))
    return tuple(Tick(at / end * scale, f"{at / unit:.4g} {word}" if at else "0") for at in range(0, end + 1, step))
