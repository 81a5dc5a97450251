"""The JUnit file of a run that was killed, made of report logs as they are found afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped, TestCase
from typer.testing import CliRunner

from kvcycle.cli import app
from kvcycle.errors import RecoveryError
from kvcycle.record import Record
from kvcycle.report.recover import COLLECTED, recover
from tests.unit.records import good_record

#: One test of every outcome.
_TESTS = """
import pytest

@pytest.fixture
def broken_setup():
    raise ValueError("in the setup")

@pytest.fixture
def broken_teardown():
    yield
    raise ValueError("in the teardown")

class TestInAClass:
    @pytest.mark.parametrize("scope", ["cycle0-device0-ledger", "a::b/c.py"])
    def test_passes(self, scope, record_property):
        record_property("witness", "ledger")

def test_fails():
    assert 1 == 2

def test_fails_without_a_traceback():
    pytest.fail("a sentence", pytrace=False)

def test_skips():
    pytest.skip("for a reason")

def test_errors(broken_setup):
    pass

def test_errors_late(broken_teardown):
    pass
"""
_PLUGIN = f'''
def pytest_collection_finish(session):
    ids = [item.nodeid for item in session.items]
    session.config._report_log_plugin._write_json_data({{"$report_type": "{COLLECTED}", "nodeids": ids}})
'''


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that pytest itself has ended, with its JUnit file and its report log."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "pytest.ini").write_text("[pytest]\njunit_family = xunit1\n")
    (folder / "test_one.py").write_text(_TESTS)
    (folder / "naming.py").write_text(_PLUGIN)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "naming", "-p", "no:cacheprovider", "--junitxml=junit.xml"]
    done = subprocess.run(
        [*command, "--report-log=reportlog.jsonl"], cwd=folder, check=False, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(folder)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    return folder


@pytest.fixture
def killed(finished: Path, tmp_path: Path) -> Path:
    """The same run without its JUnit file."""
    (tmp_path / "reportlog.jsonl").write_text((finished / "reportlog.jsonl").read_text())
    return tmp_path


def keep_lines(run_dir: Path, count: int, tail: str = "") -> None:
    """Cut the log after so many lines."""
    log = run_dir / "reportlog.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:count]) + tail)


def lines_until(run_dir: Path, test: str, when: str) -> int:
    """How many lines the log has up to the report of this part of a test."""
    for number, line in enumerate((run_dir / "reportlog.jsonl").read_text().splitlines(), 1):
        entry = json.loads(line)
        if entry.get("nodeid", "").endswith(test) and entry.get("when") == when:
            return number
    raise AssertionError(f"no {when} of {test}")


def cases(junit: Path) -> dict[str, TestCase]:
    return {f"{case.classname}|{case.name}": case for suite in JUnitXml.fromfile(str(junit)) for case in suite}


def outcome(case: TestCase) -> list[type]:
    return [type(result) for result in case.result]


def test_what_had_ended_is_as_pytest_itself_reports_it(finished: Path, killed: Path) -> None:
    recovered = recover(killed)
    theirs, ours = cases(finished / "junit.xml"), cases(recovered.junit)
    assert list(ours) == list(theirs)
    assert len(ours) == 7
    for name, case in theirs.items():
        assert outcome(ours[name]) == outcome(case), name
        assert [r.text for r in ours[name].result if not isinstance(r, Skipped)] == [
            r.text for r in case.result if not isinstance(r, Skipped)
        ]
    assert recovered.outcomes == {"passed": 2, "failure": 2, "skipped": 1, "error": 2}
    assert recovered.running is None
    skipped = ours["test_one|test_skips"].result[0]
    assert skipped.message == "for a reason"
    passed = ours["test_one.TestInAClass|test_passes[cycle0-device0-ledger]"]
    assert 'name="witness" value="ledger"' in passed.tostring().decode()


@pytest.mark.parametrize("when", ["setup", "call"])
def test_the_test_that_was_running_is_an_error_and_the_rest_are_skipped(killed: Path, when: str) -> None:
    keep_lines(killed, lines_until(killed, "test_fails_without_a_traceback", when))
    recovered = recover(killed)
    assert recovered.running == "test_one.py::test_fails_without_a_traceback"
    ours = cases(recovered.junit)
    (error,) = ours["test_one|test_fails_without_a_traceback"].result
    assert isinstance(error, Error)
    assert error.message == "The run was killed while this test ran. No phase had been measured yet."
    assert outcome(ours["test_one|test_fails"]) == [Failure]
    never = [case.result[0] for name, case in ours.items() if name.split("|")[1] in {"test_skips", "test_errors"}]
    assert [type(result) for result in never] == [Skipped, Skipped]
    assert {result.message for result in never} == {"did not run: the run was killed before"}
    assert recovered.outcomes == {"passed": 2, "failure": 1, "error": 1, "skipped": 3}


def test_a_run_killed_between_two_tests_was_running_the_next(killed: Path) -> None:
    keep_lines(killed, lines_until(killed, "test_fails", "teardown"))
    assert recover(killed).running == "test_one.py::test_fails_without_a_traceback"


def test_a_last_line_that_was_cut_off_is_passed_over(killed: Path) -> None:
    number = lines_until(killed, "test_fails", "teardown")
    half = (killed / "reportlog.jsonl").read_text().splitlines()[number - 1][:60]
    keep_lines(killed, number - 1, half)
    assert recover(killed).running == "test_one.py::test_fails"


def test_lines_of_unknown_kinds_are_passed_over(killed: Path, finished: Path) -> None:
    log = killed / "reportlog.jsonl"
    strange = ['{"$report_type": "OfTomorrow"}', '{"$report_type": "TestReport"}', "[1, 2]", "no json", "{}", "",
               f'{{"$report_type": "{COLLECTED}"}}']  # fmt: skip
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*strange, *lines[:4], *strange, *lines[4:], *strange]) + "\n")
    recovered = recover(killed)
    assert list(cases(recovered.junit)) == list(cases(finished / "junit.xml"))
    assert recovered.outcomes["passed"] == 2


def test_a_log_that_does_not_name_the_tests_tells_of_those_that_ran(killed: Path) -> None:
    log = killed / "reportlog.jsonl"
    lines = [line for line in log.read_text().splitlines(keepends=True) if COLLECTED not in line]
    log.write_text("".join(lines))
    keep_lines(killed, lines_until(killed, "test_fails", "setup"))
    recovered = recover(killed)
    assert recovered.running == "test_one.py::test_fails"
    assert recovered.outcomes == {"passed": 2, "error": 1}


def test_the_record_so_far_is_judged_and_its_last_phase_named(killed: Path) -> None:
    keep_lines(killed, lines_until(killed, "cycle0-device0-ledger]", "setup"))
    whole = good_record()
    first = whole.cycles[0]
    cut = whole.model_copy(update={"cycles": (first.model_copy(update={"phases": first.phases[:4]}),), "checks": ()})
    cut.save(killed / "record.json")
    recovered = recover(killed)
    error = cases(recovered.junit)["test_one.TestInAClass|test_passes[cycle0-device0-ledger]"].result[0]
    assert error.message.endswith("The last phase that was measured is kv_cache_dropped of cycle 0.")
    judged = Record.load(killed / "record.json")
    assert judged == recovered.record
    assert {v.verdict for v in judged.checks if v.id == "drop.frees_kv"} == {"pass"}
    assert {v.verdict for v in judged.checks} > {"pass"}
    page = (killed / "index.html").read_text(encoding="utf-8")
    assert "The run ended early. The last phase that was measured is kv_cache_dropped of cycle 0;" in page


def test_a_record_that_is_none_does_not_keep_the_junit_file_from_being_made(killed: Path) -> None:
    (killed / "record.json").write_text('{"schema": 1')
    done = CliRunner().invoke(app, ["report", "--recover", str(killed)])
    assert done.exit_code == 1
    assert "record.json is not JSON" in done.output
    assert "Recovered" in done.output
    assert len(cases(killed / "junit.xml")) == 7
    assert not (killed / "index.html").exists()


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (None, "There is nothing to recover from: {log} cannot be read (No such file or directory)."),
        ("", "There is nothing to recover: {log} names no test, so the run ended before any was collected."),
        ('{"pytest_version": "9.0", "$report_type": "SessionStart"}\n', "There is nothing to recover: {log} names no"),
    ],
)
def test_what_cannot_be_recovered_is_refused(tmp_path: Path, log: str | None, sentence: str) -> None:
    path = tmp_path / "reportlog.jsonl"
    if log is not None:
        path.write_text(log)
    with pytest.raises(RecoveryError) as refused:
        recover(tmp_path)
    assert str(refused.value).startswith(sentence.format(log=path))
    assert not (tmp_path / "junit.xml").exists()


def test_a_run_that_ended_by_itself_is_refused_and_its_file_left_alone(finished: Path) -> None:
    before = (finished / "junit.xml").read_bytes()
    done = CliRunner().invoke(app, ["report", "--recover", str(finished)])
    assert done.exit_code == 2
    assert "junit.xml is whole, the run wrote it when it ended." in done.output
    assert (finished / "junit.xml").read_bytes() == before


def test_a_junit_file_that_was_cut_off_is_made_anew(finished: Path, killed: Path) -> None:
    (killed / "junit.xml").write_bytes((finished / "junit.xml").read_bytes()[:-40])
    assert recover(killed).outcomes["passed"] == 2


def test_without_a_folder_the_newest_run_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", "--recover"])
    assert done.exit_code == 2
    assert "There is nothing to recover: there is no folder reports/latest." in done.output
    neither = CliRunner().invoke(app, ["report"])
    assert neither.exit_code == 2
    assert "Name the record.json to judge, or --recover [RUN_DIR] for a run that was killed." in neither.output
