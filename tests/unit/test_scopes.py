"""The suite's test ids, expanded from its ``check`` markers."""

from __future__ import annotations

import pytest

from fixtures.scopes import verdict_names
from kvcycle.checks import CHECKS
from kvcycle.profile import Platform
from kvcycle.profile_file import load_profile
from tests.unit.records import good_record

TINY = load_profile("tiny", {"engine.tp_size": 2, "cycle.cycles": 2})


@pytest.mark.parametrize(
    ("templates", "platform", "names"),
    [
        (("run",), "cpu", ["run"]),
        (("cycle{cycle}",), "tpu", ["cycle0", "cycle1"]),
        (("device{device}", "engine_claim"), "cpu", ["device0", "device1", "engine_claim"]),
        (("device{device}-{witness}",), "cpu", ["device0-ledger", "device1-ledger"]),
        (
            ("device{device}-{witness}",),
            "tpu",
            ["device0-ledger", "device0-allocator", "device1-ledger", "device1-allocator"],
        ),
        (
            ("cycle{cycle}-device{device}",),
            "cpu",
            ["cycle0-device0", "cycle0-device1", "cycle1-device0", "cycle1-device1"],
        ),
        (("cycle{cycle}-rss",), "cpu", ["cycle0-rss", "cycle1-rss"]),
        (("cycle{cycle}-rss",), "tpu", []),
        (("allocator:cycle{cycle}-allocator",), "tpu", ["cycle0-allocator", "cycle1-allocator"]),
        (("allocator:cycle{cycle}-allocator",), "cpu", []),
        ((), "cpu", []),
    ],
    ids=str,
)
def test_names(templates: tuple[str, ...], platform: Platform, names: list[str]) -> None:
    assert verdict_names(templates, TINY, platform) == names


def test_hosts_have_a_process_each() -> None:
    place = {"engine.nnodes": 2, "engine.dist_init_addr": "127.0.0.1:10011"}
    of_hosts = load_profile("tiny", {"engine.tp_size": 2, "cycle.cycles": 1, **place})
    names = verdict_names(("cycle{cycle}-rss", "run-rss", "device{device}"), of_hosts, "cpu")
    assert names == ["cycle0-host0-rss", "cycle0-host1-rss", "host0-rss", "host1-rss", "device0", "device1"]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_witnesses_of_a_platform_are_those_of_its_records(platform: Platform) -> None:
    record = good_record(cycles=2, devices=2, allocator=platform == "tpu")
    expected = verdict_names(("cycle{cycle}-device{device}-{witness}", "cycle{cycle}-rss"), TINY, platform)
    assert sorted(verdict.name for verdict in CHECKS["drop.frees_kv"](record)) == sorted(expected)
