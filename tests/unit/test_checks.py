"""The checks at their edges: tolerances, thresholds, and whatever a record lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest

from kvcycle.checks import CHECKS, judge, passed
from kvcycle.record import Record
from kvcycle.record_parts import PHASES, Compiles, Phase, PhaseName, When
from tests.unit.planted import (
    BORROWING,
    DROPPED,
    ON_CPU,
    ON_TPU,
    REBUILT,
    cannot_see,
    checks_that,
    named,
    only,
)
from tests.unit.records import (
    BORROWED,
    KV_BYTES,
    WEIGHTS,
    edit_cycle,
    edit_generates,
    edit_info,
    edit_kv,
    edit_phase,
    edit_use,
    shift,
    with_profile,
    without_generates,
    without_phase,
)


@pytest.mark.parametrize("cycle", [0, 1])
@pytest.mark.parametrize("device", [0, 3])
def test_one_byte_on_one_device_is_one_red_verdict(cycle: int, device: int) -> None:
    verdicts = judge(shift(ON_CPU, BORROWED, 1, cycle=cycle, device=device))
    assert named(verdicts, "fail") == {f"drop.frees_kv[cycle{cycle}-device{device}-ledger]"}


# Controls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("off", "red"), [(4096, set()), (4097, {"drop.frees_kv", "controls.witnesses_agree"})])
def test_the_allocator_may_be_off_by_the_profiles_bytes(off: int, sign: int, red: set[str]) -> None:
    tolerant = with_profile(ON_TPU, "tolerances", allocator_bytes=4096)
    # Back at once, within the tolerance itself, so that only the drop is off by more than it.
    shifted = shift(shift(tolerant, BORROWED[:1], sign * off, "allocator"), BORROWED[1:], sign, "allocator")
    assert checks_that(judge(shifted), "fail") == red


def test_no_tolerance_reaches_the_ledger() -> None:
    tolerant = with_profile(ON_TPU, "tolerances", allocator_bytes=2**40, rss_fraction=0.9)
    assert named(judge(shift(tolerant, BORROWED, 1)), "fail") == {"drop.frees_kv[cycle0-device1-ledger]"}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("off", "red"), [(2_684_518, 0), (2_684_519, 1)])
def test_rss_may_be_off_by_two_percent(off: int, sign: int, red: int) -> None:
    verdicts = list(CHECKS["drop.frees_kv"](shift(ON_CPU, BORROWED, sign * off, "rss")))
    assert len(named(verdicts, "fail")) == red
    verdicts = list(CHECKS["controls.witnesses_agree"](shift(ON_CPU, BORROWED, sign * off, "rss")))
    assert len(named(verdicts, "fail")) == red


def test_the_rss_tolerance_is_the_profiles() -> None:
    halved = shift(ON_CPU, BORROWED, 4 * KV_BYTES // 2, "rss")
    assert passed(judge(with_profile(halved, "tolerances", rss_fraction=0.5)))


@pytest.mark.parametrize(("allowed", "good"), [(0.125, True), (0.124, False)])
def test_log_probabilities_may_be_off_by_the_profiles_tolerance(allowed: float, good: bool) -> None:
    warm = ON_CPU.generates_when("warm")[0].logprobs
    off = edit_generates(ON_CPU, "after_swap_back", logprobs=(warm[0] + 0.125, *warm[1:]))
    assert passed(judge(with_profile(off, "tolerances", logprob=allowed))) is good


def test_the_threshold_itself_is_allowed() -> None:
    assert passed(judge(edit_generates(ON_CPU, "after_rebuild", seconds=3.0 * 2.6)))


def test_a_device_may_be_full() -> None:
    peak = max(phase.devices[0].allocator_bytes or 0 for cycle in ON_TPU.cycles for phase in cycle.phases)
    full = tuple(device.model_copy(update={"limit_bytes": peak}) for device in ON_TPU.devices)
    assert passed(list(CHECKS["params2.fits"](ON_TPU.model_copy(update={"devices": full}))))


def test_one_compilation_is_enough_of_a_control() -> None:
    once = edit_generates(edit_generates(ON_CPU, "cold", compiles=Compiles(backend=1)), "prefix_hit", cached_tokens=1)
    assert passed(judge(edit_generates(once, "after_clear_caches", compiles=Compiles(backend=1))))


@pytest.mark.parametrize(
    ("plant", "red"),
    [
        (lambda record: record, set()),
        (lambda record: shift(record, BORROWED, 2_684_518, "rss"), set()),
        (lambda record: shift(record, BORROWED, 2_684_519, "rss"), {"drop.frees_kv", "controls.witnesses_agree"}),
        (lambda record: edit_generates(record, "after_rebuild", seconds=3.0 * 2.6), set()),
        (
            lambda record: edit_generates(record, "after_rebuild", seconds=3.0 * 2.6 + 0.01),
            {"generate.below_threshold"},
        ),
        (lambda record: edit_generates(record, "after_rebuild", logprobs=(0.0,) * 8), {"generate.same_output"}),
    ],
)
def test_without_the_profiles_numbers_the_documented_ones_hold(
    plant: Callable[[Record], Record], red: set[str]
) -> None:
    verdicts = judge(plant(ON_CPU).model_copy(update={"profile": {"name": "bare"}}))
    assert checks_that(verdicts, "fail") == red
    assert checks_that(verdicts, "inconclusive") == set()


def test_without_the_profiles_numbers_the_allocator_is_exact() -> None:
    bare = ON_TPU.model_copy(update={"profile": {"name": "bare"}})
    assert passed(judge(bare))
    assert not passed(judge(shift(bare, BORROWED, 1, "ledger", "allocator")))
    five = edit_generates(bare, "warm", token_ids=tuple(range(5)))
    assert [v.verdict for v in CHECKS["controls.output_varies"](five)] == ["inconclusive"]


# What is missing -----------------------------------------------------------------------------------------------------

#: Phase → the checks that cannot be judged without it, in its cycle; the base of no_growth matters to all cycles.
NEEDED: dict[PhaseName, set[str]] = {
    "flush_cache_before_kv_drop": {"drop.frees_kv", "drop.leaves_weights", "cycles.no_growth"},
    "kv_cache_dropped": {"drop.frees_kv", "drop.deletes_every_buffer", "drop.leaves_weights", "params2.fits"},
    "sglang_param_dict2_ready": {"params2.fits", "params2.is_its_own_memory", "rebuild.restores_bytes"},
    "kv_cache_rebuilt": {
        "rebuild.restores_bytes",
        "rebuild.same_layout",
        "rebuild.in_place",
        "rebuild.zeroed",
        "generate.no_compile",
    },
    "after_drop_param_dict2": {"cycles.no_growth"},
}


@pytest.mark.parametrize(("phase", "checks"), NEEDED.items(), ids=list(NEEDED))
def test_without_a_phase_its_checks_are_inconclusive(phase: PhaseName, checks: set[str]) -> None:
    verdicts = judge(without_phase(ON_CPU, phase))
    assert checks_that(verdicts, "inconclusive") == checks
    assert checks_that(verdicts, "fail") == set()


def test_a_verdict_names_the_phase_that_is_missing() -> None:
    verdicts = judge(without_phase(ON_CPU, DROPPED, 1))
    message = "cycle1-device0: the run ended before kv_cache_dropped."
    assert only(verdicts, "drop.frees_kv", "cycle1-device0-ledger").message == message
    assert only(verdicts, "params2.fits", "cycle1-device0-ledger").message == message


@pytest.mark.parametrize(
    ("phase", "checks"),
    [
        (DROPPED, {"drop.deletes_every_buffer"}),
        (BORROWING, {"params2.is_its_own_memory"}),
        (REBUILT, {"rebuild.same_layout", "rebuild.in_place", "rebuild.zeroed"}),
    ],
)
def test_without_a_phases_info_its_checks_are_inconclusive(phase: PhaseName, checks: set[str]) -> None:
    verdicts = judge(edit_phase(ON_CPU, phase, lambda found: found.model_copy(update={"info": None})))
    assert checks_that(verdicts, "inconclusive") == checks
    assert checks_that(verdicts, "fail") == set()


#: Kind of generation → the checks that cannot be judged without it.
NEEDED_GENERATES: dict[When, set[str]] = {
    "cold": {
        "controls.compiles_are_counted",
        "generate.no_compile",
        "controls.recompilation_is_seen",
        "generate.below_threshold",
    },
    "warm": {
        "generate.below_threshold",
        "controls.recompilation_is_seen",
        "generate.same_output",
        "controls.output_varies",
        "controls.output_follows_weights",
    },
    "prefix_hit": {"controls.prefix_hit_is_seen", "generate.no_stale_prefix"},
    "after_rebuild": {
        "generate.no_compile",
        "generate.below_threshold",
        "generate.same_output",
        "generate.no_stale_prefix",
    },
    "with_params2": {"generate.no_compile", "controls.output_follows_weights"},
    "after_swap_back": {"generate.no_compile", "generate.same_output"},
    "after_weights": set(),
    "after_clear_caches": {"controls.recompilation_is_seen", "generate.below_threshold"},
}


@pytest.mark.parametrize("when", get_args(When))
def test_without_a_generation_its_checks_are_inconclusive(when: When) -> None:
    verdicts = judge(without_generates(ON_CPU, when))
    assert checks_that(verdicts, "inconclusive") == NEEDED_GENERATES[when]
    assert checks_that(verdicts, "fail") == set()


@pytest.mark.parametrize(
    ("lose", "inconclusive"),
    [
        (lambda record: edit_kv(record, predicted_bytes=None), {"drop.size_is_predicted"}),
        (lambda record: edit_kv(record, predicted_bytes_by_device=None), {"drop.size_is_predicted"}),
        (lambda record: edit_kv(record, claimed_bytes=None), {"drop.size_is_predicted"}),
        (lambda record: edit_cycle(record, 0, swap=None), {"swap.shares_buffers"}),
        (lambda record: edit_info(record, BORROWING, buffers=0), {"params2.is_its_own_memory"}),
        (lambda record: edit_info(record, REBUILT, layouts_before={}), {"rebuild.same_layout"}),
        (lambda record: edit_generates(record, "after_rebuild", logprobs=()), {"generate.same_output"}),
        (lambda record: edit_generates(record, "warm", logprobs=()), {"generate.same_output"}),
        (lambda record: edit_use(record, DROPPED, by_owner={}), set()),
        (lambda record: edit_use(record, PHASES[2], by_owner={}), {"drop.leaves_weights"}),
        (
            lambda record: record.model_copy(
                update={"params": record.params.model_copy(update={"bytes_by_device": {0: WEIGHTS}})}
            ),
            {"params2.fits"},
        ),
    ],
)
def test_what_was_not_measured_is_inconclusive(lose: Callable[[Record], Record], inconclusive: set[str]) -> None:
    assert checks_that(judge(lose(ON_CPU)), "inconclusive") == inconclusive


def test_weights_that_vanish_with_the_drop_are_a_failure() -> None:
    verdict = only(judge(edit_use(ON_CPU, DROPPED, by_owner={})), "drop.leaves_weights", "cycle0-device1")
    assert (verdict.verdict, verdict.expected, verdict.measured) == ("fail", WEIGHTS, 0)


def unsampled(phase: Phase) -> Phase:
    return phase.model_copy(update={"devices": tuple(use for use in phase.devices if use.id != 1)})


@pytest.mark.parametrize("record", [ON_CPU, ON_TPU], ids=["ledger", "ledger-and-allocator"])
def test_a_device_that_was_not_sampled_is_inconclusive(record: Record) -> None:
    witnesses = ("ledger",) if record is ON_CPU else ("ledger", "allocator")
    verdicts = judge(edit_phase(record, PHASES[2], unsampled))
    assert named(verdicts, "inconclusive") == {
        "drop.leaves_weights[cycle0-device1]",
        *(f"drop.frees_kv[cycle0-device1-{witness}]" for witness in witnesses),
        *(f"cycles.no_growth[cycle{cycle}-device1-{witness}]" for cycle in (0, 1) for witness in witnesses),
    }
    message = "cycle0-device1: this device was not sampled."
    assert only(verdicts, "drop.frees_kv", "cycle0-device1-ledger").message == message


def test_an_allocator_that_falls_silent_is_inconclusive() -> None:
    silent = ON_TPU
    for name in PHASES:
        silent = edit_use(edit_use(silent, name, 0, allocator_bytes=None), name, 1, allocator_bytes=None)
    assert named(judge(silent), "inconclusive") == cannot_see("allocator", 1)


def test_an_rss_that_falls_silent_is_inconclusive() -> None:
    silent = edit_phase(ON_CPU, DROPPED, lambda phase: phase.model_copy(update={"rss_bytes": None}))
    assert named(judge(silent), "inconclusive") == {"drop.frees_kv[cycle0-rss]"}


def test_an_allocator_is_judged_only_where_it_speaks() -> None:
    silent = ON_TPU
    for name in PHASES:
        for cycle in (0, 1):
            silent = edit_use(silent, name, cycle, allocator_bytes=None)
    silent = silent.model_copy(
        update={"canaries": tuple(c for c in silent.canaries if (c.witness, c.device) != ("allocator", 1))}
    )
    verdicts = judge(silent)
    assert passed(verdicts)
    heard = {v.scope for v in verdicts if v.witness == "allocator" and v.id == "drop.frees_kv"}
    assert heard == {f"cycle{cycle}-device{device}" for cycle in (0, 1) for device in (0, 2, 3)}
