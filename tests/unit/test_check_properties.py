"""What holds of the checks on any record: a good one passes, a shifted one does not, and judging is a pure function."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvcycle.checks import CHECKS, WEIGHTS_CHECKS, judge, passed
from kvcycle.checks.soak import SOAK_CHECKS
from kvcycle.checks.verdicts import DEVICE_WITNESSES
from kvcycle.record import Record
from kvcycle.record_parts import OUTCOMES, PHASES, Cycle, DeviceUse, Phase, Verdict, Witness
from tests.unit.records import good_record, shift

#: Of weights, a second set of them and the KV cache a v4's device holds as many, and the shift of any.
sizes = st.integers(1, 2**33)
#: Phases whose bytes every check of that phase reads: before the first of these nothing is judged but the boot.
JUDGED = PHASES[2:6] + PHASES[7:]


@st.composite
def good_records(draw: st.DrawFn, max_cycles: int = 3, max_devices: int = 8, allocator: bool | None = None) -> Record:
    """A record that passes: any number of cycles and devices, any sizes, as of a TPU or of virtual devices."""
    return good_record(
        cycles=draw(st.integers(1, max_cycles)),
        devices=draw(st.integers(1, max_devices)),
        allocator=draw(st.booleans()) if allocator is None else allocator,
        kv_bytes=draw(sizes),
        weights=draw(sizes),
    )


@given(record=good_records())
def test_a_good_record_passes_every_check(record: Record) -> None:
    verdicts = judge(record)
    assert {verdict.id for verdict in verdicts} == set(CHECKS) - set(WEIGHTS_CHECKS) - set(SOAK_CHECKS)
    assert Counter(verdict.verdict for verdict in verdicts) == {"pass": len(verdicts)}
    assert max(Counter((verdict.id, verdict.name) for verdict in verdicts).values()) == 1


@given(data=st.data())
def test_a_shift_of_any_bytes_anywhere_shows_and_on_its_own_device(data: st.DataObject) -> None:
    record = data.draw(good_records(max_devices=4))
    speaking: tuple[Witness, ...] = DEVICE_WITNESSES if record.evidence == "measured-on-tpu" else ("ledger",)
    witness = data.draw(st.sampled_from(speaking), "witness")
    cycle = data.draw(st.integers(0, len(record.cycles) - 1), "cycle")
    device = data.draw(st.integers(0, len(record.devices) - 1), "device")
    phase = data.draw(st.sampled_from(JUDGED), "phase")
    by = data.draw(st.integers(-(2**40), 2**40).filter(bool), "by")
    use = record.cycles[cycle].phases[PHASES.index(phase)].devices[device]
    assume((use.ledger_bytes if witness == "ledger" else use.allocator_bytes or 0) + by >= 0)

    verdicts = judge(shift(record, [phase], by, witness, cycle=cycle, device=device))
    red = [verdict for verdict in verdicts if verdict.verdict != "pass"]
    assert not passed(verdicts)
    assert {verdict.verdict for verdict in red} == {"fail"}
    # The process's scope has a word too: where resident memory speaks, it disagrees with the ledger.
    own = {f"cycle{cycle}-device{device}", f"cycle{cycle}-device{device}-capacity", f"cycle{cycle}"}
    # Growth is counted from the first cycle's base, so one shift of it shows in every cycle: on this device still.
    from_base = cycle == 0 and phase == "flush_cache_before_kv_drop"
    everywhere = {f"cycle{index}-device{device}" for index in range(len(record.cycles))} if from_base else set()
    assert {verdict.scope for verdict in red} <= own | everywhere
    assert any(verdict.witness == witness and verdict.scope == f"cycle{cycle}-device{device}" for verdict in red)


@given(data=st.data())
def test_resident_memory_may_be_off_by_its_fraction_and_no_byte_more(data: st.DataObject) -> None:
    record = data.draw(good_records(max_devices=4, allocator=False))
    phase = data.draw(st.sampled_from(PHASES[3:4] + PHASES[5:6]), "phase")
    allowed = round(record.kv.bytes * 0.02)
    off = data.draw(st.sampled_from([-allowed - 1, -allowed, 0, allowed, allowed + 1]), "off")
    number = PHASES.index(phase)
    assume((record.cycles[0].phases[number].rss_bytes or 0) + off >= 0)
    # From this phase on, so that no other change is off.
    red = [v for v in judge(shift(record, PHASES[number:], off, "rss", device=0)) if v.verdict != "pass"]
    assert {verdict.witness for verdict in red} == ({"rss"} if abs(off) > allowed else set())
    if red:
        assert {verdict.id for verdict in red} >= {"controls.witnesses_agree"}


@settings(max_examples=20)
@given(data=st.data())
def test_the_allocator_may_be_off_by_its_tolerance_and_no_byte_more(data: st.DataObject) -> None:
    record = data.draw(good_records(max_devices=4, allocator=True))
    allowed = data.draw(st.integers(0, 2**20), "allowed")
    tolerances = record.profile["tolerances"] | {"allocator_bytes": allowed}
    record = record.model_copy(update={"profile": record.profile | {"tolerances": tolerances}})
    for off in (-allowed - 1, -allowed, allowed, allowed + 1):
        assert passed(judge(shift(record, PHASES[3:7], off, "allocator", device=0))) == (abs(off) <= allowed)


# Records that are valid and nothing more -----------------------------------------------------------------------------


def thinned[Part](draw: st.DrawFn, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Some of them, in their order."""
    return tuple(part for part in parts if draw(st.integers(0, 4)))


@st.composite
def torn_records(draw: st.DrawFn) -> Record:
    """A record of a run that died, or of one that lies: parts removed, bytes shifted, and valid all the same."""
    record = draw(good_records(max_cycles=2, max_devices=3))

    def uses(phase: Phase) -> tuple[DeviceUse, ...]:
        return tuple(
            use.model_copy(
                update={
                    "ledger_bytes": draw(st.just(use.ledger_bytes) | st.integers(0, 2**50)),
                    "allocator_bytes": draw(st.just(use.allocator_bytes) | st.none()),
                    "by_owner": {owner: size for owner, size in use.by_owner.items() if draw(st.booleans())},
                }
            )
            if draw(st.booleans())
            else use
            for use in thinned(draw, phase.devices)
        )

    def torn(phase: Phase) -> Phase:
        devices = uses(phase) if draw(st.booleans()) else phase.devices
        changes: dict[str, Any] = {
            "devices": devices,
            "ledger_bytes_sum": sum(use.ledger_bytes for use in devices),
            "rss_bytes": draw(st.just(phase.rss_bytes) | st.none()),
            "info": draw(st.just(phase.info) | st.none()),
        }
        return phase.model_copy(update=changes)

    cycles = tuple(
        Cycle(
            phases=tuple(torn(phase) for phase in thinned(draw, cycle.phases)),
            swap=draw(st.just(cycle.swap) | st.none()),
            residue_before=tuple(draw(st.lists(st.dictionaries(st.integers(0, 3), sizes), max_size=2))),
        )
        for cycle in thinned(draw, record.cycles)
    )
    table = {"cycles": draw(st.integers(1, 5)), "generate": draw(st.booleans())}
    update: dict[str, Any] = {
        "cycles": cycles,
        "generates": thinned(draw, record.generates),
        "canaries": thinned(draw, record.canaries),
        "devices": thinned(draw, record.devices),
        "boot": draw(st.just(record.boot) | st.none()),
        "kv": record.kv.model_copy(
            update={
                key: draw(st.just(getattr(record.kv, key)) | st.none())
                for key in ("predicted_bytes", "predicted_bytes_by_device", "claimed_bytes")
            }
        ),
        "profile": draw(st.just(record.profile) | st.just({}) | st.just(record.profile | {"cycle": table})),
    }
    return Record.model_validate_json(record.model_copy(update=update).to_json())


@settings(max_examples=60)
@given(record=torn_records())
def test_judging_is_total_and_pure_and_survives_the_file(record: Record) -> None:
    before = record.to_json()
    verdicts = judge(record)
    assert {verdict.verdict for verdict in verdicts} <= set(OUTCOMES)
    assert judge(record) == verdicts
    assert record.to_json() == before
    assert judge(Record.model_validate_json(before, strict=True)) == verdicts
    # The record's own verdicts are not looked at, and judge() says the same of one that has them.
    assert judge(record.model_copy(update={"checks": tuple(verdicts)})) == verdicts
    assert [Verdict.model_validate_json(verdict.model_dump_json()) for verdict in verdicts] == verdicts


@settings(max_examples=40)
@given(record=torn_records(), seed=st.randoms())
def test_the_order_of_devices_does_not_matter(record: Record, seed: Any) -> None:
    def shuffled[Part](parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(seed.sample(parts, len(parts)))

    cycles = tuple(
        cycle.model_copy(
            update={
                "phases": tuple(phase.model_copy(update={"devices": shuffled(phase.devices)}) for phase in cycle.phases)
            }
        )
        for cycle in record.cycles
    )
    update: dict[str, Any] = {
        "cycles": cycles, "devices": shuffled(record.devices), "canaries": shuffled(record.canaries)
    }  # fmt: skip
    if record.boot is not None:
        boot = {"before": shuffled(record.boot.before), "after": shuffled(record.boot.after)}
        update["boot"] = record.boot.model_copy(update=boot)

    def said(record: Record) -> Counter[str]:
        return Counter(verdict.model_dump_json() for verdict in judge(record))

    assert said(record.model_copy(update=update)) == said(record)


@settings(max_examples=40)
@given(record=torn_records())
def test_what_is_torn_off_turns_no_run_into_a_pass(record: Record) -> None:
    """Fewer phases, generations or canaries are never a pass, but where the profile leaves generation out."""
    whole = all(len(cycle.phases) == len(PHASES) for cycle in record.cycles) and record.cycles
    if not whole or not record.canaries:
        assert not passed(judge(record))


def test_one_missing_sample_of_any_device_in_any_judged_phase_is_no_pass() -> None:
    record = good_record(cycles=2, devices=2)
    for cycle, name, device in itertools.product(range(2), JUDGED, range(2)):
        phase = record.cycles[cycle].phase(name)
        assert phase is not None
        uses = tuple(use for use in phase.devices if use.id != device)
        thin = phase.model_copy(update={"devices": uses, "ledger_bytes_sum": sum(use.ledger_bytes for use in uses)})
        phases = tuple(thin if entry.name == name else entry for entry in record.cycles[cycle].phases)
        cycles = list(record.cycles)
        cycles[cycle] = cycles[cycle].model_copy(update={"phases": phases})
        silent = [v for v in judge(record.model_copy(update={"cycles": tuple(cycles)})) if v.verdict != "pass"]
        assert f"cycle{cycle}-device{device}" in {verdict.scope for verdict in silent}, (cycle, name, device)
