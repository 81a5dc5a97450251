"""Records that pass every check, and small edits of them: one edit is one planted fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

from kvcycle.profile import CycleSpec, EngineArgs, ModelSpec, Profile
from kvcycle.record import Record
from kvcycle.record_info import (
    DropInfo,
    Layout,
    Params2Info,
    PhaseInfo,
    RebuildInfo,
    WeightsReleasedInfo,
    WeightsResumedInfo,
)
from kvcycle.record_parts import (
    KV,
    PHASES,
    WEIGHTS_PHASES,
    Boot,
    Canary,
    Compiles,
    Cycle,
    Device,
    DeviceUse,
    Generate,
    Params,
    Phase,
    PhaseName,
    Pool,
    Stack,
    SwapInfo,
    When,
    Witness,
)

#: Bytes on each device, as the tiny profile has them.
KV_BYTES = 33_556_480
WEIGHTS = 5_526_528
OTHER = 104
#: What an allocator has in use and no live array owns.
UNOWNED = 73_148_416
RSS_BASE = 580_108_288
CANARY = 16 * 2**20
BUFFERS = 4
LEAVES = 51

WARM_TOKENS = (328, 249, 182, 458, 121, 90, 38, 418)
OTHER_TOKENS = (234, 234, 234, 234, 234, 234, 234, 234)
LOGPROBS = (-4.03125, -3.984375, -3.546875, -3.375, -3.65625, -3.6875, -3.53125, -3.609375)

LAYOUT = Layout(
    shape=(16385, 1, 4, 2, 128),
    dtype="bfloat16",
    sharding="P('data', None, 'tensor', None, None) over {'data': 1, 'tensor': 4}",
    memory_kind="device",
    committed=True,
    weak_type=False,
)
SLOTS = tuple(f"token_to_kv_pool.kv_buffer[{index}]" for index in range(BUFFERS))
DIGESTS = {f"{number} model.layers.{number}.scale": f"{number:032x}" for number in range(LEAVES)}

#: From one of these phases on up to the cycle's last but one: a shift of all of them shows at the first alone.
BORROWED: tuple[PhaseName, ...] = PHASES[3:7]


def good_record(
    cycles: int = 2,
    devices: int = 4,
    allocator: bool = False,
    kv_bytes: int = KV_BYTES,
    weights: int = WEIGHTS,
    release_weights: bool = False,
    hosts: int = 1,
) -> Record:
    """A record that passes every check: of a TPU with an allocator's statistics, or of virtual devices with RSS.

    The devices are numbered through, as on a TPU, and each host has as many; the resident memory of several is not
    sampled. Parts that are equal are one object, so that ten thousand devices are made in a second.
    """
    rss = not allocator and hosts == 1
    ids = range(devices)
    profile = Profile(
        name="tiny",
        model=ModelSpec(path="builtin:tiny-qwen2"),
        engine=EngineArgs(tp_size=devices),
        cycle=CycleSpec(cycles=cycles, release_weights=release_weights),
    )

    @cache
    def uses(kv: int, params2: int, booted: int = 1, resident: bool = True) -> tuple[DeviceUse, ...]:
        own = {"weights": booted * weights if resident else 0, "kv": kv, "params2": params2, "other": booted * OTHER}
        held = sum(own.values())
        return tuple(
            DeviceUse.model_validate(
                {
                    "id": device,
                    "ledger_bytes": held,
                    "allocator_bytes": held + UNOWNED if allocator else None,
                    "by_owner": own,
                }
            )
            for device in ids
        )

    infos: dict[PhaseName, PhaseInfo] = {
        "kv_cache_dropped": DropInfo(
            buffers=BUFFERS,
            deleted_buffers=BUFFERS,
            missing_delete_method=0,
            bytes_by_device=dict.fromkeys(ids, kv_bytes),
        ),
        "sglang_param_dict2_ready": Params2Info(
            arrays=LEAVES,
            requested_bytes_by_device=dict.fromkeys(ids, weights),
            buffers=LEAVES * devices,
            buffers_shared_with_engine=0,
        ),
        "kv_cache_rebuilt": RebuildInfo(
            layouts_before=dict.fromkeys(SLOTS, LAYOUT), layouts_after=dict.fromkeys(SLOTS, LAYOUT)
        ),
        "weights_released": WeightsReleasedInfo(
            arrays=LEAVES, deleted_arrays=LEAVES, host_bytes=weights * devices, digests=DIGESTS
        ),
        "weights_resumed": WeightsResumedInfo(digests=DIGESTS, model_params=LEAVES, model_shared=LEAVES),
    }

    def phase(number: int, name: PhaseName) -> Phase:
        dropped = name in ("kv_cache_dropped", "sglang_param_dict2_ready")
        borrowed = name in ("sglang_param_dict2_ready", "kv_cache_rebuilt", "generate_result_after_kv_rebuild")
        devices_now = uses(0 if dropped else kv_bytes, weights if borrowed else 0, resident=name != "weights_released")
        held = sum(use.ledger_bytes for use in devices_now)
        return Phase(
            name=name,
            t_s=float(number),
            seconds=0.25,
            rss_bytes=RSS_BASE + held if rss else None,
            devices=devices_now,
            ledger_bytes_sum=held,
            info=infos.get(name),
        )

    def cycle(index: int) -> Cycle:
        names = PHASES + WEIGHTS_PHASES if release_weights else PHASES
        phases = (phase(len(names) * index + number, name) for number, name in enumerate(names))
        swap = SwapInfo(leaves=LEAVES, runner_shared=LEAVES, model_shared=LEAVES, model_params=LEAVES, restored=LEAVES)
        return Cycle(phases=tuple(phases), swap=swap)

    def generated(when: When, index: int, seconds: float, **other: Any) -> Generate:
        values = {"token_ids": WARM_TOKENS, "logprobs": LOGPROBS} | other
        return Generate(when=when, cycle=index, seconds=seconds, **values)

    compiled = Compiles(trace=12, lower=12, backend=12)
    generates = [generated("cold", 0, 17.0, compiles=compiled)]
    generates += [generated("warm", 0, seconds) for seconds in (2.5, 2.75, 2.6)]
    generates.append(generated("prefix_hit", 0, 2.5, cached_tokens=4))
    for index in range(cycles):
        if index:
            generates.append(generated("warm", index, 2.6))
        generates.append(generated("after_rebuild", index, 2.8))
        generates.append(generated("with_params2", index, 2.8, token_ids=OTHER_TOKENS))
        generates.append(generated("after_swap_back", index, 2.8))
        if release_weights:
            generates.append(generated("after_weights", index, 2.8))
    generates.append(generated("after_clear_caches", cycles - 1, 18.0, compiles=compiled))

    witnesses: tuple[Witness, ...] = ("ledger", "allocator") if allocator else ("ledger",)
    canaries = [
        Canary(witness=witness, device=device, allocated_bytes=CANARY, rise_bytes=CANARY, fall_bytes=CANARY)
        for device in ids
        for witness in witnesses
    ]
    if rss:
        size = CANARY * devices
        canaries.append(
            Canary(witness="rss", device=None, allocated_bytes=size, rise_bytes=size + 20_480, fall_bytes=size)
        )
    return Record(
        evidence="measured-on-tpu" if allocator else "simulated-on-cpu",
        created="2026-11-23T23:24:47Z",
        profile=profile.model_dump(mode="json"),
        stack=Stack(kvcycle="0.1.0", jax="0.10.2", jaxlib="0.10.2", sglang_jax="0.1.0rc0", python="3.13.0"),
        devices=tuple(
            Device(
                id=device,
                kind="TPU v4" if allocator else "cpu",
                limit_bytes=33_017_561_088 if allocator else None,
                host=device * hosts // devices,
            )
            for device in ids
        ),
        kv=KV(
            buffers=BUFFERS,
            bytes=kv_bytes * devices,
            bytes_by_device=dict.fromkeys(ids, kv_bytes),
            predicted_bytes=kv_bytes * devices,
            predicted_bytes_by_device=dict.fromkeys(ids, kv_bytes),
            predicted_by="config arithmetic",
            predicted_how="4 layers x …",
            claimed_bytes=kv_bytes * devices,
            pools=(Pool(type="MHATokenToKVPool", buffers=BUFFERS, bytes=kv_bytes * devices),),
        ),
        params=Params(arrays=LEAVES, bytes_on_devices=weights * devices, bytes_by_device=dict.fromkeys(ids, weights)),
        boot=Boot(
            seconds=7.0,
            before=uses(0, 0, booted=0),
            after=uses(kv_bytes, 0),
            compiles=Compiles(trace=20, lower=19, backend=19),
        ),
        canaries=tuple(canaries),
        cycles=tuple(cycle(index) for index in range(cycles)),
        generates=tuple(generates),
    )


def edit_cycle(record: Record, index: int, **changes: Any) -> Record:
    """The record with fields of one cycle replaced."""
    cycles = list(record.cycles)
    cycles[index] = cycles[index].model_copy(update=changes)
    return record.model_copy(update={"cycles": tuple(cycles)})


def edit_phase(record: Record, name: PhaseName, change: Callable[[Phase], Phase], cycle: int = 0) -> Record:
    """The record with one phase changed."""
    phases = tuple(change(phase) if phase.name == name else phase for phase in record.cycles[cycle].phases)
    return edit_cycle(record, cycle, phases=phases)


def edit_info(record: Record, name: PhaseName, cycle: int = 0, **changes: Any) -> Record:
    """The record with fields of a phase's info replaced."""

    def change(phase: Phase) -> Phase:
        assert phase.info is not None
        return phase.model_copy(update={"info": phase.info.model_copy(update=changes)})

    return edit_phase(record, name, change, cycle)


def edit_use(record: Record, name: PhaseName, cycle: int = 0, device: int = 1, **changes: Any) -> Record:
    """The record with fields of one device's use in one phase replaced; the phase's sum follows."""

    def change(phase: Phase) -> Phase:
        uses = tuple(use.model_copy(update=changes) if use.id == device else use for use in phase.devices)
        return phase.model_copy(update={"devices": uses, "ledger_bytes_sum": sum(use.ledger_bytes for use in uses)})

    return edit_phase(record, name, change, cycle)


def shift(
    record: Record, names: Iterable[PhaseName], by: int, *witnesses: Witness, cycle: int = 0, device: int = 1
) -> Record:
    """The record with so many more bytes in use in these phases, by these witnesses (the ledger if none is named)."""
    for name in names:
        phase = record.cycles[cycle].phase(name)
        assert phase is not None
        use = phase.device(device)
        assert use is not None
        for witness in witnesses or ("ledger",):
            if witness == "rss":
                record = edit_phase(record, name, partial(_with_rss, by=by), cycle)
            elif witness == "ledger":
                record = edit_use(record, name, cycle, device, ledger_bytes=use.ledger_bytes + by)
            else:
                record = edit_use(record, name, cycle, device, allocator_bytes=(use.allocator_bytes or 0) + by)
    return record


def _with_rss(phase: Phase, by: int) -> Phase:
    return phase.model_copy(update={"rss_bytes": (phase.rss_bytes or 0) + by})


def edit_generates(record: Record, when: When, cycle: int | None = None, **changes: Any) -> Record:
    """The record with fields of the generations of one kind, of one cycle or of all, replaced."""
    return record.model_copy(
        update={
            "generates": tuple(
                g.model_copy(update=changes) if g.when == when and cycle in (None, g.cycle) else g
                for g in record.generates
            )
        }
    )


def without_generates(record: Record, *whens: When) -> Record:
    """The record without the generations of these kinds."""
    return record.model_copy(update={"generates": tuple(g for g in record.generates if g.when not in whens)})


def without_phase(record: Record, name: PhaseName, cycle: int = 0) -> Record:
    """The record without one phase."""
    phases = tuple(phase for phase in record.cycles[cycle].phases if phase.name != name)
    return edit_cycle(record, cycle, phases=phases)


def with_profile(record: Record, table: str, **values: Any) -> Record:
    """The record of a profile with other values in one table."""
    return record.model_copy(update={"profile": record.profile | {table: record.profile[table] | values}})


def edit_canary(record: Record, witness: Witness, device: int | None, **changes: Any) -> Record:
    """The record with fields of one canary replaced."""
    return record.model_copy(
        update={
            "canaries": tuple(
                canary.model_copy(update=changes) if (canary.witness, canary.device) == (witness, device) else canary
                for canary in record.canaries
            )
        }
    )


def edit_kv(record: Record, **changes: Any) -> Record:
    """The record with other facts of the KV cache."""
    return record.model_copy(update={"kv": record.kv.model_copy(update=changes)})
