"""The phases as reports name them: what each should change, which check judges it, and its worst verdict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from kvcycle.record import Record
from kvcycle.record_parts import Outcome, PhaseName, Verdict
from kvcycle.report.scopes import parts

#: The phases with an expected change, and the check that judges it.
JUDGED: dict[PhaseName, str] = {
    "kv_cache_dropped": "drop.frees_kv",
    "sglang_param_dict2_ready": "params2.fits",
    "kv_cache_rebuilt": "rebuild.restores_bytes",
    "after_drop_param_dict2": "cycles.no_growth",
    "weights_released": "weights.released_exact",
    "weights_resumed": "weights.restored_exact",
}

#: What a person calls them.
LABELS: dict[PhaseName, str] = {
    "engine_ready": "Engine ready",
    "generate_result": "Generated",
    "flush_cache_before_kv_drop": "Flushed",
    "kv_cache_dropped": "KV cache dropped",
    "sglang_param_dict2_ready": "Second set in",
    "kv_cache_rebuilt": "KV cache rebuilt",
    "generate_result_after_kv_rebuild": "Generated again",
    "after_drop_param_dict2": "Second set out",
    "weights_released": "Weights out",
    "weights_resumed": "Weights back",
}

#: The worst outcome of several comes first.
WORST_FIRST: tuple[Outcome, ...] = ("fail", "inconclusive", "pass", "not-run")


def worst(verdicts: Iterable[Verdict]) -> Outcome | None:
    """The worst outcome of some verdicts, None if there are none."""
    outcomes = {verdict.verdict for verdict in verdicts}
    return next((outcome for outcome in WORST_FIRST if outcome in outcomes), None)


def by_cycle(verdicts: Iterable[Verdict]) -> dict[int, list[Verdict]]:
    """The verdicts on each cycle; [] of one on which there is none."""
    found: defaultdict[int, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        cycle, _, _ = parts(verdict.scope)
        if cycle is not None:
            found[cycle].append(verdict)
    return found


def by_check(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    """The verdicts of each check, in the order of the first of each; [] of one that gave none."""
    found: defaultdict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        found[verdict.id].append(verdict)
    return found


def expected_changes(record: Record, device_id: int | None = None) -> dict[PhaseName, int]:
    """By how many bytes each judged phase should change what is in use: on one device, or summed over all.

    Phases of which nothing is known on that device are left out.
    """
    kv_record, params_record = record.kv, record.params
    kv: int | None
    params: int | None
    if device_id is None:
        kv = kv_record.predicted_bytes if kv_record.predicted_bytes is not None else kv_record.bytes
        params = params_record.bytes_on_devices
    else:
        kv = (kv_record.predicted_bytes_by_device or kv_record.bytes_by_device).get(device_id)
        params = params_record.bytes_by_device.get(device_id)
    changes: dict[PhaseName, int] = {}
    if kv is not None:
        changes |= {"kv_cache_dropped": -kv, "kv_cache_rebuilt": kv}
    if params is not None:
        changes |= {"sglang_param_dict2_ready": params, "after_drop_param_dict2": -params}
        changes |= {"weights_released": -params, "weights_resumed": params}
    return changes
