"""A campaign of faults as a page: the matrix of fault by check, and a paragraph on every fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcycle.checks import CHECKS
from kvcycle.faults.campaign import Result
from kvcycle.record_parts import Evidence
from kvcycle.report.faults import mark, summary, why_not
from kvcycle.report.page.answers import EVIDENCE
from kvcycle.report.page.html import render
from kvcycle.report.page.verdicts import meaning

#: What a campaign runs on: virtual devices, always.
_EVIDENCE: Evidence = "simulated-on-cpu"

_MEANS = {
    "F": "fails, as it should",
    "I": "is inconclusive, as it should",
    "f": "fails as a consequence",
    "i": "is inconclusive as a consequence",
    ".": "passes",
    "!": "a false alarm",
    "M": "missed: it should have turned red",
    " ": "was not run",
}


@dataclass(frozen=True)
class Cell:
    """One fault, one check: the mark, its class in the style sheet, and what it means in words."""

    mark: str
    style: str
    means: str


@dataclass(frozen=True)
class FaultRow:
    """One fault: what was planted, whether it was caught, its cells in the order of the checks."""

    id: str
    what: str
    caught: bool
    red: tuple[str, ...]
    said: str
    seconds: float
    cells: tuple[Cell, ...]


def draw(results: Sequence[Result], *, name: str, whole: bool = True) -> str:
    """The page of a campaign, as text.

    Args:
        results: what became of the faults.
        name: the profile's name.
        whole: whether the whole catalogue was run, so that every check must have been red.
    """
    line, good = summary(results, whole=whole)
    return render(
        "faults.html",
        good=good,
        line=line,
        name=name,
        evidence=_EVIDENCE,
        evidence_means=EVIDENCE[_EVIDENCE],
        checks=[(check, meaning(check)) for check in CHECKS],
        rows=sorted(map(_row, results), key=lambda row: row.caught),
    )


def _row(result: Result) -> FaultRow:
    fault = result.fault
    return FaultRow(
        id=fault.id,
        what=fault.what,
        caught=result.caught,
        red=tuple(check for check in CHECKS if check in fault.red),
        said=result.message if result.caught else why_not(result),
        seconds=result.seconds,
        cells=tuple(_cell(check, mark(result, check)) for check in CHECKS),
    )


def _cell(check: str, sign: str) -> Cell:
    style = "wrong" if sign in "!M" else sign if sign.isalpha() else "none"
    return Cell(sign.strip() or "–", style, f"{check} {_MEANS[sign]}")
