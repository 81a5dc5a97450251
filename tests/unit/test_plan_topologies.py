"""Names of TPU slices, and what libtpu is asked for; no libtpu."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcycle.errors import ProfileError
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
    ("spelled", "name"),
    [("v5litepod-4", "v5e-4"), ("V5E-4", "v5e-4"), ("tpu7x-8", "v7x-8"), ("v7-8", "v7x-8"), (" v4-8 ", "v4-8")],
)
def test_other_spellings(spelled: str, name: str) -> None:
    assert find_topology(spelled).name == name


def test_v4_is_asked_for_as_megacore_so_that_it_shows_one_device_a_chip() -> None:
    assert find_topology("v4-8").description_arguments["chip_config_name"] == "megacore"
    assert "chip_config_name" not in find_topology("v5p-8").description_arguments


def test_a_single_chip_needs_a_host_of_one() -> None:
    assert find_topology("v6e-1").description_arguments["chips_per_host_bounds"] == (1, 1, 1)
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
