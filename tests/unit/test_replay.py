"""The replay's arithmetic and refusals, the reference as data, and the comparison of records; no engine."""

from __future__ import annotations

import io
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from kvcycle import host_memory, reference, replay
from kvcycle.errors import ProfileError
from kvcycle.profile_file import load_profile
from kvcycle.record import Record
from kvcycle.record_parts import DeviceUse
from kvcycle.report import side_by_side
from tests.unit.records import good_record


def shifted(record: Record, phase: str, device: int, off: int) -> Record:
    """The record with ``off`` bytes more of KV cache on one device after one phase of the first cycle."""

    def use(entry: DeviceUse) -> DeviceUse:
        if entry.id != device:
            return entry
        owners = dict(entry.by_owner) | {"kv": entry.by_owner.get("kv", 0) + off}
        return DeviceUse(id=entry.id, ledger_bytes=entry.ledger_bytes + off, by_owner=owners)

    first, *rest = record.cycles
    phases = tuple(
        p.model_copy(update={"devices": tuple(map(use, p.devices)), "ledger_bytes_sum": p.ledger_bytes_sum + off})
        if p.name == phase
        else p
        for p in first.phases
    )
    return record.model_copy(update={"cycles": (first.model_copy(update={"phases": phases}), *rest)})


def test_the_reference_agrees_with_itself() -> None:
    data = reference.load()
    first, second = data.runs
    assert first.changes() == {
        "kv_cache_dropped": -2_415_992_832,
        "sglang_param_dict2_ready": 6_248_972_288,
        "kv_cache_rebuilt": 2_415_992_832,
    }
    assert second.changes() == {
        "sglang_param_dict2_ready": 6_248_972_288,
        "kv_cache_rebuilt": 9_663_750_144 + 212_992,  # as measured; what the rest is was not noted
        "after_drop_param_dict2": -6_248_972_288,
    }
    assert [first.unexplained_bytes(change) for change in first.changes().values()] == [0, 0, 0]
    assert [second.unexplained_bytes(change) for change in second.changes().values()] == [0, 212_992, 0]
    assert data.evidence == "measured-on-tpu"


@pytest.mark.parametrize("name", ["qwen2.5-3b-v4-8", "qwen2.5-3b-v4-8-131072"])
def test_the_shipped_profiles_have_a_reference_run_of_their_geometry(name: str) -> None:
    profile = load_profile(name)
    config = profile.model_config_json()
    assert config is not None
    run = reference.run_for(config, profile.engine.max_total_tokens, profile.engine.tp_size)
    assert run is not None
    assert run.kv_buffers == config["num_hidden_layers"]
    assert reference.run_for(config, 4096, 4) is None
    assert not profile.on("cpu").cycle.generate
    assert profile.on("tpu").cycle.generate


def test_the_estimate_of_the_weights_is_close_to_what_the_reference_run_saw() -> None:
    profile = load_profile("qwen2.5-3b-v4-8")
    needed = host_memory.needed_bytes(profile)
    assert needed is not None
    exact = 2 * 6_248_972_288 + 2_415_992_832 + 2 * 2**30
    assert abs(needed - exact) < 0.001 * exact


def test_too_little_memory_is_said_before_anything_boots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = psutil.virtual_memory()._replace(available=8 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(ProfileError, match=r"needs about 15\.89 GiB .* and 8\.00 GiB \(8,589,934,592 B\) is free"):
        replay.replay(load_profile("qwen2.5-3b-v4-8"), tmp_path / "record.json", print)


def test_a_profile_whose_size_nobody_can_compute_is_refused(tmp_path: Path) -> None:
    tiny = load_profile("tiny")
    unsized = tiny.model_copy(update={"engine": tiny.engine.model_copy(update={"max_total_tokens": None})})
    host_memory.check(unsized)  # a boot goes on: nobody knows that it is too large
    with pytest.raises(ProfileError, match=r"'tiny' cannot be replayed.*engine\.max_total_tokens"):
        replay.replay(unsized, tmp_path / "record.json", print)


def test_a_containers_limit_counts_where_it_is_less_than_what_the_machine_has_free(tmp_path: Path) -> None:
    machine = host_memory.free_bytes(tmp_path)
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 300000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert host_memory.free_bytes(tmp_path) == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.free_bytes(tmp_path) >= 0.5 * machine


def test_equal_records_have_no_differences() -> None:
    assert side_by_side.differences(good_record(), good_record()) == []


def test_one_byte_on_one_device_is_found_and_named() -> None:
    second = shifted(good_record(), "kv_cache_rebuilt", 2, 1)
    (difference,) = side_by_side.differences(good_record(), second)
    assert (difference.phase, difference.device, difference.owner) == ("kv_cache_rebuilt", 2, "kv")
    assert difference.off_bytes == 1


def test_the_reference_table_shows_a_difference() -> None:
    run = reference.load().runs[0]
    buffer = io.StringIO()
    console = Console(file=buffer, width=100, no_color=True)
    assert not side_by_side.show_reference(good_record(), reference.load(), run, console)
    assert "-2,415,992,832" in buffer.getvalue()
    assert "simulated-on-cpu" in buffer.getvalue()
