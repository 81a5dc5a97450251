"""A soak's curves: growth on every device, resident memory and seconds, cycle by cycle."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kvcycle.checks.soak import rss_medians
from kvcycle.checks.verdicts import tolerance_bytes
from kvcycle.record import Record
from kvcycle.record_parts import Soak
from kvcycle.report.scopes import named
from kvcycle.report.soak import compilations, growth_of, growth_sum
from kvcycle.text import exact_bytes, seconds, signed_bytes

#: Lines of one plot: devices that grew alike share one, and those that grew most come first.
MOST_LINES = 6
#: Never less than 16 bytes from bottom to top: the few bytes of the last batch look like what they are.
_FLAT_BYTES = 8
#: Width and height of a plot in its own units; it is stretched to what there is room for.
_WIDTH, _HEIGHT = 1000, 200


@dataclass(frozen=True)
class Line:
    """One curve: the points of its polyline, and its exact values, cycle by cycle, from cycle 1."""

    name: str
    points: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Plot:
    """Curves over the same cycles; ``low`` and ``high`` label the axis, ``allowed`` is a line across it."""

    title: str
    unit: str
    low: str
    high: str
    lines: tuple[Line, ...]
    allowed_at: float | None
    allowed: str
    left_out: str


@dataclass(frozen=True)
class SoakView:
    """What the page shows of a soak."""

    cycles: int
    done: int
    figures: tuple[tuple[str, str], ...]
    plots: tuple[Plot, ...]

    @property
    def data(self) -> list[list[dict[str, object]]]:
        """The exact values, for whoever points at a cycle."""
        return [
            [{"name": line.name, "unit": plot.unit, "values": line.values} for line in plot.lines]
            for plot in self.plots
        ]


def soak(record: Record) -> SoakView | None:
    """The soak's figures and plots, None for a record without one."""
    if (found := record.soak) is None:
        return None
    return SoakView(found.cycles, len(found.points), _figures(record, found), _plots(record, found))


def _figures(record: Record, soak: Soak) -> tuple[tuple[str, str], ...]:
    growth = growth_sum(record, soak)
    figures = [
        ("Cycles", f"{len(soak.points):,} of {soak.cycles:,}"),
        ("Growth, all devices", signed_bytes(growth[-1]) if growth else "–"),
        ("Compilations and traces", f"{compilations(soak):,}"),
        ("A cycle, median", seconds(statistics.median(p.seconds for p in soak.points)) if soak.points else "–"),
    ]
    if (ends := rss_medians(_rss(soak))) is not None:
        figures.append(("Resident memory, medians", signed_bytes(ends[1] - ends[0])))
    return tuple(figures)


def _rss(soak: Soak) -> list[int]:
    return [point.rss_bytes for point in soak.points if point.rss_bytes is not None]


def _plots(record: Record, soak: Soak) -> tuple[Plot, ...]:
    if not soak.points:
        return ()
    plots = [_growth_plot(record, soak)]
    if rss := _rss(soak):
        ends = rss_medians(rss)
        allowed = ends[0] + tolerance_bytes(record, "rss", ends[0]) if ends else None
        low, high = min(rss), max([*rss, *([allowed] if allowed else [])])
        low, high = low - (high - low) // 10, high + max(1, (high - low) // 20)
        said = f"allowed for the last tenth's median: {exact_bytes(allowed)}" if allowed else ""
        plots.append(
            Plot(
                "Resident memory of the process",
                "B",
                exact_bytes(low),
                exact_bytes(high),
                (_line("resident memory", rss, low, high),),
                _at(allowed, low, high) if allowed else None,
                said,
                "",
            )
        )
    times = [point.seconds for point in soak.points]
    top = max(times) * 1.05 or 1.0
    plots.append(Plot("Seconds a cycle", "s", "0", seconds(top), (_line("a cycle", times, 0.0, top),), None, "", ""))
    return tuple(plots)


def _growth_plot(record: Record, soak: Soak) -> Plot:
    alike: dict[tuple[int, ...], list[int]] = {}
    for device in record.devices:
        if values := growth_of(soak, device.id):
            alike.setdefault(tuple(values), []).append(device.id)
    ordered = sorted(alike.items(), key=lambda entry: (-max(entry[0]), entry[1][0]))
    shown = ordered[:MOST_LINES]
    if ordered and ordered[-1] not in shown:
        shown = [*shown[:-1], ordered[-1]]  # the least as well
    low = min([-_FLAT_BYTES, *(min(values) for values, _ in shown)])
    high = max([_FLAT_BYTES, *(max(values) for values, _ in shown)])
    left = sum(len(devices) for values, devices in ordered if all(values != other for other, _ in shown))
    return Plot(
        "Ledger: growth on a device since before the first drop",
        "B",
        signed_bytes(low),
        signed_bytes(high),
        tuple(_line(named("device", devices, record.host_of), values, low, high) for values, devices in shown),
        _at(0, low, high),
        "no growth",
        f"{left:,} more devices lie between the highest and the lowest." if left else "",
    )


def _at(value: float, low: float, high: float) -> float:
    """Where a value lies on an axis, from 0 at the bottom to 1."""
    return (value - low) / (high - low) if high > low else 0.5


def _line(name: str, values: Sequence[float], low: float, high: float) -> Line:
    """A curve; of points in a row that are equal only the first and the last is drawn."""
    last = len(values) - 1
    kept = [
        index
        for index, value in enumerate(values)
        if index in (0, last) or values[index - 1] != value or values[index + 1] != value
    ]
    points = (
        f"{index / max(1, last) * _WIDTH:.1f},{(1 - _at(values[index], low, high)) * _HEIGHT:.1f}" for index in kept
    )
    return Line(name, " ".join(points), tuple(values))
