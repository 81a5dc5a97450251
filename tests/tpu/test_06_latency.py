"""Latencies through pytest-benchmark, into benchmark.json: warm, and after a drop and rebuild. The cold one is once."""

import statistics
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import kvcycle
from kvcycle.generate import generate_once
from kvcycle.profile import Profile
from kvcycle.record import Record
from kvcycle.record_parts import When

_ROUNDS = 3


@pytest.fixture(autouse=True)
def _needs_generation(profile: Profile) -> None:
    if not profile.cycle.generate:
        pytest.skip("the profile leaves generation out (cycle.generate = false)")


def _measure(benchmark: BenchmarkFixture, engine: Any, profile: Profile, record: Record, when: When) -> None:
    kv = kvcycle.KVCache(engine)

    def setup() -> None:
        kv.flush()
        if when == "after_rebuild":
            with kv.released():
                pass

    generated = benchmark.pedantic(generate_once, (engine, profile, when, 0), setup=setup, rounds=_ROUNDS)
    benchmark.extra_info |= {
        "evidence": record.evidence,
        "cold_s": record.generates_when("cold")[0].seconds,
        "warm_median_s": statistics.median(g.seconds for g in record.generates_when("warm")),
    }
    assert generated.compiles.any_work == 0
    assert generated.token_ids == record.generates_when("warm")[0].token_ids


@pytest.mark.benchmark(group="generate")
def test_warm(benchmark: BenchmarkFixture, engine: Any, profile: Profile, record: Record) -> None:
    _measure(benchmark, engine, profile, record, "warm")


@pytest.mark.benchmark(group="generate")
def test_after_rebuild(benchmark: BenchmarkFixture, engine: Any, profile: Profile, record: Record) -> None:
    _measure(benchmark, engine, profile, record, "after_rebuild")
