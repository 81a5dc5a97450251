"""The suite as a subprocess, judged by what it leaves behind: the JUnit file, the record, the exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped

from kvcycle import checkpoint
from kvcycle.record import Record

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_suite(guarded: Run, tmp_path: Path) -> Run:
    """Run ``pytest -m tpu`` with further arguments, reporting into tmp_path."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return guarded("-m", "pytest", "-m", "tpu", "--kv-report-dir", str(tmp_path), "tests/tpu", *arguments)

    return run


def outcomes(folder: Path) -> Counter[str]:
    """Tests by outcome in the newest run's JUnit file."""
    counts: Counter[str] = Counter()
    for suite in JUnitXml.fromfile(str(folder / "latest" / "junit.xml")):
        for case in suite:
            kinds = {Failure: "failure", Error: "error", Skipped: "skipped"}
            counts[next((kinds[type(result)] for result in case.result), "passed")] += 1
    return counts


@pytest.mark.usefixtures("compiling_anew")
def test_the_suite_passes_on_virtual_devices(run_suite: Run, tmp_path: Path, smaller: dict[str, float]) -> None:
    keys = [argument for key, value in smaller.items() for argument in ("--kv-set", f"{key}={value}")]
    done = run_suite("--kv-platform", "cpu", "--kv-cycles", "1", *keys)
    assert done.returncode == 0, done.stdout
    counts = outcomes(tmp_path)
    assert set(counts) == {"passed"}
    assert counts["passed"] >= 25

    latest = tmp_path / "latest"
    record = Record.load(latest / "record.json")
    freed = [v for v in record.checks if v.id == "drop.frees_kv" and v.witness == "ledger"]
    assert [(v.scope, v.verdict) for v in freed] == [(f"cycle0-device{d}", "pass") for d in range(4)]
    tokens = int(smaller.get("engine.max_total_tokens", 16_384)) + 1
    assert all(v.measured == v.expected == -tokens * 4 * 2 * 128 * 2 for v in freed)  # layers, K and V, width, bytes
    (cold,), (after,) = record.generates_when("cold"), record.generates_when("after_rebuild")
    assert cold.compiles.backend > 0
    assert after.compiles.any_work == 0
    assert after.token_ids == cold.token_ids
    assert len(set(cold.token_ids)) >= 6
    (control,) = record.generates_when("after_clear_caches")
    assert control.compiles.backend > 0

    benchmarks = json.loads((latest / "benchmark.json").read_text())
    assert sorted(entry["name"] for entry in benchmarks["benchmarks"]) == ["test_after_rebuild", "test_warm"]
    assert benchmarks["machine_info"]["kvcycle"]["evidence"] == "simulated-on-cpu"
    log = [json.loads(line) for line in (latest / "reportlog.jsonl").read_text().splitlines()]
    assert log[-1]["$report_type"] == "SessionFinish"
    assert "PASSED [simulated-on-cpu] tiny on 4 cpu devices" in done.stdout
    assert f"Reports: {latest / 'index.html'} (latest -> {latest.readlink()})" in done.stdout
    assert "PASSED" in (latest / "index.html").read_text(encoding="utf-8").split("</title>")[0]
    assert "\x1b[" not in done.stdout
    properties = {p.name: p.value for suite in JUnitXml.fromfile(str(latest / "junit.xml")) for p in suite.properties()}
    assert properties["kvcycle.profile"] == "tiny"


def test_a_profile_without_generation_skips_what_it_leaves_out_and_says_so(run_suite: Run, tmp_path: Path) -> None:
    done = run_suite("--kv-platform", "cpu", "--kv-cycles", "1", "--kv-set", "cycle.generate=false")
    assert done.returncode == 0, done.stdout
    counts = outcomes(tmp_path)
    assert set(counts) == {"passed", "skipped"}
    assert counts["passed"] >= 25
    assert "Not run: the profile leaves generation out (cycle.generate = false). This is not a pass." in done.stdout
    record = Record.load(tmp_path / "latest" / "record.json")
    assert {v.id for v in record.checks if v.verdict == "not-run"} >= {"generate.no_compile", "swap.shares_buffers"}


def test_a_boot_that_fails_is_one_error_with_its_cause_and_the_rest_skip_quoting_it(
    run_suite: Run, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint.ensure_builtin("tiny-qwen2"), broken)
    (broken / "model.safetensors").write_bytes(b"these are no tensors")
    done = run_suite("--kv-platform", "cpu", "--kv-set", f"model.path={broken}")
    assert done.returncode == 1, done.stdout
    counts = outcomes(tmp_path)
    assert counts["error"] == 1
    assert counts["skipped"] == counts.total() - 1 >= 24
    cases = [case for suite in JUnitXml.fromfile(str(tmp_path / "latest" / "junit.xml")) for case in suite]
    (cause,) = [result.text or "" for case in cases for result in case.result if isinstance(result, Error)]
    assert "The engine did not boot" in cause
    assert "Its last words: MemoryError" in cause  # the engine reads the first eight bytes as the header's length
    reasons = {result.message for case in cases for result in case.result if isinstance(result, Skipped)}
    assert len(reasons) == 1
    assert reasons.pop().startswith("skipped since the engine did not boot: The engine did not boot")


def test_without_a_tpu_everything_skips_and_says_what_to_do(run_suite: Run, tmp_path: Path) -> None:
    done = run_suite()
    assert done.returncode == 0, done.stdout
    assert set(outcomes(tmp_path)) == {"skipped"}
    assert "no TPU here: run the same tests on virtual devices with --kv-platform cpu" in done.stdout
    assert "--require-tpu" in done.stdout
    summary = (tmp_path / "latest" / "summary.md").read_text()
    assert summary.startswith("## kvcycle: NOT RUN\n\nno TPU here: run the same tests on virtual devices with ")


def test_require_tpu_makes_that_a_failure(run_suite: Run, tmp_path: Path) -> None:
    done = run_suite("--require-tpu")
    assert done.returncode == 1, done.stdout
    assert "There is no TPU here, and --require-tpu makes that a failure." in done.stdout
    assert outcomes(tmp_path)["error"] == 1
