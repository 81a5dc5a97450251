"""Verdicts that say the same of several places, told once: of ten thousand devices that fail alike, one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvcycle.record_parts import Verdict
from kvcycle.report.scopes import describe

#: So many verdicts of a check are told one by one; of more, those that say the same are told together.
MOST_SINGLE = 16
#: Of a check whose verdicts are told together, so many that differ.
_MOST_TOGETHER = 4


@dataclass(frozen=True)
class Told:
    """One verdict that is told in full, and in words what it stands for."""

    verdict: Verdict
    more: str = ""


def alike(verdicts: Iterable[Verdict]) -> list[list[Verdict]]:
    """Verdicts of one check that say the same of several places, together; in the order of the first of each."""
    found: dict[tuple[object, ...], list[Verdict]] = {}
    for verdict in verdicts:
        key = (verdict.verdict, verdict.witness, verdict.expected, verdict.measured, verdict.unit, verdict.causes)
        # Without figures it is the sentence that tells them apart.
        words = _without_place(verdict) if verdict.measured is None else ""
        found.setdefault((*key, words), []).append(verdict)
    return list(found.values())


def told(verdicts: Sequence[Verdict], hosts: Mapping[int, int]) -> list[Told]:
    """What is said of verdicts that did not pass: all of a check that has few, of one that has many those that differ.

    Args:
        verdicts: in the order in which they are to be told.
        hosts: each device's host, {} where there is one.
    """
    by_check: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_check.setdefault(verdict.id, []).append(verdict)
    lines: list[Told] = []
    for found in by_check.values():
        if len(found) <= MOST_SINGLE:
            lines += [Told(verdict) for verdict in found]
            continue
        groups = alike(found)
        for first, *others in groups[:_MOST_TOGETHER]:
            places = describe((verdict.scope for verdict in others), hosts)
            lines.append(Told(first, f"and {len(others):,} alike: {places}" if others else ""))
        if left := sum(map(len, groups[_MOST_TOGETHER:])):
            last = lines[-1]
            more = f"{last.more}; and " if last.more else "and "
            lines[-1] = Told(last.verdict, f"{more}{left:,} more of {last.verdict.id} that differ from these")
    return lines


def _without_place(verdict: Verdict) -> str:
    host = "" if verdict.host is None else f" (host {verdict.host})"
    return verdict.message.replace(f"{verdict.scope}{host}", "")
