"""``kvcycle report``: records judged and drawn again, one or several, and a figure over many."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvcycle.cli import app
from kvcycle.record import Record
from kvcycle.report import history
from tests.unit.records import BORROWED, edit_generates, good_record, shift

GOOD = good_record()
RED = shift(GOOD, BORROWED, 1)
TPU = good_record(allocator=True)


def report(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def run_at(record: Record, folder: Path, created: str = GOOD.created) -> Path:
    record.model_copy(update={"created": created}).save(folder / "record.json")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder as the suite leaves it: three runs, the newest with a link, and one that died before it had a record."""
    folder = tmp_path / "reports"
    run_at(GOOD, folder / "first", "2026-11-01T00:00:00Z")
    run_at(edit_generates(RED, "after_rebuild", seconds=5.2), folder / "a-later-one", "2026-11-03T00:00:00Z")
    run_at(TPU, folder / "second", "2026-11-02T00:00:00Z")
    (folder / "died").mkdir()
    (folder / "latest").symlink_to("a-later-one")
    return folder


# One and several -----------------------------------------------------------------------------------------------------


def test_a_record_is_judged_again_whatever_it_says_itself(tmp_path: Path) -> None:
    assert report(run_at(GOOD, tmp_path / "good")).exit_code == 0
    done = report(run_at(RED, tmp_path / "red"))
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("FAILED [simulated-on-cpu] tiny on 4 cpu devices")


def test_several_are_told_apart_and_one_that_fails_decides(tmp_path: Path) -> None:
    good, red = run_at(GOOD, tmp_path / "good"), run_at(RED, tmp_path / "red")
    done = report(good / "record.json", red)
    assert done.exit_code == 1
    assert done.output.index(str(good / "record.json")) < done.output.index("PASSED [") < done.output.index(str(red))
    assert report(good, good).exit_code == 0


def test_one_that_is_no_record_is_refused_before_anything_is_printed(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    done = report(run_at(GOOD, tmp_path / "good"), tmp_path / "none.json")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "has no record schema" in done.stderr


def test_the_files_of_one_record_are_written_where_output_says(tmp_path: Path) -> None:
    done = report(run_at(RED, tmp_path / "red"), "--output", tmp_path / "made" / "here")
    assert done.exit_code == 1
    summary = tmp_path / "made" / "here" / "summary.md"
    assert summary.read_text().startswith("## ❌ FAILED \\[simulated-on-cpu\\] tiny")
    assert f"wrote {summary}" in done.output


def test_of_several_records_each_has_a_folder_of_its_own(tmp_path: Path) -> None:
    one, two = run_at(GOOD, tmp_path / "a" / "run"), run_at(RED, tmp_path / "b" / "run")
    shutil.copy(one / "record.json", tmp_path / "plain.json")
    report(one, two, tmp_path / "plain.json", "-o", tmp_path / "out")
    words = {path.parent.name: path.read_text().split()[2] for path in (tmp_path / "out").glob("*/summary.md")}
    assert words == {"run": "PASSED", "run-2": "FAILED", "plain": "PASSED"}


def test_an_output_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = report(run_at(GOOD, tmp_path / "good"), "-o", tmp_path / "file")
    assert done.exit_code == 2
    assert f"The report cannot be written to {tmp_path / 'file'}: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Name the record.json to judge, or --recover [RUN_DIR] for a run that was killed. With --history"),
        (["x.json", "--figure", "warm_s"], "--figure is drawn over many records: give --history as well."),
        (["--recover", "--history"], "--recover takes one run's folder and no other option."),
        (["--recover", "a", "b"], "--recover takes one run's folder and no other option."),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: list[str], sentence: str) -> None:
    done = report(*arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr


# A figure over many --------------------------------------------------------------------------------------------------


def rows(output: str) -> list[list[str]]:
    """The rows of the tables: name, versions, verdict, value, bar."""
    return [cells for line in output.splitlines() if {"PASSED", "FAILED"} & set(cells := line.split())]


def test_a_folder_stands_for_its_runs_each_once_oldest_first(runs: Path) -> None:
    done = report("--history", runs)
    assert done.exit_code == 0
    assert [(row[0], row[3], row[4]) for row in rows(done.output)] == [
        ("first", "PASSED", "1.077"),
        ("a-later-one", "FAILED", "2"),
        ("second", "PASSED", "1.077"),
    ]
    assert "after_rebuild_of_warm: slowest generation after the rebuild, as a multiple of the warm" in done.output


def test_what_was_measured_and_what_was_simulated_are_no_one_curve(runs: Path) -> None:
    lines = report("--history", runs).output.splitlines()
    titles = [line.rstrip() for line in lines if line.startswith("[")]
    assert titles == ["[simulated-on-cpu] tiny on 4 cpu devices", "[measured-on-tpu] tiny on 4 TPU v4 devices"]
    assert " from the first to the last: ▁█  1.077 to 2" in lines
    assert sum("from the first" in line for line in lines) == 1


def test_figures_are_exact_and_bars_are_of_the_highest(runs: Path) -> None:
    done = report("--history", runs, "--figure", "freed_bytes", "--figure", "not_passed")
    found = [row[4] for row in rows(done.output)]
    assert found == ["134,225,920", "134,225,919", "134,225,920", "0", "1", "0"]
    bars = {row[0]: row[5] for row in rows(report("--history", runs).output)}
    assert (len(bars["a-later-one"]), len(bars["first"])) == (16, 9)


@pytest.mark.parametrize("name", history.FIGURES)
def test_every_figure_is_read_from_a_whole_record_and_missing_from_an_empty_one(name: str) -> None:
    chosen = history.figure(name)
    assert chosen.of(GOOD) is not None
    empty = GOOD.model_copy(update={"cycles": (), "generates": (), "boot": None})
    assert (chosen.of(empty) is None) == (name != "not_passed")


def test_figures_have_the_values_they_name() -> None:
    values = {name: figure.of(GOOD) for name, figure in history.FIGURES.items()}
    assert values["warm_s"] == 2.6
    assert values["cold_of_warm"] == pytest.approx(17.0 / 2.6)
    assert values["after_rebuild_s"] == 2.8
    assert values["boot_s"] == 7.0
    assert values["drop_s"] == values["rebuild_s"] == 0.25
    assert values["second_set_bytes"] == 22_106_112
    assert values["peak_bytes"] == 178_438_560
    assert values["other_bytes"] == 416
    assert values["compilations"] == 0


def test_an_unknown_figure_is_refused_with_the_nearest(runs: Path) -> None:
    done = report("--history", runs, "--figure", "freed_byte")
    assert done.exit_code == 2
    assert "There is no figure 'freed_byte' (did you mean 'freed_bytes'?); there are: after_rebuild_of_w" in done.stderr


def test_a_broken_file_in_a_folder_is_passed_over_and_a_named_one_refused(runs: Path) -> None:
    (runs / "died" / "record.json").write_text('{"schema"')
    done = report("--history", runs)
    assert done.exit_code == 0
    assert f"passed over: {runs / 'died' / 'record.json'} is not JSON" in done.output
    assert len(rows(done.output)) == 3
    named = report("--history", runs / "died" / "record.json")
    assert named.exit_code == 2


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    done = report("--history", tmp_path)
    assert done.exit_code == 2
    assert f"There is no record in {tmp_path}: name records, or a folder whose runs have one." in done.stderr


def test_records_may_lie_in_a_folder_as_files(tmp_path: Path) -> None:
    for name in ("v4.json", "v5e.json"):
        TPU.save(tmp_path / name)
    assert [row[0] for row in rows(report("--history", tmp_path).output)] == ["v4.json", "v5e.json"]


def test_the_page_has_the_figures_and_no_record_can_put_a_tag_into_it(runs: Path, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    hostile = GOOD.model_copy(update={"profile": GOOD.profile | {"name": name}})
    run_at(hostile, runs / '"><b>bold<', created="</script><script>alert(2)")
    done = report("--history", runs, "--figure", "cold_s", "-o", tmp_path / "out")
    assert done.exit_code == 0
    page = (tmp_path / "out" / "history.html").read_text()
    assert '<td class="number">17</td>' in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") == 3  # above its curve, of the drawing, in the table
    tags = set(re.findall(r"<([a-z0-9]+)", page))
    assert not tags & {"img", "b", "script"}
    assert "http" not in page


def test_the_pages_curve_goes_from_nothing_to_the_highest(runs: Path, tmp_path: Path) -> None:
    report("--history", runs, "-o", tmp_path)
    page = (tmp_path / "history.html").read_text()
    dots = re.findall(r'cy="([0-9.]+)" r="5"( class="failed")?><title>([^<]+)</title>', page)
    assert [(said, bool(failed)) for _, failed, said in dots] == [
        ("first: 1.077, PASSED", False),
        ("a-later-one: 2, FAILED", True),
        ("second: 1.077, PASSED", False),
    ]
    first, later, _ = (float(y) for y, _, _ in dots)
    assert later == 16.0  # the upper line
    assert first == pytest.approx(174 - 158 * 1.077 / 2, abs=0.1)


def test_a_history_fits_a_terminal_of_80_columns(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = GOOD.stack.model_copy(update={"sglang_jax": "0.1.0rc0.post12", "jax": "0.10.2.dev20261123"})
    run_at(GOOD.model_copy(update={"stack": long}), runs / "2026-11-24T10-10-01Z")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    done = report("--history", runs, "--figure", "freed_bytes")
    assert [line for line in done.output.splitlines() if len(line.rstrip()) > 80] == []
    assert "134,225,920" in done.output


def test_the_docs_name_every_figure(pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "docs" / "compare.md").read_text()
    table = text[text.index("| figure |") :]
    assert [name for name in history.FIGURES if f"`{name}`" not in table] == []
