"""Two records side by side: what counts as a regression, and what a person sees at 80 columns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvcycle.checks import judge
from kvcycle.cli import app
from kvcycle.record import Record
from kvcycle.record_parts import Stack, Verdict
from kvcycle.report.regressions import Regression, changed_checks, other_geometry, regressions
from tests.unit.records import (
    BORROWED,
    KV_BYTES,
    edit_canary,
    edit_generates,
    edit_use,
    good_record,
    shift,
    with_profile,
    without_generates,
)

EQUAL = "EQUAL to the byte, on every device and in every phase that both have"
GOOD = good_record()
OTHER_STACK = Stack(kvcycle="0.1.0", jax="0.8.1", jaxlib="0.8.1", sglang_jax="0.0.3rc0", python="3.12.4")
RED = shift(GOOD, BORROWED, 1)
SLOW = edit_generates(GOOD, "after_rebuild", 0, seconds=9.0)


def found(first: Record, second: Record) -> list[Regression]:
    return regressions(first, second, judge(first), judge(second))


def kinds(first: Record, second: Record) -> list[tuple[str, str]]:
    return [(regression.kind, regression.where) for regression in found(first, second)]


def predicted(record: Record) -> Record:
    """As a plan's record has it: bytes and nothing that ran."""
    return record.model_copy(update={"evidence": "compiled-for-tpu", "generates": (), "canaries": (), "boot": None})


def kv_shifted(record: Record, by: int) -> Record:
    """So many more bytes of KV cache on device 1 after the rebuild."""
    use = record.cycles[0].phases[5].devices[1]
    owners = dict(use.by_owner) | {"kv": KV_BYTES + by}
    return edit_use(record, "kv_cache_rebuilt", ledger_bytes=use.ledger_bytes + by, by_owner=owners)


def allocator_of(record: Record, by: int) -> Record:
    return shift(record, BORROWED, by, "allocator")


def compare(tmp_path: Path, first: Record, second: Record, width: int = 110) -> Result:
    first.save(tmp_path / "first.json")
    second.save(tmp_path / "second.json")
    # Not a terminal: rich takes the width of a log, or what COLUMNS says of one.
    environment = {"COLUMNS": str(width), "TTY_COMPATIBLE": "1", "NO_COLOR": "1"} if width != 110 else {}
    files = [str(tmp_path / "first.json"), str(tmp_path / "second.json")]
    return CliRunner().invoke(app, ["compare", *files], env=environment)


# What a regression is ------------------------------------------------------------------------------------------------


def test_a_record_is_no_regression_from_itself() -> None:
    assert found(GOOD, GOOD) == found(RED, RED) == []


def test_a_check_that_passed_and_fails_is_one() -> None:
    (only,) = found(GOOD, RED)
    assert (only.kind, only.where) == ("check", "drop.frees_kv")
    assert only.text.startswith("drop.frees_kv passed, and now: fail: kv_cache_dropped, cycle0-device1, ledger: bytes")
    assert found(RED, GOOD) == []


def test_a_check_that_became_inconclusive_is_one() -> None:
    blind = edit_canary(GOOD, "ledger", 1, rise_bytes=0)
    assert ("check", "controls.witness_sees_allocation") in kinds(GOOD, blind)
    (first, *_) = (r for r in found(GOOD, blind) if r.where == "drop.frees_kv")
    assert first.text.endswith("(and 1 more)")


def test_a_check_that_failed_elsewhere_before_is_one_where_it_passed() -> None:
    both = shift(RED, BORROWED, 1, device=2)
    (only,) = found(RED, both)
    assert "cycle0-device2" in only.text
    assert found(both, RED) == []


def test_a_place_that_is_new_stands_for_the_whole_check() -> None:
    longer = shift(good_record(cycles=3), BORROWED, 1, cycle=2)
    assert kinds(GOOD, longer) == [("check", "drop.frees_kv")]


def test_what_the_profile_leaves_out_is_a_change_and_no_regression() -> None:
    shorter = with_profile(without_generates(GOOD, *(g.when for g in GOOD.generates)), "cycle", generate=False)
    changed = {entry.check: (entry.first, entry.second) for entry in changed_checks(judge(GOOD), judge(shorter))}
    assert changed["generate.no_compile"] == ("pass", "not-run")
    assert found(GOOD, shorter) == []


@pytest.mark.parametrize("by", [1, -512])
def test_bytes_of_one_owner_on_one_device_are_one(by: int) -> None:
    (first, *rest) = found(GOOD, kv_shifted(GOOD, by))
    assert first.kind == "bytes"
    assert first.text == (
        f"kv_cache_rebuilt, device 1, kv: {KV_BYTES:,} and {KV_BYTES + by:,} B, {by:+,} B"
    )  # fmt: skip
    assert {regression.kind for regression in rest} <= {"check"}


def test_the_host_of_a_device_is_named_where_there_are_several() -> None:
    one = good_record(hosts=2)
    use = one.cycles[0].phases[0].devices[3]
    other = edit_use(one, "engine_ready", device=3, by_owner=dict(use.by_owner) | {"kv": 0})
    (regression,) = (regression for regression in found(one, other) if regression.kind == "bytes")
    assert regression.text.startswith("engine_ready, device 3 (host 1), kv: 33,556,480 and 0 B")


def test_the_allocators_tolerance_is_the_second_profiles() -> None:
    first = good_record(allocator=True)
    second = allocator_of(first, 512)
    allowed = with_profile(second, "tolerances", allocator_bytes=512)
    assert [kind for kind, _ in kinds(first, second)].count("bytes") == 1
    assert found(first, allowed) == []
    assert "bytes" in dict(kinds(with_profile(first, "tolerances", allocator_bytes=512), second))
    assert "allocator: changed by -33,556,480 and -33,555,968 B, +512 B, allowed 0 B" in found(first, second)[0].text


def test_of_another_geometry_bytes_are_not_held_against_it() -> None:
    larger = with_profile(good_record(kv_bytes=2 * KV_BYTES), "engine", page_size=16)
    assert other_geometry(GOOD, larger) == ["page_size 1 and 16"]
    assert found(GOOD, larger) == []
    assert found(GOOD, good_record(devices=2)) == []


def test_the_same_geometry_with_other_bytes_is_a_regression() -> None:
    assert {kind for kind, _ in kinds(GOOD, good_record(kv_bytes=2 * KV_BYTES))} == {"bytes"}


def test_the_same_model_in_another_folder_is_the_same_geometry() -> None:
    here = with_profile(GOOD, "model", path="org/Some-Model")
    there = with_profile(GOOD, "model", path="/data/models/Some-Model/")
    assert other_geometry(here, there) == []
    assert other_geometry(here, with_profile(GOOD, "model", path="org/Other")) == ["model Some-Model and Other"]


def test_what_holds_on_cpu_is_what_ran_there() -> None:
    on_cpu = GOOD.profile["on_cpu"] | {"engine": {"page_size": 16}}
    simulated = GOOD.model_copy(update={"profile": GOOD.profile | {"on_cpu": on_cpu}})
    assert other_geometry(GOOD, simulated) == ["page_size 1 and 16"]
    measured = simulated.model_copy(update={"evidence": "measured-on-tpu"})
    assert other_geometry(GOOD, measured) == []


def test_without_max_total_tokens_the_capacity_is_part_of_the_geometry() -> None:
    first = good_record(allocator=True)
    larger = tuple(device.model_copy(update={"limit_bytes": 10**12}) for device in first.devices)
    second = first.model_copy(update={"devices": larger})
    assert other_geometry(first, second) == ["capacity_bytes 33017561088 and 1000000000000"]
    fixed = [with_profile(record, "engine", max_total_tokens=32768) for record in (first, second)]
    assert other_geometry(*fixed) == []


def test_a_generation_beyond_its_own_threshold_is_told_once() -> None:
    assert kinds(GOOD, SLOW) == [("check", "generate.below_threshold")]


def test_a_generation_beyond_its_threshold_counts_where_the_first_record_has_no_verdict_on_it() -> None:
    before = without_generates(GOOD, "after_clear_caches")  # the control is missing: inconclusive
    (only,) = (r for r in found(before, SLOW) if r.kind == "latency")
    assert only.text == "the generation after the rebuild took 9 s, the record's own threshold is 7.8 s"
    assert not [r for r in found(edit_generates(before, "after_rebuild", seconds=9.0), SLOW) if r.kind == "latency"]


def test_slower_than_the_first_but_within_its_own_threshold_is_none() -> None:
    slower = GOOD.model_copy(update={"generates": tuple(g.model_copy(update={"seconds": 3 * g.seconds}) for g in GOOD.generates)})  # fmt: skip # noqa: E501
    assert found(GOOD, slower) == []


def test_of_a_prediction_only_bytes_count_whatever_its_profile_says() -> None:
    plan = predicted(with_profile(GOOD, "engine", page_size=16))
    assert found(plan, RED) == found(plan, SLOW) == found(SLOW, plan) == []
    assert kinds(plan, kv_shifted(GOOD, 1)) == [("bytes", "kv_cache_rebuilt device 1")]


# What a person sees --------------------------------------------------------------------------------------------------


def test_equal_records(tmp_path: Path) -> None:
    done = compare(tmp_path, GOOD, GOOD)
    assert done.exit_code == 0
    assert done.output.splitlines()[-2:] == [EQUAL, "NO REGRESSION from A to B"]
    assert "checks: the same verdict on each in A and B" in done.output
    assert [line.split()[1] for line in done.output.splitlines() if line.startswith("≠")] == ["record"]  # its name


def test_a_prediction_and_a_measurement_that_agree_end_with_that_line_alone(tmp_path: Path) -> None:
    done = compare(tmp_path, predicted(GOOD), SLOW)
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == EQUAL
    assert "a prediction" in done.output
    assert "REGRESSION" not in done.output
    assert "(A compiled-for-tpu, B simulated-on-cpu)" in done.output
    assert "checks" not in done.output


def test_one_byte_beside_a_prediction_is_named(tmp_path: Path) -> None:
    done = compare(tmp_path, predicted(GOOD), kv_shifted(GOOD, 512))
    assert done.exit_code == 1
    assert "DIFFERENT in 1 places" in done.output
    assert "differs kv_cache_rebuilt, device 1, kv: 33,556,480 and 33,556,992 B, +512 B" in done.output
    assert done.output.splitlines()[-1] == "REGRESSION from A to B: 1 in bytes"


def test_a_regression_ends_with_1_and_says_what(tmp_path: Path) -> None:
    done = compare(tmp_path, GOOD, RED)
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert EQUAL in lines
    assert lines[-1] == "REGRESSION from A to B: 1 in check"
    assert any(line.startswith("regression drop.frees_kv passed, and now: fail: ") for line in lines)
    assert any(line.split() == ["drop.frees_kv", "pass", "fail"] for line in lines)


def test_another_geometry_is_said(tmp_path: Path) -> None:
    done = compare(tmp_path, GOOD, good_record(devices=2))
    assert done.exit_code == 0
    told = "The geometry is not the same (devices 4 and 2; tp_size 4 and 2): bytes are shown, and not held against B."
    assert told in done.output
    assert EQUAL not in done.output
    assert "DIFFERENT" not in done.output


def test_latencies_are_multiples_of_the_same_records_warm_median(tmp_path: Path) -> None:
    done = compare(tmp_path, GOOD, SLOW)
    rows = {line[:33].strip(): line[33:].split() for line in done.output.splitlines()}
    assert rows["warm, median"] == ["2.6", "s", "2.6", "s", "1.00"]
    assert rows["after the rebuild, × warm"] == ["1.08", "×", "3.46", "×", "3.21"]
    assert rows["threshold for after the rebuild"] == ["3.00", "×", "3.00", "×"]


@pytest.mark.parametrize("wide", [False, True])
def test_two_stacks_fit_a_terminal_of_80_columns(wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = good_record(allocator=True)
    if wide:
        first = good_record(allocator=True, kv_bytes=9_663_750_144 // 4, weights=6_248_972_288 // 4)
    second = shift(first, BORROWED, 1).model_copy(update={"stack": OTHER_STACK, "created": "2026-11-25T01:02:03Z"})
    second = kv_shifted(second, -1) if not wide else second
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    done = compare(tmp_path, first, second, width=80)
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.output)
    assert [line for line in text.splitlines() if len(line.rstrip()) > 80] == []
    assert "…" not in text
    rows = {cells[1]: cells for line in text.splitlines() if len(cells := line.split()) > 2}
    assert rows["sglang-jax"] == ["≠", "sglang-jax", "0.1.0rc0", "0.0.3rc0"]
    assert rows["jax"] == ["≠", "jax", "0.10.2", "0.8.1"]
    for name in (phase.name for phase in first.cycles[0].phases):
        assert any(line.startswith(f"{name} ") and len(line.split()) == 4 for line in text.splitlines()), name


def test_what_a_record_says_is_text(tmp_path: Path) -> None:
    hostile = GOOD.model_copy(
        update={
            "profile": GOOD.profile | {"name": "[bold]x[/]\x1b[31m", "model": {"path": "[/]"}},
            "stack": OTHER_STACK.model_copy(update={"jax": "[red]1\n2"}),
        }
    )
    done = compare(tmp_path, hostile, GOOD)
    assert "[bold]x[/]\\x1b[31m" in done.output
    assert "[red]1\\n2" in done.output
    assert "\x1b" not in done.output


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    fewer = compare(tmp_path, predicted(GOOD), good_record(devices=2))
    assert fewer.exit_code == 2
    assert "cannot be compared: the first has 4 devices, the second 2." in fewer.output
    nothing = compare(tmp_path, GOOD, GOOD.model_copy(update={"cycles": ()}))
    assert nothing.exit_code == 2
    assert "they have no phase in common" in nothing.output
    missing = CliRunner().invoke(app, ["compare", str(tmp_path / "first.json"), str(tmp_path / "none.json")])
    assert missing.exit_code == 2
    assert "cannot be read" in missing.output


def test_a_runs_folder_stands_for_its_record(tmp_path: Path) -> None:
    GOOD.save(tmp_path / "run" / "record.json")
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "run"), str(tmp_path / "run" / "record.json")])
    assert done.exit_code == 0


def test_the_verdicts_in_a_record_are_not_believed(tmp_path: Path) -> None:
    lying = RED.model_copy(update={"checks": (Verdict(id="drop.frees_kv", scope="run", verdict="pass", message="."),)})
    assert compare(tmp_path, GOOD, lying).exit_code == 1
