"""A soak in a terminal: a table, small plots, and the line that tells how far it is."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from kvcycle.checks.soak import SOAK_CHECKS, growth_witnesses, in_use, rss_medians
from kvcycle.record import Record
from kvcycle.record_parts import Soak, Verdict, Witness
from kvcycle.report.scopes import named
from kvcycle.text import exact_bytes, seconds

_BARS = "▁▂▃▄▅▆▇█"
#: Columns of a small plot: it fits an old terminal beside its name.
_PLOT_WIDTH = 56
#: Up to here every device has a row.
_MOST_DEVICES = 16


def show(record: Record, verdicts: Sequence[Verdict], console: Console) -> None:
    """Print the soak's table, small plots and each check's worst outcome; nothing for a record without a soak."""
    soak = record.soak
    if soak is None:
        return
    if not soak.points:
        console.print(f"soak: none of its {soak.cycles:,} cycles was run")
        return
    console.print(_table(record, soak))
    for check in SOAK_CHECKS:
        found = Counter(verdict.verdict for verdict in verdicts if verdict.id == check)
        if found:
            worst = next(outcome for outcome in ("fail", "inconclusive", "not-run", "pass") if found[outcome])
            console.print(f"{worst:>12}  {check}", style="" if worst == "pass" else "bold")
    console.print(f"Cycles 1 to {len(soak.points):,}, from the lowest to the highest:")
    rss = [point.rss_bytes for point in soak.points if point.rss_bytes is not None]
    # Of several cycles the highest growth, so that none is overlooked; of resident memory, which has peaks, the median.
    plots = [
        ("growth, all devices", buckets(growth_sum(record, soak), max)),
        ("resident memory", buckets(rss, statistics.median_low)),
    ]
    for name, values in plots:
        if values:
            low, high = min(values), max(values)
            console.print(f"{name:>20}  {sparkline(values)}", no_wrap=True, overflow="ignore", crop=False)
            console.print(f"{'':>20}  {exact_bytes(low)}" + (f" to {exact_bytes(high)}" if high != low else ", flat"))


def progress_line(record: Record) -> str:
    """One line on where a soak is: cycles, seconds each, what is left, and the figures that must not move."""
    soak = record.soak
    if soak is None or not soak.points:
        return "the soak has not begun"
    done, each_s = len(soak.points), statistics.median(point.seconds for point in soak.points[-20:])
    growth, rss = growth_sum(record, soak), soak.points[-1].rss_bytes
    text = (
        f"cycle {done:,} of {soak.cycles:,}, {seconds(each_s)} each, {duration((soak.cycles - done) * each_s)} left: "
        f"growth {growth[-1]:+,} B, {compilations(soak):,} compilations"
    )
    return text + (f", resident {exact_bytes(rss)}" if rss is not None else "")


def duration(value_s: float) -> str:
    """``1 h 05 min``, ``12 min``, ``40 s``: how long something still takes."""
    minutes = round(value_s / 60)
    if value_s < 90:
        return f"{value_s:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def compilations(soak: Soak) -> int:
    """Compilations and traces in all cycles."""
    return sum(point.compiles.any_work + point.compiles.trace for point in soak.points)


def buckets(values: Sequence[int], of: Callable[[Sequence[int]], int], width: int = _PLOT_WIDTH) -> list[int]:
    """The values, or where there are more than ``width``, one of each of ``width`` groups of neighbours."""
    count = min(width, len(values))
    return [of(values[i * len(values) // count : (i + 1) * len(values) // count]) for i in range(count)]


def sparkline(values: Sequence[float]) -> str:
    """One character for each value, from the lowest of them to the highest."""
    low, high = min(values), max(values)
    if high == low:
        return _BARS[0] * len(values)
    return "".join(_BARS[round((value - low) / (high - low) * (len(_BARS) - 1))] for value in values)


def growth_of(soak: Soak, device_id: int) -> list[int]:
    """The ledger of one device after every cycle, less its highest before the first drop."""
    before = [size for size in in_use(soak, device_id, "ledger", before=True) if size is not None]
    return [size - max(before) for size in in_use(soak, device_id, "ledger") if size is not None] if before else []


def growth_sum(record: Record, soak: Soak) -> list[int]:
    """As :func:`growth_of`, summed over the devices."""
    by_device = [growth_of(soak, device.id) for device in record.devices]
    return [sum(values) for values in zip(*by_device, strict=False)]


def _ends(record: Record, soak: Soak) -> list[tuple[list[int], Witness, int, int]]:
    """Devices, witness, the highest bytes before the first drop and those at the end.

    Each device has its own, unless there are many: then those that are alike are together, and the rest left out.
    """
    few = len(record.devices) <= _MOST_DEVICES
    found: dict[object, tuple[list[int], Witness, int, int]] = {}
    for device in record.devices:
        for witness in growth_witnesses(record, device.id):
            before = [size for size in in_use(soak, device.id, witness, before=True) if size is not None]
            after = [size for size in in_use(soak, device.id, witness) if size is not None]
            if before and after:
                start, end = max(before), after[-1]
                key = (device.id, witness) if few else (witness, start, end)
                found.setdefault(key, ([], witness, start, end))[0].append(device.id)
    if few:
        return list(found.values())
    # Those that grew most, of whichever bytes; then the most frequent.
    return sorted(found.values(), key=lambda row: (row[2] - row[3], -len(row[0])))[:_MOST_DEVICES]


def _table(record: Record, soak: Soak) -> Table:
    table = Table(
        title=f"soak: {len(soak.points):,} of {soak.cycles:,} cycles on {len(record.devices):,} devices "
        f"({record.evidence})",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("", no_wrap=True)
    table.add_column("start", justify="right", no_wrap=True)
    table.add_column("end", justify="right", no_wrap=True)
    table.add_column("growth", justify="right", no_wrap=True)
    for devices, witness, start, end in _ends(record, soak):
        name = named("device", devices, record.host_of)
        table.add_row(f"{name}, {witness}, bytes", f"{start:,}", f"{end:,}", f"{end - start:+,}")
    rss = [point.rss_bytes for point in soak.points if point.rss_bytes is not None]
    if (ends := rss_medians(rss)) is not None:
        table.add_row("resident memory, medians", f"{ends[0]:,}", f"{ends[1]:,}", f"{ends[1] - ends[0]:+,}")
    table.add_section()
    each_s = statistics.median(point.seconds for point in soak.points)
    table.add_row("seconds a cycle, median", "", f"{each_s:.3f}", "")
    table.add_row("compilations and traces", "", f"{compilations(soak):,}", "")
    different = [point.different_tokens for point in soak.points]
    same = sum(count == 0 for count in different)
    answers = f"{same:,} of {len(different):,}" if None not in different else "not run"
    table.add_row(f"cycles with the same {soak.new_tokens} tokens", "", answers, "")
    return table
