"""The table of what was run: whole, and quoted by the documentation as it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcycle import checkpoint, compatibility, profile_file, versions
from kvcycle.cli import app
from kvcycle.compatibility import (
    DP_SIZES,
    DTYPES,
    ENGINE_RUNS,
    GEOMETRIES,
    PAGE_SIZES,
    POOLS,
    TP_SIZES,
    EngineRun,
    engine_runs,
    pool_cells,
)
from kvcycle.errors import ProfileError
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
    assert len({cell.id for cell in pool_cells()}) == len(POOLS) * len(GEOMETRIES)
    assert {run.pool for run in ENGINE_RUNS} | {pool.id for pool in POOLS if pool.unbooted} == {p.id for p in POOLS}
    assert not {run.pool for run in ENGINE_RUNS} & {pool.id for pool in POOLS if pool.unbooted}


@pytest.mark.parametrize("run", engine_runs(versions.installed()), ids=lambda run: run.id)
def test_a_run_is_a_profile_whose_size_is_predicted_where_the_table_says_so(run: EngineRun) -> None:
    profile = load_profile("tiny", run.overrides())
    assert profile.engine.tp_size == run.geometry.tp_size
    predicted = predict_kv(run.config, profile.engine_args("cpu"))
    (pool,) = [pool for pool in POOLS if pool.id == run.pool]
    assert (predicted is not None) is pool.predicted


def test_a_run_that_a_version_lacks_an_argument_for_is_refused_there_before_anything_boots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (run,) = [run for run in ENGINE_RUNS if run not in engine_runs("0.0.3rc0")]
    (part,) = compatibility.lacking(run, "0.0.3rc0")
    fields = profile_file.server_args_fields() - {part.argument}
    monkeypatch.setattr(profile_file, "server_args_fields", lambda: fields)
    with pytest.raises(ProfileError, match=rf"engine\.{part.argument} is no argument of the installed sglang-jax"):
        load_profile("tiny", run.overrides())


def test_a_version_that_lacks_a_part_has_no_cell_that_needs_it_and_all_others() -> None:
    older = pool_cells("0.0.3rc0")
    assert {cell.pool for cell in pool_cells()} - {cell.pool for cell in older} == {"mla-indexer"}
    assert len(older) == len(pool_cells()) - len(GEOMETRIES)
    assert {run.id for run in engine_runs()} - {run.id for run in engine_runs("0.0.3rc0")} == {"hicache"}
    # A version that the table does not know is run as the newest.
    assert pool_cells("0.2.0") == pool_cells(None) == pool_cells(versions.NEWEST)
    assert engine_runs("0.2.0") == engine_runs(None) == engine_runs(versions.NEWEST) == ENGINE_RUNS


def test_what_a_version_lacks_stands_in_the_table() -> None:
    rows = [line for line in compatibility.markdown().splitlines() if line.startswith("| ")]
    (indexer,) = [row for row in rows if row.startswith("| MLATokenToKVPool with an indexer")]
    assert "| 42 geometries | not in this version: no `MLATokenToKVPool(indexer_key_dim=…)` |" in indexer
    (draft,) = [row for row in rows if row.startswith("| the draft workers'")]
    assert "| 42 geometries | 42 geometries, without what is not in it: `speculative.relay_buffer` |" in draft
    (plain,) = [row for row in rows if row.startswith("| SWAKVPool")]
    assert "| 42 geometries | 42 geometries |" in plain
    (hicache,) = [row for row in rows if row.startswith("| `hicache`")]
    assert hicache.endswith("| without generation | not in this version: no `ServerArgs(hicache_storage=…)` |")
    (lora,) = [row for row in rows if row.startswith("| `lora`")]
    assert lora.endswith("| without generation | as well |")


def test_the_documentation_quotes_what_the_command_prints(pytestconfig: pytest.Config) -> None:
    printed = CliRunner().invoke(app, ["matrix"])
    assert printed.exit_code == 0
    text = Path(pytestconfig.rootpath, "docs", "compatibility.md").read_text(encoding="utf-8")
    assert text.count("<!-- kvcycle matrix -->") == text.count("<!-- end of kvcycle matrix -->") == 1
    quoted = text.partition("<!-- kvcycle matrix -->\n\n")[2].partition("\n<!-- end of kvcycle matrix -->")[0]
    assert quoted == printed.stdout, "run `kvcycle matrix` and put what it prints between the markers"
