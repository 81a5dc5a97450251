"""The checks on bytes: what the drop frees, what the second set takes, what the rebuild restores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcycle.checks.controls import blindness, speaks
from kvcycle.checks.verdicts import (
    DEVICE_WITNESSES,
    change,
    count,
    on_device,
    scope,
    tolerance_bytes,
    unmeasured,
    use_of,
)
from kvcycle.record import Record
from kvcycle.record_info import DropInfo, Params2Info
from kvcycle.record_parts import DeviceUse, PhaseName, Verdict, Witness
from kvcycle.text import exact_bytes


def device_changes(
    check: str,
    record: Record,
    before_name: PhaseName,
    after_name: PhaseName,
    expected_by_device: dict[int, int],
    causes: Sequence[str],
    *,
    by_rss: bool = False,
) -> Iterator[Verdict]:
    """The change between two phases of each cycle, on each device, by each witness that speaks; and by RSS if asked.

    RSS follows only where every buffer is a mapping of its own (1 MiB and more, see ``platform``): the KV cache's are,
    a parameter set's norms and biases are not.
    """
    blind = _blindness_by_device(record)
    for index, cycle in enumerate(record.cycles):
        before, after = cycle.phase(before_name), cycle.phase(after_name)
        if before is None or after is None:
            missing = before_name if before is None else after_name
            for device in record.devices:
                place = on_device(record, device.id, index)
                yield unmeasured(check, place, f"the run ended before {missing}", "ledger")
            continue
        uses_before, uses_after = before.by_id, after.by_id
        for device in record.devices:
            place, expected = on_device(record, device.id, index), expected_by_device.get(device.id)
            if expected is None:
                yield unmeasured(check, place, "no size is known for this device", "ledger")
                continue
            for witness in DEVICE_WITNESSES:
                low = use_of(uses_before.get(device.id), witness)
                high = use_of(uses_after.get(device.id), witness)
                if low is None or high is None:
                    if speaks(record, witness, device.id):
                        yield unmeasured(check, place, "this device was not sampled", witness)
                    continue
                yield change(
                    check,
                    place,
                    witness,
                    before,
                    after,
                    expected,
                    (low, high),
                    tolerance_bytes(record, witness, expected),
                    causes,
                    blind[witness, device.id],
                )
        if not by_rss:
            continue
        for host in record.hosts:
            low, high = before.rss_bytes_of(host), after.rss_bytes_of(host)
            at_host = scope(index, host=host)
            if low is None or high is None:
                if speaks(record, "rss", None):
                    yield unmeasured(check, at_host, "the process's resident memory was not sampled", "rss")
                continue
            total = sum(expected_by_device.get(device.id, 0) for device in record.devices_of(host))
            yield change(
                check,
                at_host,
                "rss",
                before,
                after,
                total,
                (low, high),
                tolerance_bytes(record, "rss", total),
                [*causes, "the process grew or shrank elsewhere meanwhile"],
                blindness(record, "rss", None, host or 0),
            )


def _blindness_by_device(record: Record) -> dict[tuple[Witness, int], str | None]:
    """Each device's :func:`blindness` by witness, asked for once and not in every cycle."""
    return {
        (witness, device.id): blindness(record, witness, device.id)
        for device in record.devices
        for witness in DEVICE_WITNESSES
    }


def _kv_expectation(record: Record) -> dict[int, int]:
    """KV bytes by device as predicted.

    The shards' own sum only where nothing predicts, which ``drop.size_is_predicted`` then reports as inconclusive.
    """
    return dict(record.kv.predicted_bytes_by_device or record.kv.bytes_by_device)


def drop_frees_kv(record: Record) -> Iterator[Verdict]:
    """On every device, by every witness, the drop frees exactly the predicted KV bytes."""
    expected = {device: -size for device, size in _kv_expectation(record).items()}
    yield from device_changes(
        "drop.frees_kv",
        record,
        "flush_cache_before_kv_drop",
        "kv_cache_dropped",
        expected,
        (
            "a buffer was not deleted, or something else still holds it (see drop.deletes_every_buffer)",
            "a copy of the cache is alive under another name (see the owner 'other' in the table)",
            "the allocator keeps freed memory for itself; jax.clear_caches() may give it back, and recompiles",
        ),
        by_rss=True,
    )


def drop_deletes_every_buffer(record: Record) -> Iterator[Verdict]:
    """Every buffer is deleted, and none was without a ``delete`` method (the SOP's missing_delete_method=0)."""
    check = "drop.deletes_every_buffer"
    for index, cycle in enumerate(record.cycles):
        phase = cycle.phase("kv_cache_dropped")
        info = phase.info if phase else None
        if not isinstance(info, DropInfo):
            yield unmeasured(check, scope(index), "the drop was not recorded")
            continue
        causes = ("a slot holds something else than a jax.Array", "delete() did not take effect")
        verdict = count(
            check,
            scope(index),
            expected=record.kv.buffers,
            measured=info.deleted_buffers,
            unit="buffers",
            what=f"buffers deleted ({info.missing_delete_method} had no delete method, {info.buffers} were found)",
            causes=causes,
        )
        if info.missing_delete_method or info.buffers != record.kv.buffers:
            # As many were deleted as there should be, and there was one more that was not.
            verdict = verdict.model_copy(update={"verdict": "fail", "causes": causes})
        yield verdict


def drop_size_is_predicted(record: Record) -> Iterator[Verdict]:
    """What the shards add up to on each device, and the engine's own claim, equal the prediction."""
    check, kv = "drop.size_is_predicted", record.kv
    if kv.predicted_bytes is None or kv.predicted_bytes_by_device is None:
        for device in record.devices:
            yield unmeasured(check, on_device(record, device.id), "nothing predicts this model's KV size")
        yield unmeasured(check, scope(part="engine_claim"), "nothing predicts this model's KV size")
        return
    causes = (
        "the engine rounded or cut max_total_tokens (free memory, page size)",
        "the pool pads heads or pages in a way the prediction does not know",
    )
    for device in record.devices:
        yield count(
            check,
            on_device(record, device.id),
            expected=kv.predicted_bytes_by_device.get(device.id, 0),
            measured=kv.bytes_by_device.get(device.id, 0),
            unit="bytes",
            what=f"KV bytes by the shards, predicted by {kv.predicted_by} ({kv.predicted_how})",
            causes=causes,
        )
    if kv.claimed_bytes is None:
        yield unmeasured(check, scope(part="engine_claim"), "the engine does not say how large its KV cache is")
    else:
        yield count(
            check,
            scope(part="engine_claim"),
            expected=kv.predicted_bytes,
            measured=kv.claimed_bytes,
            unit="bytes",
            what=f"KV bytes by the engine's own claim, predicted by {kv.predicted_by}",
            causes=causes,
        )


def drop_leaves_weights(record: Record) -> Iterator[Verdict]:
    """On every device the weights' bytes are what they were before the drop."""
    check = "drop.leaves_weights"
    for index, cycle in enumerate(record.cycles):
        before, after = cycle.phase("flush_cache_before_kv_drop"), cycle.phase("kv_cache_dropped")
        uses_before, uses_after = (phase.by_id if phase else {} for phase in (before, after))
        for device in record.devices:
            place, low, high = (
                on_device(record, device.id, index),
                uses_before.get(device.id),
                uses_after.get(device.id),
            )
            if low is None or high is None or not low.by_owner.get("weights"):
                yield unmeasured(check, place, "no weights were seen before the drop")
                continue
            yield count(
                check,
                place,
                expected=low.by_owner["weights"],
                measured=high.by_owner.get("weights", 0),
                unit="bytes",
                what="bytes of weights after the drop",
                causes=("the drop reached an array that belongs to the weights",),
            )


def params2_fits(record: Record) -> Iterator[Verdict]:
    """On every device, by every witness, the second set takes exactly the first one's bytes, within the capacity."""
    check = "params2.fits"
    for index, phase in record.phases("sglang_param_dict2_ready"):
        if isinstance(phase.info, Params2Info) and phase.info.error is not None:
            yield Verdict(
                id=check,
                scope=scope(index),
                verdict="fail",
                expected=sum(phase.info.requested_bytes_by_device.values()),
                measured=0,
                unit="bytes",
                message=f"{scope(index)}: {phase.info.error}",
                causes=("the freed memory is less than a second set, or too fragmented",),
            )
    yield from device_changes(
        check,
        record,
        "kv_cache_dropped",
        "sglang_param_dict2_ready",
        record.params.bytes_by_device,
        (
            "the second set shares buffers with the first (see params2.is_its_own_memory)",
            "it did not fit, or part of it lies on another device",
        ),
    )
    for index, cycle in enumerate(record.cycles):
        sampled = [(phase.name, phase.by_id) for phase in cycle.phases]
        for device in record.devices:
            if device.limit_bytes is None:
                continue
            # The peak comes with the rebuild: the second set and the KV cache at once.
            uses = [(name, use) for name, by_id in sampled if (use := by_id.get(device.id)) is not None]
            if not uses:
                continue
            in_use, name = max((max(use.ledger_bytes, use.allocator_bytes or 0), name) for name, use in uses)
            if in_use > device.limit_bytes:
                place = on_device(record, device.id, index)
                yield Verdict(
                    id=check,
                    scope=scope(index, device.id, "capacity"),
                    host=place.host,
                    verdict="fail",
                    expected=device.limit_bytes,
                    measured=in_use,
                    unit="bytes",
                    message=f"{name}, {place}: {exact_bytes(in_use)} in use, but the device has "
                    f"{exact_bytes(device.limit_bytes)}.",
                )


def params2_is_its_own_memory(record: Record) -> Iterator[Verdict]:
    """No buffer of the second set is a buffer of the engine's weights."""
    check = "params2.is_its_own_memory"
    for index, cycle in enumerate(record.cycles):
        phase = cycle.phase("sglang_param_dict2_ready")
        info = phase.info if phase else None
        if not isinstance(info, Params2Info) or not info.buffers:
            yield unmeasured(check, scope(index), "there is no second set to look at")
            continue
        yield count(
            check,
            scope(index),
            expected=0,
            measured=info.buffers_shared_with_engine,
            unit="buffers",
            what=f"buffers of the second set (of {info.buffers}) that are the engine's own",
            causes=("device_put to the same sharding returns the same buffer: copy",),
        )


def rebuild_restores_bytes(record: Record) -> Iterator[Verdict]:
    """On every device, by every witness, the rebuild takes exactly the predicted KV bytes."""
    yield from device_changes(
        "rebuild.restores_bytes",
        record,
        "sglang_param_dict2_ready",
        "kv_cache_rebuilt",
        _kv_expectation(record),
        (
            "a buffer was rebuilt with another shape, dtype or sharding (see rebuild.same_layout)",
            "a slot was left empty, or an old buffer is still alive beside the new one",
        ),
        by_rss=True,
    )


def _residue_above(use: DeviceUse | None, residues: Sequence[dict[int, int]]) -> int:
    """By how much the largest residue of several idle points exceeds the one in a phase's own sample.

    The engine keeps its last batch. Two of its arrays are made from one numpy array, and on a CPU device are one buffer
    of four bytes where that happens to be aligned, two where it is not. ``kvcycle.boot()`` keeps them apart; for an
    engine that the user booted the largest of several is the same before and after. A leak is in every one of them, so
    it shows to the byte.
    """
    if use is None:
        return 0
    own = use.by_owner.get("other", 0)
    return max([own, *(residue.get(use.id, 0) for residue in residues)]) - own


def cycles_no_growth(record: Record) -> Iterator[Verdict]:
    """At the end of every cycle each device holds what it held before the first drop, by every witness."""
    check = "cycles.no_growth"
    base = record.cycles[0].phase("flush_cache_before_kv_drop") if record.cycles else None
    if base is None or not record.devices:
        yield unmeasured(check, "run", "the run ended before the first drop, or without a device", "ledger")
        return
    for index in range(len(record.cycles), int(record.profile.get("cycle", {}).get("cycles", 0))):
        yield unmeasured(check, scope(index), "the run ended before this cycle", "ledger")
    blind = _blindness_by_device(record)
    for index, cycle in enumerate(record.cycles):
        end = cycle.phase("after_drop_param_dict2")
        for device in record.devices:
            place = on_device(record, device.id, index)
            before, after = base.by_id.get(device.id), end.by_id.get(device.id) if end else None
            for witness in DEVICE_WITNESSES:
                low, high = use_of(before, witness), use_of(after, witness)
                if low is None and not speaks(record, witness, device.id):
                    continue
                if end is None:
                    yield unmeasured(check, place, "the cycle did not end", witness)
                    continue
                if low is None or high is None:
                    yield unmeasured(check, place, "this device was not sampled", witness)
                    continue
                if witness == "ledger":
                    low += _residue_above(before, record.cycles[0].residue_before)
                    high += _residue_above(after, cycle.residue_after)
                yield change(
                    check,
                    place,
                    witness,
                    base,
                    end,
                    0,
                    (low, high),
                    tolerance_bytes(record, witness, 0),
                    ("something of every cycle stays alive: the second set, a copy, a cached result",),
                    blind[witness, device.id],
                )
