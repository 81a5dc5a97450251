"""The benchmarks' report on planted results: outcomes, table, page, exit codes, and what it refuses."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import benchmarks.__main__ as command
from benchmarks import chart, measure, pages, table
from benchmarks.one import SCENARIOS
from benchmarks.results import QUIET, Curve, Figure, Point, Report, Scenario, Target
from benchmarks.sizes import SIZES
from benchmarks.stats import Outcome
from kvcycle.errors import KVCycleError


def scenario(*rounds: float, name: str = "rebuild-default", others_share: float = 0.0) -> Scenario:
    """A scenario whose one ratio, at most 1.5, has these rounds."""
    ratio = Figure(name="rebuild ÷ the limit", unit="x", rounds=rounds, target=Target(sense="at most", limit=1.5))
    points = tuple(Point(x=x, rounds_s=(x / 1000,) * 5) for x in (1, 2, 4))
    return Scenario(
        name=name,
        title="default malloc: 36 layers",
        figures=(ratio, Figure(name="rebuild", unit="ms", rounds=(12_345.6, 220.5, 230))),
        curves=(Curve(name="4 devices", x_name="MiB", points=points),),
        seconds=1.0,
        others_share=others_share,
    )


def report(*scenarios: Scenario) -> Report:
    return Report(
        schema=1,
        evidence="simulated-on-cpu",
        created="2026-01-01T00:00:00Z",
        stack={"sglang_jax": "0.1.0rc0", "jax": "0.10.2"},
        cores=2,
        memory_bytes=24 * 2**30,
        scenarios=scenarios,
    )


MET, MISSED, STRADDLING = (1.1,) * 4 + (1.2,), (1.9,) * 4 + (1.8,), (1.1, 1.2, 1.4, 1.6, 1.9)


def shown(found: Report, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    table.show(found, console)
    return console.export_text()


@pytest.mark.parametrize(
    ("rounds", "others", "expected"),
    [
        (MET, 0.0, "met"),
        (MISSED, 0.0, "missed"),
        (STRADDLING, 0.0, "not resolved"),
        (MET[:3], 0.0, "not resolved"),
        (MET, QUIET, "met"),
        (MET, QUIET + 0.01, "not resolved"),
        (MISSED, QUIET + 0.01, "not resolved"),
    ],
)
def test_a_noisy_run_is_no_result(rounds: tuple[float, ...], others: float, expected: Outcome) -> None:
    assert report(scenario(*rounds, others_share=others)).outcomes() == [expected]
    text = shown(report(scenario(*rounds, others_share=others)))
    assert f"1 {expected}" in text
    assert ("NOT A RESULT: others took 6% of the cores meanwhile (limit 5%)." in text) == (others > QUIET)


def test_rounds_that_are_not_of_their_state_are_no_result() -> None:
    found = report(scenario(*MET).model_copy(update={"disturbed": "3 rounds mapped pages"}))
    assert found.outcomes() == ["not resolved"]
    assert "NOT A RESULT: 3 rounds mapped pages." in shown(found)


@pytest.mark.parametrize(
    ("rounds", "best", "expected"),
    [
        (MISSED, (2.0,) * 8, "out of reach"),
        (STRADDLING, (2.0,) * 8, "out of reach"),
        (MISSED, (1.0,) * 8, "missed"),
        (MISSED, (1.0,) * 4 + (2.0,) * 4, "missed"),  # whether the best would do is not resolved
        (MISSED, (2.0,) * 3, "missed"),  # too few rounds to say so
        (MISSED, (), "missed"),
        (MET, (2.0,) * 8, "met"),
    ],
)
def test_a_target_that_the_machine_itself_misses_is_out_of_reach(
    rounds: tuple[float, ...], best: tuple[float, ...], expected: Outcome
) -> None:
    figure = Figure(name="x", unit="x", rounds=rounds, target=Target(sense="at most", limit=1.5, best=best))
    assert figure.outcome() == expected
    found = report(scenario(*MET).model_copy(update={"figures": (figure,)}))
    assert ("all cores together could not do it" in table.summary(found)) == (expected == "out of reach")


def test_one_compilation_in_one_round_misses_however_noisy_the_run_was() -> None:
    none = Figure(name="compilations", unit="compilations", rounds=(0,) * 9, target=Target(sense="at most", limit=0))
    assert none.outcome(is_result=False) == "met"
    assert none.model_copy(update={"rounds": (0,) * 8 + (1,)}).outcome() == "missed"
    assert none.model_copy(update={"target": None}).outcome() is None


@pytest.mark.parametrize("width", [80, 110])
def test_the_table_has_every_number_whole(width: int) -> None:
    text = shown(report(scenario(*STRADDLING)), width)
    for part in (
        "1.4 x",
        "1.1 – 1.9",
        "≤ 1.5",
        "not resolved",
        "230 ms",
        "220 – 12,346",
        "MiB^1.00 ± 0.00",
        "1 in 1 ms",
    ):
        assert part in text
    assert "simulated-on-cpu" in text
    assert "default malloc: 36 layers  (1 s)" in text
    assert "Measured in 1 s" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_a_ratio_beside_its_limit_is_not_rounded_to_one() -> None:
    assert [table.number(value) for value in (1, 1.0014, 0.9977, 1.0099, 1.01, 1.25)] == [
        "1", "1.0014", "0.9977", "1.0099", "1.01", "1.25",
    ]  # fmt: skip


def test_a_report_survives_its_json() -> None:
    found = report(scenario(*MET), scenario(*MISSED, name="curves"))
    text = found.model_dump_json(by_alias=True)
    assert json.loads(text)["schema"] == 1
    assert Report.model_validate_json(text) == found


def test_the_page_tells_what_is_out_of_reach_from_what_is_missed(tmp_path: Path) -> None:
    target = Target(sense="at most", limit=1.5, best=(2.0,) * 8)
    figure = Figure(name="x", unit="x", rounds=MISSED, target=target)
    chart.write(report(scenario(*MET).model_copy(update={"figures": (figure,)})), tmp_path / "bench.html")
    page = (tmp_path / "bench.html").read_text(encoding="utf-8")
    assert '"name":"out of reach"' in page
    assert '"name":"missed"' not in page


def test_the_page_has_the_ratios_the_targets_and_needs_no_network(tmp_path: Path) -> None:
    chart.write(report(scenario(*MET), scenario(*MISSED, name="b")), tmp_path / "bench.html")
    page = (tmp_path / "bench.html").read_text(encoding="utf-8")
    for part in ("simulated-on-cpu", "1 met, 1 missed", "at most 1.5", "MiB^1.00"):
        assert part in page
    assert "<script src=" not in page
    assert page.count("Plotly.newPlot") == 2


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    """Let every scenario find this."""

    def plant(found: Scenario) -> None:
        monkeypatch.setattr(command, "_run", lambda *_: found)

    monkeypatch.setattr(command, "_check_memory", lambda _scale: None)
    return plant


@pytest.mark.parametrize(("rounds", "code"), [(MET, 0), (MISSED, command.MISSED), (STRADDLING, command.NOT_RESOLVED)])
def test_the_exit_code_tells_missed_from_not_resolved(
    planted: Callable[[Scenario], None], tmp_path: Path, rounds: tuple[float, ...], code: int
) -> None:
    planted(scenario(*rounds))
    ended = CliRunner().invoke(command.app, ["--only", "curves", "--report-dir", str(tmp_path)])
    assert ended.exit_code == code, ended.output
    kept = Report.model_validate_json((tmp_path / "latest" / "bench.json").read_text(encoding="utf-8"))
    assert kept.scenarios[0].figures[0].rounds == rounds
    assert (tmp_path / "latest" / "bench.html").is_file()


def test_an_unknown_scenario_and_too_little_memory_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = CliRunner().invoke(command.app, ["--only", "curve", "--report-dir", str(tmp_path)])
    assert (ended.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "There is no scenario 'curve'; there are: rebuild-default, " in ended.output
    monkeypatch.setattr(command, "_LEAST_MEMORY_BYTES", 2**60)
    ended = CliRunner().invoke(command.app, ["--report-dir", str(tmp_path)])
    assert ended.exit_code == 2
    assert "need 1,152,921,504,606,846,976 bytes of free memory, and " in ended.output


def test_a_whole_run_has_every_scenario_but_the_one_that_nobody_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[str] = []

    def note(name: str, *_: object) -> Scenario:
        ran.append(name)
        return scenario(*MET, name=name)

    monkeypatch.setattr(command, "_run", note)
    monkeypatch.setattr(command, "_check_memory", lambda _scale: None)
    assert CliRunner().invoke(command.app, ["--report-dir", str(tmp_path)]).exit_code == 0
    assert ran == [name for name in SCENARIOS if name != "rebuild-huge"]
    assert CliRunner().invoke(command.app, ["--only", "rebuild-huge", "--report-dir", str(tmp_path)]).exit_code == 0
    assert ran[len(SCENARIOS) - 1 :] == ["rebuild-huge"]
    words = CliRunner().invoke(command.app, ["--help"]).output.replace("│", " ").split()
    assert "Only when named: rebuild-huge" in " ".join(words)


def test_a_scenario_that_fails_is_told_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENARIOS, "broken", (lambda _: scenario(1.0), "default"))  # the new process does not know it
    ended = CliRunner().invoke(command.app, ["--scale", "small", "--only", "broken", "--report-dir", str(tmp_path)])
    assert ended.exit_code == 2
    assert "The scenario broken ended with exit code 1. Its last words, of " in ended.output
    assert "KeyError: 'broken'" in ended.output


def test_one_scenario_that_fails_takes_nothing_from_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, *_: object) -> Scenario:
        if name == "curves":
            raise KVCycleError("The scenario curves ended with exit code 1.")
        return scenario(*MISSED, name=name)

    monkeypatch.setattr(command, "_run", run)
    monkeypatch.setattr(command, "_check_memory", lambda _scale: None)
    only = ["--only", "snapshots", "--only", "curves", "--only", "overhead"]
    ended = CliRunner().invoke(command.app, [*only, "--report-dir", str(tmp_path)])
    assert ended.exit_code == 2
    assert "2 missed" in ended.output
    assert ended.output.rstrip().endswith("The scenario curves ended with exit code 1.")
    kept = Report.model_validate_json((tmp_path / "latest" / "bench.json").read_text(encoding="utf-8"))
    assert [found.name for found in kept.scenarios] == ["snapshots", "overhead"]


def test_a_scenario_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_LIMIT_S", 0.01)
    with pytest.raises(KVCycleError, match=r"curves did not end within 0\.01 s; its log is .*curves\.log\."):
        command._run("curves", "small", tmp_path)


def test_an_interrupted_run_leaves_nothing_that_measures_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    class Process(contextlib.AbstractContextManager["Process"]):
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            ended.append("awaited")

        def wait(self, _timeout: float) -> int:
            raise KeyboardInterrupt

        def terminate(self) -> None:
            ended.append("terminated")

    monkeypatch.setattr(subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        command._run("curves", "small", tmp_path)
    assert ended == ["terminated", "awaited"]


# Measuring ------------------------------------------------------------------------------------------------------------


def test_every_other_round_runs_in_the_opposite_order() -> None:
    ran: list[str] = []

    def way(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            ran.append(name)
            return seconds

        return run

    found = measure.in_turn({"a": way("a", 1.0), "b": way("b", 2.0)}, 3)
    assert ran == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_a_round_that_does_not_count_is_taken_again_while_there_are_spare_ones() -> None:
    took = iter(range(10))
    verdicts = iter([True, False, False, False, True])
    left_out: list[bool] = []
    found = measure.in_turn(
        {"a": lambda: float(next(took))}, 3,
        counts=lambda: next(verdicts), spare=2, left_out=lambda: left_out.append(True),
    )  # fmt: skip
    assert found == {"a": [0.0, 3.0, 4.0]}, "the third that does not count finds no spare one"
    assert left_out == [True] * 2


def test_a_point_gets_its_rounds_spread_over_the_whole() -> None:
    taken = list(measure.turns({"often": 30, "now and then": 5, "seldom": 3}))
    assert [taken.count(point) for point in ("often", "now and then", "seldom")] == [30, 5, 3]
    rounds = [taken[: place + 1].count("often") - 1 for place, point in enumerate(taken) if point == "seldom"]
    assert rounds == [0, 10, 20]
    assert list(measure.turns({"a": 2, "b": 2})) == ["a", "b"] * 2


def test_the_load_of_others_is_the_machines_less_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    clocks = iter([(100.0, 50.0, 7.0), (110.0, 50.0 + 6.0 + cores, 13.0)])
    monkeypatch.setattr(measure, "_clocks", lambda: next(clocks))
    with measure.load() as busy:
        pass
    assert (busy.seconds, busy.others_share) == (10.0, pytest.approx(0.1))


def test_ones_own_work_is_told_from_the_machines() -> None:
    _, busy_before, own_before = measure._clocks()
    until = time.process_time() + 0.3
    took = measure.seconds_of(lambda: [None for _ in iter(lambda: time.process_time() < until, False)])
    _, busy, own = measure._clocks()
    assert took >= 0.29
    # Clocks that tick a hundred times a second.
    assert own - own_before >= 0.28
    assert busy - busy_before >= own - own_before - 0.05


@pytest.mark.parametrize(
    "fill",
    [
        pages.Region.fill,
        pages.Region.fill_by_every_core,
        pages.Region.memset,
        pages.Region.memset_by_every_core,
    ],
)
def test_the_limit_writes_every_byte(fill: Callable[[pages.Region], None]) -> None:
    region = pages.Region(3 * 4096, buffers=5)
    assert region._elements is not None
    region._elements.fill(0xFFFF)
    fill(region)
    assert not np.any(region._elements)
    region.unmap()
    with pytest.raises(ValueError, match="closed"):
        region._map.size()


def test_every_buffer_is_a_memset_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for all of them at once may use other stores, which a rebuild of separate buffers could not."""
    sizes: list[int] = []
    monkeypatch.setattr(ctypes, "memset", lambda _address, _value, size: sizes.append(size))
    region = pages.Region(4 * 4096, buffers=4)
    region.memset_by_every_core()
    region.unmap()
    assert sizes == [4096] * 4


def test_the_whole_benchmark_measures_the_geometry_of_the_yardsticks() -> None:
    full, small = SIZES["full"], SIZES["small"]
    assert full.layers * (full.tokens + 1) * 4 * 2 * 128 * 2 == 2_415_992_832
    assert {*full.rounds} == {*full.sessions} == {*pages.ENVIRONMENT} == {*small.rounds}
    assert all(full.rounds[state] * full.sessions[state] >= 5 for state in pages.ENVIRONMENT), "or nothing resolves"
    assert (min(full.kv_bytes), max(full.kv_bytes)) == (64 * 2**20, 4 * 2**30)
    assert min(full.snapshot_rounds, full.sessions["default"]) >= 5
