"""Verdicts on a whole run: what was left out, what ended early, what is judged again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvcycle.checks import CHECKS, judge, passed
from kvcycle.record import Record
from kvcycle.record_info import RebuildInfo
from kvcycle.record_parts import Verdict
from tests.unit.planted import (
    ON_CPU,
    ON_TPU,
    REBUILT,
    checks_that,
    only,
)
from tests.unit.records import (
    BORROWED,
    KV_BYTES,
    OTHER,
    OTHER_TOKENS,
    WARM_TOKENS,
    edit_cycle,
    edit_generates,
    edit_info,
    edit_kv,
    shift,
    with_profile,
)


def without_generation(record: Record) -> Record:
    """The record as a run leaves it whose profile leaves generation out."""
    record = with_profile(record, "cycle", generate=False).model_copy(update={"generates": ()})
    for index in range(len(record.cycles)):
        record = edit_cycle(record, index, swap=None)
    return record


def test_what_the_profile_leaves_out_is_not_run_and_no_failure() -> None:
    verdicts = judge(without_generation(ON_CPU))
    not_run = [verdict for verdict in verdicts if verdict.verdict == "not-run"]
    assert sorted(verdict.id for verdict in not_run) == sorted(
        [check for check in CHECKS if check.startswith("generate.")]
        + ["swap.shares_buffers", "controls.compiles_are_counted", "controls.recompilation_is_seen"]
        + ["controls.output_varies", "controls.output_follows_weights", "controls.prefix_hit_is_seen"]
    )
    assert {verdict.scope for verdict in not_run} == {"run"}
    assert {verdict.message for verdict in not_run} == {
        "Not run: the profile leaves generation out (cycle.generate = false). This is not a pass."
    }
    assert passed(verdicts)


def test_an_engine_without_a_prefix_cache_is_not_judged_by_it() -> None:
    engine = ON_CPU.profile.get("engine", {}) | {"disable_radix_cache": True}
    record = ON_CPU.model_copy(update={"profile": ON_CPU.profile | {"engine": engine}})
    not_run = [verdict for verdict in judge(record) if verdict.verdict == "not-run"]
    assert [verdict.id for verdict in not_run] == ["generate.no_stale_prefix", "controls.prefix_hit_is_seen"]
    assert {verdict.message for verdict in not_run} == {
        "Not run: the engine keeps no prefix cache (engine.disable_radix_cache = true). This is not a pass."
    }
    assert passed(judge(record))


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("record", [ON_CPU, ON_TPU], ids=["cpu", "tpu"])
def test_a_run_that_ended_early_never_passes(record: Record, generate: bool) -> None:
    if not generate:
        record = without_generation(record)
    phases = [(index, phase) for index, cycle in enumerate(record.cycles) for phase in cycle.phases]
    for end in range(len(phases)):
        first = tuple(phase for index, phase in phases[:end] if index == 0)
        second = tuple(phase for index, phase in phases[:end] if index == 1)
        cycles = tuple(
            cycle.model_copy(update={"phases": kept})
            for cycle, kept in zip(record.cycles, (first, second), strict=True)
            if kept
        )
        verdicts = judge(record.model_copy(update={"cycles": cycles}))
        assert not passed(verdicts), f"passed with {end} of {len(phases)} phases"
        assert checks_that(verdicts, "fail") == set()
    assert passed(judge(record))


def test_the_cycle_that_is_missing_is_named() -> None:
    short = without_generation(ON_CPU).model_copy(update={"cycles": ON_CPU.cycles[:1]})
    verdict = only(judge(short), "cycles.no_growth", "cycle1-ledger")
    assert (verdict.verdict, verdict.message) == ("inconclusive", "cycle1: the run ended before this cycle.")


@pytest.mark.parametrize("record", [ON_CPU, ON_TPU], ids=["cpu", "tpu"])
def test_a_record_without_devices_or_cycles_never_passes(record: Record) -> None:
    assert not passed(judge(record.model_copy(update={"devices": ()})))
    assert not passed(judge(without_generation(record).model_copy(update={"devices": ()})))
    assert not passed(judge(record.model_copy(update={"cycles": ()})))
    assert not passed(judge(without_generation(record).model_copy(update={"cycles": ()})))


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ((), False),
        (("pass",), True),
        (("pass", "not-run"), True),
        (("pass", "inconclusive"), False),
        (("fail", "pass"), False),
    ],
)
def test_passed_needs_verdicts_and_no_doubt(outcomes: tuple[str, ...], expected: bool) -> None:
    verdicts = [Verdict.model_validate({"id": "x", "scope": "run", "verdict": o, "message": "m"}) for o in outcomes]
    assert passed(verdicts) is expected


def test_judging_again_looks_only_at_what_was_measured() -> None:
    judged = ON_CPU.model_copy(update={"checks": tuple(judge(shift(ON_CPU, BORROWED, 1)))})
    assert judge(judged) == judge(ON_CPU)


def test_the_kv_cache_without_a_prediction_is_measured_against_its_own_shards() -> None:
    unpredicted = edit_kv(ON_CPU, predicted_bytes=None, predicted_bytes_by_device=None)
    verdict = only(judge(unpredicted), "drop.frees_kv", "cycle0-device1-ledger")
    assert (verdict.verdict, verdict.expected) == ("pass", -KV_BYTES)


def test_the_prediction_is_preferred_to_the_shards() -> None:
    # The engine allocated less than predicted, consistently: only the prediction can tell.
    less = edit_kv(ON_CPU, predicted_bytes_by_device=dict.fromkeys(range(4), KV_BYTES + 256))
    assert checks_that(judge(less), "fail") == {"drop.frees_kv", "drop.size_is_predicted", "rebuild.restores_bytes"}


def test_a_slot_in_another_order_is_the_same_slot() -> None:
    info = ON_CPU.cycles[0].phases[5].info
    assert isinstance(info, RebuildInfo)
    turned = dict(reversed(info.layouts_after.items()))
    assert passed(judge(edit_info(ON_CPU, REBUILT, layouts_after=turned)))


def test_the_second_sets_output_is_compared_with_the_warm_one() -> None:
    other = edit_generates(ON_CPU, "with_params2", 0, token_ids=(*WARM_TOKENS[:7], OTHER_TOKENS[0]))
    verdict = only(judge(other), "controls.output_follows_weights", "cycle0")
    assert (verdict.verdict, verdict.measured) == ("pass", 1)


@pytest.mark.parametrize(
    "statement",
    [
        "import kvcycle",
        "import kvcycle.checks, kvcycle.record, kvcycle.report.terminal",
        "from kvcycle.profile_file import load_profile; load_profile('tiny').check_geometry('cpu')",
    ],
)
def test_no_engine_is_imported_where_none_is_needed(statement: str) -> None:
    # boot() must still be able to choose jax's platform.
    code = f"import sys; {statement}; print({{'jax', 'jaxlib', 'sgl_jax.srt.server_args'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")


def test_a_last_batch_that_is_smaller_once_is_no_growth_and_a_leak_still_shows_to_the_byte() -> None:
    def residues(record: Record, *, after: int) -> Record:
        before = tuple(dict.fromkeys(range(4), OTHER + 4) for _ in range(3))
        noted = tuple(dict.fromkeys(range(4), OTHER + after) for _ in range(3))
        cycles = tuple(
            cycle.model_copy(update={"residue_before": before, "residue_after": noted}) for cycle in record.cycles
        )
        return record.model_copy(update={"cycles": cycles})

    assert passed(list(CHECKS["cycles.no_growth"](residues(ON_CPU, after=4))))
    leak = list(CHECKS["cycles.no_growth"](residues(ON_CPU, after=5)))
    assert {(v.verdict, v.measured) for v in leak} == {("fail", 1)}
