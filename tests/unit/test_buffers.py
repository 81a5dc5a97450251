"""Slots and their allocator, on four virtual devices and with pools that are plain objects."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict, defaultdict, deque
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kvcycle.buffers import Attribute, BufferSpec, Slot, ZeroAllocator, ZeroTester, bytes_by_device, find_slots
from kvcycle.compiles import counting
from kvcycle.errors import UnknownBufferError
from kvcycle.kv_cache import KVCache
from tests.unit.engines import Scheduler003, engine_of


class Pool:
    """As sglang-jax's pools: attributes, some of them buffers."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def array(size: int = 2) -> jax.Array:
    return jnp.ones(size)


def paths(slots: list[Slot]) -> list[str]:
    return [slot.path for slot in slots]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    """One rank of data by four of tensor, with the explicit axes that sglang-jax has."""
    return jax.make_mesh((1, 4), ("data", "tensor"), axis_types=(AxisType.Explicit, AxisType.Explicit))


# Finding slots -------------------------------------------------------------------------------------------------------


def test_lists_dicts_and_attributes_are_slots_in_a_stable_order() -> None:
    pool = Pool(kv_buffer=[array(), array()], by_name={"k": array(), 3: array()}, single=array(), size=7, name="pool")
    slots = find_slots({"pool": pool})
    assert paths(slots) == [
        "pool.kv_buffer[0]", "pool.kv_buffer[1]", "pool.by_name['k']", "pool.by_name[3]", "pool.single",
    ]  # fmt: skip
    assert [slot.get() for slot in slots] == [
        pool.kv_buffer[0], pool.kv_buffer[1], pool.by_name["k"], pool.by_name[3], pool.single,
    ]  # fmt: skip
    assert paths(find_slots({"pool": pool})) == paths(slots)


def test_what_is_set_is_what_the_pool_holds() -> None:
    pool = Pool(kv_buffer=[array(), array()], by_name={"k": array()}, single=array())
    for number, slot in enumerate(find_slots({"pool": pool})):
        new = jnp.full(2, number)
        slot.set(new)
        assert slot.get() is new
    assert [int(a[0]) for a in (*pool.kv_buffer, pool.by_name["k"], pool.single)] == [0, 1, 2, 3]


def test_setting_goes_past_the_pools_own_setattr() -> None:
    class Frozen(Pool):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    pool = Frozen(single=array())
    (slot,) = find_slots({"pool": pool})
    new = array()
    slot.set(new)
    assert pool.single is new


def test_pools_inside_pools_are_walked() -> None:
    inner = Pool(kv_buffer=[array()], state=[[array()], [array(), array()]])
    hybrid = Pool(full_kv_pool=inner, by_layer=OrderedDict(a=Pool(conv=array())), spare=defaultdict(list, b=[array()]))
    assert paths(find_slots({"pools": hybrid})) == [
        "pools.full_kv_pool.kv_buffer[0]",
        "pools.full_kv_pool.state[0][0]",
        "pools.full_kv_pool.state[1][0]",
        "pools.full_kv_pool.state[1][1]",
        "pools.by_layer['a'].conv",
        "pools.spare['b'][0]",
    ]


def test_a_container_in_several_places_is_walked_once() -> None:
    buffers = [array()]
    pool = Pool(kv_buffer=buffers, alias=buffers)
    owner = Pool(pool=pool, memory_pools={"kv": pool}, itself=None)
    vars(owner)["itself"] = owner
    slots = find_slots({"allocator": owner, "pool": pool})
    assert paths(slots) == ["allocator.pool.kv_buffer[0]"]
    assert slots[0].owner is buffers


def test_a_list_inside_a_tuple_can_be_assigned() -> None:
    layers = ([array()], [array()])
    assert paths(find_slots({"pool": Pool(layers=layers)})) == ["pool.layers[0][0]", "pool.layers[1][0]"]


def test_what_holds_no_buffer_is_passed_over() -> None:
    device = jax.devices()[0]
    plain = Pool(
        host=np.zeros(3), lock=threading.Lock(), event=threading.Event(), dtype=jnp.bfloat16, device=device,
        sharding=jax.sharding.SingleDeviceSharding(device), spec=PartitionSpec(), shape=(1, 2), names={"a"},
        call=functools.partial(max, 1), none=None, kind=Pool, bound=Pool, items=deque([1, 2]),
    )  # fmt: skip
    assert find_slots({"pool": plain}) == []


class Pair(NamedTuple):
    key: jax.Array


class Slotted:
    """Its attribute is not in ``vars()``."""

    __slots__ = ("buffer", "unset")

    def __init__(self, buffer: object) -> None:
        self.buffer = buffer


class HalfSlotted(Slotted):
    """And has a ``__dict__`` beside it."""


class ListWithMore(list[Any]):
    """A list that is also an object with attributes."""


def half_slotted() -> HalfSlotted:
    pool = HalfSlotted(array())
    vars(pool)["size"] = 7
    return pool


def list_with_more() -> ListWithMore:
    pool = ListWithMore([1])
    pool.extra = array()  # type: ignore[attr-defined]
    return pool


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ((array(),), "pool.value[0]"),
        ([(1, array())], "pool.value[0][1]"),
        (Pair(array()), "pool.value[0]"),
        (deque([1, array()]), "pool.value[1]"),
        (Slotted(array()), "pool.value.buffer"),
        (Slotted((1, array())), "pool.value.buffer[1]"),
        (half_slotted(), "pool.value.buffer"),
        (list_with_more(), "pool.value.extra"),
        (functools.partial(max, array()), "pool.value.args[0]"),
        (jax.tree_util.Partial(max, array()), "pool.value.args[0]"),
    ],
    ids=["tuple", "nested-tuple", "namedtuple", "deque", "slots", "tuple-in-slots", "slots-and-dict", "list-with-more",
         "partial", "pytree"],
)  # fmt: skip
def test_an_array_that_could_not_be_put_back_is_an_error(value: object, path: str) -> None:
    with pytest.raises(UnknownBufferError) as caught:
        find_slots({"pool": Pool(value=value)})
    assert str(caught.value) == (
        f"{path} is a device array of (2,) in a place that cannot be assigned, so it could not be rebuilt in place; "
        "kvcycle does not know this kind of pool."
    )


def test_an_array_in_a_set_of_pools_is_found_and_a_root_that_is_an_array_is_an_error() -> None:
    assert paths(find_slots({"pools": {Pool(single=array())}})) == ["pools[0].single"]
    with pytest.raises(UnknownBufferError, match=r"^root is a device array of \(2,\) in a place"):
        find_slots({"root": array()})


def test_one_array_in_two_slots_is_an_error_that_names_both() -> None:
    shared = array()
    with pytest.raises(UnknownBufferError) as caught:
        find_slots({"pool": Pool(kv_buffer=[array(), shared], draft={"k": shared})})
    assert str(caught.value) == (
        "pool.draft['k'] and pool.kv_buffer[1] hold the same device array; rebuilding both would need twice the memory."
    )


class Relay(NamedTuple):
    verified_id: jax.Array
    new_seq_lens: jax.Array


@pytest.mark.parametrize(("kind", "names"), [(Relay, ["verified_id", "new_seq_lens"]), (tuple, ["0", "1"])])
def test_a_tuple_that_a_root_names_is_replaced_as_a_whole(kind: type[Any], names: list[str]) -> None:
    first, second = array(), array()
    worker: Any = Pool(spec_relay_buffers=Relay(first, second) if kind is Relay else (first, second), other=array())
    slots = find_slots({"relay": Attribute(worker, "spec_relay_buffers")})
    assert paths(slots) == [f"relay.{name}" for name in names]
    assert [slot.get() for slot in slots] == [first, second]
    news = [jnp.full(2, number) for number in range(2)]
    for slot, new in zip(slots, news, strict=True):
        slot.set(new)
    assert type(worker.spec_relay_buffers) is kind
    assert [held is new for held, new in zip(worker.spec_relay_buffers, news, strict=True)] == [True, True]
    worker.spec_relay_buffers = kind(*news) if kind is Relay else tuple(news)  # as a step of the engine does
    assert [slot.get() is new for slot, new in zip(slots, news, strict=True)] == [True, True]


def test_a_root_that_names_an_attribute_may_hold_an_array_or_a_pool() -> None:
    owner = Pool(single=array(), pool=Pool(kv_buffer=[array()]))
    slots = find_slots({"single": Attribute(owner, "single"), "pool": Attribute(owner, "pool")})
    assert paths(slots) == ["single", "pool.kv_buffer[0]"]
    slots[0].set(new := array())
    assert owner.single is new


def test_the_walk_stops_at_what_is_no_part_of_a_pool() -> None:
    model = Pool(embedding=array(), layers=[array()])
    runner = Pool(model=model, pool=None, scratch=(array(),))
    pool = Pool(kv_buffer=[array()], runner=runner, of=[model])
    vars(runner)["pool"] = pool
    weights = [model.embedding, *model.layers]
    assert paths(find_slots({"pool": pool}, beyond=[runner, model], weights=weights)) == ["pool.kv_buffer[0]"]


@pytest.mark.parametrize(("held", "path"), [("model", "pool.held.embedding"), ("layers", "pool.held[0]")])
def test_a_weight_that_a_pool_holds_is_an_error_that_names_it(held: str, path: str) -> None:
    model = Pool(embedding=array(), layers=[array()])
    pool = Pool(kv_buffer=[array()], held=model if held == "model" else model.layers)
    with pytest.raises(UnknownBufferError) as caught:
        find_slots({"pool": pool}, weights=[model.embedding, *model.layers])
    assert str(caught.value) == (
        f"{path} is one of the model's weights, of (2,), held by a pool: to drop it would delete the model; kvcycle "
        "does not know this kind of pool."
    )


# Allocating ----------------------------------------------------------------------------------------------------------

SPECS = {
    "rank5": ((8, 1, 4, 2, 128), PartitionSpec("data", None, "tensor", None, None), jnp.bfloat16),
    "rank3": ((8, 4, 128), PartitionSpec(None, "tensor", None), jnp.bfloat16),
    "replicated": ((8, 4), PartitionSpec(), jnp.float32),
    "size-1 axis": ((8, 4), PartitionSpec("data", None), jnp.int32),
    "both axes": ((8, 4), PartitionSpec(("data", "tensor")), jnp.int8),
    "fp8": ((8, 4), PartitionSpec(None, "tensor"), jnp.float8_e4m3fn),
    "bool": ((4,), PartitionSpec("tensor"), jnp.bool_),
    "scalar": ((), PartitionSpec(), jnp.float32),
    "empty": ((0, 4), PartitionSpec(), jnp.float32),
}


@pytest.fixture(scope="module")
def sharded(mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays as pools have them: of every rank, spec and dtype, and none of them zeros."""
    return {
        name: jax.device_put(jnp.ones(shape, dtype), NamedSharding(mesh, spec))
        for name, (shape, spec, dtype) in SPECS.items()
    }


@pytest.fixture(scope="module")
def uncommitted() -> dict[str, jax.Array]:
    """Arrays that no one put anywhere, some of a weak type."""
    return {
        "float32": jnp.ones(3),
        "weak float32": jax.lax.full((3,), 1.0),
        "weak int32": jax.lax.full((3,), 1),
        "weak complex64": jax.lax.full((3,), 1j),
    }


def assert_rebuilt(before: jax.Array, after: jax.Array) -> None:
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert after.sharding == before.sharding
    assert after.sharding.memory_kind == before.sharding.memory_kind
    assert after.committed == before.committed
    assert after.aval.weak_type == before.aval.weak_type
    assert BufferSpec.of(after) == BufferSpec.of(before)
    assert BufferSpec.of(after).layout == BufferSpec.of(before).layout
    assert not np.asarray(after).any()


def test_zeros_are_what_the_arrays_were(sharded: dict[str, jax.Array], uncommitted: dict[str, jax.Array]) -> None:
    # In turn, so that the order of the two kinds' own calls would show.
    names = [*sharded, *uncommitted]
    names = names[::2] + names[1::2]
    before = [(sharded | uncommitted)[name] for name in names]
    assert {bool(a.committed) for a in before} == {True, False}
    allocate = ZeroAllocator([BufferSpec.of(a) for a in before])
    with counting() as span:
        after = allocate()
    assert span.compiles.any_work == 0
    assert len(after) == len(before)
    for was, now in zip(before, after, strict=True):
        assert_rebuilt(was, now)
    assert len({a.unsafe_buffer_pointer() for a in after if len(a.devices()) == 1 and a.size}) == len(uncommitted)


def test_an_allocator_allocates_as_often_as_it_is_called(sharded: dict[str, jax.Array]) -> None:
    spec = BufferSpec.of(sharded["rank5"])
    allocate = ZeroAllocator([spec, spec])
    arrays = [*allocate(), *allocate()]
    buffers = {shard.data.unsafe_buffer_pointer() for a in arrays for shard in a.addressable_shards}
    assert len(buffers) == 4 * 4
    assert ZeroAllocator([])() == []


def test_a_spec_outlives_its_array(mesh: Mesh) -> None:
    gone = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec(None, "tensor")))
    spec = BufferSpec.of(gone)
    gone.delete()
    assert BufferSpec.of(gone) == spec
    assert BufferSpec.of(ZeroAllocator([spec])()[0]) == spec


def test_a_layout_is_readable(sharded: dict[str, jax.Array], uncommitted: dict[str, jax.Array]) -> None:
    layout = BufferSpec.of(sharded["rank3"]).layout
    assert layout.shape == (8, 4, 128)
    assert (layout.dtype, layout.committed, layout.weak_type) == ("bfloat16", True, False)
    assert layout.sharding == "P(None, 'tensor', None) over {'data': 1, 'tensor': 4}"
    plain = BufferSpec.of(uncommitted["weak int32"]).layout
    assert (plain.dtype, plain.committed, plain.weak_type) == ("int32", False, True)
    assert plain.sharding.startswith("SingleDeviceSharding(")
    assert plain.memory_kind == jax.devices()[0].default_memory().kind


# A pool of rank 3, as sglang-jax had them up to 0.0.2 -----------------------------------------------------------------


def test_a_pool_of_rank_3_is_dropped_and_rebuilt_in_place(mesh: Mesh) -> None:
    """One buffer a layer: tokens and a page, K and V of every head side by side, their width."""
    layers, tokens, page, heads, width = 3, 32, 16, 4, 128
    sharding = NamedSharding(mesh, PartitionSpec(None, "tensor", None))

    def buffer() -> jax.Array:
        return cast(jax.Array, jax.device_put(jnp.ones((tokens + page, heads * 2, width), jnp.bfloat16), sharding))

    @functools.partial(jax.jit, donate_argnums=0)
    def forward(buffers: list[jax.Array]) -> list[jax.Array]:
        return [kv + 1 for kv in buffers]

    pool = Pool(kv_buffer=[buffer() for _ in range(layers)], kv_sharding=sharding, size=tokens, page_size=page)
    pool.kv_buffer[:] = forward(pool.kv_buffer)
    held, before = pool.kv_buffer, list(pool.kv_buffer)
    kv = KVCache(engine_of(Scheduler003({"token_to_kv_pool": pool})))
    assert [slot.path for slot in kv.slots] == [f"token_to_kv_pool.kv_buffer[{layer}]" for layer in range(layers)]
    with kv.released() as freed:
        assert all(a.is_deleted() for a in before)
    # K and V of one head on each of the four devices.
    assert freed.bytes_by_device == dict.fromkeys(range(4), layers * (tokens + page) * 2 * width * 2)
    assert (freed.deleted_buffers, freed.missing_delete_method) == (layers, 0)
    assert pool.kv_buffer is held
    for was, now in zip(before, pool.kv_buffer, strict=True):
        assert (now.shape, now.dtype, now.sharding) == (was.shape, was.dtype, sharding)
        assert not np.asarray(now).any()
    with counting() as span:
        pool.kv_buffer[:] = forward(pool.kv_buffer)
    assert span.compiles.any_work == 0
    assert all((np.asarray(a) == 1).all() for a in pool.kv_buffer)


# Counting bytes ------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_shards_on_each_device(sharded: dict[str, jax.Array]) -> None:
    # A quarter on each device; a replicated array whole on each, which nbytes does not say.
    assert bytes_by_device([sharded["rank3"]]) == dict.fromkeys(range(4), 8 * 128 * 2)
    assert bytes_by_device([sharded["replicated"]]) == dict.fromkeys(range(4), sharded["replicated"].nbytes)
    assert bytes_by_device([sharded["replicated"], sharded["rank3"]]) == dict.fromkeys(range(4), 2048 + 128)
    assert bytes_by_device([]) == {}


def test_bytes_on_one_device_are_on_no_other() -> None:
    last = jax.device_put(jnp.ones(3), jax.devices()[3])
    first = jax.device_put(jnp.ones(5, jnp.int8), jax.devices()[0])
    assert list(bytes_by_device([last, first]).items()) == [(0, 5), (3, 12)]


# Seeing what is not zero ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 31])
@pytest.mark.parametrize("value", [1.0, -1.0, float("nan"), float("inf"), 2**-133])
def test_one_element_that_is_not_zero_is_seen(mesh: Mesh, value: float, place: int) -> None:
    sharding = NamedSharding(mesh, PartitionSpec(None, "tensor"))

    def put(host: np.ndarray[Any, Any]) -> jax.Array:
        return cast(jax.Array, jax.device_put(host.reshape(8, 4), sharding))

    zeros = np.zeros(32, jnp.bfloat16)
    spoiled = zeros.copy()
    spoiled[place] = value
    assert spoiled[place] != 0
    arrays = [put(zeros), put(spoiled), put(-zeros)]
    test = ZeroTester([BufferSpec.of(a) for a in arrays])
    with counting() as span:
        assert test(arrays) == [False, True, False]
    assert span.compiles.any_work == 0


def test_what_an_allocator_makes_is_zero(sharded: dict[str, jax.Array]) -> None:
    specs = [BufferSpec.of(a) for a in sharded.values()]
    test = ZeroTester(specs)
    assert test(ZeroAllocator(specs)()) == [False] * len(specs)
    assert test(list(sharded.values())) == [a.size > 0 for a in sharded.values()]
