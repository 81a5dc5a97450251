"""Every word of every kind of verdict, as ``verdicts.txt`` beside this file has it.

After a change that is meant, write the file anew and read its diff: ``python -m tests.unit.test_verdict_texts``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from kvcycle.checks import judge
from kvcycle.record import Record
from kvcycle.record_parts import PHASES, WEIGHTS_PHASES, Compiles, Verdict, When
from tests.unit.records import (
    BORROWED,
    DIGESTS,
    LAYOUT,
    LOGPROBS,
    SLOTS,
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
from tests.unit.soaks import edit_soak, good_soak, hold, hold_before, set_points, soak_of

FILE = Path(__file__).parent / "verdicts.txt"


def logprobs() -> tuple[float, ...]:
    return (LOGPROBS[0] - 0.25, *LOGPROBS[1:])


def all_wrong(record: Record) -> Record:
    """Everything wrong that a record can be wrong in at once, short of lacking something."""
    record = shift(record, BORROWED, 1, "ledger", device=0)
    record = shift(record, BORROWED[1:], 2, "ledger", device=0)
    record = shift(record, PHASES[5:6], -(2**21), "ledger", device=0)
    record = shift(record, PHASES[7:], 4096, "ledger", device=0)
    record = edit_use(record, "kv_cache_dropped", device=0, by_owner={"weights": 1})
    record = edit_info(record, "kv_cache_dropped", deleted_buffers=3, missing_delete_method=1, buffers=5)
    record = edit_info(record, "sglang_param_dict2_ready", buffers_shared_with_engine=7, error="No room.")
    layouts = {SLOTS[0]: LAYOUT.model_copy(update={"dtype": "int8", "committed": False}), "new": LAYOUT}
    record = edit_info(record, "kv_cache_rebuilt", layouts_after=layouts, moved_owners=("a", "b"), nonzero_slots=("c",))
    compiled = Compiles(trace=1, lower=2, backend=4)
    record = edit_phase(record, "kv_cache_rebuilt", lambda phase: phase.model_copy(update={"compiles": compiled}))
    whens: tuple[When, ...] = ("after_rebuild", "after_swap_back", "with_params2")
    for when in whens:
        record = edit_generates(
            record, when, token_ids=(1, 2, 3), logprobs=logprobs(), seconds=99.5, cached_tokens=5, compiles=compiled
        )
    record = edit_kv(record, bytes_by_device={0: 5}, claimed_bytes=6)
    swap = record.cycles[0].swap
    assert swap is not None
    return edit_cycle(record, 0, swap=swap.model_copy(update={"runner_shared": 1, "model_shared": 2, "restored": 3}))


def records() -> Iterator[tuple[str, Record]]:
    """(what it is, record), each small."""
    cpu, tpu = good_record(cycles=1, devices=1), good_record(cycles=1, devices=1, allocator=True)
    yield "good, on virtual devices", cpu
    yield "good, on a TPU", tpu
    yield "all wrong, on virtual devices", all_wrong(cpu)
    allocator = shift(all_wrong(tpu), BORROWED, 77, "allocator", device=0)
    allocator = shift(allocator, BORROWED[2:], -5, "allocator", device=0)
    full = allocator.devices[0].model_copy(update={"limit_bytes": 1000})
    yield "all wrong, on a TPU", allocator.model_copy(update={"devices": (full,)})
    other = with_profile(tpu, "tolerances", allocator_bytes=512, logprob=0.3)
    other = with_profile(other, "thresholds", latency_factor_of_warm=1.05, min_distinct_tokens=9)
    other = with_profile(other, "engine", disable_precompile=False)
    other = edit_generates(edit_generates(other, "cold", compiles=Compiles()), "after_rebuild", logprobs=logprobs())
    yield "another profile", shift(other, BORROWED, 512, "allocator", device=0)
    yield "another fraction of cold", with_profile(cpu, "thresholds", latency_fraction_of_cold=0.1)
    yield (
        "another fraction of resident memory",
        shift(with_profile(cpu, "tolerances", rss_fraction=0.5), BORROWED, 2**24, "rss", device=0),
    )
    slow = edit_generates(edit_generates(cpu, "warm", seconds=9.0), "after_rebuild", logprobs=logprobs())
    cold, first, *others = slow.generates
    first = first.model_copy(update={"token_ids": (*first.token_ids[1:], 5)})  # the first warm one is compared with
    slow = slow.model_copy(update={"generates": (cold, first, *others)})
    yield "no profile: every default", slow.model_copy(update={"profile": {}})
    two = good_record(cycles=2, devices=2, allocator=True)
    late = tuple(generate for generate in two.generates if generate.cycle or generate.when in ("cold", "warm"))
    yield "only the second cycle", edit_cycle(two, 0, phases=(), swap=None).model_copy(update={"generates": late})
    phases = tuple(
        phase.model_copy(update={"devices": phase.devices[1:], "ledger_bytes_sum": phase.devices[1].ledger_bytes})
        for phase in two.cycles[1].phases
    )
    yield "a first device without samples", edit_cycle(two, 1, phases=phases)
    yield "residues", edit_cycle(cpu, 0, residue_before=({0: 120}, {}), residue_after=({0: 130}, {0: 90}))
    yield (
        "residues of nobody",
        edit_cycle(edit_use(cpu, "flush_cache_before_kv_drop", device=0, by_owner={}), 0, residue_before=({}, {0: 0})),
    )
    yield "resident memory", shift(cpu, BORROWED, -(2**24), "rss", device=0)
    yield "no canaries", tpu.model_copy(update={"canaries": ()})
    blind = edit_canary(edit_canary(cpu, "ledger", 0, rise_bytes=1, fall_bytes=-2), "rss", None, fall_bytes=0)
    yield "blind witnesses", blind
    yield (
        "a boot that brought nothing",
        tpu.model_copy(update={"boot": tpu.boot and tpu.boot.model_copy(update={"after": tpu.boot.before})}),
    )
    yield "no generations", cpu.model_copy(update={"generates": ()})
    yield "generations without log-probabilities", edit_generates(cpu, "after_rebuild", logprobs=())
    quiet = edit_generates(cpu, "cold", compiles=Compiles())
    quiet = edit_generates(quiet, "after_clear_caches", compiles=Compiles(), seconds=0.5)
    quiet = edit_generates(quiet, "warm", token_ids=(7, 7, 7))
    quiet = edit_generates(quiet, "prefix_hit", cached_tokens=0)
    yield "controls that see nothing", edit_generates(quiet, "with_params2", token_ids=(7, 7, 7))
    yield "no warm generation", without_generates(cpu, "warm")
    yield "generation left out", with_profile(without_generates(cpu, "cold"), "cycle", generate=False)
    yield (
        "no prediction",
        edit_kv(cpu, predicted_bytes=None, predicted_bytes_by_device=None, predicted_by=None, predicted_how=None),
    )
    yield "no claim", edit_kv(cpu, claimed_bytes=None)
    yield "a device of unknown size", edit_kv(cpu, bytes_by_device={}, predicted_bytes_by_device={1: 2})
    for name in PHASES[2:]:
        yield f"without {name}", without_phase(tpu, name)
    yield "not swapped", edit_cycle(cpu, 0, swap=None)
    nothing: dict[str, object] = {"info": None, "devices": (), "ledger_bytes_sum": 0, "rss_bytes": None}
    phases = tuple(phase.model_copy(update=nothing) for phase in cpu.cycles[0].phases)
    yield "nothing sampled", edit_cycle(cpu, 0, phases=phases)
    yield "no cycles", with_profile(cpu.model_copy(update={"cycles": ()}), "cycle", cycles=2)
    yield "one cycle of two", with_profile(cpu, "cycle", cycles=2)
    yield "empty", cpu.model_copy(update={"cycles": (), "generates": (), "canaries": (), "devices": (), "boot": None})
    yield "a buffer that survives", edit_info(cpu, "kv_cache_dropped", deleted_buffers=3)
    yield "a slot without delete", edit_info(cpu, "kv_cache_dropped", missing_delete_method=1)
    bare = tpu.model_copy(update={"profile": {}})
    yield "no profile, a byte more by the allocator", shift(bare, BORROWED, 1, "allocator", device=0)
    nobody = edit_use(cpu, "flush_cache_before_kv_drop", device=0, by_owner={"weights": WEIGHTS})
    yield "a residue of nobody before", edit_cycle(nobody, 0, residue_before=({0: 5},))
    roomy = two.devices[0].model_copy(update={"limit_bytes": None})
    full = two.devices[1].model_copy(update={"limit_bytes": 1000})
    yield "the second device is full", two.model_copy(update={"devices": (roomy, full)})
    yield from soaks()
    yield from weights()


def soaks() -> Iterator[tuple[str, Record]]:
    """(what it is, the record of a short soak)."""
    soak, late = good_soak(cycles=9, devices=2), range(4, 10)
    yield "a good soak", soak
    yield "a good soak on a TPU", good_soak(cycles=9, devices=2, allocator=True)
    yield "a soak that leaks", hold(soak, late, lambda cycle: 512 * cycle)
    yield "a soak that loses weights", hold(soak, late, lambda cycle: -cycle, "weights")
    yield "a soak whose last batch varies", hold(hold_before(soak, 0, 4, 0, 4, 0), late, lambda cycle: 4 * (cycle % 2))
    wrong = set_points(soak, late, compiles=Compiles(trace=1, lower=2), different_tokens=3, logprobs_off=0.25)
    yield "a soak that compiles and answers otherwise", wrong
    yield "a soak within its tolerance", with_profile(wrong, "tolerances", logprob=0.3)
    yield "a soak without a profile", wrong.model_copy(update={"profile": {}})
    yield "a soak that takes host memory", set_points(soak, range(6, 10), rss_bytes=2**31)
    yield "a soak without witnesses", set_points(soak, late, rss_bytes=None, by_owner={}, logprobs_off=None)
    yield "a soak without counts", set_points(soak, late, different_tokens=None)
    blind = edit_canary(edit_canary(soak, "ledger", 0, rise_bytes=1), "rss", None, fall_bytes=0)
    yield "a soak with blind witnesses", edit_generates(blind, "cold", compiles=Compiles())
    yield "a soak without generation", with_profile(soak, "cycle", generate=False)
    yield "a soak that ended early", edit_soak(soak, points=soak_of(soak).points[:4])
    yield "a soak that never began", edit_soak(soak, points=(), before=())
    yield "a soak of no device", soak.model_copy(update={"devices": ()})


def weights() -> Iterator[tuple[str, Record]]:
    """(what it is, the record of a run that releases its weights)."""
    good = good_record(cycles=1, devices=1, release_weights=True)
    yield "released weights", good
    yield "released weights on a TPU", good_record(cycles=1, devices=1, allocator=True, release_weights=True)
    wrong = shift(shift(good, ("weights_released",), 512, device=0), ("weights_resumed",), -512, device=0)
    wrong = edit_info(wrong, "weights_released", deleted_arrays=3)
    wrong = edit_info(wrong, "weights_resumed", digests=DIGESTS | {"new": "0"}, model_shared=1)
    compiled = Compiles(trace=1, lower=2, backend=4)
    wrong = edit_phase(wrong, "weights_resumed", lambda phase: phase.model_copy(update={"compiles": compiled}))
    yield (
        "weights that are all wrong",
        edit_generates(wrong, "after_weights", token_ids=(1, 2, 3), logprobs=logprobs(), compiles=compiled),
    )
    for name in WEIGHTS_PHASES:
        yield f"without {name}", without_phase(good, name)
    yield "weights that were promised", with_profile(good_record(cycles=1, devices=1), "cycle", release_weights=True)


def line(verdict: Verdict) -> str:
    """One verdict in one line, with all that it says."""
    figures = f"{verdict.expected!r} {verdict.measured!r} {verdict.unit!r}"
    likely = "".join(f" | {cause}" for cause in verdict.causes)
    return f"{verdict.verdict} {verdict.id}[{verdict.name}] {figures}: {verdict.message}{likely}"


def blocks(all_records: Iterable[tuple[str, Record]]) -> Iterator[str]:
    """Each record's verdicts, one a line; of one that passes nearly everywhere, only those unlike the ones before."""
    seen = set[str]()
    for what, record in all_records:
        lines = [line(verdict) for verdict in judge(record)]
        yield "\n".join([f"# {what}", *(entry for entry in lines if entry not in seen)])
        seen.update(lines)


def texts() -> str:
    """The whole file."""
    return "\n\n".join(blocks(records())) + "\n"


def test_every_verdict_says_what_it_said() -> None:
    assert texts().splitlines() == FILE.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    FILE.write_text(texts(), encoding="utf-8")
