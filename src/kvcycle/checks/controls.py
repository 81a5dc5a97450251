"""The controls: each shows that an oracle can see what it is trusted to see. No zero is believed without one."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise

from kvcycle.checks.verdicts import (
    DEVICE_WITNESSES,
    Place,
    left_out,
    left_out_prefix,
    on_device,
    scope,
    tolerance_bytes,
    unmeasured,
    use_of,
    verdict_at,
)
from kvcycle.record import Record
from kvcycle.record_parts import Canary, Device, DeviceUse, Outcome, Phase, Verdict, Witness
from kvcycle.text import exact_bytes, seconds, signed_bytes


def _verdict(
    check: str,
    place: Place | str,
    ok: bool,
    text: str,
    *,
    witness: Witness | None = None,
    expected: int | float | None = None,
    measured: int | float | None = None,
    unit: str = "",
) -> Verdict:
    # A control never fails: an oracle that cannot see says nothing about the engine.
    outcome: Outcome = "pass" if ok else "inconclusive"
    return verdict_at(
        check, place, outcome, f"{place}: {text}.", witness=witness, expected=expected, measured=measured, unit=unit
    )


def blindness(record: Record, witness: Witness, device: int | None, host: int = 0) -> str | None:
    """Why a memory verdict of this witness would prove nothing; None if it saw the canary.

    ``host`` is whose process it is, where ``device`` is None.
    """
    if any((device is not None or c.host == host) and _saw(record, c) for c in record.canaries_of(witness, device)):
        return None
    return f"the {witness} did not see an allocation of known size (controls.witness_sees_allocation)"


def speaks(record: Record, witness: Witness, device: int | None) -> bool:
    """Whether a witness is one of this run's, on the device or (``None``) in the process: its silence is no pass."""
    return witness == "ledger" or bool(record.canaries_of(witness, device))


def _saw(record: Record, canary: Canary) -> bool:
    tolerance = tolerance_bytes(record, canary.witness, canary.allocated_bytes)
    return all(abs(seen - canary.allocated_bytes) <= tolerance for seen in (canary.rise_bytes, canary.fall_bytes))


def witness_sees_allocation(record: Record) -> Iterator[Verdict]:
    """Every witness saw a known allocation rise and fall, on its device."""
    check = "controls.witness_sees_allocation"
    if not record.canaries:
        yield unmeasured(check, "run", "no allocation of known size was made")
    for canary in record.canaries:
        yield _verdict(
            check,
            scope(host=canary.host if len(record.hosts) > 1 else None)
            if canary.device is None
            else on_device(record, canary.device),
            _saw(record, canary),
            f"of {exact_bytes(canary.allocated_bytes)} allocated and freed the {canary.witness} saw "
            f"{signed_bytes(canary.rise_bytes)} and {signed_bytes(-canary.fall_bytes)}",
            witness=canary.witness,
            expected=canary.allocated_bytes,
            measured=min(canary.rise_bytes, canary.fall_bytes),
            unit="bytes",
        )


def witness_saw_boot(record: Record) -> Iterator[Verdict]:
    """Every witness saw the boot bring at least the weights and the KV cache; silent if the user booted the engine."""
    check, boot = "controls.witness_saw_boot", record.boot
    if boot is None:
        return
    before = {use.id: use for use in boot.before}
    after = {use.id: use for use in boot.after}
    for device in record.devices:
        least = record.kv.bytes_by_device.get(device.id, 0) + record.params.bytes_by_device.get(device.id, 0)
        for witness in DEVICE_WITNESSES:
            low, high = use_of(before.get(device.id), witness), use_of(after.get(device.id), witness)
            if low is None or high is None:
                continue
            yield _verdict(
                check,
                on_device(record, device.id),
                least > 0 and high - low >= least,
                f"the boot brought {signed_bytes(high - low)} by the {witness}, weights and KV cache are "
                f"{exact_bytes(least)}",
                witness=witness,
                expected=least,
                measured=high - low,
                unit="bytes",
            )


def witnesses_agree(record: Record) -> Iterator[Verdict]:
    """Allocator and RSS, where they speak, report the same changes as the ledger; a disagreement is a failure."""
    for index, cycle in enumerate(record.cycles):
        pairs = list(pairwise(cycle.phases))
        sampled = [(before.by_id, after.by_id, after.name) for before, after in pairs]
        for device in record.devices:
            gaps = [
                (gap, name)
                for before, after, name in sampled
                if (gap := _gap(before.get(device.id), after.get(device.id))) is not None
            ]
            if gaps:
                worst = max(gaps, key=lambda entry: abs(entry[0]))
                yield _agreement(record, on_device(record, device.id, index), "allocator", worst, 0)
        # RSS follows the KV cache's large buffers only, see platform.map_large_allocations.
        for host in record.hosts:
            devices = record.devices_of(host)
            gaps = [
                (gap, after.name)
                for before, after in pairs
                if after.name in ("kv_cache_dropped", "kv_cache_rebuilt")
                and (gap := _rss_gap(before, after, host, devices)) is not None
            ]
            if gaps:
                size = record.kv.bytes
                if host is not None:
                    size = sum(record.kv.bytes_by_device.get(device.id, 0) for device in devices)
                worst = max(gaps, key=lambda entry: abs(entry[0]))
                yield _agreement(record, scope(index, host=host), "rss", worst, size)


def _agreement(record: Record, place: Place | str, witness: Witness, worst: tuple[int, str], size: int) -> Verdict:
    gap, phase = worst
    tolerance = tolerance_bytes(record, witness, size)
    return verdict_at(
        "controls.witnesses_agree",
        place,
        "pass" if abs(gap) <= tolerance else "fail",
        f"{phase}, {place}: the change by the {witness} less the change by the ledger is {signed_bytes(gap)} at most, "
        f"allowed {exact_bytes(tolerance)}.",
        causes=(
            "memory that no live jax.Array owns (compiled programs, temporaries) grew or shrank",
            f"the {witness}'s numbers are stale",
        ),
        witness=witness,
        expected=0,
        measured=gap,
        unit="bytes",
    )


def _rss_gap(before: Phase, after: Phase, host: int | None, devices: Sequence[Device]) -> int | None:
    """The change of a host's resident memory minus its ledger's, between two phases; None if it was not sampled."""
    sizes = before.rss_bytes_of(host), after.rss_bytes_of(host)
    if sizes[0] is None or sizes[1] is None:
        return None
    if host is None:
        return sizes[1] - sizes[0] - (after.ledger_bytes_sum - before.ledger_bytes_sum)
    held = [sum(use.ledger_bytes for d in devices if (use := phase.device(d.id))) for phase in (before, after)]
    return sizes[1] - sizes[0] - (held[1] - held[0])


def _gap(before: DeviceUse | None, after: DeviceUse | None) -> int | None:
    """The allocator's change minus the ledger's, on one device, between two phases; None where one is not known."""
    if before is None or after is None or before.allocator_bytes is None or after.allocator_bytes is None:
        return None
    return (after.allocator_bytes - before.allocator_bytes) - (after.ledger_bytes - before.ledger_bytes)


def compiles_are_counted(record: Record) -> Iterator[Verdict]:
    """The counter saw compilations where there must be some: in the cold generation, or in a boot that precompiles."""
    check = "controls.compiles_are_counted"
    if (verdict := left_out(check, record)) is not None:
        yield verdict
        return
    cold = record.generates_when("cold")
    # Of several hosts the one that saw least: each counts for itself.
    seen = min(compiles.backend for compiles in cold[0].each_hosts_compiles) if cold else 0
    booted = min(compiles.backend for compiles in record.boot.each_hosts_compiles) if record.boot else 0
    least = "at least " if len(record.hosts) > 1 else ""
    precompiled = not record.profile.get("engine", {}).get("disable_precompile", True)
    yield _verdict(
        check,
        "run",
        seen > 0 or (precompiled and booted > 0),
        f"the counter saw {least}{seen} compilations in the cold generation and {booted} in the boot",
        expected=1,
        measured=seen,
        unit="compilations",
    )


def recompilation_is_seen(record: Record) -> Iterator[Verdict]:
    """With jax's caches cleared on purpose, the counter sees the compilations and the clock exceeds the threshold."""
    from kvcycle.checks.generation import thresholds_s  # generation.py reads the controls, so this comes late

    check = "controls.recompilation_is_seen"
    verdict = left_out(check, record)
    if verdict is not None:
        yield verdict
        return
    cleared, limits = record.generates_when("after_clear_caches"), thresholds_s(record)
    if not cleared or limits is None:
        yield unmeasured(check, scope(part="compiles"), "no generation was made with cleared caches")
        yield unmeasured(check, scope(part="latency"), "no generation was made with cleared caches")
        return
    control, allowed_s = cleared[0], limits[1]
    seen = min(compiles.backend for compiles in control.each_hosts_compiles)
    yield _verdict(
        check,
        scope(part="compiles"),
        seen > 0,
        f"after jax.clear_caches() the generation compiled {seen} times",
        expected=1,
        measured=seen,
        unit="compilations",
    )
    warm = statistics.median(g.seconds for g in record.generates_when("warm"))
    yield _verdict(
        check,
        scope(part="latency"),
        control.seconds > allowed_s,
        f"after jax.clear_caches() the generation took {seconds(control.seconds)} (warm {seconds(warm)}), so a "
        f"threshold of {seconds(allowed_s)} {'tells' if control.seconds > allowed_s else 'cannot tell'} it apart",
        expected=allowed_s,
        measured=control.seconds,
        unit="seconds",
    )


def output_varies(record: Record) -> Iterator[Verdict]:
    """The greedy output has enough distinct tokens that a broken cache would show in it."""
    check = "controls.output_varies"
    if (verdict := left_out(check, record)) is not None:
        yield verdict
        return
    least = int(record.profile.get("thresholds", {}).get("min_distinct_tokens", 6))
    warm = record.generates_when("warm")
    distinct = len(set(warm[0].token_ids)) if warm else 0
    yield _verdict(
        check,
        "run",
        distinct >= least,
        f"the output has {distinct} distinct tokens, at least {least} are needed for a comparison to mean something",
        expected=least,
        measured=distinct,
        unit="tokens",
    )


def output_follows_weights(record: Record) -> Iterator[Verdict]:
    """On the second, perturbed set the output differs: the forward reads the weights it was given."""
    check = "controls.output_follows_weights"
    if (verdict := left_out(check, record)) is not None:
        yield verdict
        return
    warm = record.generates_when("warm")
    for index, _ in enumerate(record.cycles):
        other = record.generates_when("with_params2", index)
        if not warm or not other:
            yield unmeasured(check, scope(index), "there was no generation on the second set")
            continue
        different = sum(a != b for a, b in zip(warm[0].token_ids, other[0].token_ids, strict=False))
        yield _verdict(
            check,
            scope(index),
            different > 0,
            f"on the second, perturbed set {different} of {len(warm[0].token_ids)} tokens differ",
            expected=1,
            measured=different,
            unit="tokens",
        )


def prefix_hit_is_seen(record: Record) -> Iterator[Verdict]:
    """A repeated prompt without a flush takes tokens from the prefix cache, and the counter says so."""
    check = "controls.prefix_hit_is_seen"
    if (verdict := left_out_prefix(check, record)) is not None:
        yield verdict
        return
    hits = record.generates_when("prefix_hit")
    cached = hits[0].cached_tokens if hits else 0
    yield _verdict(
        check,
        "run",
        cached > 0,
        f"a repeated prompt took {cached} tokens from the prefix cache",
        expected=1,
        measured=cached,
        unit="tokens",
    )
