"""Names of TPU slices, and what libtpu is asked for; no libtpu."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcycle.errors import ProfileError
from kvcycle.plan import PlanError, compiler
from kvcycle.plan.topologies import GENERATIONS, find_topology, topology_names, with_devices


@pytest.mark.parametrize(
    ("name", "devices", "libtpu", "capacity_gib"),
    [
        ("v4-8", 4, "v4:2x2x1", 30.75),
        ("v4-16", 8, "v4:2x2x2", 30.75),
        ("v4-32", 16, "v4:2x2x4", 30.75),
        ("v5e-1", 1, "v5e:1x1", 15.75),
        ("v5e-4", 4, "v5e:2x2", 15.75),
        ("v5e-8", 8, "v5e:2x4", 15.75),
        ("v5e-16", 16, "v5e:4x4", 15.75),
        ("v5p-8", 4, "v5p:2x2x1", 95.74),
        ("v5p-16", 8, "v5p:2x2x2", 95.74),
        ("v6e-1", 1, "v6e:1x1", 31.25),
        ("v6e-4", 4, "v6e:2x2", 31.25),
        ("v6e-16", 16, "v6e:4x4", 31.25),
        ("v7x-2", 2, "tpu7x:1x1x1", 94.75),
        ("v7x-8", 8, "tpu7x:2x2x1", 94.75),
        ("v7x-16", 16, "tpu7x:2x2x2", 94.75),
    ],
)
def test_a_name_means_a_slice(name: str, devices: int, libtpu: str, capacity_gib: float) -> None:
    found = find_topology(name)
    assert (found.name, found.devices) == (name, devices)
    assert found.description_arguments["topology_name"] == libtpu
    assert found.capacity_bytes / 2**30 == pytest.approx(capacity_gib, abs=0.005)


@pytest.mark.parametrize(
    ("name", "hosts", "chips", "devices"),
    [
        ("v4-8", 1, 4, 4),
        ("v4-16", 2, 8, 8),
        ("v4-32", 4, 16, 16),
        ("v4-512", 64, 256, 256),
        ("v5e-1", 1, 1, 1),
        ("v5e-4", 1, 4, 4),
        ("v5e-8", 1, 8, 8),  # one host of eight chips, and not two of four
        ("v5litepod-16", 4, 16, 16),
        ("v5e-256", 64, 256, 256),
        ("v5p-8", 1, 4, 4),
        ("v5p-16", 2, 8, 8),
        ("v6e-1", 1, 1, 1),
        ("v6e-8", 1, 8, 8),
        ("v6e-16", 4, 16, 16),
        ("v7x-2", 1, 1, 2),
        ("v7x-8", 1, 4, 8),
        ("v7x-16", 2, 8, 16),
    ],
)
def test_a_slice_has_hosts_chips_and_devices(name: str, hosts: int, chips: int, devices: int) -> None:
    found = find_topology(name)
    assert (found.hosts, found.chips, found.devices) == (hosts, chips, devices)


def test_no_slice_has_a_part_of_a_host() -> None:
    for name in topology_names():
        found = find_topology(name)
        on_host = math.prod(found.host_shape)
        assert found.hosts * on_host == found.chips, name
        assert found.devices % found.hosts == 0, name
        assert len(found.host_shape) == 3, name


def test_the_documented_table_is_the_one_that_is_planned_with() -> None:
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| (\d+) \| (\d+) \| (\d+) \| (\S+) \|$", text, re.MULTILINE)
    assert {row[0] for row in rows} >= {"v4-8", "v4-16", "v4-32", "v5e-8", "v5e-16", "v5p-16", "v6e-16", "v7x-16"}
    for name, hosts, chips, devices, shape in rows:
        found = find_topology(name)
        assert (found.hosts, found.chips, found.devices) == (int(hosts), int(chips), int(devices)), name
        assert "x".join(map(str, found.shape)) == shape


def described(monkeypatch: pytest.MonkeyPatch, devices: int, on_host: int) -> None:
    """libtpu describes every slice as so many devices, so many on each host."""
    made = [SimpleNamespace(id=number, process_index=number // on_host) for number in range(devices)]
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", lambda **_: SimpleNamespace(devices=made))


@pytest.mark.parametrize(
    ("name", "devices", "on_host", "words"),
    [
        ("v5e-8", 8, 4, "8 devices on 2 hosts for v5e-8, and 8 devices on 1 host were expected"),
        ("v4-16", 16, 8, "16 devices on 2 hosts for v4-16, and 8 devices on 2 hosts were expected"),
        ("v4-16", 8, 8, "8 devices on 1 host for v4-16, and 8 devices on 2 hosts were expected"),
    ],
)
def test_another_slice_than_the_one_that_was_asked_for_is_refused(
    name: str, devices: int, on_host: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    described(monkeypatch, devices, on_host)
    with pytest.raises(PlanError, match=f"^libtpu shows {words}; this version of kvcycle does not know this libtpu"):
        compiler.TPUCompiler(find_topology(name))


def test_a_slice_that_libtpu_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(**_: object) -> None:
        raise ValueError("NOT_FOUND: no such chip.\nsecond line")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", unknown)
    with pytest.raises(PlanError, match=r"^libtpu cannot describe v6e-16 \(v6e:4x4\): NOT_FOUND: no such chip\.$"):
        compiler.TPUCompiler(find_topology("v6e-16"))


@pytest.mark.parametrize(
    ("spelled", "name"),
    [("v5litepod-4", "v5e-4"), ("V5E-4", "v5e-4"), ("tpu7x-8", "v7x-8"), ("v7-8", "v7x-8"), (" v4-8 ", "v4-8")],
)
def test_other_spellings(spelled: str, name: str) -> None:
    assert find_topology(spelled).name == name


def test_v4_is_asked_for_as_megacore_so_that_it_shows_one_device_a_chip() -> None:
    assert find_topology("v4-8").description_arguments["chip_config_name"] == "megacore"
    assert "chip_config_name" not in find_topology("v5p-8").description_arguments


def test_a_host_that_is_not_of_2x2_chips_is_told_to_libtpu() -> None:
    assert find_topology("v6e-1").description_arguments["chips_per_host_bounds"] == (1, 1, 1)
    assert find_topology("v6e-8").description_arguments["chips_per_host_bounds"] == (2, 4, 1)
    assert "chips_per_host_bounds" not in find_topology("v6e-16").description_arguments
    assert "chips_per_host_bounds" not in find_topology("v4-16").description_arguments
    assert "chips_per_host_bounds" not in find_topology("v6e-4").description_arguments


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v4-9", r"There is no topology 'v4-9': the number counts TensorCores, and v4 comes as v4-8, v4-16, "),
        ("v4-4", r"the number counts TensorCores, and v4 comes as v4-8"),
        ("v5e-3", r"the number counts chips, and v5e comes as v5e-1, v5e-4, v5e-8"),
        ("v4", r"There is no topology 'v4'\. Did you mean v4-\d+"),
        ("v6-4", r"Did you mean .*v6e-4"),
        ("h100", r"There is no topology 'h100'\..* There are v4-8, v5e-1, v5p-8, v6e-1, v7x-2, and larger"),
        ("", r"There is no topology ''"),
    ],
)
def test_an_unknown_name_is_a_sentence_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        find_topology(name)


def test_every_listed_name_is_found_under_itself_and_under_its_aliases() -> None:
    names = topology_names()
    assert len(names) == len(set(names))
    for name in names:
        found = find_topology(name)
        assert found.name == name
        count = name.partition("-")[2]
        for alias in found.generation.aliases:
            assert find_topology(f"{alias}-{count}") == found


def test_a_slice_is_found_by_its_devices() -> None:
    v4, v7x = GENERATIONS[0], GENERATIONS[-1]
    four = with_devices(4, v4)
    assert four is not None
    assert four.name == "v4-8"
    eight = with_devices(8, v7x)
    assert eight is not None
    assert eight.name == "v7x-8"
    assert with_devices(3, v4) is None


@given(st.text(max_size=12))
def test_no_text_ends_in_anything_but_a_slice_or_a_sentence(text: str) -> None:
    try:
        name = find_topology(text).name
    except ProfileError:
        return  # any other error fails the test
    assert name in topology_names()
