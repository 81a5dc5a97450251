"""One figure over many records: a table and small bars in a terminal, one group for each profile and evidence."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvcycle.checks import judge, passed
from kvcycle.errors import KVCycleError, RecordError
from kvcycle.record import Record
from kvcycle.record_parts import PhaseName, When
from kvcycle.report.regressions import is_prediction
from kvcycle.report.soak import sparkline
from kvcycle.text import nearest, printable

Number = int | float
_BAR_WIDTH = 16


@dataclass(frozen=True)
class Figure:
    """A number that every record may have: what it is, and how it is read; None where a record has none."""

    what: str
    of: Callable[[Record], Number | None]


@dataclass(frozen=True)
class Entry:
    """One record of a history: the name it is called by, the record, and its verdict in a word."""

    name: str
    record: Record
    verdict: str


def _slowest_s(when: When) -> Callable[[Record], Number | None]:
    return lambda record: max((generate.seconds for generate in record.generates_when(when)), default=None)


def _warm_s(record: Record) -> float | None:
    found = record.generates_when("warm")
    return statistics.median(generate.seconds for generate in found) if found else None


def _of_warm(when: When) -> Callable[[Record], Number | None]:
    def ratio(record: Record) -> float | None:
        slowest, warm = _slowest_s(when)(record), _warm_s(record)
        return slowest / warm if slowest is not None and warm else None

    return ratio


def _phase_s(name: PhaseName) -> Callable[[Record], Number | None]:
    return lambda record: max((phase.seconds for _, phase in record.phases(name)), default=None)


def _change_bytes(before: PhaseName, after: PhaseName) -> Callable[[Record], Number | None]:
    def change(record: Record) -> int | None:
        cycle = record.cycles[0] if record.cycles else None
        one, two = (cycle.phase(name) if cycle else None for name in (before, after))
        return abs(two.ledger_bytes_sum - one.ledger_bytes_sum) if one and two else None

    return change


def _peak_bytes(record: Record) -> int | None:
    return max((phase.ledger_bytes_sum for cycle in record.cycles for phase in cycle.phases), default=None)


def _other_bytes(record: Record) -> int | None:
    found = [phase for _, phase in record.phases("flush_cache_before_kv_drop")]
    return sum(use.by_owner.get("other", 0) for use in found[0].devices) if found else None


def _compilations(record: Record) -> int | None:
    rebuilds = [phase.compiles.any_work for _, phase in record.phases("kv_cache_rebuilt")]
    after = [generate.compiles.any_work for generate in record.generates_when("after_rebuild")]
    return sum(rebuilds + after) if rebuilds else None


#: By the names that ``--figure`` takes. A ratio to the same record's warm time can stand beside another machine's.
FIGURES: dict[str, Figure] = {
    "after_rebuild_of_warm": Figure(
        "slowest generation after the rebuild, as a multiple of the warm median", _of_warm("after_rebuild")
    ),
    "cold_of_warm": Figure("first generation, as a multiple of the warm median", _of_warm("cold")),
    "warm_s": Figure("warm generation, median seconds", _warm_s),
    "after_rebuild_s": Figure("slowest generation after the rebuild, seconds", _slowest_s("after_rebuild")),
    "cold_s": Figure("first generation, seconds", _slowest_s("cold")),
    "boot_s": Figure("boot, seconds", lambda record: record.boot.seconds if record.boot else None),
    "drop_s": Figure("slowest drop, seconds", _phase_s("kv_cache_dropped")),
    "rebuild_s": Figure("slowest rebuild, seconds", _phase_s("kv_cache_rebuilt")),
    "freed_bytes": Figure(
        "bytes that the drop freed, all devices", _change_bytes("flush_cache_before_kv_drop", "kv_cache_dropped")
    ),
    "second_set_bytes": Figure(
        "bytes of the second set, all devices", _change_bytes("kv_cache_dropped", "sglang_param_dict2_ready")
    ),
    "peak_bytes": Figure("most bytes in use at the end of a phase, all devices", _peak_bytes),
    "other_bytes": Figure("bytes that are neither weights nor KV cache before the drop, all devices", _other_bytes),
    "compilations": Figure("compilations by the rebuilds and the generations after them", _compilations),
    "not_passed": Figure(
        "verdicts that fail or are inconclusive",
        lambda record: sum(verdict.verdict in ("fail", "inconclusive") for verdict in judge(record)),
    ),
}


def figure(name: str) -> Figure:
    """The figure of that name.

    Raises:
        KVCycleError: there is none.
    """
    if name not in FIGURES:
        hint = nearest(name, FIGURES)
        raise KVCycleError(f"There is no figure {printable(name)!r}{hint}; there are: {', '.join(FIGURES)}.")
    return FIGURES[name]


def collect(paths: Sequence[Path], say: Callable[[str], None]) -> list[Entry]:
    """The records of a history, oldest first: files, run folders, and folders of runs, each record once.

    A file in a folder that is no record is passed over, and said; one that was named is refused.

    Raises:
        RecordError: a named file is no record.
        KVCycleError: there is no record at all.
    """
    entries: dict[Path, Entry] = {}
    for path in paths:
        for found in _files(path):
            try:
                record = Record.load(found)
            except RecordError as error:
                if not path.is_dir():
                    raise
                say(f"passed over: {error}")
                continue
            word = "–" if is_prediction(record) else "PASSED" if passed(judge(record)) else "FAILED"
            entries.setdefault(found.resolve(), Entry(called(found), record, word))
    if not entries:
        raise KVCycleError(
            f"There is no record in {', '.join(map(str, paths))}: name records, or a folder whose runs have one."
        )
    return sorted(entries.values(), key=lambda entry: (entry.record.created, entry.name))


def called(path: Path) -> str:
    """What a record's file is called by: its run's folder where it is a run's, else the file's own name."""
    return path.resolve().parent.name if path.name == "record.json" else path.name


def groups(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries that may stand in one curve: of one profile, on as many devices of one kind, of one evidence."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        record = entry.record
        kinds = ", ".join(sorted({device.kind for device in record.devices}))
        name = f"[{record.evidence}] {record.profile.get('name', '?')} on {len(record.devices)} {kinds} devices"
        found.setdefault(printable(name), []).append(entry)
    return found


def show(entries: Sequence[Entry], name: str, console: Console) -> None:
    """Print one figure of every record, group by group."""
    chosen = figure(name)
    console.print(Text.assemble((name, "bold"), f": {chosen.what}"))
    for title, members in groups(entries).items():
        console.print()
        console.print(_group_table(title, members, chosen))
        values = [value for entry in members if (value := chosen.of(entry.record)) is not None]
        if len(values) > 1:
            low, high = min(values), max(values)
            flat = f"always {shown(low)}" if low == high else f"{shown(low)} to {shown(high)}"
            console.print(f" from the first to the last: {sparkline(values)}  {flat}", soft_wrap=True)


def shown(value: Number | None) -> str:
    """A figure as text: integers exact, others to four figures."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _group_table(title: str, members: Sequence[Entry], chosen: Figure) -> Table:
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for heading in ("record", "sglang-jax", "jax", "verdict"):
        table.add_column(heading, overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    values = [chosen.of(entry.record) for entry in members]
    highest = max((value for value in values if value is not None), default=0)
    for entry, value in zip(members, values, strict=True):
        stack = entry.record.stack
        table.add_row(
            *(Text(printable(text)) for text in (entry.name, stack.sglang_jax, stack.jax)),
            Text(entry.verdict, "bold red" if entry.verdict == "FAILED" else ""),
            shown(value),
            "█" * round(_BAR_WIDTH * value / highest) if value and highest else "",
        )
    return table


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / "record.json").is_file():
        return [path / "record.json"]
    runs = sorted(path.glob("*/record.json"))
    return runs or sorted(path.glob("*.json"))
