"""The soak's checks: green on a good soak, red on what they are there to catch, and no alarm for the last batch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcycle.checks import CHECKS, SOAK_CHECKS, WEIGHTS_CHECKS, judge, passed
from kvcycle.checks.soak import MIN_CYCLES, WINDOW, violation
from kvcycle.record import Record
from kvcycle.record_parts import Compiles, Verdict
from tests.unit import planted
from tests.unit.records import KV_BYTES, RSS_BASE, edit_canary, edit_generates, good_record, with_profile
from tests.unit.soaks import HELD, edit_points, edit_soak, good_soak, hold, hold_before, set_points, soak_of

ON_CPU = good_soak()
ON_TPU = good_soak(allocator=True)


def of_soak(record: Record) -> list[Verdict]:
    return [verdict for check in SOAK_CHECKS.values() for verdict in check(record)]


def only(record: Record, check: str, name: str) -> Verdict:
    (verdict,) = [verdict for verdict in of_soak(record) if (verdict.id, verdict.name) == (check, name)]
    return verdict


def outcomes(record: Record, outcome: str) -> set[str]:
    return {f"{verdict.id}[{verdict.name}]" for verdict in of_soak(record) if verdict.verdict == outcome}


@pytest.mark.parametrize("record", [ON_CPU, ON_TPU, good_soak(MIN_CYCLES, 1)], ids=["cpu", "tpu", "shortest"])
def test_a_good_soak_passes_every_check(record: Record) -> None:
    verdicts = judge(record)
    assert {verdict.verdict for verdict in verdicts} == {"pass"}
    silent = {"soak.rss_is_bounded"} if record is ON_TPU else set()
    assert {verdict.id for verdict in verdicts} == set(CHECKS) - set(WEIGHTS_CHECKS) - silent
    names = [(verdict.id, verdict.name) for verdict in verdicts]
    assert len(names) == len(set(names))
    assert violation(record) is None


def test_a_record_without_a_soak_has_no_verdict_on_one() -> None:
    assert of_soak(good_record()) == []


@dataclass(frozen=True)
class Fault(planted.Fault):
    """A fault planted in a soak, and the one verdict that it turns red."""

    base: Record = ON_CPU

    def __str__(self) -> str:
        return f"{self.check}[{self.name}]-{self.message.split(':')[0]}"


def leak_by_allocator(record: Record) -> Record:
    return edit_points(
        record,
        range(20, 41),
        lambda point, cycle: point.model_copy(
            update={"allocator_bytes": point.allocator_bytes | {1: point.allocator_bytes[1] + 512 * (cycle - 19)}}
        ),
    )


FAULTS = [
    Fault(
        "soak.no_growth",
        "device1-ledger",
        lambda record: hold(record, range(1, 41), lambda cycle: 512 * cycle),
        "soak cycle 5 of 40, device1, ledger: 37.27 MiB (39,083,624 B) in use at the lowest of the last 5 idle points, "
        "expected at most 37.27 MiB (39,083,112 B), the highest of 5 before the first drop; grown by +512 B, allowed "
        "0 B.",
    ),
    Fault(
        "soak.no_growth",
        "device1-allocator",
        leak_by_allocator,
        "soak cycle 24 of 40, device1, allocator: 107.03 MiB (112,232,040 B) in use at the lowest of the last 5 idle "
        "points, expected at most 107.03 MiB (112,231,528 B), the highest of 5 before the first drop; grown by "
        "+512 B, allowed 0 B.",
        base=ON_TPU,
    ),
    Fault(
        "soak.no_growth",
        "device1-weights-ledger",
        # As many bytes change hands: the sum of the device stays.
        lambda record: hold(hold(record, [3], lambda _: -256, "weights"), [3], lambda _: 256),
        "soak cycle 3 of 40, device1-weights: 5.27 MiB (5,526,272 B) of weights at the idle point, expected 5.27 MiB "
        "(5,526,528 B); off by -256 B.",
    ),
    Fault(
        "soak.no_growth",
        "device1-kv-ledger",
        lambda record: hold(record, [40], lambda _: -KV_BYTES, "kv"),
        "soak cycle 40 of 40, device1-kv: 0 B of kv at the idle point, expected 32.00 MiB (33,556,480 B); off by "
        "-32.00 MiB (-33,556,480 B).",
    ),
    Fault(
        "soak.no_compile",
        "run",
        lambda record: set_points(record, [9, 17], compiles=Compiles(trace=1, lower=1, backend=1)),
        "soak cycle 9 of 40: 3 compilations and traces, expected 0.",
    ),
    Fault(
        "soak.no_compile",
        "run",
        lambda record: set_points(record, [40], compiles=Compiles(trace=1)),
        "soak cycle 40 of 40: 1 compilations and traces, expected 0.",
    ),
    Fault(
        "soak.same_output",
        "run",
        lambda record: set_points(record, [12], different_tokens=2),
        "soak cycle 12 of 40: 2 token ids (of 4) unlike the warm generation's, expected 0.",
    ),
    Fault(
        "soak.same_output",
        "logprobs",
        lambda record: set_points(record, [12], logprobs_off=0.25),
        "logprobs: log-probabilities differ from the warm generation's by at most 0.25 (soak cycle 12 of 40), allowed "
        "0.",
    ),
    Fault(
        "soak.rss_is_bounded",
        "run-rss",
        lambda record: edit_points(
            record,
            range(1, 41),
            lambda point, cycle: point.model_copy(update={"rss_bytes": RSS_BASE + cycle * 2**20}),
        ),
        "run: soak cycle 40 of 40: resident memory went from 559.73 MiB (586,924,032 B) to 591.73 MiB (620,478,464 B) "
        "(medians of the second and of the last tenth of the cycles), by +32.00 MiB (33,554,432 B), allowed 11.19 MiB "
        "(11,738,481 B).",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_turns_one_verdict_red(fault: Fault) -> None:
    record = fault.plant(fault.base)
    assert outcomes(record, "fail") == {f"{fault.check}[{fault.name}]"}
    assert outcomes(record, "inconclusive") == set()
    verdict = only(record, fault.check, fault.name)
    assert verdict.message == fault.message
    assert verdict.causes
    assert violation(record) == verdict
    assert not passed(judge(record))


def test_every_check_of_the_soak_has_a_planted_fault() -> None:
    assert {fault.check for fault in FAULTS} == set(SOAK_CHECKS)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("rare", "common"), [(-4, 0), (4, 0)], ids=["one-in-twenty-less", "one-in-twenty-more"])
def test_a_last_batch_that_varies_by_four_bytes_is_no_growth(seed: int, rare: int, common: int) -> None:
    draw = random.Random(seed)
    by = [rare if draw.random() < 0.05 else common for _ in range(1000 + WINDOW)]
    record = hold_before(good_soak(1000, devices=2), *by[:WINDOW])
    record = hold(record, range(1, 1001), lambda cycle: by[WINDOW + cycle - 1])
    assert len(set(by)) == 2
    assert outcomes(record, "fail") == set()
    assert passed(judge(record))


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_of_four_bytes_a_cycle_is_seen_through_a_last_batch_that_varies_by_as_much(seed: int) -> None:
    draw = random.Random(seed)
    record = hold(ON_CPU, range(1, 41), lambda cycle: 4 * cycle - (4 if draw.random() < 0.5 else 0))
    verdict = only(record, "soak.no_growth", "device1-ledger")
    assert verdict.verdict == "fail"
    assert verdict.message.startswith(("soak cycle 5 of 40", "soak cycle 6 of 40"))


def test_one_byte_that_stays_is_growth_and_one_that_goes_again_is_not() -> None:
    assert outcomes(hold(ON_CPU, range(20, 20 + WINDOW), lambda _: 1), "fail") == {"soak.no_growth[device1-ledger]"}
    assert outcomes(hold(ON_CPU, range(20, 20 + WINDOW - 1), lambda _: 1), "fail") == set()
    stays = only(hold(ON_CPU, range(20, 41), lambda _: 1), "soak.no_growth", "device1-ledger")
    assert (stays.expected, stays.measured) == (HELD, HELD + 1)
    assert stays.message.startswith("soak cycle 24 of 40, device1, ledger: ")


def test_what_was_there_before_the_first_drop_is_no_growth() -> None:
    more = hold_before(hold(ON_CPU, range(1, 41), lambda _: 4), 0, 0, 4, 0, 0)
    assert outcomes(more, "fail") == set()


def test_the_allocator_may_be_off_by_the_profiles_bytes() -> None:
    leak = leak_by_allocator(ON_TPU)
    assert "fail" in {v.verdict for v in of_soak(with_profile(leak, "tolerances", allocator_bytes=8191))}
    assert "fail" not in {v.verdict for v in of_soak(with_profile(leak, "tolerances", allocator_bytes=16384))}


def test_resident_memory_may_swing() -> None:
    swinging = edit_points(
        ON_CPU,
        range(1, 41),
        lambda point, cycle: point.model_copy(update={"rss_bytes": RSS_BASE + (cycle % 3) * 8 * 2**20}),
    )
    assert passed(of_soak(swinging))
    # What comes in the first tenth is warm-up.
    assert passed(of_soak(set_points(ON_CPU, range(1, 4), rss_bytes=RSS_BASE // 2)))


def test_a_soak_that_ended_early_is_no_pass() -> None:
    record = edit_soak(ON_CPU, points=soak_of(ON_CPU).points[:17])
    assert outcomes(record, "inconclusive") == {"soak.no_growth[run]"}
    assert only(record, "soak.no_growth", "run").message == "run: the soak ended after 17 of 40 cycles."
    assert violation(record) is None
    assert not passed(judge(record))


@pytest.mark.parametrize("cycles", [0, 1, WINDOW - 1])
def test_too_few_cycles_prove_nothing_and_violate_nothing(cycles: int) -> None:
    record = edit_soak(ON_CPU, points=soak_of(ON_CPU).points[:cycles])
    assert violation(record) is None
    assert "soak.no_growth[device1-ledger]" in outcomes(record, "inconclusive")
    assert "soak.rss_is_bounded[run-rss]" in outcomes(record, "inconclusive")
    assert only(record, "soak.no_growth", "device1-ledger").message == (
        f"device1: growth needs 5 idle points before the first drop and after it, there are 5 and {cycles}."
    )


def test_resident_memory_is_judged_from_the_shortest_soak_on() -> None:
    def ended_after(cycles: int) -> Verdict:
        return only(edit_soak(ON_CPU, points=soak_of(ON_CPU).points[:cycles]), "soak.rss_is_bounded", "run-rss")

    assert ended_after(MIN_CYCLES).verdict == "pass"
    too_short = ended_after(MIN_CYCLES - 1)
    assert (too_short.verdict, too_short.message) == ("inconclusive", "run: the medians need 9 cycles, there are 8.")


def test_a_soak_without_points_before_the_drop_proves_nothing() -> None:
    record = edit_soak(ON_CPU, before=soak_of(ON_CPU).before[:4])
    assert outcomes(record, "inconclusive") == {f"soak.no_growth[device{device}-ledger]" for device in range(4)}


@pytest.mark.parametrize(
    ("record", "inconclusive"),
    [
        (
            edit_canary(ON_CPU, "ledger", 1, rise_bytes=0),
            {f"soak.no_growth[device1{part}-ledger]" for part in ("", "-weights", "-kv")},
        ),
        (edit_canary(ON_CPU, "rss", None, rise_bytes=0), {"soak.rss_is_bounded[run-rss]"}),
        (edit_canary(ON_TPU, "allocator", 1, rise_bytes=0), {"soak.no_growth[device1-allocator]"}),
        (
            edit_generates(ON_CPU, "cold", compiles=Compiles()),
            {"soak.no_compile[run]"},
        ),
        (
            edit_generates(ON_CPU, "warm", token_ids=(7,) * 8),
            {"soak.same_output[run]", "soak.same_output[logprobs]"},
        ),
    ],
    ids=["ledger", "rss", "allocator", "compiles", "output"],
)
def test_without_its_control_a_check_proves_nothing(record: Record, inconclusive: set[str]) -> None:
    assert outcomes(record, "inconclusive") == inconclusive
    assert all("this proves nothing" in v.message for v in of_soak(record) if v.verdict == "inconclusive")


@pytest.mark.parametrize(
    ("record", "inconclusive"),
    [
        (set_points(ON_CPU, [7], rss_bytes=None), {"soak.rss_is_bounded[run-rss]"}),
        (set_points(ON_CPU, [7], different_tokens=None), {"soak.same_output[run]"}),
        (set_points(ON_CPU, [7], logprobs_off=None), {"soak.same_output[logprobs]"}),
        (set_points(ON_TPU, [7], allocator_bytes={}), {f"soak.no_growth[device{d}-allocator]" for d in range(4)}),
        (
            set_points(ON_CPU, [7], by_owner={}),
            {f"soak.no_growth[device{d}{part}-ledger]" for d in range(4) for part in ("",)}
            | {f"soak.no_growth[device{d}-{owner}]" for d in range(4) for owner in ("weights", "kv")},
        ),
        (ON_CPU.model_copy(update={"devices": ()}), {"soak.no_growth[run]"}),
    ],
    ids=["rss", "tokens", "logprobs", "allocator", "ledger", "devices"],
)
def test_a_sample_that_is_missing_is_no_pass(record: Record, inconclusive: set[str]) -> None:
    assert outcomes(record, "fail") == set()
    assert outcomes(record, "inconclusive") == inconclusive


def test_without_generation_the_output_is_not_run_and_a_compilation_still_seen() -> None:
    left_out = with_profile(set_points(ON_CPU, range(1, 41), different_tokens=None), "cycle", generate=False)
    assert outcomes(left_out, "not-run") == {"soak.no_compile[run]", "soak.same_output[run]"}
    assert outcomes(left_out, "inconclusive") == set()
    compiled = set_points(left_out, [2], compiles=Compiles(lower=1))
    assert outcomes(compiled, "fail") == {"soak.no_compile[run]"}


def test_a_thousand_cycles_are_a_small_file(tmp_path: Path) -> None:
    record = good_soak(1000)
    path = tmp_path / "record.json"
    record.save(path)
    assert path.stat().st_size < 2**20
    assert Record.load(path) == record
