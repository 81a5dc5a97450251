"""run_cycle on a live engine: a record that passes, and one that keeps what was measured when a step fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvcycle
from kvcycle.errors import ParamSetError, RebuildError
from kvcycle.kv_cache import KVCache
from kvcycle.params import ParamSet
from kvcycle.record import Record
from kvcycle.record_info import Params2Info
from kvcycle.record_parts import PHASES, WEIGHTS_PHASES
from kvcycle.settling import leave_room_for_names
from kvcycle.text import exact_bytes


@pytest.fixture
def brief(tiny: kvcycle.Profile) -> kvcycle.Profile:
    """The tiny profile without generation: phases and bytes only."""
    return tiny.model_copy(update={"cycle": tiny.cycle.model_copy(update={"generate": False})})


def test_a_cycle_without_generation_passes_and_says_what_was_not_run(
    live_engine: Any, kv: KVCache, brief: kvcycle.Profile, tmp_path: Path
) -> None:
    lines: list[str] = []
    details: list[str] = []
    leave_room_for_names.cache_clear()
    path = tmp_path / "record.json"
    record = kvcycle.run_cycle(live_engine, brief, save_to=path, progress=lines.append, details=details.append)
    assert leave_room_for_names.cache_info().currsize == 1
    verdicts = kvcycle.judge(record)
    assert {v.verdict for v in verdicts} == {"pass", "not-run"}
    assert kvcycle.passed(verdicts)
    assert {v.id for v in verdicts if v.verdict == "not-run"} >= {"generate.no_compile", "generate.same_output"}
    assert record.evidence == "simulated-on-cpu"
    assert [phase.name for phase in record.cycles[0].phases] == [*PHASES, *WEIGHTS_PHASES]
    assert Record.load(tmp_path / "record.json") == record
    dropped = record.cycles[0].phases[3]
    told = f"cycle 0: kv_cache_dropped: {exact_bytes(dropped.ledger_bytes_sum)} in use, -{record.kv.bytes:,} B, "
    assert [line for line in lines if line.startswith(told)]
    begins = details.index("cycle 0: kv_cache_dropped begins")
    weights = dropped.devices[0].by_owner["weights"]
    assert details[begins + 1].startswith(f"  device 0: weights {weights:,} B, other ")
    assert not any("device 0" in line or "begins" in line for line in lines)


def test_a_second_set_that_does_not_fit_is_a_failed_check_and_the_cache_is_rebuilt(
    live_engine: Any, kv: KVCache, brief: kvcycle.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> ParamSet:
        raise ParamSetError("A second parameter set of 21.08 MiB (22,106,112 B) could not be allocated: no room")

    monkeypatch.setattr(ParamSet, "clone", no_room)
    record = kvcycle.run_cycle(live_engine, brief)
    info = record.cycles[0].phases[PHASES.index("sglang_param_dict2_ready")].info
    assert isinstance(info, Params2Info)
    assert info.error is not None
    failed = {v.id: v.message for v in kvcycle.judge(record) if v.verdict == "fail"}
    assert set(failed) == {"params2.fits"}, failed
    assert kv.state == "resident"


def test_what_was_measured_is_saved_when_a_step_fails(
    live_engine: Any, kv: KVCache, brief: kvcycle.Profile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: KVCache) -> None:
        raise RebuildError("no room", {})

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "rebuild", fail)
        with pytest.raises(RebuildError):
            kvcycle.run_cycle(live_engine, brief, save_to=tmp_path / "record.json")
    saved = Record.load(tmp_path / "record.json")
    assert [phase.name for phase in saved.cycles[0].phases] == list(PHASES[:5])
    assert not kvcycle.passed(kvcycle.judge(saved))
