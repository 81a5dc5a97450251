"""What each host measured becomes one record, exactly; and what goes wrong on one host alone turns its check red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import TypeAdapter

from kvcycle import merge
from kvcycle.checks import judge, passed
from kvcycle.record import Record
from kvcycle.record_info import DropInfo, Params2Info, RebuildInfo, WeightsResumedInfo
from kvcycle.record_parts import KV, Boot, Canary, Compiles, Device, Generate, Params, Phase, SwapInfo, Verdict, sum_of
from tests.unit.hosts import no_loss, of_hosts, on_all
from tests.unit.records import (
    BORROWED,
    KV_BYTES,
    LAYOUT,
    SLOTS,
    edit_cycle,
    edit_generates,
    edit_info,
    edit_phase,
    good_record,
    shift,
)

pytestmark = pytest.mark.usefixtures(no_loss.__name__)
__all__ = ["no_loss"]

#: What virtual devices of two hosts are called by jax, and what the record calls them.
NUMBERS = {0: 0, 1: 1, 2048: 2, 2049: 3}
WHOLE = of_hosts(good_record(cycles=1, release_weights=True), 2)


def bad(record: Record) -> list[Verdict]:
    return [verdict for verdict in judge(record) if verdict.verdict not in ("pass", "not-run")]


def test_a_good_record_of_several_hosts_passes_and_is_read_again() -> None:
    for hosts in (2, 4):
        for allocator in (False, True):
            record = of_hosts(good_record(release_weights=True, allocator=allocator), hosts)
            assert bad(record) == []
            assert passed(judge(record))
            assert Record.model_validate_json(record.to_json(), strict=True) == record


# Putting together ----------------------------------------------------------------------------------------------------


def share_of(part: Any, host: int) -> Any:
    """What one of two hosts has of a whole, with jax's own ids: the opposite of a merge."""
    ids = {number: id_ for id_, number in NUMBERS.items() if number // 2 == host}

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            by_device = all(isinstance(key, int) for key in value)
            return {ids[key]: entry for key, entry in value.items() if key in ids} if by_device else value
        if isinstance(value, tuple) and value and isinstance(getattr(value[0], "id", None), int):
            return tuple(entry.model_copy(update={"id": ids[entry.id]}) for entry in value if entry.id in ids)
        return value

    return part.model_copy(update={name: kept(value) for name, value in part if name != "by_owner"})


def halves(whole: Any, **own: Callable[[int], Any]) -> list[Any]:
    return [share_of(whole, host).model_copy(update={name: of(host) for name, of in own.items()}) for host in (0, 1)]


def put_together(kind: Any, parts: list[Any], merged: Any) -> Any:
    """As the hosts do it: as JSON, gathered by the first, which alone gets the whole."""
    whole, other = on_all(2, lambda hosts: merge.together(hosts, kind, parts[hosts.rank], merged, NUMBERS))
    assert other == TypeAdapter(kind).validate_python(merge.renumbered(parts[1], NUMBERS))
    return whole


def test_devices_and_sizes() -> None:
    parts = [tuple(device for device in WHOLE.devices if device.host == host) for host in (0, 1)]
    ids = {number: id_ for id_, number in NUMBERS.items()}
    raw = [tuple(device.model_copy(update={"id": ids[device.id]}) for device in part) for part in parts]
    assert put_together(tuple[Device, ...], raw, merge.devices) == WHOLE.devices

    kv = WHOLE.kv
    half: Callable[[int], int] = lambda _host: kv.bytes // 2  # noqa: E731 - one word for four fields
    pools = [kv.pools[0].model_copy(update={"bytes": kv.bytes // 2})]
    parts_kv = halves(kv, bytes=half, claimed_bytes=half, pools=lambda _host: tuple(pools))
    # By its own arithmetic the second host expects less than the compiler that the first has asked.
    parts_kv[1] = parts_kv[1].model_copy(update={"predicted_bytes_by_device": {2048: 1, 2049: 1}, "predicted_bytes": 4})
    assert put_together(KV, parts_kv, merge.kv) == kv
    unknown = [part.model_copy(update={"claimed_bytes": None}) for part in parts_kv]
    assert put_together(KV, unknown, merge.kv).claimed_bytes is None

    params = WHOLE.params
    parts_params = halves(params, bytes_on_devices=lambda _host: params.bytes_on_devices // 2)
    assert put_together(Params, parts_params, merge.params) == params


def test_boot_and_canaries() -> None:
    boot = WHOLE.boot
    assert boot is not None
    parts = halves(boot, compiles=lambda host: boot.compiles_by_host[host], compiles_by_host=lambda _host: ())
    parts[0] = parts[0].model_copy(update={"seconds": 5.0})  # all wait for the slowest
    assert put_together(Boot, parts, merge.boot) == boot

    ids = {number: id_ for id_, number in NUMBERS.items()}
    told = [
        tuple(
            canary.model_copy(update={"host": 0, "device": None if canary.device is None else ids[canary.device]})
            for canary in WHOLE.canaries
            if host == (canary.host if canary.device is None else canary.device // 2)
        )
        for host in (0, 1)
    ]
    whole = put_together(tuple[Canary, ...], told, merge.canaries)
    key: Callable[[Canary], Any] = lambda canary: (canary.witness, canary.device or 0, canary.host)  # noqa: E731
    expected = [c.model_copy(update={"host": c.host if c.device is None else c.device // 2}) for c in WHOLE.canaries]
    assert sorted(whole, key=key) == sorted(expected, key=key)


@pytest.mark.parametrize("index", range(len(WHOLE.cycles[0].phases)))
def test_every_phase(index: int) -> None:
    whole = WHOLE.cycles[0].phases[index]

    def info_of(host: int) -> Any:
        info = whole.info
        if info is None:
            return None
        info = share_of(info, host)
        if isinstance(info, Params2Info):
            return info.model_copy(update={"buffers": info.buffers // 2})
        return info.model_copy(update={"host_bytes": info.host_bytes // 2}) if hasattr(info, "host_bytes") else info

    parts = halves(
        whole,
        compiles=lambda host: whole.compiles_by_host[host],
        compiles_by_host=lambda _host: (),
        rss_bytes=lambda host: whole.rss_bytes_by_host[host],
        rss_bytes_by_host=lambda _host: (),
        ledger_bytes_sum=lambda host: sum(use.ledger_bytes for use in whole.devices if use.id // 2 == host),
        info=info_of,
    )
    merged = put_together(Phase, parts, merge.phase)
    digests = getattr(whole.info, "digests", None)
    if digests is None:
        assert merged == whole
    else:  # a digest of both hosts' digests, the same for the same bits
        assert merged.model_copy(update={"info": None}) == whole.model_copy(update={"info": None})
        assert merged.info.model_copy(update={"digests": digests}) == whole.info
        assert len(set(merged.info.digests.values())) == len(digests)


def test_a_generation_is_the_first_hosts_and_both_compilers() -> None:
    (whole,) = WHOLE.generates_when("cold")
    parts = [
        whole.model_copy(update={"compiles": compiles, "compiles_by_host": ()}) for compiles in whole.compiles_by_host
    ]
    assert put_together(Generate, parts, merge.generate) == whole


def test_what_is_no_longer_the_same_on_one_host_is_in_the_whole() -> None:
    swap = SwapInfo(leaves=51, runner_shared=51, model_shared=51, model_params=51, restored=51)
    assert merge.swap([swap, swap.model_copy(update={"restored": 50})]).restored == 50

    drop = WHOLE.cycles[0].phases[3].info
    assert isinstance(drop, DropInfo)
    for field, value in (("deleted_buffers", 3), ("missing_delete_method", 1), ("buffers", 5)):
        assert getattr(merge.info([drop, drop.model_copy(update={field: value})]), field) == value

    rebuild = WHOLE.cycles[0].phases[5].info
    assert isinstance(rebuild, RebuildInfo)
    other = LAYOUT.model_copy(update={"committed": False})
    theirs = rebuild.model_copy(
        update={
            "layouts_after": rebuild.layouts_after | {SLOTS[1]: other},
            "moved_owners": (SLOTS[0],),
            "nonzero_slots": (SLOTS[2],),
        }
    )
    whole = merge.info([rebuild, theirs])
    assert isinstance(whole, RebuildInfo)
    assert whole.layouts_after == rebuild.layouts_after | {f"{SLOTS[1]} (host 1)": other}
    assert whole.layouts_before == rebuild.layouts_before | {f"{SLOTS[1]} (host 1)": LAYOUT}
    assert whole.moved_owners == (f"{SLOTS[0]} (host 1)",)
    assert whole.nonzero_slots == (f"{SLOTS[2]} (host 1)",)

    resumed = WHOLE.cycles[0].phases[9].info
    assert isinstance(resumed, WeightsResumedInfo)
    name = next(iter(resumed.digests))
    changed = resumed.model_copy(update={"digests": resumed.digests | {name: "deleted"}})
    before, after = merge.info([resumed, resumed]), merge.info([resumed, changed])
    assert isinstance(before, WeightsResumedInfo)
    assert isinstance(after, WeightsResumedInfo)
    assert [key for key in before.digests if before.digests[key] != after.digests[key]] == [name]


def test_a_second_set_that_one_host_lacks_is_no_second_set() -> None:
    info = WHOLE.cycles[0].phases[4].info
    assert isinstance(info, Params2Info)
    none = info.model_copy(update={"arrays": 0, "buffers": 0, "error": "no room"})
    merged = merge.info([info, none])
    assert isinstance(merged, Params2Info)
    assert (merged.arrays, merged.buffers, merged.error) == (0, 0, "host 1: no room")
    assert merge.info([info, WHOLE.cycles[0].phases[3].info or info]) is None  # they did not do the same


def test_one_host_tells_nobody() -> None:
    from kvcycle.hosts import Hosts

    phase = WHOLE.cycles[0].phases[0]
    assert merge.together(Hosts(), Phase, phase, merge.phase, NUMBERS) is phase


# One host's fault is red ---------------------------------------------------------------------------------------------


def only_red(record: Record, *names: str) -> list[Verdict]:
    found = bad(record)
    assert sorted(f"{verdict.id}[{verdict.name}]" for verdict in found) == sorted(names)
    return found


def test_a_recompilation_on_one_host_alone_is_red_and_names_the_host() -> None:
    by_host = (Compiles(), Compiles(trace=1, lower=1, backend=1))
    spans: dict[str, Any] = {"compiles": sum_of(by_host), "compiles_by_host": by_host}
    (verdict,) = only_red(edit_generates(WHOLE, "after_rebuild", **spans), "generate.no_compile[cycle0-generate]")
    assert "compilations in the generation after_rebuild (1 lowered, 1 compiled), 2 on host 1: 2, expected 0" in (
        verdict.message
    )
    rebuilt = edit_phase(WHOLE, "kv_cache_rebuilt", lambda phase: phase.model_copy(update=spans))
    (verdict,) = only_red(rebuilt, "generate.no_compile[cycle0-rebuild]")
    assert "compilations and traces while rebuilding, 3 on host 1: 3, expected 0" in verdict.message
    (verdict,) = only_red(edit_generates(WHOLE, "after_weights", **spans), "weights.no_compile[cycle0-generate]")
    assert ", 2 on host 1: 2" in verdict.message


@pytest.mark.parametrize("when", ["cold", "after_clear_caches"])
def test_a_counter_that_is_blind_on_one_host_is_no_control(when: Any) -> None:
    """The other host's compilations would hide it: its zeros would prove nothing."""
    (seen,) = WHOLE.generates_when(when)
    by_host = (seen.compiles_by_host[0], Compiles())
    record = edit_generates(WHOLE, when, compiles=sum_of(by_host), compiles_by_host=by_host)
    control = "controls.compiles_are_counted[run]" if when == "cold" else "controls.recompilation_is_seen[compiles]"
    assert control in {f"{verdict.id}[{verdict.name}]" for verdict in bad(record)}


def test_a_host_that_keeps_a_buffer_is_red_on_its_devices_and_in_the_count() -> None:
    kept = KV_BYTES // 4
    record = edit_info(WHOLE, "kv_cache_dropped", deleted_buffers=3)
    for device in (2, 3):
        record = shift(record, BORROWED[:2], kept, device=device)
    found = bad(record)
    on_devices = [v for v in found if v.id == "drop.frees_kv" and v.witness == "ledger"]
    assert [v.scope for v in on_devices] == ["cycle0-device2", "cycle0-device3"]
    assert all(f"{v.scope} (host 1)" in v.message for v in on_devices)
    assert [v.scope for v in found if v.id == "drop.deletes_every_buffer"] == ["cycle0"]


def with_rss(record: Record, name: Any, host: int, size: int | None) -> Record:
    def change(phase: Phase) -> Phase:
        by_host = list(phase.rss_bytes_by_host)
        by_host[host] = size if size is None else (by_host[host] or 0) + size
        whole = None if None in by_host else sum(known or 0 for known in by_host)
        return phase.model_copy(update={"rss_bytes": whole, "rss_bytes_by_host": tuple(by_host)})

    return edit_phase(record, name, change)


def test_a_host_whose_process_keeps_the_memory_is_red_and_another_cannot_make_up_for_it() -> None:
    record = WHOLE
    for name in BORROWED[:2]:  # what one keeps the other gives back: the sum is right
        record = with_rss(with_rss(record, name, 1, KV_BYTES), name, 0, -KV_BYTES)
    found = {f"{verdict.id}[{verdict.name}]" for verdict in bad(record)}
    assert {f"drop.frees_kv[cycle0-host{host}-rss]" for host in (0, 1)} <= found
    assert {f"controls.witnesses_agree[cycle0-host{host}-rss]" for host in (0, 1)} <= found


def test_a_host_that_was_not_sampled_is_inconclusive() -> None:
    (verdict,) = only_red(with_rss(WHOLE, "kv_cache_dropped", 1, None), "drop.frees_kv[cycle0-host1-rss]")
    assert verdict.verdict == "inconclusive"
    assert verdict.message == "cycle0-host1: the process's resident memory was not sampled."

    def without_its_devices(phase: Phase) -> Phase:
        uses = tuple(use for use in phase.devices if use.id < 2)
        return phase.model_copy(update={"devices": uses, "ledger_bytes_sum": sum(use.ledger_bytes for use in uses)})

    found = bad(edit_phase(WHOLE, "kv_cache_dropped", without_its_devices))
    missing = [v for v in found if v.id == "drop.frees_kv" and v.witness == "ledger"]
    assert [(v.scope, v.verdict) for v in missing] == [
        ("cycle0-device2", "inconclusive"),
        ("cycle0-device3", "inconclusive"),
    ]
    assert missing[0].message == "cycle0-device2 (host 1): this device was not sampled."


def test_a_host_whose_witness_was_not_tried_proves_nothing() -> None:
    canaries = tuple(canary for canary in WHOLE.canaries if (canary.witness, canary.host) != ("rss", 1))
    found = bad(WHOLE.model_copy(update={"canaries": canaries}))
    assert {v.verdict for v in found} == {"inconclusive"}
    assert {f"{v.id}[{v.name}]" for v in found} == {
        "drop.frees_kv[cycle0-host1-rss]",
        "rebuild.restores_bytes[cycle0-host1-rss]",
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"compiles": Compiles(lower=1)}, "compiles is not what compiles_by_host adds up to"),
        ({"rss_bytes": 1}, "rss_bytes is 1 but the hosts add up to"),
        ({"rss_bytes_by_host": (None, 1)}, "but the hosts add up to None"),
    ],
)
def test_a_record_whose_hosts_do_not_add_up_is_none(change: dict[str, Any], problem: str) -> None:
    phase = WHOLE.cycles[0].phases[0].model_copy(update=change)
    record = edit_cycle(WHOLE, 0, phases=(phase, *WHOLE.cycles[0].phases[1:]))
    with pytest.raises(ValueError, match=problem):
        Record.model_validate_json(record.to_json(), strict=True)


def test_the_verdicts_line_says_how_many_hosts_there_were() -> None:
    from kvcycle.report.terminal import verdict_line

    assert " tiny on 4 cpu devices of 2 hosts, " in verdict_line(WHOLE, judge(WHOLE)).plain
    one = good_record()
    assert " tiny on 4 cpu devices, " in verdict_line(one, judge(one)).plain
