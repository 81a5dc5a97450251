"""What a person sees at the end of a run, at the width of an old terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvcycle.checks import judge
from kvcycle.record import Record
from kvcycle.report.terminal import show, verdict_line
from tests.unit.records import (
    BORROWED,
    edit_canary,
    edit_cycle,
    edit_kv,
    edit_phase,
    good_record,
    shift,
    with_profile,
    without_phase,
)

GOOD = good_record()
RED = shift(GOOD, BORROWED, 1)
BLIND = edit_canary(GOOD, "ledger", 1, rise_bytes=0)
LEFT_OUT = edit_cycle(
    with_profile(good_record(cycles=1), "cycle", generate=False).model_copy(update={"generates": ()}), 0, swap=None
)
#: The reference run's second size on four devices: the numbers are as wide as they get on a v4-8.
WIDE = good_record(cycles=1, allocator=True, kv_bytes=9_663_750_144 // 4, weights=6_248_972_288 // 4)
#: With the weights' release, whose rows are the widest names with the widest numbers.
RELEASED = good_record(allocator=True, weights=6_248_972_288 // 4, release_weights=True)
RECORDS = pytest.mark.parametrize(
    "record",
    [GOOD, RED, BLIND, LEFT_OUT, WIDE, RELEASED],
    ids=["good", "failed", "inconclusive", "not-run", "wide", "released"],
)


def shown(record: Record, width: int = 80, *, color: bool = False) -> str:
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=color, no_color=not color, highlight=False)
    show(record, judge(record), console)
    return buffer.getvalue()


def flat(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


def plain_verdict_line(record: Record) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=80, no_color=True, highlight=False).print(
        verdict_line(record, judge(record)), soft_wrap=True
    )
    return buffer.getvalue()


@RECORDS
@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_line_is_wider_than_the_terminal_but_the_verdict(record: Record, width: int) -> None:
    *lines, verdict = shown(record, width).splitlines()
    assert [line for line in lines if len(line) > width] == []
    assert verdict.startswith(("PASSED [", "FAILED ["))


@RECORDS
@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_number_is_cut_off(record: Record, width: int) -> None:
    text = shown(record, width)
    assert "…" not in text.replace("4 layers x …", "")
    previous = None
    for phase in record.cycles[0].phases:
        row = next(cells for line in text.splitlines() if phase.name in (cells := line.split()))
        assert f"{phase.ledger_bytes_sum:,}" in row
        if previous is not None:
            assert f"{phase.ledger_bytes_sum - previous:+,}" in row
        previous = phase.ledger_bytes_sum


@RECORDS
def test_numbers_stand_with_their_evidence(record: Record) -> None:
    text = shown(record)
    assert f"(ledger, {record.evidence})" in flat(text)
    assert f"[{record.evidence}] tiny on 4 " in text
    assert "\x1b" not in text


def test_the_whole_table_where_there_is_room_for_it() -> None:
    lines = shown(GOOD, 120).splitlines()
    assert lines[0].rstrip() == "cycle 0: bytes in use, summed over 4 devices (ledger, simulated-on-cpu)"
    dropped = next(line for line in lines if "kv_cache_dropped" in line)
    assert [cell.strip() for cell in dropped.split("│")[1:-1]] == [
        "kv_cache_dropped", "22,106,528", "-134,225,920", "-134,225,920", "pass",
    ]  # fmt: skip


def test_the_release_of_the_weights_has_its_rows() -> None:
    text = shown(RELEASED, 120)
    rows = {cells[0]: cells[2:] for line in text.splitlines() if len(cells := line.replace("│", " ").split()) == 5}
    assert rows["weights_released"] == ["-6,248,972,288", "-6,248,972,288", "pass"]
    assert rows["weights_resumed"] == ["+6,248,972,288", "+6,248,972,288", "pass"]
    assert "after the weights, slowest" in text
    assert "cycle 1: every change to the byte as in cycle 0." in text
    assert "weights_" not in shown(GOOD)


def test_a_good_run() -> None:
    text = shown(GOOD)
    assert "cycle 1: every change to the byte as in cycle 0." in text
    assert "KV cache: 4 buffers, 128.01 MiB (134,225,920 B)" in text
    assert "predicted by config arithmetic: 4 layers x …" in text
    assert "silent here: allocator" in flat(text)
    assert "rss (the process, KV only, within 2%)" in flat(text)
    assert "likely:" not in text
    assert text.splitlines()[-1] == (
        "PASSED [simulated-on-cpu] tiny on 4 cpu devices, sglang-jax 0.1.0rc0, jax 0.10.2: 99 pass"
    )


def test_latencies_stand_beside_their_threshold() -> None:
    rows = {
        cells[0]: cells[1:]
        for line in shown(GOOD).splitlines()
        if len(cells := [cell.strip() for cell in line.split("│")[1:-1]]) == 4
    }
    assert rows["cold (first)"] == ["17.000", "12", "0"]
    assert rows["warm, median"] == ["2.600", "0", "0"]
    assert rows["after the rebuild, slowest"] == ["2.800", "0", "0"]
    assert rows["control: jax's caches cleared"] == ["18.000", "12", "0"]
    assert rows["threshold for after the rebuild"] == ["7.800", "0", "0"]


def test_a_failed_run_says_what_and_why() -> None:
    text = shown(RED)
    assert (
        "fail drop.frees_kv: kv_cache_dropped, cycle0-device1, ledger: bytes in use changed by -32.00 MiB "
        "(-33,556,479 B) since flush_cache_before_kv_drop, expected -32.00 MiB (-33,556,480 B); off by +1 B, "
        "allowed 0 B." in flat(text)
    )
    assert "likely: a buffer was not deleted, or something else still holds it (see drop.deletes_every_buffer)" in flat(
        text
    )
    assert "every change to the byte as in cycle 0" not in text
    assert text.splitlines()[-1].startswith("FAILED [simulated-on-cpu] tiny on 4 cpu devices, ")
    assert text.splitlines()[-1].endswith(": 98 pass, 1 fail")


def test_a_cycle_that_did_not_pass_has_its_own_table() -> None:
    # The same changes in both cycles, but one cannot be believed.
    moved = edit_phase(GOOD, "kv_cache_dropped", lambda phase: phase.model_copy(update={"info": None}), 1)
    text = shown(moved)
    assert "cycle 1: bytes in use, summed over 4 devices" in text
    assert "every change" not in text


def test_an_inconclusive_run_has_failed() -> None:
    text = shown(BLIND)
    assert "inconclusive controls.witness_sees_allocation: device1: of 16.00 MiB (16,777,216 B)" in flat(text)
    assert text.splitlines()[-1].startswith("FAILED [simulated-on-cpu] tiny")
    assert text.splitlines()[-1].endswith(" pass, 9 inconclusive")


def test_what_was_not_run_is_said_and_no_pass() -> None:
    text = flat(shown(LEFT_OUT))
    assert "not run: controls.compiles_are_counted, " in text
    reason = "the profile leaves generation out (cycle.generate = false). This is not a pass."
    assert f"swap.shares_buffers: {reason}" in text
    assert "seconds" not in text
    assert text.endswith(" pass, 10 not-run")


def test_what_was_not_run_for_another_reason_says_that_one() -> None:
    text = flat(shown(with_profile(good_record(), "engine", disable_radix_cache=True)))
    reason = "the engine keeps no prefix cache (engine.disable_radix_cache = true). This is not a pass."
    assert f"not run: controls.prefix_hit_is_seen, generate.no_stale_prefix: {reason}" in text
    assert "leaves generation out" not in text


def test_a_run_that_ended_early_is_shown_as_far_as_it_came() -> None:
    short = good_record(cycles=1)
    for name in BORROWED:
        short = without_phase(short, name)
    text = shown(short)
    assert "flush_cache_before_kv_drop" in text
    assert "│ kv_cache_rebuilt" not in text
    assert "the run ended before kv_cache_dropped." in flat(text)
    empty = shown(short.model_copy(update={"cycles": (), "generates": (), "canaries": ()}))
    assert "Witnesses: none; silent here: ledger, allocator, rss" in flat(empty)
    assert empty.splitlines()[-1].startswith("FAILED [simulated-on-cpu]")


@pytest.mark.parametrize("name", ["[bold]tiny[/bold]", "[/]", "[simulated-on-cpu]", "a[red]b", "tiny[/red]", "[[x]]"])
def test_markup_in_a_name_is_text(name: str) -> None:
    record = edit_kv(
        GOOD.model_copy(
            update={
                "profile": GOOD.profile | {"name": name},
                "devices": tuple(device.model_copy(update={"kind": name}) for device in GOOD.devices),
                "stack": GOOD.stack.model_copy(update={"jax": name, "sglang_jax": name}),
            }
        ),
        predicted_by=name,
        predicted_how=name,
        claimed_bytes=1,
    )
    text = shown(record)
    assert text.splitlines()[-1].startswith(
        f"FAILED [simulated-on-cpu] {name} on 4 {name} devices, sglang-jax {name}, jax {name}: "
    )
    assert f"predicted by {name}: {name}" in text
    assert f"engine_claim: KV bytes by the engine's own claim, predicted by {name}: 1 B, expected" in flat(text)


def test_color_only_where_it_is_asked_for() -> None:
    assert "\x1b[1;32mPASSED" in shown(GOOD, color=True)
    assert "\x1b[1;31mFAILED" in shown(RED, color=True)
    assert "\x1b" not in shown(GOOD)


def test_a_tpus_record_is_called_one() -> None:
    assert plain_verdict_line(WIDE).startswith("PASSED [measured-on-tpu] tiny on 4 TPU v4 devices, ")
    assert "silent here: rss" in flat(shown(WIDE))


def test_a_verdict_line_without_verdicts_has_failed() -> None:
    assert verdict_line(GOOD, []).plain.endswith(": nothing was judged")
    assert verdict_line(GOOD, []).plain.startswith("FAILED [simulated-on-cpu]")
