"""The verdicts as a page lists them: by check, the worst first, equal ones as one row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvcycle.checks import CHECKS
from kvcycle.record_parts import OUTCOMES, Outcome, Verdict
from kvcycle.report.alike import alike
from kvcycle.report.phases import WORST_FIRST, by_check, worst
from kvcycle.report.scopes import describe
from kvcycle.text import exact_bytes, signed_bytes

#: Rows of one check; what is left out is counted, and is in the record.
MOST_ROWS = 40


@dataclass(frozen=True)
class Row:
    """Verdicts of one check that say the same of several places; ``message`` is the first one's."""

    outcome: Outcome
    places: str
    count: int
    witness: str
    expected: str
    measured: str
    difference: str
    message: str
    causes: tuple[str, ...]


@dataclass(frozen=True)
class CheckGroup:
    """One check: what it means, its worst outcome, how many verdicts of each, and its rows."""

    id: str
    meaning: str
    worst: Outcome
    counts: str
    rows: tuple[Row, ...]
    left_out: int


def check_groups(verdicts: Sequence[Verdict], hosts: Mapping[int, int]) -> list[CheckGroup]:
    """Every check that gave a verdict: those that failed first, then in the order of the cycle.

    Args:
        verdicts: of any checks.
        hosts: each device's host, {} where there is one.
    """
    groups = [_group(check, found, hosts) for check, found in by_check(verdicts).items()]
    return sorted(groups, key=lambda group: WORST_FIRST.index(group.worst))


def red(groups: Sequence[CheckGroup]) -> list[CheckGroup]:
    """The checks that did not pass."""
    return [group for group in groups if group.worst in ("fail", "inconclusive")]


def counts(verdicts: Sequence[Verdict]) -> str:
    """``127 pass``, ``2 fail, 125 pass``."""
    found = Counter(verdict.verdict for verdict in verdicts)
    return ", ".join(f"{found[outcome]:,} {outcome}" for outcome in OUTCOMES if found[outcome])


def meaning(check: str) -> str:
    """The check's own first sentence without its markup, nothing for one of another version."""
    first = ((CHECKS[check].__doc__ or "").strip().splitlines() or [""])[0] if check in CHECKS else ""
    return re.sub(r"``|\*", "", first)


def _group(check: str, verdicts: list[Verdict], hosts: Mapping[int, int]) -> CheckGroup:
    rows = [_row(found, hosts) for found in alike(verdicts)]
    rows.sort(key=lambda row: WORST_FIRST.index(row.outcome))
    return CheckGroup(
        id=check,
        meaning=meaning(check),
        worst=worst(verdicts) or "inconclusive",
        counts=counts(verdicts),
        rows=tuple(rows[:MOST_ROWS]),
        left_out=sum(row.count for row in rows[MOST_ROWS:]),
    )


def _row(alike: list[Verdict], hosts: Mapping[int, int]) -> Row:
    first = alike[0]
    return Row(
        outcome=first.verdict,
        places=describe((verdict.scope for verdict in alike), hosts),
        count=len(alike),
        witness=first.witness or "",
        expected=_shown(first.expected, first.unit),
        measured=_shown(first.measured, first.unit),
        difference=_difference(first),
        message=first.message,
        causes=first.causes,
    )


def _shown(value: float | str | None, unit: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if unit == "bytes" and isinstance(value, int):
        return exact_bytes(value)
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if unit == "seconds" else f"{value:g}"
    return f"{number} {'s' if unit == 'seconds' else unit}".strip()


def _difference(verdict: Verdict) -> str:
    expected, measured = verdict.expected, verdict.measured
    if expected is None or measured is None or isinstance(expected, str) or isinstance(measured, str):
        return ""
    off = measured - expected
    if off == 0:
        return "0"
    if verdict.unit == "bytes" and isinstance(off, int):
        return signed_bytes(off)
    return ("+" if off > 0 else "") + _shown(off, verdict.unit)
