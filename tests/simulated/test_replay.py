"""The replay on a small geometry; and the TPU compiler's plan held against the full-size replay and the reference."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from kvcycle import checkpoint, checks, reference
from kvcycle.plan.api import plan
from kvcycle.predict import predict, predict_by_arithmetic
from kvcycle.profile_file import load_profile
from kvcycle.record import Record
from kvcycle.report import side_by_side
from tests.simulated.compiler import needs_libtpu

#: What `make replay` wrote (simulated-on-cpu, sglang-jax 0.1.0rc0, jax 0.10.2, 2 cores, 24 GiB).
FULL_SIZE = Path(__file__).parents[1] / "data" / "qwen2.5-3b-v4-8.replay.json"


def test_a_replay_with_dummy_weights_passes_without_generation(
    guarded: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    geometry = checkpoint.ensure_builtin("tiny-qwen2")
    done = guarded(
        "-c", "from kvcycle.cli import app; app()", "replay", "--set", f"model.config={geometry}",
        "--set", "engine.max_total_tokens=8192", "--report-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "(cycle.generate = false). This is not a pass." in " ".join(done.stdout.split())
    assert "reference" not in done.stdout.split("Witnesses:")[1]  # there is none of this geometry
    record = Record.load(tmp_path / "latest" / "record.json")
    assert record.evidence == "simulated-on-cpu"
    assert {v.verdict for v in record.checks} == {"pass", "not-run"}
    assert record.generates == ()


def test_the_full_size_replay_still_passes_and_equals_the_reference() -> None:
    record = Record.load(FULL_SIZE)
    assert checks.passed(checks.judge(record))
    (run,) = [run for run in reference.load().runs if run.max_total_tokens == 32768]
    sums = {phase.name: phase.ledger_bytes_sum for phase in record.cycles[0].phases if phase.name in run.bytes_in_use}
    assert {after: sums[after] - sums[before] for before, after in pairwise(sums)} == run.changes()
    assert record.kv.buffers == run.kv_buffers


@needs_libtpu
def test_the_plan_for_v4_8_equals_the_replay_and_the_reference_to_the_byte() -> None:
    planned = plan(load_profile("qwen2.5-3b-v4-8"), "v4-8")
    assert planned.fits
    assert side_by_side.differences(planned.record, Record.load(FULL_SIZE)) == []
    run = reference.load().runs[0]
    assert planned.record.kv.bytes == run.kv_bytes
    assert planned.record.params.bytes_on_devices == run.params_bytes
    assert planned.record.evidence == "compiled-for-tpu"


@needs_libtpu
def test_the_prediction_is_the_compilers_and_says_so() -> None:
    profile = load_profile("tiny")
    predicted, arithmetic = predict(profile, "cpu"), predict_by_arithmetic(profile, "cpu")
    assert predicted is not None
    assert arithmetic is not None
    assert (predicted.by, arithmetic.by) == ("the TPU compiler", "config arithmetic")
    assert (predicted.total_bytes, predicted.bytes_per_device) == (134_225_920, 33_556_480)
    assert "4 buffers for v4-8 in its own layouts" in predicted.formula


@needs_libtpu
def test_a_compiler_that_refuses_leaves_the_arithmetic_and_its_reason() -> None:
    profile = load_profile("tiny", {"engine.attention_backend": "fa", "topology": "v9-8"})
    predicted = predict(profile, "cpu")
    assert predicted is not None
    assert predicted.by == "config arithmetic"
    assert "the compiler: " in predicted.formula
    assert "v9-8" in predicted.formula
