"""Every check: green on a good record, red on the fault it is there to catch, inconclusive without its control."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import pytest

from kvcycle.checks import CHECKS, SOAK_CHECKS, WEIGHTS_CHECKS, judge, passed
from kvcycle.record import PHASES, Compiles, Phase, PhaseName, Record, Verdict, When
from kvcycle.record_info import RebuildInfo
from tests.unit.records import (
    BORROWED,
    CANARY,
    KV_BYTES,
    LAYOUT,
    LEAVES,
    OTHER,
    OTHER_TOKENS,
    SLOTS,
    WARM_TOKENS,
    WEIGHTS,
    edit_canary,
    edit_cycle,
    edit_generates,
    edit_info,
    edit_kv,
    edit_phase,
    edit_use,
    good_record,
    shift,
    with_profile,
    without_generates,
    without_phase,
)

#: The checks that every record of cycles concerns; the weights' and the soak's have tests of their own.
OF_CYCLES = [check for check in CHECKS if check not in WEIGHTS_CHECKS | SOAK_CHECKS]

ON_CPU = good_record()
ON_TPU = good_record(allocator=True)

DROPPED: PhaseName = "kv_cache_dropped"
BORROWING: PhaseName = "sglang_param_dict2_ready"
REBUILT: PhaseName = "kv_cache_rebuilt"
END: PhaseName = "after_drop_param_dict2"


def only(verdicts: Sequence[Verdict], check: str, name: str) -> Verdict:
    found = [verdict for verdict in verdicts if (verdict.id, verdict.name) == (check, name)]
    assert len(found) == 1, f"{len(found)} verdicts of {check} on {name}"
    return found[0]


def named(verdicts: Sequence[Verdict], outcome: str) -> set[str]:
    return {f"{verdict.id}[{verdict.name}]" for verdict in verdicts if verdict.verdict == outcome}


def checks_that(verdicts: Sequence[Verdict], outcome: str) -> set[str]:
    return {verdict.id for verdict in verdicts if verdict.verdict == outcome}


def compiles_in_rebuild(record: Record) -> Record:
    return edit_phase(record, REBUILT, lambda phase: phase.model_copy(update={"compiles": Compiles(trace=1)}), 1)


def relayout(record: Record, **changes: object) -> Record:
    """The second slot rebuilt with another layout."""
    return edit_info(
        record, REBUILT, layouts_after=dict.fromkeys(SLOTS, LAYOUT) | {SLOTS[1]: LAYOUT.model_copy(update=changes)}
    )


def edit_swap(record: Record, **changes: int) -> Record:
    swap = record.cycles[1].swap
    assert swap is not None
    return edit_cycle(record, 1, swap=swap.model_copy(update=changes))


@dataclass(frozen=True)
class Fault:
    """A planted fault, and the one verdict (``red``: the checks) that it turns red."""

    check: str
    name: str
    plant: Callable[[Record], Record]
    message: str
    likely: str | None
    base: Record = ON_CPU
    also: frozenset[str] = frozenset()
    #: Tells apart what is planted for the same verdict.
    what: str = ""

    def __str__(self) -> str:
        return f"{self.check}[{self.name}]{self.what}"


_HELD = "a buffer was not deleted, or something else still holds it (see drop.deletes_every_buffer)"
_ALIVE = "something of every cycle stays alive: the second set, a copy, a cached result"
_OTHER_SHAPE = "a buffer was rebuilt with another shape, dtype or sharding (see rebuild.same_layout)"
_SHARED = "the second set shares buffers with the first (see params2.is_its_own_memory)"
_ROUNDED = "the engine rounded or cut max_total_tokens (free memory, page size)"
_LAYOUT_DIFFERS = "a rebuilt buffer differs in layout (see rebuild.same_layout)"
_RECOMPILES = "any other layout makes the compiled forward compile again"
_NOT_AS_THEY_WERE = "the rebuilt cache, or the weights, are not what they were"
_UNKNOWN_MEMORY = "memory that no live jax.Array owns (compiled programs, temporaries) grew or shrank"

FAULTS = [
    Fault(
        "drop.frees_kv",
        "cycle0-device1-ledger",
        lambda record: shift(record, BORROWED, 1),
        "kv_cache_dropped, cycle0-device1, ledger: bytes in use changed by -32.00 MiB (-33,556,479 B) since "
        "flush_cache_before_kv_drop, expected -32.00 MiB (-33,556,480 B); off by +1 B, allowed 0 B.",
        _HELD,
    ),
    Fault(
        "drop.frees_kv",
        "cycle1-device2-allocator",
        lambda record: shift(record, BORROWED, -4096, "ledger", "allocator", cycle=1, device=2),
        "kv_cache_dropped, cycle1-device2, allocator: bytes in use changed by -32.01 MiB (-33,560,576 B) since "
        "flush_cache_before_kv_drop, expected -32.00 MiB (-33,556,480 B); off by -4.00 KiB (-4,096 B), allowed 0 B.",
        _HELD,
        base=ON_TPU,
    ),
    Fault(
        "drop.frees_kv",
        "cycle0-rss",
        lambda record: shift(record, BORROWED, 4 * KV_BYTES // 2, "rss"),
        "kv_cache_dropped, cycle0, rss: bytes in use changed by -64.00 MiB (-67,112,960 B) since "
        "flush_cache_before_kv_drop, expected -128.01 MiB (-134,225,920 B); off by +64.00 MiB (67,112,960 B), allowed "
        "2.56 MiB (2,684,518 B).",
        _HELD,
        also=frozenset({"controls.witnesses_agree"}),
    ),
    Fault(
        "drop.deletes_every_buffer",
        "cycle1",
        lambda record: edit_info(record, DROPPED, 1, deleted_buffers=3, missing_delete_method=1),
        "cycle1: buffers deleted (1 had no delete method, 4 were found): 3, expected 4.",
        "a slot holds something else than a jax.Array",
    ),
    Fault(
        "drop.deletes_every_buffer",
        "cycle0",
        lambda record: edit_info(record, DROPPED, buffers=5, missing_delete_method=1),
        "cycle0: buffers deleted (1 had no delete method, 5 were found): 4, expected 4.",
        "a slot holds something else than a jax.Array",
    ),
    Fault(
        "drop.size_is_predicted",
        "device1",
        lambda record: edit_kv(record, bytes_by_device=dict.fromkeys(range(4), KV_BYTES) | {1: KV_BYTES - 256}),
        "device1: KV bytes by the shards, predicted by config arithmetic (4 layers x …): 32.00 MiB "
        "(33,556,224 B), expected 32.00 MiB (33,556,480 B); off by -256 B.",
        _ROUNDED,
    ),
    Fault(
        "drop.size_is_predicted",
        "engine_claim",
        lambda record: edit_kv(record, claimed_bytes=4 * KV_BYTES + 1),
        "engine_claim: KV bytes by the engine's own claim, predicted by config arithmetic: 128.01 MiB "
        "(134,225,921 B), expected 128.01 MiB (134,225,920 B); off by +1 B.",
        _ROUNDED,
    ),
    Fault(
        "drop.leaves_weights",
        "cycle0-device1",
        lambda record: edit_use(record, DROPPED, by_owner={"weights": WEIGHTS - 1024, "other": OTHER + 1024}),
        "cycle0-device1: bytes of weights after the drop: 5.27 MiB (5,525,504 B), expected 5.27 MiB "
        "(5,526,528 B); off by -1.00 KiB (-1,024 B).",
        "the drop reached an array that belongs to the weights",
    ),
    Fault(
        "params2.fits",
        "cycle0-device1-ledger",
        lambda record: shift(record, BORROWED[1:], -WEIGHTS),
        "sglang_param_dict2_ready, cycle0-device1, ledger: bytes in use changed by 0 B since kv_cache_dropped, "
        "expected +5.27 MiB (5,526,528 B); off by -5.27 MiB (-5,526,528 B), allowed 0 B.",
        _SHARED,
    ),
    Fault(
        "params2.fits",
        "cycle0-device1-allocator",
        lambda record: shift(record, BORROWED[1:], 512, "ledger", "allocator"),
        "sglang_param_dict2_ready, cycle0-device1, allocator: bytes in use changed by +5.27 MiB (5,527,040 B) since "
        "kv_cache_dropped, expected +5.27 MiB (5,526,528 B); off by +512 B, allowed 0 B.",
        _SHARED,
        base=ON_TPU,
    ),
    Fault(
        "params2.fits",
        "cycle0",
        lambda record: edit_info(record, BORROWING, error="A second parameter set could not be allocated: no room."),
        "cycle0: A second parameter set could not be allocated: no room.",
        "the freed memory is less than a second set, or too fragmented",
    ),
    Fault(
        "params2.fits",
        "cycle1-device0-capacity",
        lambda record: record.model_copy(
            update={"devices": (record.devices[0].model_copy(update={"limit_bytes": 44_609_639}), *record.devices[1:])}
        ),
        "kv_cache_rebuilt, cycle1-device0: 42.54 MiB (44,609,640 B) in use, but the device has 42.54 MiB "
        "(44,609,639 B).",
        None,
    ),
    Fault(
        "params2.is_its_own_memory",
        "cycle1",
        lambda record: edit_info(record, BORROWING, 1, buffers_shared_with_engine=3),
        "cycle1: buffers of the second set (of 204) that are the engine's own: 3, expected 0.",
        "device_put to the same sharding returns the same buffer: copy",
    ),
    Fault(
        "swap.shares_buffers",
        "cycle1",
        lambda record: edit_swap(record, model_shared=0),
        "cycle1: parameters that are the given arrays (runner 51 and model 0 of the second set, runner 51 of the "
        "first after the swap back): 102, expected 153.",
        "the engine copied the set, or keeps a second list of its own",
        what="-model",
    ),
    Fault(
        "swap.shares_buffers",
        "cycle1",
        lambda record: edit_swap(record, runner_shared=LEAVES - 1),
        "cycle1: parameters that are the given arrays (runner 50 and model 51 of the second set, runner 51 of the "
        "first after the swap back): 152, expected 153.",
        "the engine copied the set, or keeps a second list of its own",
        what="-runner",
    ),
    Fault(
        "swap.shares_buffers",
        "cycle1",
        lambda record: edit_swap(record, restored=LEAVES - 1),
        "cycle1: parameters that are the given arrays (runner 51 and model 51 of the second set, runner 50 of the "
        "first after the swap back): 152, expected 153.",
        "the engine copied the set, or keeps a second list of its own",
        what="-restored",
    ),
    Fault(
        "rebuild.restores_bytes",
        "cycle0-device3-ledger",
        lambda record: shift(record, BORROWED[2:], -1, device=3),
        "kv_cache_rebuilt, cycle0-device3, ledger: bytes in use changed by +32.00 MiB (33,556,479 B) since "
        "sglang_param_dict2_ready, expected +32.00 MiB (33,556,480 B); off by -1 B, allowed 0 B.",
        _OTHER_SHAPE,
    ),
    Fault(
        "rebuild.restores_bytes",
        "cycle1-device0-allocator",
        lambda record: shift(record, BORROWED[2:], KV_BYTES, "ledger", "allocator", cycle=1, device=0),
        "kv_cache_rebuilt, cycle1-device0, allocator: bytes in use changed by +64.00 MiB (67,112,960 B) since "
        "sglang_param_dict2_ready, expected +32.00 MiB (33,556,480 B); off by +32.00 MiB (33,556,480 B), allowed 0 B.",
        _OTHER_SHAPE,
        base=ON_TPU,
    ),
    Fault(
        "rebuild.restores_bytes",
        "cycle1-rss",
        lambda record: shift(record, BORROWED[2:], -2_684_519, "rss", cycle=1),
        "kv_cache_rebuilt, cycle1, rss: bytes in use changed by +125.45 MiB (131,541,401 B) since "
        "sglang_param_dict2_ready, expected +128.01 MiB (134,225,920 B); off by -2.56 MiB (-2,684,519 B), allowed "
        "2.56 MiB (2,684,518 B).",
        _OTHER_SHAPE,
        also=frozenset({"controls.witnesses_agree"}),
    ),
    Fault(
        "rebuild.same_layout",
        "cycle0",
        lambda record: relayout(record, sharding="P() over {'data': 1, 'tensor': 4}", committed=False),
        "cycle0: slots (of 4) whose layout differs after the rebuild; first: token_to_kv_pool.kv_buffer[1]: sharding "
        "was P('data', None, 'tensor', None, None) over {'data': 1, 'tensor': 4} and is P() over "
        "{'data': 1, 'tensor': 4}, committed was True and is False: 1, expected 0.",
        _RECOMPILES,
        what="-sharding",
    ),
    Fault(
        "rebuild.same_layout",
        "cycle0",
        lambda record: edit_info(record, REBUILT, layouts_after=dict.fromkeys(SLOTS[1:], LAYOUT)),
        "cycle0: slots (of 4) whose layout differs after the rebuild; first: token_to_kv_pool.kv_buffer[0]: is gone: "
        "1, expected 0.",
        _RECOMPILES,
        what="-gone",
    ),
    Fault(
        "rebuild.same_layout",
        "cycle0",
        lambda record: edit_info(record, REBUILT, layouts_after=dict.fromkeys([*SLOTS, "pool.extra"], LAYOUT)),
        "cycle0: slots (of 4) whose layout differs after the rebuild; first: pool.extra: is new: 1, expected 0.",
        _RECOMPILES,
        what="-new",
    ),
    Fault(
        "rebuild.in_place",
        "cycle1",
        lambda record: edit_info(record, REBUILT, 1, moved_owners=SLOTS[:2]),
        "cycle1: slots (of 4) whose owner is another object than before the drop; first: "
        "token_to_kv_pool.kv_buffer[0]: 2, expected 0.",
        "the pool object or its list was replaced: the allocator and the runner then disagree",
    ),
    Fault(
        "rebuild.zeroed",
        "cycle0",
        lambda record: edit_info(record, REBUILT, nonzero_slots=SLOTS[3:]),
        "cycle0: slots (of 4) that hold anything but zeros after the rebuild; first: token_to_kv_pool.kv_buffer[3]: 1, "
        "expected 0.",
        "the buffers were not initialised: NaNs there can reach the attention's padding",
    ),
    Fault(
        "generate.no_compile",
        "cycle1-rebuild",
        compiles_in_rebuild,
        "cycle1-rebuild: compilations and traces while rebuilding: 1, expected 0.",
        _LAYOUT_DIFFERS,
    ),
    Fault(
        "generate.no_compile",
        "cycle0-generate",
        lambda record: edit_generates(record, "after_rebuild", 0, compiles=Compiles(lower=2)),
        "cycle0-generate: compilations in the generation after_rebuild (2 lowered, 0 compiled): 2, expected 0.",
        _LAYOUT_DIFFERS,
    ),
    Fault(
        "generate.no_compile",
        "cycle1-params2",
        lambda record: edit_generates(record, "with_params2", 1, compiles=Compiles(backend=1)),
        "cycle1-params2: compilations in the generation with_params2 (0 lowered, 1 compiled): 1, expected 0.",
        _LAYOUT_DIFFERS,
    ),
    Fault(
        "generate.no_compile",
        "cycle1-swap_back",
        lambda record: edit_generates(record, "after_swap_back", 1, compiles=Compiles(lower=1, backend=1)),
        "cycle1-swap_back: compilations in the generation after_swap_back (1 lowered, 1 compiled): 2, expected 0.",
        _LAYOUT_DIFFERS,
    ),
    Fault(
        "generate.below_threshold",
        "cycle1",
        lambda record: edit_generates(record, "after_rebuild", 1, seconds=7.9),
        "cycle1: the generation after the rebuild took 7.9 s, allowed 7.8 s (cold 17 s).",
        "it compiled (see generate.no_compile)",
    ),
    Fault(
        "generate.below_threshold",
        "cycle0",
        lambda record: edit_generates(edit_generates(record, "cold", seconds=5.5), "after_rebuild", 0, seconds=2.9),
        "cycle0: the generation after the rebuild took 2.9 s, allowed 2.75 s (cold 5.5 s).",
        "it compiled (see generate.no_compile)",
        base=edit_generates(ON_CPU, "after_rebuild", seconds=2.7),
    ),
    Fault(
        "generate.same_output",
        "cycle1-generate",
        lambda record: edit_generates(record, "after_rebuild", 1, token_ids=(*WARM_TOKENS[:2], 7, *WARM_TOKENS[3:])),
        "cycle1-generate: token ids (of 8) unlike the warm generation's; first at position 2: 182 became 7: 1, "
        "expected 0.",
        _NOT_AS_THEY_WERE,
    ),
    Fault(
        "generate.same_output",
        "cycle0-swap_back",
        lambda record: edit_generates(record, "after_swap_back", 0, token_ids=(*WARM_TOKENS, 1, 2)),
        "cycle0-swap_back: token ids (of 8) unlike the warm generation's: 2, expected 0.",
        _NOT_AS_THEY_WERE,
    ),
    Fault(
        "generate.same_output",
        "cycle0-generate_logprobs",
        lambda record: edit_generates(record, "after_rebuild", 0, logprobs=tuple(-4.0 for _ in WARM_TOKENS)),
        "cycle0-generate_logprobs: log-probabilities differ from the warm generation's by at most 0.625, allowed 0.",
        "the arithmetic differs: another executable, another layout, or other contents",
    ),
    Fault(
        "generate.no_stale_prefix",
        "cycle0",
        lambda record: edit_generates(record, "after_rebuild", 0, cached_tokens=4),
        "cycle0: tokens that the generation after the rebuild took from the prefix cache: 4, expected 0.",
        "the drop did not flush the prefix cache: its keys and values are zeros now",
    ),
    Fault(
        "cycles.no_growth",
        "cycle1-device1-ledger",
        lambda record: shift(record, [END], 1, cycle=1),
        "after_drop_param_dict2, cycle1-device1, ledger: bytes in use changed by +1 B since "
        "flush_cache_before_kv_drop, expected 0 B; off by +1 B, allowed 0 B.",
        _ALIVE,
    ),
    Fault(
        "cycles.no_growth",
        "cycle0-device1-allocator",
        lambda record: shift(record, [END], WEIGHTS, "ledger", "allocator"),
        "after_drop_param_dict2, cycle0-device1, allocator: bytes in use changed by +5.27 MiB (5,526,528 B) since "
        "flush_cache_before_kv_drop, expected 0 B; off by +5.27 MiB (5,526,528 B), allowed 0 B.",
        _ALIVE,
        base=ON_TPU,
    ),
    Fault(
        "controls.witnesses_agree",
        "cycle0-device1-allocator",
        lambda record: shift(record, ["engine_ready"], -2048, "allocator"),
        "generate_result, cycle0-device1: the change by the allocator less the change by the ledger is +2.00 KiB "
        "(2,048 B) at most, allowed 0 B.",
        _UNKNOWN_MEMORY,
        base=ON_TPU,
    ),
    Fault(
        "controls.witnesses_agree",
        "cycle1-rss",
        lambda record: shift(record, PHASES[3:], 2_684_519, "rss", cycle=1),
        "kv_cache_dropped, cycle1: the change by the rss less the change by the ledger is +2.56 MiB (2,684,519 B) at "
        "most, allowed 2.56 MiB (2,684,518 B).",
        _UNKNOWN_MEMORY,
        also=frozenset({"drop.frees_kv"}),
    ),
]


@pytest.mark.parametrize(
    "record",
    [ON_CPU, ON_TPU, good_record(1, 1), good_record(3, 2, True)],
    ids=["cpu", "tpu", "one-device", "three-cycles"],
)
def test_a_good_record_passes_every_check(record: Record) -> None:
    verdicts = judge(record)
    assert {verdict.id: verdict.verdict for verdict in verdicts} == dict.fromkeys(OF_CYCLES, "pass")
    assert checks_that(verdicts, "pass") == {verdict.id for verdict in verdicts}
    assert passed(verdicts)
    assert [verdict.causes for verdict in verdicts if verdict.causes] == []


def test_each_verdict_has_a_name_of_its_own() -> None:
    names = [(verdict.id, verdict.name) for verdict in judge(ON_TPU)]
    assert len(names) == len(set(names)) == 140


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_turns_its_check_red(fault: Fault) -> None:
    verdicts = judge(fault.plant(fault.base))
    assert checks_that(verdicts, "fail") == {fault.check, *fault.also}
    assert checks_that(verdicts, "inconclusive") == set()
    verdict = only(verdicts, fault.check, fault.name)
    assert verdict.verdict == "fail"
    assert verdict.message == fault.message
    assert verdict.causes[:1] == ((fault.likely,) if fault.likely else ())
    assert not passed(verdicts)


def test_every_check_that_can_fail_has_a_planted_fault() -> None:
    # A control never fails: it says inconclusive, and so do the checks that it is the control of (below).
    can_fail = {check for check in OF_CYCLES if not check.startswith("controls.")} | {"controls.witnesses_agree"}
    assert {fault.check for fault in FAULTS} == can_fail
    assert {control.check for control in LOST_CONTROLS} == set(OF_CYCLES) - can_fail


def test_a_verdict_carries_its_numbers() -> None:
    verdict = only(judge(shift(ON_CPU, BORROWED, 1)), "drop.frees_kv", "cycle0-device1-ledger")
    assert (verdict.scope, verdict.witness, verdict.unit) == ("cycle0-device1", "ledger", "bytes")
    assert (verdict.expected, verdict.measured) == (-KV_BYTES, -KV_BYTES + 1)


@pytest.mark.parametrize("cycle", [0, 1])
@pytest.mark.parametrize("device", [0, 3])
def test_one_byte_on_one_device_is_one_red_verdict(cycle: int, device: int) -> None:
    verdicts = judge(shift(ON_CPU, BORROWED, 1, cycle=cycle, device=device))
    assert named(verdicts, "fail") == {f"drop.frees_kv[cycle{cycle}-device{device}-ledger]"}


# Controls ------------------------------------------------------------------------------------------------------------


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


def cannot_see(witness: str, device: int | None) -> frozenset[str]:
    """The verdicts that rest on a witness, as they are named."""
    place = "" if device is None else f"-device{device}"
    checks = ["drop.frees_kv", "rebuild.restores_bytes"]
    if device is not None:
        checks += ["params2.fits", "cycles.no_growth"]
    return frozenset(f"{check}[cycle{cycle}{place}-{witness}]" for check in checks for cycle in (0, 1))


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


# Verdicts on a whole run ---------------------------------------------------------------------------------------------


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
