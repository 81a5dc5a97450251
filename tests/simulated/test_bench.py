"""The benchmarks at tiny sizes: every kind of scenario runs, and what is counted in them is right."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.one import WHOLE_RUN
from benchmarks.rebuild import SPARE_ROUNDS
from benchmarks.results import Report
from benchmarks.sizes import SIZES
from tests.unit.records import good_record

Guarded = Callable[..., subprocess.CompletedProcess[str]]


def test_every_kind_of_scenario_runs(guarded: Guarded, tmp_path: Path) -> None:
    only = [argument for name in WHOLE_RUN for argument in ("--only", name)]
    ended = guarded("-m", "benchmarks", "--scale", "small", "--report-dir", str(tmp_path), *only)
    # So few rounds resolve nothing, and the command must not call it a pass.
    assert ended.returncode == 3, ended.stdout
    assert "not resolved" in ended.stdout
    report = Report.model_validate_json((tmp_path / "latest" / "bench.json").read_text(encoding="utf-8"))
    assert report.evidence == "simulated-on-cpu"
    assert tuple(scenario.name for scenario in report.scenarios) == WHOLE_RUN
    by_scenario = {scenario.name: {figure.name: figure for figure in scenario.figures} for scenario in report.scenarios}
    figures = by_scenario["rebuild-mapped"] | by_scenario["overhead"]
    sizes = SIZES["small"]
    # The engine's first rebuild, those that do not count, and the rounds.
    rebuilds = figures["compilations in a rebuild"].rounds
    assert set(rebuilds) == {0}
    assert 2 + sizes.rounds["mapped"] <= len(rebuilds) <= 2 + 2 * SPARE_ROUNDS + sizes.rounds["mapped"]
    assert figures["pages mapped anew by a rebuild"].rounds[-1] < 10
    assert figures["the same counter, fresh jits"].rounds == (sizes.layers,)
    # generate_once(), the request's wrapper, and for each token one batch whose arrays are copied.
    assert figures["guards: calls in one generation"].rounds[0] >= 2 + 2 * sizes.new_tokens
    own, generations = figures["guards: their own time in it"].rounds, figures["generate, engine as it was"].rounds
    shares = figures["generation + guards' own time ÷ generation"].rounds
    assert min(own) > 0
    assert shares == pytest.approx([1 + mine / whole for mine, whole in zip(own, generations, strict=True)])
    targets = [figure.name for figure in by_scenario["overhead"].values() if figure.target]
    assert targets == ["generation + guards' own time ÷ generation"]
    default = by_scenario["rebuild-default"]
    assert set(default["compilations in a rebuild"].rounds) == {0}
    assert len(default["new engine, tiny weights ÷ rebuild"].rounds) == sizes.sessions["default"]
    assert len(default["fresh jit per layer ÷ rebuild"].rounds) == sizes.sessions["default"] * sizes.jit_rounds
    assert all(len(point.rounds_s) >= 2 for scenario in report.scenarios for c in scenario.curves for point in c.points)


def test_several_hosts_are_measured_with_spread(guarded: Guarded, tmp_path: Path) -> None:
    good_record().save(tmp_path / "record.json")
    ended = guarded("-m", "benchmarks.hosts", "--hosts", "2", str(tmp_path / "record.json"))
    assert ended.returncode == 0, ended.stdout
    assert re.search(r"^2 hosts: an agreement [\d.]+ ms \([\d.]+ – [\d.]+\)$", ended.stdout, re.MULTILINE), ended.stdout
    assert len(re.findall(r"bytes from each, a gather -?[\d.]+ ms \(", ended.stdout)) == 2
