"""A run as a page: one HTML file with everything in it, that opens from a disk without a network.

:func:`write` draws a judged record; :func:`kvcycle.report.page.faults.draw` draws a campaign of faults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kvcycle.record import Record
from kvcycle.record_parts import Verdict
from kvcycle.report.hosts import hosts_of
from kvcycle.report.page import answers, curves, latency, memory, tables, verdicts
from kvcycle.report.page.html import render
from kvcycle.text import first_line

#: The page's name in a run's folder.
PAGE = "index.html"


def draw(record: Record, judged: Sequence[Verdict]) -> str:
    """The page of a judged record, as text."""
    checks = verdicts.check_groups(judged, record.host_of)
    return render(
        "index.html",
        record=record,
        head=answers.headline(record, judged),
        answers=answers.answers(record, judged),
        red=verdicts.red(checks),
        hosts=hosts_of(record, judged),
        picture=memory.picture(record, judged),
        latency=latency.latencies(record),
        cycles=tables.cycle_tables(record, judged),
        checks=checks,
        soak=curves.soak(record),
    )


def write(record: Record, judged: Sequence[Verdict], path: Path) -> None:
    """Write the page of a judged record to ``path``.

    Args:
        record: the record; its own verdicts are not looked at.
        judged: the verdicts on it.
        path: the file to write, ``index.html`` of a run's folder as a rule.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(draw(record, judged), encoding="utf-8")


def try_to_write(path: Path, drawn: Callable[[], str]) -> str | None:
    """Write what ``drawn`` returns, at the end of a run that must not be lost for its picture.

    Returns:
        None; or if it failed, the sentence that says so.
    """
    try:
        path.write_text(drawn(), encoding="utf-8")
    except Exception as error:  # noqa: BLE001 - whatever it is: the run is measured, and its record is on the disk
        return f"The page {path} could not be written: {first_line(error)}. What was measured is whole."
    return None


def written(run_dir: Path, drawn: Callable[[], str]) -> str:
    """Write the page into a run's folder, and say in a line where the reports are; and why, if there is no page."""
    problem = try_to_write(run_dir / PAGE, drawn)
    return f"Reports: {run_dir / PAGE}" if problem is None else f"{problem}\nReports: {run_dir}"
