"""What a run leaves for machines and for CI pages: the JUnit file as viewers read it, and the summary."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.unit.records import BORROWED, edit_cycle, edit_phase, good_record, shift
from tests.unit.suites import RunSuite, reports, suite_on

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("config_cache")

GOOD = good_record()
RED = shift(GOOD, BORROWED, 1)
LATE = "def test_of_another_kind(record):\n    raise RuntimeError('the engine died & <left>')\n"


@pytest.fixture
def run(pytester: pytest.Pytester, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> RunSuite:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return suite_on(pytester, pytestconfig.rootpath / "tests" / "tpu")


def junit(pytester: pytest.Pytester) -> ET.Element:
    (suite,) = ET.parse(reports(pytester) / "junit.xml").getroot()
    return suite


def failures(pytester: pytest.Pytester) -> dict[str, ET.Element]:
    cases = junit(pytester).iter("testcase")
    return {case.attrib["name"]: failure for case in cases if (failure := case.find("failure")) is not None}


def test_a_failures_message_is_one_line_with_the_numbers(run: RunSuite, pytester: pytest.Pytester) -> None:
    assert run(RED).ret == 1
    (name, failure), = failures(pytester).items()  # fmt: skip
    assert name == "test_drop_frees_the_kv_cache[cycle0-device1-ledger]"
    assert failure.attrib["message"] == (
        "fail [simulated-on-cpu] drop.frees_kv cycle0-device1-ledger: "
        "measured -33,556,479, expected -33,556,480 bytes, off by +1"
    )


def test_a_failures_text_has_the_sentence_the_numbers_the_causes_and_where_to_read_on(
    run: RunSuite, pytester: pytest.Pytester
) -> None:
    run(RED)
    (failure,) = failures(pytester).values()
    lines = (failure.text or "").splitlines()
    assert lines[0] == "fail [simulated-on-cpu] drop.frees_kv cycle0-device1-ledger"
    assert lines[1].startswith("kv_cache_dropped, cycle0-device1, ledger: bytes in use changed by -32.00 MiB (-33,")
    assert lines[2:7] == [
        "",
        "  expected    -33,556,480 bytes",
        "  measured    -33,556,479 bytes",
        "  difference           +1 bytes",
        "  evidence    simulated-on-cpu",
    ]
    assert [line[:10] for line in lines[7:]] == ["  likely: "] * 3 + ["  what to "]
    assert lines[-1] == "  what to do: docs/checks.md, drop.frees_kv"


def test_a_verdict_without_numbers_speaks_in_its_own_words(run: RunSuite, pytester: pytest.Pytester) -> None:
    run(edit_phase(GOOD, "kv_cache_dropped", lambda phase: phase.model_copy(update={"info": None})))
    failure = failures(pytester)["test_drop_deletes_every_buffer[cycle0]"]
    head = "inconclusive [simulated-on-cpu] drop.deletes_every_buffer cycle0"
    assert failure.attrib["message"] == f"{head}: cycle0: the drop was not recorded."
    assert (failure.text or "").splitlines() == [
        head,
        "cycle0: the drop was not recorded.",
        "",
        "  evidence    simulated-on-cpu",
        "  what to do: docs/checks.md, drop.deletes_every_buffer",
    ]


def test_where_viewers_look_is_the_tests_own_line_and_its_own_time(run: RunSuite, pytester: pytest.Pytester) -> None:
    run(GOOD)
    case = next(junit(pytester).iter("testcase"))
    assert case.attrib["classname"] == "tests.tpu.test_01_drop"
    assert case.attrib["file"] == "tests/tpu/test_01_drop.py"
    source = (pytester.path / case.attrib["file"]).read_text().splitlines()
    assert source[int(case.attrib["line"]) - 1].startswith('@pytest.mark.check("drop.frees_kv"')
    # Its setup made the record, and judged it: that is not the check's time.
    assert float(case.attrib["time"]) < float(junit(pytester).attrib["time"]) / 10


def test_the_suites_properties_say_what_was_run_and_how_it_ended(run: RunSuite, pytester: pytest.Pytester) -> None:
    run(RED)
    suite = junit(pytester)
    assert suite.attrib["name"] == "kvcycle"
    (group,) = suite.findall("properties")
    told = {entry.attrib["name"].removeprefix("kvcycle."): entry.attrib["value"] for entry in group}
    expected = {
        "profile": "tiny",
        "platform": "cpu",
        "evidence": "simulated-on-cpu",
        "verdict": "failed",
        "verdicts": "98 pass, 1 fail",
        "devices": "4 cpu",
        "cycles": "2",
        "kv_bytes": "134225920",
        "params_bytes": "22106112",
        "boot_s": "7.000",
    }
    assert {name: told.get(name) for name in expected} == expected
    assert told.keys() >= {"jax", "sglang_jax", "kvcycle", "python"}


def test_the_summary_is_in_the_runs_folder_and_on_the_ci_page(
    run: RunSuite, pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "step.md"
    page.write_text("what an earlier step said\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    done = run(GOOD)
    assert done.ret == 0
    summary = (reports(pytester) / "summary.md").read_text()
    assert summary.startswith("## ✅ PASSED \\[simulated-on-cpu\\] tiny on 4 cpu devices, sglang-jax 0.1.0rc0, ")
    assert page.read_text() == f"what an earlier step said\n{summary}\n"
    assert "warning" not in done.stdout.str()


@pytest.mark.parametrize("name", ["no/such/folder/step.md", "."])
def test_a_page_that_cannot_be_written_is_a_line_and_no_lost_run(
    name: str, run: RunSuite, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", name)
    done = run(GOOD)
    assert done.ret == 0
    assert f"warning: The summary could not be appended to {name} (GITHUB_STEP_SUMMARY): " in done.stdout.str()
    assert (reports(pytester) / "summary.md").is_file()


def test_a_folder_that_cannot_be_written_is_a_line_and_no_lost_run(
    run: RunSuite, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvcycle.report.files.write", full)
    done = run(GOOD)
    assert done.ret == 0
    assert "warning: The report's files could not be written: [Errno 28] No space left on device." in done.stdout.str()


def test_a_test_that_is_no_check_makes_the_summary_red(run: RunSuite, pytester: pytest.Pytester) -> None:
    assert run(GOOD, more=LATE).ret == 1
    summary = (reports(pytester) / "summary.md").read_text()
    assert summary.startswith("## ❌ FAILED \\[simulated-on-cpu\\] tiny on 4 cpu devices, ")
    assert summary.splitlines()[0].endswith(": 99 pass; 1 test failed beside the checks")
    assert (
        "- **failed** <code>tests/tpu/test_99_more.py::test_of_another_kind</code>: "
        "RuntimeError: the engine died &amp; &lt;left&gt;" in summary
    )


def test_a_check_that_failed_is_told_once(run: RunSuite, pytester: pytest.Pytester) -> None:
    run(RED)
    summary = (reports(pytester) / "summary.md").read_text()
    assert summary.count("- **") == 1
    assert "beside the checks" not in summary


def test_a_run_that_measured_nothing_says_why(run: RunSuite, pytester: pytest.Pytester) -> None:
    nothing = GOOD.model_copy(update={"cycles": ()})
    assert run(nothing, error="The engine did not boot. Its last words: <none>").ret == 1
    assert (reports(pytester) / "summary.md").read_text() == (
        "## kvcycle: FAILED\n\nThe engine did not boot. Its last words: &lt;none&gt;\n"
    )


def test_a_run_that_ended_early_is_judged_as_far_as_it_came(run: RunSuite, pytester: pytest.Pytester) -> None:
    begun = edit_cycle(good_record(cycles=1), 0, phases=GOOD.cycles[0].phases[:4])
    done = run(begun, error="A step did not end.")
    assert done.ret == 1
    summary = (reports(pytester) / "summary.md").read_text()
    assert "<code>kv_cache_dropped</code> | -128.01 MiB (-134,225,920 B) | -128.01 MiB" in summary
    assert "A step did not end." in summary
    assert "What was measured before the run ended is in reports/" in done.stdout.str()
