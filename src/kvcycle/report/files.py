"""The files of a report: everything that is drawn of one judged record, in one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvcycle.record import Record
from kvcycle.record_parts import Verdict
from kvcycle.report import markdown, page
from kvcycle.report.markdown import FailedTest
from kvcycle.text import first_line

SUMMARY = "summary.md"
#: The environment variable by which GitHub Actions names the file whose Markdown it shows on the run's page.
STEP_SUMMARY = "GITHUB_STEP_SUMMARY"


def write(
    record: Record, verdicts: Sequence[Verdict], folder: Path, failed_tests: Sequence[FailedTest] = ()
) -> list[Path]:
    """Write all files of a report into ``folder``, which is made if it is not there; returns their paths.

    Raises:
        OSError: one of them cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary, html = folder / SUMMARY, folder / page.PAGE
    summary.write_text(markdown.summary(record, verdicts, failed_tests), encoding="utf-8")
    page.write(record, verdicts, html)
    return [html, summary]


def write_without_record(outcome: str, reason: str, folder: Path) -> Path:
    """Write the summary of a run that measured nothing; returns its path.

    Raises:
        OSError: it cannot be written.
    """
    summary = folder / SUMMARY
    summary.write_text(markdown.summary_without_record(outcome, reason), encoding="utf-8")
    return summary


def write_or_say(
    record: Record, verdicts: Sequence[Verdict], folder: Path, failed_tests: Sequence[FailedTest] = ()
) -> str | None:
    """As :func:`write`, at the end of a run that must not be lost for its picture; returns what went wrong."""
    try:
        write(record, verdicts, folder, failed_tests)
    except Exception as error:  # noqa: BLE001 - whatever it is: the run is measured, and its record is on the disk
        return f"The report's files could not be written: {first_line(error)}. What was measured is whole."
    return None


def where(folder: Path) -> str:
    """The line that ends a command: where the reports are, the page if there is one."""
    return f"Reports: {folder / page.PAGE if (folder / page.PAGE).is_file() else folder}"


def write_killed(record: Record | None, told: str, folder: Path) -> list[str]:
    """Write the files of a run that was killed, and append its summary to the run's page; returns what went wrong."""
    if record is not None:
        if (problem := write_or_say(record, record.checks, folder, [("the run", told)])) is not None:
            return [problem]
    else:
        try:
            write_without_record("FAILED", told, folder)
        except OSError as error:
            return [f"The report's files could not be written: {error}."]
    problem = append_step_summary(folder / SUMMARY)
    return [problem] if problem else []


def append_step_summary(summary: Path, environment: Mapping[str, str] | None = None) -> str | None:
    """Append a summary to the file that the CI service names for the run's page; nothing where it names none.

    Returns:
        What went wrong, as a sentence; None if nothing did. A page without a summary is no reason to lose a run.
    """
    if not (name := (os.environ if environment is None else environment).get(STEP_SUMMARY)):
        return None
    try:
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(summary.read_text(encoding="utf-8") + "\n")
    except (OSError, ValueError) as error:  # a ValueError: a name that no file can have
        return f"The summary could not be appended to {name} ({STEP_SUMMARY}): {error}."
    return None
