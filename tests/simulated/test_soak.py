"""The soak on a live engine: no false alarm, and a leak or a compilation that is planted ends it with its sentence."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcycle
from kvcycle.checks import SOAK_CHECKS
from kvcycle.checks.soak import MIN_CYCLES, WINDOW, violation
from kvcycle.errors import RebuildError
from kvcycle.generate import generate_once
from kvcycle.kv_cache import KVCache
from kvcycle.params import ParamSetMaker, perturbed
from kvcycle.record import Record
from kvcycle.record_parts import Generate, Soak
from kvcycle.soak import soak_on
from kvcycle.text import exact_bytes


@pytest.fixture(scope="module")
def brief(tiny: kvcycle.Profile) -> kvcycle.Profile:
    """The tiny profile without generation, whose cycles take a fraction of a second."""
    return tiny.model_copy(update={"cycle": tiny.cycle.model_copy(update={"generate": False})})


@pytest.fixture(scope="module")
def brief_opening(live_engine: Any, cold: Generate, brief: kvcycle.Profile) -> Record:
    """The whole cycle before a soak, without generation."""
    return kvcycle.run_cycle(live_engine, brief)


@pytest.fixture(scope="module")
def opening(live_engine: Any, cold: Generate, tiny: kvcycle.Profile, brief_opening: Record) -> Record:
    """The same with the generations that are the soak's controls: one that compiled, and one to compare with."""
    warm = generate_once(live_engine, tiny, "warm", 0)
    return brief_opening.model_copy(update={"generates": (cold, warm), "profile": tiny.model_dump(mode="json")})


@pytest.fixture
def leaked() -> Iterator[list[jax.Array]]:
    """A list that keeps what a test leaks, until the test has ended."""
    held: list[jax.Array] = []
    yield held
    for array in held:
        array.delete()


def points_of(record: Record) -> Soak:
    assert record.soak is not None
    return record.soak


def test_a_soak_has_nothing_to_complain_of(
    live_engine: Any, kv: KVCache, tiny: kvcycle.Profile, opening: Record, tmp_path: Path
) -> None:
    seen: list[int] = []
    path = tmp_path / "record.json"
    record = soak_on(
        live_engine, tiny, opening, MIN_CYCLES, save_to=path, on_cycle=lambda r: seen.append(len(points_of(r).points))
    )
    verdicts = [verdict for check in SOAK_CHECKS.values() for verdict in check(record)]
    assert [(v.id, v.message) for v in verdicts if v.verdict != "pass"] == []
    assert seen == list(range(1, MIN_CYCLES + 1))
    assert Record.load(path) == record
    assert [point.different_tokens for point in points_of(record).points] == [0] * MIN_CYCLES
    assert kv.state == "resident"


def test_512_bytes_a_cycle_on_one_device_end_it(
    live_engine: Any,
    kv: KVCache,
    brief: kvcycle.Profile,
    brief_opening: Record,
    leaked: list[jax.Array],
    tmp_path: Path,
) -> None:
    device = jax.local_devices()[2]
    path = tmp_path / "record.json"

    def leak(_: Record) -> None:
        leaked.append(jax.device_put(np.zeros(512, np.uint8), device))

    record = soak_on(live_engine, brief, brief_opening, 100, save_to=path, on_cycle=leak)
    found = violation(record)
    assert found is not None
    ceiling = found.expected
    assert isinstance(ceiling, int)
    lowest, highest = exact_bytes(ceiling + 512), exact_bytes(ceiling)
    # The first cycle was over when the first array was put there, so the lowest of five points has one of them.
    assert found.message == (
        f"soak cycle {WINDOW + 1} of 100, device2, ledger: {lowest} in use at the lowest of the last 5 idle "
        f"points, expected at most {highest}, the highest of 5 before the first drop; grown by +512 B, allowed 0 B."
    )
    assert len(points_of(record).points) == len(leaked) == WINDOW + 1
    saved = Record.load(path)
    assert violation(saved) == found
    assert [v.name for v in kvcycle.judge(saved) if v.id == "soak.no_growth" and v.verdict == "fail"] == [
        "device2-ledger"
    ]


def test_one_compilation_ends_it(
    live_engine: Any, kv: KVCache, brief: kvcycle.Profile, brief_opening: Record, tmp_path: Path
) -> None:
    def compile_in_the_third_cycle(record: Record) -> None:
        if len(points_of(record).points) == 2:
            jax.jit(lambda: jnp.zeros(()) + 1).lower().compile()

    record = soak_on(
        live_engine, brief, brief_opening, 100, save_to=tmp_path / "r.json", on_cycle=compile_in_the_third_cycle
    )
    found = violation(record)
    assert found is not None
    assert found.id == "soak.no_compile"
    assert found.message.startswith("soak cycle 3 of 100: ")
    assert found.message.endswith(" compilations and traces, expected 0.")
    assert len(points_of(record).points) == 3
    assert violation(Record.load(tmp_path / "r.json")) == found


def test_ctrl_c_ends_it_after_the_cycle_it_comes_in(
    live_engine: Any, kv: KVCache, brief: kvcycle.Profile, brief_opening: Record, tmp_path: Path
) -> None:
    def press(record: Record) -> None:
        if len(points_of(record).points) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    record = soak_on(live_engine, brief, brief_opening, 100, save_to=tmp_path / "r.json", on_cycle=press)
    assert len(points_of(record).points) == 2
    assert signal.getsignal(signal.SIGINT) is handler
    assert violation(record) is None
    told = [v.message for v in kvcycle.judge(record) if v.id == "soak.no_growth" and v.name == "run"]
    assert told == ["run: the soak ended after 2 of 100 cycles."]
    assert Record.load(tmp_path / "r.json") == record
    assert kv.state == "resident"


def test_what_was_measured_is_saved_when_a_step_fails(
    live_engine: Any,
    kv: KVCache,
    brief: kvcycle.Profile,
    brief_opening: Record,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(_: KVCache) -> None:
        raise RebuildError("no room", {})

    def break_it(record: Record) -> None:
        if len(points_of(record).points) == 2:
            monkeypatch.setattr(KVCache, "rebuild", fail)

    with pytest.raises(RebuildError, match="no room"):
        soak_on(live_engine, brief, brief_opening, 100, save_to=tmp_path / "r.json", on_cycle=break_it)
    monkeypatch.undo()
    assert len(points_of(Record.load(tmp_path / "r.json")).points) == 2


def test_a_maker_clones_again_and_again_without_compiling(live_engine: Any, kv: KVCache) -> None:
    from kvcycle import compiles

    make = ParamSetMaker(live_engine, perturbed(0.5))
    with compiles.counting() as span:
        first, second = make(), make()
    assert span.compiles.any_work + span.compiles.trace == 0
    assert not set(first.buffers()) & set(second.buffers())
    assert first.bytes == second.bytes == kvcycle.ParamSet.of(live_engine).bytes
    first.delete()
    second.delete()


def test_the_command_soaks_and_writes_its_page(
    guarded: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = guarded(
        "-c", "from kvcycle.cli import app; app()", "soak", "--cycles", str(MIN_CYCLES), "--report-dir", str(tmp_path),
        "--set", "on_cpu.generate=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "\x1b" not in done.stdout
    assert f"cycle 1 of {MIN_CYCLES}, " in done.stdout
    assert f"soak: {MIN_CYCLES} of {MIN_CYCLES} cycles on 4 devices (simulated-on-cpu)" in done.stdout
    assert "PASSED [simulated-on-cpu] tiny on 4 cpu devices" in done.stdout
    record = Record.load(tmp_path / "latest" / "record.json")
    assert {v.id: v.verdict for v in record.checks if v.id in SOAK_CHECKS} == {
        "soak.no_growth": "pass",
        "soak.no_compile": "not-run",
        "soak.same_output": "not-run",
        "soak.rss_is_bounded": "pass",
    }
    assert kvcycle.judge(record) == list(record.checks)
    page = (tmp_path / "latest" / "index.html").read_text(encoding="utf-8")
    assert f"The soak: {MIN_CYCLES} of {MIN_CYCLES} cycles on one engine" in page
