"""The ledger on four virtual devices, to the byte; and an allocator that does not say what it should."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvcycle import memory
from kvcycle.memory import MemorySnapshot, allocator_bytes, limit_bytes, shards_of, snapshot
from kvcycle.record_parts import OWNERS, DeviceUse, Owner

MIB = 2**20


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    """Four devices in a row."""
    return jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(autouse=True, scope="module")
def nothing_floating() -> Iterator[None]:
    """No array of another module dies in the middle of a test of this one, which leaves no cycle of its own."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def put(mesh: Mesh, size: int, *spec: str | None) -> jax.Array:
    """An array of so many bytes, whole on every device or split among them."""
    array = jax.device_put(jnp.ones(size, jnp.int8), NamedSharding(mesh, PartitionSpec(*spec)))
    return cast(jax.Array, jax.block_until_ready(array))


def alias_of(array: jax.Array) -> jax.Array:
    """Another array of the same buffers."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def growth(before: MemorySnapshot, after: MemorySnapshot) -> dict[int, int]:
    """Bytes that the ledger grew by, on each device."""
    return {old.id: new.ledger_bytes - old.ledger_bytes for old, new in zip(before.devices, after.devices, strict=True)}


# The ledger ----------------------------------------------------------------------------------------------------------


def test_a_sharded_array_is_split_and_a_replicated_one_is_whole_everywhere(mesh: Mesh) -> None:
    before = snapshot()
    split = put(mesh, 4 * 1000, "x")
    assert growth(before, snapshot()) == dict.fromkeys(range(4), 1000)
    whole = put(mesh, 333)
    assert growth(before, snapshot()) == dict.fromkeys(range(4), 1333)
    one = jax.block_until_ready(jax.device_put(jnp.ones(7, jnp.int8), jax.devices()[2]))
    assert growth(before, snapshot()) == {0: 1333, 1: 1333, 2: 1340, 3: 1333}
    assert snapshot().ledger_bytes_sum - before.ledger_bytes_sum == 4 * 1333 + 7
    for array in (split, whole, one):
        array.delete()
    assert growth(before, snapshot()) == dict.fromkeys(range(4), 0)


@settings(max_examples=15)
@given(arrays=st.lists(st.tuples(st.sampled_from([1, 7, 1000]), st.booleans(), st.integers(0, 3)), max_size=4))
def test_each_buffer_counts_once_whatever_holds_it(arrays: list[tuple[int, bool, int]], mesh: Mesh) -> None:
    """Any arrays, split or whole, each with any number of aliases and some of them the claimed weights."""
    before = snapshot()
    held = [put(mesh, 4 * size, *(("x",) if split else ())) for size, split, _ in arrays]
    aliases = [alias_of(array) for array, (_, _, times) in zip(held, arrays, strict=True) for _ in range(times)]
    expected = sum(size if split else 4 * size for size, split, _ in arrays)
    after = snapshot({"weights": aliases, "kv": held})
    assert growth(before, after) == dict.fromkeys(range(4), expected)
    assert all(sum(use.by_owner.values()) == use.ledger_bytes for use in after.devices)
    assert after.bytes_of("weights") + after.bytes_of("kv") == 4 * expected
    for array in [*aliases, *held]:
        array.delete()
    assert growth(before, snapshot()) == dict.fromkeys(range(4), 0)


def test_only_the_devices_that_are_asked_for_count(mesh: Mesh) -> None:
    last = jax.devices()[3]
    before = snapshot(devices=[last])
    array = put(mesh, 4000, "x")
    assert growth(before, snapshot(devices=[last])) == {3: 1000}
    array.delete()


def test_the_process_is_in_the_snapshot_and_an_owner_without_an_entry_has_nothing() -> None:
    assert (snapshot().rss_bytes or 0) > MIB
    taken = MemorySnapshot(t_s=0.0, devices=(DeviceUse(id=0, ledger_bytes=5, by_owner={"kv": 5}),), rss_bytes=None)
    assert (taken.bytes_of("kv"), taken.bytes_of("weights")) == (5, 0)


def test_the_largest_are_ordered_by_bytes_and_not_by_name() -> None:
    arrays = [jax.block_until_ready(jnp.ones(size, jnp.int8)) for size in (300_000, 50_000, 4_000_000)]
    named = [entry for entry in snapshot(largest=100).largest_other if entry[1] in (300_000, 50_000, 4_000_000)]
    assert [size for _, size in named] == [4_000_000, 300_000, 50_000]
    for array in arrays:
        array.delete()


def test_an_array_without_a_kind_of_memory_is_on_its_device() -> None:
    nowhere = SimpleNamespace(sharding=SimpleNamespace(memory_kind=None))
    assert memory._in_host_memory(cast(jax.Array, nowhere)) is False


def test_an_alias_counts_once(mesh: Mesh) -> None:
    before = snapshot()
    array = put(mesh, 4000, "x")
    again, put_again = alias_of(array), jax.device_put(array, array.sharding)
    views = [shard.data for shard in array.addressable_shards]
    assert again is not array
    assert len(views) == 4
    assert growth(before, snapshot()) == dict.fromkeys(range(4), 1000)
    # While one alias lives, so does the buffer.
    del array, put_again, views
    assert growth(before, snapshot()) == dict.fromkeys(range(4), 1000)
    del again
    assert growth(before, snapshot()) == dict.fromkeys(range(4), 0)


def test_an_array_that_was_read_still_goes_with_its_last_reference() -> None:
    gc.disable()
    try:
        before = snapshot()
        array = jax.device_put(jnp.ones(1000, jnp.int8), jax.devices()[2])
        assert growth(before, snapshot({"kv": [array]}))[2] == 1000
        del array
        assert growth(before, snapshot())[2] == 0
    finally:
        gc.enable()


def test_a_deleted_array_is_not_counted(mesh: Mesh) -> None:
    before = snapshot()
    array = put(mesh, 4000, "x")
    assert growth(before, snapshot({"kv": [array]})) == dict.fromkeys(range(4), 1000)
    array.delete()
    after = snapshot({"kv": [array]})
    assert growth(before, after) == dict.fromkeys(range(4), 0)
    assert after.bytes_of("kv") == 0


def test_a_donated_array_is_counted_where_its_bytes_went(mesh: Mesh) -> None:
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = put(mesh, 4 * MIB, "x")
    before = snapshot({"kv": [array]})
    result = jax.block_until_ready(add(array))
    assert array.is_deleted()
    after = snapshot({"kv": [array], "params2": [result]})
    assert growth(before, after) == dict.fromkeys(range(4), 0)
    assert (after.bytes_of("kv"), after.bytes_of("params2")) == (0, 4 * MIB)


def test_an_array_is_read_once(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    array = put(mesh, 4000, "x")
    shards = shards_of(array)
    assert [(device, size) for (device, _), size in shards] == [(device, 1000) for device in range(4)]
    assert [shards_of(shard.data) for shard in array.addressable_shards] == [(shard,) for shard in shards]

    def read_again(array: jax.Array) -> None:
        pytest.fail(f"{array.shape} was read a second time")

    monkeypatch.setattr(memory, "_read", read_again)
    assert shards_of(array) is shards


def test_reading_leaves_no_view_that_every_snapshot_would_look_at(mesh: Mesh) -> None:
    array = put(mesh, 4000, "x")
    before = len(jax.live_arrays())
    assert len(shards_of(array)) == 4
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("aliases", [True, False], ids=["alias", "no_alias"])
def test_a_view_is_counted_with_its_array_and_alone(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, aliases: bool) -> None:
    if not aliases:  # as a jax without clone()
        monkeypatch.setattr(memory, "_alias", lambda array: array)
    before = snapshot()
    array = put(mesh, 4000, "x")
    view = array.addressable_shards[1].data
    assert growth(before, snapshot()) == dict.fromkeys(range(4), 1000)
    del array
    assert growth(before, snapshot()) == {0: 0, 1: 1000, 2: 0, 3: 0}
    assert view.nbytes == 1000


@pytest.mark.parametrize("over_several_hosts", [True, False])
def test_an_array_that_jax_does_not_alias_is_read_itself(over_several_hosts: bool) -> None:
    def clone() -> None:
        raise ValueError("Cannot copy array to non-addressable device cpu:0")

    array = SimpleNamespace(is_fully_addressable=False, clone=clone) if over_several_hosts else SimpleNamespace()
    assert memory._alias(array) is cast(jax.Array, array)


def test_what_was_read_of_an_array_goes_with_it(mesh: Mesh) -> None:
    array = put(mesh, 4000, "x")
    shards_of(array)
    left = weakref.ref(array)
    del array
    assert left() is None


def test_an_array_of_no_bytes_is_no_ones() -> None:
    empty = jax.block_until_ready(jnp.zeros((0, 4)))
    before = snapshot()
    taken = snapshot({"kv": [empty]}, largest=10**6)
    assert growth(before, taken) == dict.fromkeys(range(4), 0)
    assert taken.bytes_of("kv") == 0
    assert not any("[0, 4]" in name for name, _ in taken.largest_other)


# Owners --------------------------------------------------------------------------------------------------------------


def test_every_byte_has_one_owner(mesh: Mesh) -> None:
    before = snapshot()
    weights, kv, other = put(mesh, 400, "x"), put(mesh, 4000, "x"), put(mesh, 50)
    taken = snapshot({"weights": [weights], "kv": iter([kv])})
    for use, was in zip(taken.devices, before.devices, strict=True):
        assert list(use.by_owner) == list(OWNERS)
        assert (use.by_owner["weights"], use.by_owner["kv"], use.by_owner["params2"]) == (100, 1000, 0)
        assert use.by_owner["other"] == was.by_owner["other"] + 50
        assert sum(use.by_owner.values()) == use.ledger_bytes
    assert (taken.bytes_of("weights"), taken.bytes_of("kv")) == (400, 4000)
    assert other.nbytes == 50


def test_a_buffer_of_two_owners_is_the_first_ones(mesh: Mesh) -> None:
    array = put(mesh, 4000, "x")
    alias = alias_of(array)
    owners: list[Mapping[Owner, list[jax.Array]]] = [
        {"weights": [array], "params2": [alias]},
        {"params2": [array], "weights": [alias]},
    ]
    for claimed in owners:
        taken = snapshot(claimed)
        first, second = claimed
        assert (taken.bytes_of(first), taken.bytes_of(second)) == (4000, 0)


def test_an_owner_of_some_shards_owns_those(mesh: Mesh) -> None:
    array = put(mesh, 4000, "x")
    taken = snapshot({"kv": [shard.data for shard in array.addressable_shards if shard.device.id < 2]})
    assert [use.by_owner["kv"] for use in taken.devices] == [1000, 1000, 0, 0]


def test_the_largest_unowned_arrays_are_named_whole(mesh: Mesh) -> None:
    elsewhere = jax.live_arrays()  # another test's engine may be alive in this process
    large, small = put(mesh, 40 * MIB, "x"), put(mesh, 5 * MIB)
    views = [shard.data for shard in large.addressable_shards]
    kv = put(mesh, 80 * MIB, "x")
    taken = snapshot({"kv": [kv], "weights": elsewhere}, largest=2)
    assert taken.largest_other == ((f"int8[{40 * MIB}]", 40 * MIB), (f"int8[{5 * MIB}]", 20 * MIB))
    assert snapshot({"kv": [kv]}).largest_other == ()
    assert len(views) == 4
    assert small.nbytes == 5 * MIB


# Arrays that go away meanwhile ---------------------------------------------------------------------------------------


class VanishingArray:
    """An array that another thread deletes, or that breaks, between being listed and being read."""

    def __init__(self, error: Exception, deleted: bool) -> None:
        self.error, self.deleted, self.asked = error, deleted, 0
        self.sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def is_deleted(self) -> bool:
        self.asked += 1
        return self.deleted and self.asked > 1

    def block_until_ready(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "deleted"),
    [
        (RuntimeError("Array has been deleted with shape=int8[4]."), True),
        (TypeError("'NoneType' object is not iterable"), True),
        # While it is being donated its buffers are gone, and it does not know yet.
        (RuntimeError("INVALID_ARGUMENT: BlockHostUntilReady() called on deleted or donated buffer"), False),
    ],
)
def test_an_array_deleted_or_donated_meanwhile_is_no_longer_in_use(error: Exception, deleted: bool) -> None:
    vanishing = VanishingArray(error, deleted=deleted)
    assert shards_of(cast(jax.Array, vanishing)) == ()
    assert vanishing.asked == 2


def test_an_error_of_a_live_array_is_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="the computation failed"):
        shards_of(cast(jax.Array, VanishingArray(RuntimeError("the computation failed"), deleted=False)))


def test_snapshots_go_on_while_arrays_are_donated(mesh: Mesh) -> None:
    add, stop = jax.jit(lambda x: x + 1, donate_argnums=0), threading.Event()
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    begun = threading.Event()

    def donate() -> int:
        array, rounds = jax.device_put(jnp.ones(4 * MIB, jnp.int8), sharding), 0
        while not stop.is_set():
            array, rounds = add(array), rounds + 1
            begun.set()
        return rounds

    before = snapshot()
    with ThreadPoolExecutor(1) as pool:
        rounds = pool.submit(donate)
        assert begun.wait(timeout=60)
        try:
            seen = [growth(before, snapshot()) for _ in range(20)]
        finally:
            stop.set()
        assert rounds.result() > 0
    # Between a donation and its result there may be none or one of the two, on each device for itself.
    assert {size for sample in seen for size in sample.values()} <= {0, MIB, 2 * MIB}


# Witnesses that do not say what they should --------------------------------------------------------------------------


class FakeDevice:
    """A device whose allocator says what the test wants."""

    def __init__(self, stats: object, id: int = 0) -> None:  # noqa: A002 - jax's own name
        self.id, self.stats = id, stats

    def memory_stats(self) -> object:
        return self.stats


def fake(stats: object, id: int = 0) -> jax.Device:  # noqa: A002 - as above
    return cast(jax.Device, FakeDevice(stats, id))


@pytest.mark.parametrize(
    ("stats", "in_use", "limit"),
    [
        (None, None, None),  # CPU
        ({}, None, None),
        ({"peak_bytes_in_use": 9}, None, None),
        ({"bytes_in_use": None}, None, None),
        ({"bytes_in_use": 0, "bytes_limit": 33_017_561_088}, 0, 33_017_561_088),
        ({"bytes_in_use": 7.0}, 7, None),
        ({"bytes_limit": 5}, None, 5),
    ],
    ids=str,
)
def test_an_allocator_speaks_only_of_what_it_knows(stats: object, in_use: int | None, limit: int | None) -> None:
    assert allocator_bytes(fake(stats)) == in_use
    assert limit_bytes(fake(stats)) == limit
    (use,) = snapshot(devices=[fake(stats)]).devices
    assert use.allocator_bytes == in_use


def test_a_stale_allocator_is_reported_as_it_is_beside_a_ledger_that_moves(mesh: Mesh) -> None:
    device = fake({"bytes_in_use": 1234})
    before = snapshot(devices=[device])
    array = put(mesh, 4000, "x")
    after = snapshot(devices=[device])
    assert [taken.devices[0].allocator_bytes for taken in (before, after)] == [1234, 1234]
    assert growth(before, after) == {0: 1000}
    assert array.nbytes == 4000


def test_only_the_devices_that_were_asked_for_are_reported(mesh: Mesh) -> None:
    array = put(mesh, 4000, "x")
    taken = snapshot({"kv": [array]}, devices=jax.devices()[1:3])
    assert [(use.id, use.by_owner["kv"]) for use in taken.devices] == [(1, 1000), (2, 1000)]


def test_rss_is_the_processs_own_and_speaks_on_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rss = memory.rss_bytes()
    assert rss is not None
    assert 0.5 < rss / psutil.Process().memory_info().rss < 2
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert memory.rss_bytes() is None
    assert snapshot().rss_bytes is None


def test_an_array_in_host_memory_is_on_no_device(mesh: Mesh) -> None:
    class Host:
        """A pinned array: a live one whose memory is not its device's own."""

        sharding: Any = NamedSharding(mesh, PartitionSpec("x"), memory_kind="unpinned_host")

        def is_deleted(self) -> bool:
            return False

    kind = jax.devices()[0].default_memory().kind
    host = Host()
    if kind == "unpinned_host":
        host.sharding = NamedSharding(mesh, PartitionSpec("x"), memory_kind="pinned_host")
    assert shards_of(cast(jax.Array, host)) == ()


def test_an_array_of_another_platform_is_on_no_device_of_this_one() -> None:
    there = SimpleNamespace(id=0, platform="tpu")  # as a CPU array is beside a TPU's device 0
    sharding = SimpleNamespace(memory_kind=None, device_set={0}, addressable_devices=[there])
    other = SimpleNamespace(sharding=sharding, is_deleted=lambda: False)
    assert shards_of(cast(jax.Array, other)) == ()
    assert snapshot({"weights": [cast(jax.Array, other)]}).bytes_of("weights") == 0


def test_alike_arrays_are_named_together() -> None:
    held = [jnp.zeros((7, 11, 13)) for _ in range(2)]
    named = dict(snapshot(largest=10**6).largest_other)
    assert named["2 x float32[7, 11, 13]"] == sum(array.nbytes for array in held)


def test_of_an_array_over_several_hosts_this_hosts_only_shard_counts() -> None:
    class ShardsFail:
        """One of four hosts' arrays, with a device on each: jax 0.10.2 counts all, and fails to make the shard."""

        sharding = SimpleNamespace(
            memory_kind=None, device_set={0, 1, 2, 3}, addressable_devices=[SimpleNamespace(id=2048, platform="cpu")]
        )

        def is_deleted(self) -> bool:
            return False

        def block_until_ready(self) -> None:
            pass

        def unsafe_buffer_pointer(self) -> int:
            return 4096

        def on_device_size_in_bytes(self) -> int:
            return 4 * 72

        @property
        def addressable_shards(self) -> object:
            raise ValueError("the input arrays must have one shard each")

    assert shards_of(cast(jax.Array, ShardsFail())) == (((2048, 4096), 72),)
