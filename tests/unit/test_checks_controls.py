"""The controls: without its own, a pass is inconclusive; a failure stays one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kvcycle.checks import CHECKS, judge, passed
from kvcycle.record import Record
from kvcycle.record_parts import Compiles, When
from tests.unit.planted import (
    OF_CYCLES,
    ON_CPU,
    ON_TPU,
    cannot_see,
    checks_that,
    compiles_in_rebuild,
    named,
    only,
)
from tests.unit.records import (
    BORROWED,
    CANARY,
    KV_BYTES,
    OTHER,
    WARM_TOKENS,
    WEIGHTS,
    edit_canary,
    edit_generates,
    edit_kv,
    shift,
    with_profile,
)
from tests.unit.test_checks_faults import FAULTS


@dataclass(frozen=True)
class LostControl:
    """A control that did not see what it must see, and the checks that prove nothing without it."""

    check: str
    name: str
    lose: Callable[[Record], Record]
    message: str
    blinds: frozenset[str] = frozenset()
    base: Record = ON_CPU

    def __str__(self) -> str:
        return f"{self.check}[{self.name}]"


def constant_output(record: Record) -> Record:
    whens: tuple[When, ...] = ("warm", "after_rebuild", "after_swap_back")
    for when in whens:
        record = edit_generates(record, when, token_ids=(7,) * 8)
    return record


_PARTS = ("generate", "swap_back")
LOST_CONTROLS = [
    LostControl(
        "controls.witness_sees_allocation",
        "device1-ledger",
        lambda record: edit_canary(record, "ledger", 1, rise_bytes=CANARY - 1),
        "device1: of 16.00 MiB (16,777,216 B) allocated and freed the ledger saw +16.00 MiB (16,777,215 B) and "
        "-16.00 MiB (-16,777,216 B).",
        cannot_see("ledger", 1),
    ),
    LostControl(
        "controls.witness_sees_allocation",
        "device2-allocator",
        lambda record: edit_canary(record, "allocator", 2, rise_bytes=0, fall_bytes=0),
        "device2: of 16.00 MiB (16,777,216 B) allocated and freed the allocator saw 0 B and 0 B.",
        cannot_see("allocator", 2),
        base=ON_TPU,
    ),
    LostControl(
        "controls.witness_sees_allocation",
        "device0-allocator",
        lambda record: edit_canary(record, "allocator", 0, fall_bytes=0),
        "device0: of 16.00 MiB (16,777,216 B) allocated and freed the allocator saw +16.00 MiB (16,777,216 B) and 0 B.",
        cannot_see("allocator", 0),
        base=ON_TPU,
    ),
    LostControl(
        "controls.witness_sees_allocation",
        "run-rss",
        lambda record: edit_canary(record, "rss", None, fall_bytes=CANARY),
        "run: of 64.00 MiB (67,108,864 B) allocated and freed the rss saw +64.02 MiB (67,129,344 B) and -16.00 MiB "
        "(-16,777,216 B).",
        cannot_see("rss", None),
    ),
    LostControl(
        "controls.witness_saw_boot",
        "device0-ledger",
        lambda record: record.model_copy(
            update={"params": record.params.model_copy(update={"bytes_by_device": {0: WEIGHTS + OTHER + 1}})}
        ),
        "device0: the boot brought +37.27 MiB (39,083,112 B) by the ledger, weights and KV cache are 37.27 MiB "
        "(39,083,113 B).",
        frozenset(f"params2.fits[cycle{cycle}-device{device}-ledger]" for cycle in (0, 1) for device in (1, 2, 3)),
        # The second set's size is expected from the same number, so let there be as much of it.
        base=shift(shift(ON_CPU, BORROWED[1:], 105, device=0), BORROWED[1:], 105, device=0, cycle=1),
    ),
    LostControl(
        "controls.compiles_are_counted",
        "run",
        lambda record: edit_generates(record, "cold", compiles=Compiles()),
        "run: the counter saw 0 compilations in the cold generation and 19 in the boot.",
        frozenset(
            f"generate.no_compile[cycle{cycle}-{part}]" for cycle in (0, 1) for part in ("rebuild", "params2", *_PARTS)
        ),
    ),
    LostControl(
        "controls.recompilation_is_seen",
        "compiles",
        lambda record: edit_generates(record, "after_clear_caches", compiles=Compiles(trace=9)),
        "compiles: after jax.clear_caches() the generation compiled 0 times.",
        frozenset({"generate.below_threshold[cycle0]", "generate.below_threshold[cycle1]"}),
    ),
    LostControl(
        "controls.recompilation_is_seen",
        "latency",
        lambda record: edit_generates(record, "after_clear_caches", seconds=7.8),
        "latency: after jax.clear_caches() the generation took 7.8 s (warm 2.6 s), so a threshold of 7.8 s cannot "
        "tell it apart.",
        frozenset({"generate.below_threshold[cycle0]", "generate.below_threshold[cycle1]"}),
    ),
    LostControl(
        "controls.output_varies",
        "run",
        constant_output,
        "run: the output has 1 distinct tokens, at least 6 are needed for a comparison to mean something.",
        frozenset(
            f"generate.same_output[cycle{cycle}-{part}{what}]"
            for cycle in (0, 1)
            for part in _PARTS
            for what in ("", "_logprobs")
        ),
    ),
    LostControl(
        "controls.output_follows_weights",
        "cycle1",
        lambda record: edit_generates(record, "with_params2", 1, token_ids=WARM_TOKENS),
        "cycle1: on the second, perturbed set 0 of 8 tokens differ.",
    ),
    LostControl(
        "controls.prefix_hit_is_seen",
        "run",
        lambda record: edit_generates(record, "prefix_hit", cached_tokens=0),
        "run: a repeated prompt took 0 tokens from the prefix cache.",
        frozenset({"generate.no_stale_prefix[cycle0]", "generate.no_stale_prefix[cycle1]"}),
    ),
]


#: A control's numbers on the good record: what it had to see at least (or exactly), and what it saw.
SEEN: dict[tuple[str, str], tuple[float, float]] = {
    ("controls.witness_sees_allocation", "device0-ledger"): (CANARY, CANARY),
    ("controls.witness_sees_allocation", "run-rss"): (4 * CANARY, 4 * CANARY),
    ("controls.witness_saw_boot", "device0-ledger"): (KV_BYTES + WEIGHTS, KV_BYTES + WEIGHTS + OTHER),
    ("controls.witnesses_agree", "cycle0-rss"): (0, 0),
    ("controls.compiles_are_counted", "run"): (1, 12),
    ("controls.recompilation_is_seen", "compiles"): (1, 12),
    ("controls.recompilation_is_seen", "latency"): (3.0 * 2.6, 18.0),
    ("controls.output_varies", "run"): (6, 8),
    ("controls.output_follows_weights", "cycle0"): (1, 8),
    ("controls.prefix_hit_is_seen", "run"): (1, 4),
}


def test_a_control_carries_its_numbers() -> None:
    verdicts = judge(ON_CPU)
    assert {check for check, _ in SEEN} == {check for check in CHECKS if check.startswith("controls.")}
    for (check, name), (expected, measured) in SEEN.items():
        verdict = only(verdicts, check, name)
        assert (verdict.expected, verdict.measured) == (pytest.approx(expected), measured)


@pytest.mark.parametrize("control", LOST_CONTROLS, ids=str)
def test_without_its_control_a_pass_proves_nothing(control: LostControl) -> None:
    verdicts = judge(control.lose(control.base))
    assert checks_that(verdicts, "fail") == set()
    assert named(verdicts, "inconclusive") == {str(control), *control.blinds}
    assert only(verdicts, control.check, control.name).message == control.message
    assert not passed(verdicts)


def test_a_blind_witness_says_in_its_verdict_why_it_proves_nothing() -> None:
    verdicts = judge(edit_canary(ON_CPU, "ledger", 1, rise_bytes=0))
    assert only(verdicts, "drop.frees_kv", "cycle0-device1-ledger").message == (
        "kv_cache_dropped, cycle0-device1, ledger: bytes in use changed by -32.00 MiB (-33,556,480 B) since "
        "flush_cache_before_kv_drop, expected -32.00 MiB (-33,556,480 B); but the ledger did not see an allocation of "
        "known size (controls.witness_sees_allocation), so this proves nothing."
    )


def test_a_failure_stays_a_failure_without_its_control() -> None:
    without_controls: list[tuple[Record, str]] = [
        (edit_canary(shift(ON_CPU, BORROWED, 1), "ledger", 1, rise_bytes=0), "drop.frees_kv"),
        (edit_generates(compiles_in_rebuild(ON_CPU), "cold", compiles=Compiles()), "generate.no_compile"),
        (edit_generates(constant_output(ON_CPU), "after_rebuild", token_ids=(8,) * 8), "generate.same_output"),
    ]
    for record, check in without_controls:
        assert checks_that(judge(record), "fail") == {check}


def test_without_any_canary_no_memory_verdict_is_a_pass() -> None:
    verdicts = judge(ON_TPU.model_copy(update={"canaries": ()}))
    witnessed = {v.verdict for v in verdicts if v.id in ("drop.frees_kv", "params2.fits", "cycles.no_growth")}
    assert witnessed == {"inconclusive"}
    assert only(verdicts, "controls.witness_sees_allocation", "run").message == (
        "run: no allocation of known size was made."
    )


def test_a_boot_that_precompiles_may_count_its_compilations_instead() -> None:
    silent = edit_generates(ON_CPU, "cold", compiles=Compiles())
    assert passed(judge(with_profile(silent, "engine", disable_precompile=False)))
    no_boot = with_profile(silent, "engine", disable_precompile=False).model_copy(update={"boot": None})
    assert checks_that(judge(no_boot), "inconclusive") == {"controls.compiles_are_counted", "generate.no_compile"}


def test_an_engine_that_the_user_booted_has_no_boot_to_see() -> None:
    verdicts = judge(ON_CPU.model_copy(update={"boot": None}))
    assert "controls.witness_saw_boot" not in {verdict.id for verdict in verdicts}
    assert passed(verdicts)


def test_a_boot_of_nothing_is_no_control() -> None:
    nothing = ON_CPU.model_copy(update={"params": ON_CPU.params.model_copy(update={"bytes_by_device": {}})})
    verdicts = list(CHECKS["controls.witness_saw_boot"](edit_kv(nothing, bytes_by_device={})))
    assert [verdict.verdict for verdict in verdicts] == ["inconclusive"] * 4


@pytest.mark.parametrize(("distinct", "outcome"), [(6, "pass"), (5, "inconclusive")])
def test_output_varies_from_the_profiles_number_of_tokens_on(distinct: int, outcome: str) -> None:
    record = edit_generates(ON_CPU, "warm", token_ids=tuple(range(distinct)))
    assert [v.verdict for v in CHECKS["controls.output_varies"](record)] == [outcome]


# Tolerances ----------------------------------------------------------------------------------------------------------


def test_every_check_that_can_fail_has_a_planted_fault_and_every_control_a_lost_one() -> None:
    # A control never fails: it says inconclusive, and so do the checks that it is the control of.
    can_fail = {check for check in OF_CYCLES if not check.startswith("controls.")} | {"controls.witnesses_agree"}
    assert {fault.check for fault in FAULTS} == can_fail
    assert {control.check for control in LOST_CONTROLS} == set(OF_CYCLES) - can_fail
