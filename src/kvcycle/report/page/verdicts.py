"""The verdicts as a page lists them: by check, the worst first, equal ones as one row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvcycle.checks import CHECKS
from kvcycle.record import OUTCOMES, Outcome, Verdict
from kvcycle.report.page.scopes import describe
from kvcycle.report.phases import WORST_FIRST, worst
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


def check_groups(verdicts: Sequence[Verdict]) -> list[CheckGroup]:
    """Every check that gave a verdict: those that failed first, then in the order of the cycle."""
    by_check: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_check.setdefault(verdict.id, []).append(verdict)
    groups = [_group(check, found) for check, found in by_check.items()]
    return sorted(groups, key=lambda group: WORST_FIRST.index(group.worst))


def red(verdicts: Sequence[Verdict]) -> list[CheckGroup]:
    """The checks that did not pass."""
    return [group for group in check_groups(verdicts) if group.worst in ("fail", "inconclusive")]


def counts(verdicts: Sequence[Verdict]) -> str:
    """``127 pass``, ``2 fail, 125 pass``."""
    found = Counter(verdict.verdict for verdict in verdicts)
    return ", ".join(f"{found[outcome]:,} {outcome}" for outcome in OUTCOMES if found[outcome])


def meaning(check: str) -> str:
    """The check's own first sentence without its markup, nothing for one of another version."""
    first = ((CHECKS[check].__doc__ or "").strip().splitlines() or [""])[0] if check in CHECKS else ""
    return re.sub(r"``|\*", "", first)


def _group(check: str, verdicts: list[Verdict]) -> CheckGroup:
    alike: dict[tuple[object, ...], list[Verdict]] = {}
    for verdict in verdicts:
        key = (verdict.verdict, verdict.witness, verdict.expected, verdict.measured, verdict.unit, verdict.causes)
        # Without figures it is the sentence that tells them apart.
        words = verdict.message.replace(verdict.scope, "") if verdict.measured is None else ""
        alike.setdefault((*key, words), []).append(verdict)
    rows = sorted(map(_row, alike.values()), key=lambda row: WORST_FIRST.index(row.outcome))
    return CheckGroup(
        id=check,
        meaning=meaning(check),
        worst=worst(verdicts) or "inconclusive",
        counts=counts(verdicts),
        rows=tuple(rows[:MOST_ROWS]),
        left_out=sum(row.count for row in rows[MOST_ROWS:]),
    )


def _row(alike: list[Verdict]) -> Row:
    first = alike[0]
    return Row(
        outcome=first.verdict,
        places=describe(verdict.scope for verdict in alike),
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
