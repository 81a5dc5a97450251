"""The table of phases of every cycle; cycles that are alike to the byte have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcycle.record import Record
from kvcycle.record_parts import Cycle, Outcome, PhaseName, Verdict
from kvcycle.report.phases import JUDGED, LABELS, by_check, by_cycle, expected_changes, worst
from kvcycle.report.scopes import named

#: More tables than that are left to the record.
MOST_TABLES = 8


@dataclass(frozen=True)
class PhaseRow:
    """One phase: bytes in use over all devices at its end, how they changed, and how they should have."""

    name: PhaseName
    label: str
    bytes: int
    change: int | None
    expected: int | None
    outcome: Outcome | None
    seconds: float
    compilations: int

    @property
    def difference(self) -> int | None:
        """Measured less expected, where both are known."""
        return None if self.change is None or self.expected is None else self.change - self.expected


@dataclass(frozen=True)
class CycleTable:
    """The phases of one cycle, and the cycles that are like it in every judged byte and verdict."""

    cycle: int
    alike: str
    outcome: Outcome | None
    rows: tuple[PhaseRow, ...]


@dataclass(frozen=True)
class CycleTables:
    """The tables, and how many cycles have none."""

    tables: tuple[CycleTable, ...]
    left_out: int


def cycle_tables(record: Record, verdicts: Sequence[Verdict]) -> CycleTables:
    """A table for every cycle that differs from the ones before it."""
    of_cycle = by_cycle(verdicts)
    expected = expected_changes(record)
    found: dict[object, tuple[int, tuple[PhaseRow, ...], list[int], Outcome | None]] = {}
    for index, cycle in enumerate(record.cycles):
        rows = _rows(cycle, expected, of_cycle.get(index, []))
        outcome = worst(of_cycle.get(index, []))
        judged = tuple((row.name, row.change if row.outcome else None, row.outcome) for row in rows)
        found.setdefault((judged, outcome), (index, rows, [], outcome))[2].append(index)
    tables = [
        CycleTable(first, named("cycle", same[1:]) if same[1:] else "", outcome, rows)
        for first, rows, same, outcome in found.values()
    ]
    return CycleTables(
        tuple(tables[:MOST_TABLES]), sum(len(same) for _, _, same, _ in list(found.values())[MOST_TABLES:])
    )


def _rows(cycle: Cycle, expected: dict[PhaseName, int], verdicts: list[Verdict]) -> tuple[PhaseRow, ...]:
    rows, of_check = [], by_check(verdicts)
    previous: int | None = None
    for phase in cycle.phases:
        check = JUDGED.get(phase.name)
        rows.append(
            PhaseRow(
                name=phase.name,
                label=LABELS[phase.name],
                bytes=phase.ledger_bytes_sum,
                change=None if previous is None else phase.ledger_bytes_sum - previous,
                expected=None if previous is None else expected.get(phase.name),
                outcome=worst(of_check.get(check, [])) if check else None,
                seconds=phase.seconds,
                compilations=phase.compiles.backend,
            )
        )
        previous = phase.ledger_bytes_sum
    return tuple(rows)
