"""Two records side by side in a terminal: what was run, bytes phase by phase, latencies as ratios, changed verdicts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvcycle.checks import passed
from kvcycle.checks.generation import thresholds_s
from kvcycle.record import Record
from kvcycle.record_parts import OUTCOMES, PhaseName, Verdict, When
from kvcycle.report.regressions import Regression, changed_checks, geometry, is_prediction, other_geometry
from kvcycle.report.side_by_side import COMPARED_OWNERS, differences, shared_phases
from kvcycle.text import exact_bytes, printable, seconds

#: So many differences are told one by one, of each kind; then they are only counted.
_TOLD = 12


@dataclass(frozen=True)
class Side:
    """One of the two records: its letter, the name it is called by, and what its checks say (none of a prediction)."""

    letter: str
    name: str
    record: Record
    verdicts: tuple[Verdict, ...]


def show(one: Side, two: Side, console: Console) -> None:
    """Print the two records beside each other; the judgement on them is :func:`show_judgement`'s."""
    labels = ", ".join(f"{side.letter} {side.record.evidence}" for side in (one, two))
    _print(console, "what was run; ≠ where A and B differ", _run_table(one, two))
    _print(console, f"weights, KV cache, second set: bytes ({labels})", _bytes_table(one, two))
    if (latencies := _latency_table(one, two)) is not None:
        _print(console, "generate: seconds, and multiples (×) of the same record's warm median", latencies)
    if is_prediction(one.record) or is_prediction(two.record):
        return
    if (checks := _checks_table(one, two)) is not None:
        _print(console, "checks with another verdict", checks)
    else:
        console.print("checks: the same verdict on each in A and B\n")


def show_judgement(first: Record, second: Record, found: Sequence[Regression], console: Console) -> None:
    """Print whether the bytes are equal, then every regression of other kinds, and the line that sums up."""
    different = differences(first, second)
    if other := other_geometry(first, second):
        told = printable("; ".join(other))
        console.print(Text(f"The geometry is not the same ({told}): bytes are shown, and not held against B."))
    elif different:
        console.print(f"[bold red]DIFFERENT[/] in {len(different)} places")
    else:
        console.print("[bold green]EQUAL[/] to the byte, on every device and in every phase that both have")
    for kind in ("bytes", "check", "latency"):
        of_kind = [regression for regression in found if regression.kind == kind]
        for regression in of_kind[:_TOLD]:
            word = "differs" if kind == "bytes" else "regression"
            console.print(Text.assemble((word, "bold red"), printable(f" {regression.text}")))
        if len(of_kind) > _TOLD:
            console.print(f"… and {len(of_kind) - _TOLD} more in {kind}")
    if found:
        counts = Counter(regression.kind for regression in found)
        numbers = ", ".join(f"{counts[kind]} in {kind}" for kind in ("bytes", "check", "latency") if counts[kind])
        console.print(f"[bold red]REGRESSION[/] from A to B: {numbers}")
    elif not is_prediction(first) and not is_prediction(second):
        console.print("[bold green]NO REGRESSION[/] from A to B")


def _print(console: Console, title: str, table: Table) -> None:
    console.print(Text(title, "bold"))
    console.print(table)
    console.print()


def _table(*headings: str, left: int = 1) -> Table:
    """A table without a frame: two numbers of eleven digits and their difference fit beside the longest phase."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", overflow="fold")
    return table


def _run_table(one: Side, two: Side) -> Table:
    table = _table("", "", "A", "B", left=4)
    table.columns[1].no_wrap = True
    first, second = _facts(one), _facts(two)
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name, "–"), second.get(name, "–")
        style = "bold" if a != b else ""
        table.add_row("≠" if a != b else "", name, Text(printable(a), style), Text(printable(b), style))
    return table


def _facts(side: Side) -> dict[str, str]:
    record, stack = side.record, side.record.stack
    counts = Counter(verdict.verdict for verdict in side.verdicts)
    numbers = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    word = "PASSED" if passed(list(side.verdicts)) else "FAILED"
    sizes = geometry(record)
    return {
        "record": side.name,
        "evidence": record.evidence,
        "verdict": "a prediction" if is_prediction(record) else f"{word}: {numbers}",
        "profile": str(record.profile.get("name", "?")),
        "model": str(sizes.pop("model")),
        "devices": f"{sizes.pop('devices')} {', '.join(sorted({device.kind for device in record.devices}))}",
        **{name: f"{value:,}" if type(value) is int else str(value) for name, value in sizes.items()},
        "KV cache": exact_bytes(record.kv.bytes),
        "KV buffers": f"{record.kv.buffers:,}",
        "pools": ", ".join(sorted({pool.type for pool in record.kv.pools})) or "–",
        "weights": exact_bytes(record.params.bytes_on_devices),
        "cycles": f"{len(record.cycles)}",
        "sglang-jax": stack.sglang_jax,
        "jax": stack.jax if stack.jax == stack.jaxlib else f"{stack.jax}, jaxlib {stack.jaxlib}",
        "libtpu": stack.libtpu or "–",
        "python": stack.python,
        "kvcycle": stack.kvcycle,
        "created": record.created,
    }


def _bytes_table(one: Side, two: Side) -> Table:
    table = _table("phase", "A", "B", "difference")
    for column in table.columns[1:]:
        column.no_wrap = True
    style = "" if other_geometry(one.record, two.record) else "bold red"
    for name in shared_phases(one.record, two.record):
        a, b = _owned(one.record, name), _owned(two.record, name)
        table.add_row(name, f"{a:,}", f"{b:,}", Text(f"{b - a:+,}", style) if b != a else "0")
    return table


def _owned(record: Record, name: PhaseName) -> int:
    phase = record.cycles[0].phase(name) if record.cycles else None
    return sum(use.by_owner.get(owner, 0) for use in phase.devices for owner in COMPARED_OWNERS) if phase else 0


_LATENCIES: tuple[tuple[When, str], ...] = (
    ("cold", "cold, × warm"),
    ("after_rebuild", "after the rebuild, × warm"),
    ("after_weights", "after the weights, × warm"),
    ("after_clear_caches", "jax's caches cleared, × warm"),
)


def _latency_table(one: Side, two: Side) -> Table | None:
    """Each generation as a multiple of its own record's warm median; None where a record has no warm one."""
    warm = [_median_s(side.record) for side in (one, two)]
    if warm[0] is None or warm[1] is None:
        return None
    table = _table("", "A", "B", "B / A")
    table.add_row("warm, median", *(seconds(value) for value in (warm[0], warm[1])), _ratio(warm[1], warm[0]))
    for when, label in _LATENCIES:
        slowest = [_slowest_s(side.record, when) for side in (one, two)]
        if slowest == [None, None]:
            continue
        a, b = (s / w if s is not None and w else None for s, w in zip(slowest, warm, strict=True))
        table.add_row(label, _times(a), _times(b), _ratio(b, a))
    limits = [thresholds_s(side.record) for side in (one, two)]
    allowed = [limit[1] / w if limit is not None and w else None for limit, w in zip(limits, warm, strict=True)]
    table.add_row("threshold for after the rebuild", _times(allowed[0]), _times(allowed[1]), "")
    return table


def _median_s(record: Record) -> float | None:
    found = record.generates_when("warm")
    return statistics.median(generate.seconds for generate in found) if found else None


def _slowest_s(record: Record, when: When) -> float | None:
    return max((generate.seconds for generate in record.generates_when(when)), default=None)


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ×"


def _ratio(second: float | None, first: float | None) -> str:
    return f"{second / first:.2f}" if second is not None and first else "–"


def _checks_table(one: Side, two: Side) -> Table | None:
    """The checks whose worst verdict changed; None if none did."""
    changed = changed_checks(one.verdicts, two.verdicts)
    table = _table("check", "A", "B", left=3)
    for entry in changed:
        bad = entry.first == "pass" and entry.second in ("fail", "inconclusive")
        table.add_row(entry.check, entry.first or "–", Text(entry.second or "–", "bold red" if bad else ""))
    return table if changed else None
