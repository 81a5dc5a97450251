"""The end of a run in a terminal: the SOP's table, latencies and compilations, what failed, and one line of verdict."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kvcycle.checks import passed
from kvcycle.checks.generation import thresholds_s
from kvcycle.record import Record
from kvcycle.record_parts import OUTCOMES, Cycle, Verdict, When
from kvcycle.report import soak
from kvcycle.report.alike import told
from kvcycle.report.hosts import hosts_of, of_hosts
from kvcycle.report.phases import JUDGED, by_check, by_cycle, expected_changes, worst
from kvcycle.text import exact_bytes, printable, seconds

#: Columns of a table that is written to a log or a file.
LOG_WIDTH = 110

_STYLE = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "not-run": "dim"}
WHEN: tuple[tuple[When, str], ...] = (
    ("cold", "cold (first)"),
    ("warm", "warm, median"),
    ("after_rebuild", "after the rebuild, slowest"),
    ("after_weights", "after the weights, slowest"),
    ("after_clear_caches", "control: jax's caches cleared"),
)


def console() -> Console:
    """A console for standard output: as wide as the terminal, or :data:`LOG_WIDTH` where there is none."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=LOG_WIDTH)


def show(record: Record, verdicts: Sequence[Verdict], console: Console) -> None:
    """Print a judged record: tables, everything that did not pass, and the verdict.

    What a record says in words is printed as :class:`~rich.text.Text` and escaped: it can be from anybody.
    """
    judged = by_cycle(verdicts)
    for index, cycle in enumerate(record.cycles):
        found = judged.get(index, [])
        if index and _changes(cycle) == _changes(record.cycles[0]) and passed(found):
            console.print(f"cycle {index}: every change to the byte as in cycle 0.")
        else:
            table = _phase_table(record, found, index)
            # Exact bytes are never cut off; what is expected is what was measured, or else in the verdict's message.
            wanted = Measurement.get(console, console.options.update(width=1000), table).maximum
            console.print(table if wanted <= console.width else _phase_table(record, found, index, narrow=True))
    console.print(Text(_witness_line(record)))
    if record.generates:
        console.print(_latency_table(record))
    soak.show(record, verdicts, console)
    for line in told([v for v in verdicts if v.verdict in ("fail", "inconclusive")], record.host_of):
        verdict = line.verdict
        said = printable(f" {verdict.id}: {verdict.message}")
        console.print(Text.assemble((verdict.verdict, _STYLE[verdict.verdict]), said))
        for more in ([line.more] if line.more else []) + [f"likely: {cause}" for cause in verdict.causes]:
            console.print(Text(printable(f"    {more}")))
    left_out: dict[str, set[str]] = {}
    for verdict in verdicts:
        if verdict.verdict == "not-run":
            left_out.setdefault(verdict.message.removeprefix("Not run: "), set()).add(verdict.id)
    for reason, checks in left_out.items():
        console.print(Text(printable(f"not run: {', '.join(sorted(checks))}: {reason}"), "dim"))
    if (hosts := hosts_of(record, verdicts)) is not None:
        console.print(Text(hosts.summary))
    console.print(verdict_line(record, verdicts), soft_wrap=True)


def verdict_line(record: Record, verdicts: Sequence[Verdict]) -> Text:
    """One line: the verdict, its evidence label, what was validated, and the verdicts by outcome."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    numbers = ", ".join(f"{counts[outcome]:,} {outcome}" for outcome in OUTCOMES if counts[outcome])
    kinds = ", ".join(sorted({device.kind for device in record.devices}))
    where = f"{len(record.devices):,} {kinds} devices{of_hosts(record)}"
    said = printable(
        f" [{record.evidence}] {record.profile.get('name', '?')} on {where}, "
        f"sglang-jax {record.stack.sglang_jax}, jax {record.stack.jax}: {numbers or 'nothing was judged'}"
    )
    return Text.assemble(("PASSED", "bold green") if passed(list(verdicts)) else ("FAILED", "bold red"), said)


def _changes(cycle: Cycle) -> list[tuple[str, int]]:
    sums = [(phase.name, phase.ledger_bytes_sum) for phase in cycle.phases if phase.name in JUDGED]
    return [(name, size - before) for (_, before), (name, size) in itertools.pairwise(sums)]


def _phase_table(record: Record, verdicts: Sequence[Verdict], index: int, *, narrow: bool = False) -> Table:
    table = Table(
        title=f"cycle {index}: bytes in use, summed over {len(record.devices):,} devices (ledger, {record.evidence})",
        title_justify="left",
        title_style="bold",
    )
    if narrow:
        table.box, table.show_edge, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, False, (0, 1, 0, 0)
    table.add_column("phase", no_wrap=not narrow, overflow="fold")
    for heading in ("bytes in use", "change") if narrow else ("bytes in use", "change", "expected"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    previous: int | None = None
    changes, of_check = expected_changes(record), by_check(verdicts)
    for phase in record.cycles[index].phases:
        change = phase.ledger_bytes_sum - previous if previous is not None else None
        check = JUDGED.get(phase.name)
        expected = changes.get(phase.name)
        outcome = (worst(of_check.get(check, [])) or "inconclusive") if check else ""
        table.add_row(
            phase.name,
            f"{phase.ledger_bytes_sum:,}",
            f"{change:+,}" if change is not None else "",
            *([] if narrow else [f"{expected:+,}" if expected is not None else ""]),
            f"[{_STYLE[outcome]}]{outcome}[/]" if outcome else "",
        )
        previous = phase.ledger_bytes_sum
    return table


def _witness_line(record: Record) -> str:
    speaks = {canary.witness for canary in record.canaries}
    rss = float(record.profile.get("tolerances", {}).get("rss_fraction", 0.02))
    words = {
        "ledger": "ledger (every live buffer, exact)",
        "allocator": "allocator (the device's own count)",
        "rss": f"rss (the process, KV only, within {rss:.0%})",
    }
    silent = [name for name in words if name not in speaks]
    kv = record.kv
    line = f"KV cache: {kv.buffers} buffers, {exact_bytes(kv.bytes)}"
    if kv.predicted_how:
        line += "\n  " + printable(f"predicted by {kv.predicted_by}: {kv.predicted_how}")
    line += f"\nWitnesses: {', '.join(text for name, text in words.items() if name in speaks) or 'none'}"
    return line + (f"; silent here: {', '.join(silent)}" if silent else "")


def _latency_table(record: Record) -> Table:
    table = Table(title="generate", title_justify="left", title_style="bold")
    table.add_column("when", no_wrap=True)
    for heading in ("seconds", "compilations", "tokens from the prefix cache"):
        table.add_column(heading, justify="right")
    for when, label in WHEN:
        found = record.generates_when(when)
        if not found:
            continue
        times = [generate.seconds for generate in found]
        value = statistics.median(times) if when == "warm" else max(times)
        table.add_row(
            label,
            f"{value:.3f}",
            str(max(generate.compiles.backend for generate in found)),
            str(max(generate.cached_tokens for generate in found)),
        )
    if (limits := thresholds_s(record)) is not None:
        table.add_section()
        table.add_row("threshold for after the rebuild", f"{limits[1]:.3f}", "0", "0")
        table.caption = f"threshold {seconds(limits[1])} = the lesser of a factor on warm and a fraction of cold"
        table.caption_justify = "left"
    return table
