"""The table of what was run: whole, and quoted by the documentation as it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcycle import checkpoint, compatibility
from kvcycle.cli import app
from kvcycle.compatibility import DP_SIZES, DTYPES, ENGINE_RUNS, GEOMETRIES, PAGE_SIZES, POOLS, TP_SIZES, EngineRun
from kvcycle.profile_file import load_profile
from kvcycle.sizing import predict_kv


def test_every_value_of_every_axis_is_there_and_runs_in_an_engine() -> None:
    assert len(GEOMETRIES) == len(PAGE_SIZES) * len(DTYPES) * (len(TP_SIZES) * len(DP_SIZES) - 1)  # not tp 1 with dp 2
    for axis, values in {
        "page_size": (1, 16, 128), "tp_size": (1, 2, 4, 8), "dp_size": (1, 2), "dtype": ("bfloat16", "float32"),
    }.items():  # fmt: skip
        assert {getattr(geometry, axis) for geometry in GEOMETRIES} == set(values)
        assert {getattr(run.geometry, axis) for run in ENGINE_RUNS} == set(values)
    assert {bool(run.engine.get("disable_overlap_schedule")) for run in ENGINE_RUNS if run.generate} == {True, False}
    assert {bool(run.engine.get("disable_radix_cache")) for run in ENGINE_RUNS if run.generate} == {True, False}


def test_every_model_that_generates_does_and_every_checkpoint_is_run() -> None:
    whole = {run.model for run in ENGINE_RUNS if run.generate}
    assert whole == {"tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe", "tiny-llama"}
    assert {run.model for run in ENGINE_RUNS} >= set(checkpoint.BUILTIN)


def test_ids_are_single_and_every_run_is_of_a_known_pool() -> None:
    assert len({run.id for run in ENGINE_RUNS}) == len(ENGINE_RUNS)
    assert len({cell.id for cell in compatibility.pool_cells()}) == len(POOLS) * len(GEOMETRIES)
    assert {run.pool for run in ENGINE_RUNS} | {pool.id for pool in POOLS if pool.unbooted} == {p.id for p in POOLS}
    assert not {run.pool for run in ENGINE_RUNS} & {pool.id for pool in POOLS if pool.unbooted}


@pytest.mark.parametrize("run", ENGINE_RUNS, ids=lambda run: run.id)
def test_a_run_is_a_profile_whose_size_is_predicted_where_the_table_says_so(run: EngineRun) -> None:
    profile = load_profile("tiny", run.overrides())
    assert profile.engine.tp_size == run.geometry.tp_size
    predicted = predict_kv(run.config, profile.engine_args("cpu"))
    (pool,) = [pool for pool in POOLS if pool.id == run.pool]
    assert (predicted is not None) is pool.predicted


def test_the_documentation_quotes_what_the_command_prints(pytestconfig: pytest.Config) -> None:
    printed = CliRunner().invoke(app, ["matrix"])
    assert printed.exit_code == 0
    text = Path(pytestconfig.rootpath, "docs", "compatibility.md").read_text(encoding="utf-8")
    assert text.count("<!-- kvcycle matrix -->") == text.count("<!-- end of kvcycle matrix -->") == 1
    quoted = text.partition("<!-- kvcycle matrix -->\n\n")[2].partition("\n<!-- end of kvcycle matrix -->")[0]
    assert quoted == printed.stdout, "run `kvcycle matrix` and put what it prints between the markers"
