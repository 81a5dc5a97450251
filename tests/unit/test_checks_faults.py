"""Every check of a cycle: green on a good record, red on the fault it is there to catch, and on nothing else."""

from __future__ import annotations

import pytest

from kvcycle.checks import judge, passed
from kvcycle.record import Record
from kvcycle.record_parts import PHASES, Compiles
from tests.unit.planted import (
    BORROWING,
    DROPPED,
    END,
    OF_CYCLES,
    ON_CPU,
    ON_TPU,
    REBUILT,
    Fault,
    checks_that,
    compiles_in_rebuild,
    edit_swap,
    only,
    relayout,
)
from tests.unit.records import (
    BORROWED,
    KV_BYTES,
    LAYOUT,
    LEAVES,
    OTHER,
    SLOTS,
    WARM_TOKENS,
    WEIGHTS,
    edit_generates,
    edit_info,
    edit_kv,
    edit_use,
    good_record,
    shift,
)

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


def test_a_verdict_carries_its_numbers() -> None:
    verdict = only(judge(shift(ON_CPU, BORROWED, 1)), "drop.frees_kv", "cycle0-device1-ledger")
    assert (verdict.scope, verdict.witness, verdict.unit) == ("cycle0-device1", "ledger", "bytes")
    assert (verdict.expected, verdict.measured) == (-KV_BYTES, -KV_BYTES + 1)
