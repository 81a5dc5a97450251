"""Makes the JUnit file of a run that was killed, from the lines that its report log had by then.

pytest writes ``junit.xml`` when it ends; a run that SIGKILL (the kernel short of memory, a CI runner out of patience)
or a crash in native code ends has none. ``reportlog.jsonl`` is flushed line by line, and ``record.json`` is replaced
as a whole after every phase, so both are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from junitparser import (
    Error,
    Failure,
    JUnitXml,
    JUnitXmlError,
    Properties,
    Property,
    Skipped,
    TestCase,
    TestSuite,
)
from junitparser.junitparser import FinalResult

from kvcycle.checks import judge
from kvcycle.errors import RecordError, RecoveryError
from kvcycle.record import Record
from kvcycle.report import page

JUNIT, LOG, RECORD = "junit.xml", "reportlog.jsonl", "record.json"
#: The type of the line, written by the suite (fixtures/ending.py), that names the tests in the order they run in.
COLLECTED = "Collected"


@dataclass(frozen=True)
class ReportLog:
    """What a report log says: the tests that were to run, in their order, and the reports of those that did."""

    collected: tuple[str, ...]
    reports: dict[str, list[pytest.TestReport]]

    @classmethod
    def read(cls, path: Path) -> ReportLog:
        """Read a log; a line that was cut off, or of a kind that says nothing about a test, is passed over.

        Raises:
            RecoveryError: it cannot be read.
        """
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            reason = f"{path} cannot be read ({error.strerror})"
            raise RecoveryError(f"There is nothing to recover from: {reason}.") from error
        collected: list[str] = []
        reports: dict[str, list[pytest.TestReport]] = {}
        for entry in _entries(text):
            with suppress(KeyError, TypeError, ValueError):  # a line of another version of pytest, or of a plugin
                if entry["$report_type"] == COLLECTED:
                    collected = [str(nodeid) for nodeid in entry["nodeids"]]
                elif entry["$report_type"] == "TestReport":
                    # Private, but the counterpart of what wrote the line; its public hook wants a whole session.
                    report = pytest.TestReport._from_json(entry)
                    reports.setdefault(report.nodeid, []).append(report)
        return cls(tuple(collected or reports), reports)

    def finished(self, nodeid: str) -> bool:
        """Whether the test ran to the end of its teardown."""
        return any(report.when == "teardown" for report in self.reports.get(nodeid, ()))


@dataclass(frozen=True)
class Recovered:
    """The JUnit file that was made, tests by outcome, the test that was running, and the judged record so far.

    ``record`` is None where no phase had been measured, or where the file is no record: ``record_error`` then says so.
    """

    junit: Path
    outcomes: dict[str, int]
    running: str | None
    record: Record | None
    record_error: str | None = None


def recover(run_dir: Path, cause: str = "The run was killed while this test ran.") -> Recovered:
    """Write ``junit.xml`` into the folder of a run that was killed, and the verdicts on what it had measured.

    Every test that had ended is there as it ended; the one that was running is an error; the rest are skipped.

    Args:
        run_dir: the run's folder, ``reports/latest`` or one beside it.
        cause: what the running test's error says; the last phase that was measured is added to it.

    Raises:
        RecoveryError: there is no such run, its JUnit file is whole, or no test had been collected.
    """
    if not run_dir.is_dir():
        raise RecoveryError(f"There is nothing to recover: there is no folder {run_dir}.")
    junit = run_dir / JUNIT
    if _is_whole(junit):
        raise RecoveryError(f"There is nothing to recover: {junit} is whole, the run wrote it when it ended.")
    log = ReportLog.read(run_dir / LOG)
    if not log.collected:
        raise RecoveryError(
            f"There is nothing to recover: {run_dir / LOG} names no test, so the run ended before any was collected."
        )
    record, problem = _judged(run_dir / RECORD)
    running = next((nodeid for nodeid in log.collected if not log.finished(nodeid)), None)

    suite = TestSuite("pytest")
    suite.add_property("kvcycle.recovered", f"made from {LOG}, since the run did not live to write this file")
    outcomes: dict[str, int] = {}
    for nodeid in log.collected:
        case, outcome = _case(nodeid, log.reports.get(nodeid, []))
        if nodeid == running:
            outcome = "error"
            case.result = [Error(f"{cause} {last_phase(record)}", "Killed")]
        elif not log.finished(nodeid):
            outcome = "skipped"
            case.result = [Skipped("did not run: the run was killed before")]
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        suite.add_testcase(case)
    whole = JUnitXml()
    whole.add_testsuite(suite)
    temporary = junit.with_name(f".{JUNIT}-recovered")
    whole.write(str(temporary), pretty=True)
    temporary.replace(junit)
    if record is not None:
        page.try_to_write(run_dir / page.PAGE, lambda: page.draw(record, record.checks))
    return Recovered(junit, outcomes, running, record, problem)


def last_phase(record: Record | None) -> str:
    """A sentence about the last phase that a record has."""
    for index, cycle in reversed(list(enumerate(record.cycles if record else ()))):
        if cycle.phases:
            return f"The last phase that was measured is {cycle.phases[-1].name} of cycle {index}."
    return "No phase had been measured yet."


def _entries(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def _is_whole(junit: Path) -> bool:
    try:
        JUnitXml.fromfile(str(junit))
    except (OSError, SyntaxError, JUnitXmlError):  # ElementTree's ParseError is a SyntaxError
        return False
    return True


def _judged(path: Path) -> tuple[Record | None, str | None]:
    if not path.is_file():
        return None, None
    try:
        record = Record.load(path)
    except RecordError as error:
        return None, str(error)
    record = record.model_copy(update={"checks": tuple(judge(record))})
    record.save(path)
    return record, None


def _case(nodeid: str, reports: list[pytest.TestReport]) -> tuple[TestCase, str]:
    """The test as pytest's own JUnit file has it, and its outcome."""
    address, bracket, parameters = nodeid.partition("[")
    module, *names = address.split("::")
    classname = ".".join([module.removesuffix(".py").replace("/", "."), *names[:-1]])
    case = TestCase(f"{names[-1] if names else ''}{bracket}{parameters}", classname)
    case.time = round(sum(report.duration for report in reports), 3)
    if reports and reports[-1].user_properties:
        properties = Properties()
        for name, value in reports[-1].user_properties:
            properties.add_property(Property(name, str(value)))
        case.append(properties)
    results: list[FinalResult] = []
    for report in reports:
        if report.skipped and isinstance(report.longrepr, tuple | list):
            results.append(Skipped(str(report.longrepr[2]).removeprefix("Skipped: "), "pytest.skip"))
        elif report.failed:
            text = report.longreprtext
            words = (text.strip().splitlines() or [f"failed in its {report.when}"])[-1]
            result = Failure(words) if report.when == "call" else Error(words)
            result.text = text
            results.append(result)
    case.result = results
    return case, {Failure: "failure", Error: "error", Skipped: "skipped"}[type(results[-1])] if results else "passed"
