"""The benchmarks at tiny sizes: every kind of scenario runs, and what is counted in them is right."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.rebuild import SPARE_ROUNDS
from benchmarks.results import Report
from benchmarks.sizes import SIZES

Guarded = Callable[..., subprocess.CompletedProcess[str]]

_NAMES = ("rebuild-mapped", "snapshots", "curves", "overhead")


def test_every_kind_of_scenario_runs(guarded: Guarded, tmp_path: Path) -> None:
    only = [argument for name in _NAMES for argument in ("--only", name)]
    ended = guarded("-m", "benchmarks", "--scale", "small", "--report-dir", str(tmp_path), *only)
    # So few rounds resolve nothing, and the command must not call it a pass.
    assert ended.returncode == 3, ended.stdout
    assert "not resolved" in ended.stdout
    report = Report.model_validate_json((tmp_path / "latest" / "bench.json").read_text(encoding="utf-8"))
    assert report.evidence == "simulated-on-cpu"
    assert tuple(scenario.name for scenario in report.scenarios) == _NAMES
    figures = {figure.name: figure for scenario in report.scenarios for figure in scenario.figures}
    sizes = SIZES["small"]
    # The engine's first rebuild, those that do not count, and the rounds.
    rebuilds = figures["compilations in a rebuild"].rounds
    assert set(rebuilds) == {0}
    assert 2 + sizes.rounds["mapped"] <= len(rebuilds) <= 2 + 2 * SPARE_ROUNDS + sizes.rounds["mapped"]
    assert figures["pages mapped anew by a rebuild"].rounds[-1] < 10
    assert figures["the same counter, fresh jits"].rounds == (sizes.layers,)
    overhead = report.scenarios[-1]
    # generate_once(), the request's wrapper, and for each token one batch whose arrays are copied.
    assert figures["guards: calls in one generation"].rounds[0] >= 2 + 2 * sizes.new_tokens
    own, generations = figures["guards: their own time in it"].rounds, figures["generate, engine as it was"].rounds
    shares = figures["generation + guards' own time ÷ generation"].rounds
    assert min(own) > 0
    assert shares == pytest.approx([1 + mine / whole for mine, whole in zip(own, generations, strict=True)])
    assert [figure.name for figure in overhead.figures if figure.target] == [
        "generation + guards' own time ÷ generation"
    ]
    assert all(len(point.rounds_s) >= 2 for scenario in report.scenarios for c in scenario.curves for point in c.points)
