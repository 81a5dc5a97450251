"""A weight's copy in host memory: every layout comes back bit for bit, from memory that is nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvcycle.buffers import BufferSpec
from kvcycle.compiles import counting
from kvcycle.memory import snapshot
from kvcycle.weights import HostCopy, _digest

SPECS = {
    "split": PartitionSpec("x", "y"),
    "split-by-one-axis": PartitionSpec(None, "y"),
    "replicated": PartitionSpec(),
    "replicated-spelled-out": PartitionSpec(None, None),
}


def array(spec: PartitionSpec, dtype: Any = jnp.bfloat16, shape: tuple[int, ...] = (8, 6)) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    contents = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    made: jax.Array = jax.device_put(contents, NamedSharding(mesh, spec))
    return made


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8])
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_an_array_comes_back_bit_for_bit_in_its_layout(spec: PartitionSpec, dtype: Any) -> None:
    original = array(spec, dtype)
    bits, layout = _digest(original), BufferSpec.of(original)
    copy = HostCopy(original)
    original.delete()
    with counting() as span:
        restored = copy.restore()
    assert (span.compiles.any_work, span.compiles.trace) == (0, 0)
    assert (_digest(restored), BufferSpec.of(restored)) == (bits, layout)
    assert restored is not original


def test_a_replicated_block_is_kept_once() -> None:
    assert HostCopy(array(SPECS["split"])).bytes == 96
    assert HostCopy(array(SPECS["split-by-one-axis"])).bytes == 96
    replicated = HostCopy(array(SPECS["replicated"]))
    assert replicated.bytes == 96
    assert replicated.bytes_by_device == dict.fromkeys(range(4), 96)


def test_the_copy_and_what_is_made_of_it_share_no_memory() -> None:
    copy = HostCopy(array(SPECS["replicated"], jnp.float32, (64, 64)))
    first, second = copy.restore(), copy.restore()
    held = {shard.data.unsafe_buffer_pointer() for made in (first, second) for shard in made.addressable_shards}
    assert len(held) == 8
    for block in copy._blocks.values():
        assert block.ctypes.data not in held
        block[:] = -1
    assert _digest(first) == _digest(second) == _digest(array(SPECS["replicated"], jnp.float32, (64, 64)))


def test_a_copy_takes_nothing_of_the_devices() -> None:
    before = snapshot().ledger_bytes_sum
    copy = HostCopy(array(SPECS["split"]))
    copy.of.delete()
    assert snapshot().ledger_bytes_sum == before


def test_an_array_without_elements_and_a_scalar() -> None:
    for original in (array(PartitionSpec(), shape=(0, 6)), array(PartitionSpec(), shape=())):
        bits = _digest(original)
        copy = HostCopy(original)
        original.delete()
        assert _digest(copy.restore()) == bits


@pytest.mark.parametrize(
    "other",
    [
        lambda: array(SPECS["split"], jnp.float16),
        lambda: array(SPECS["replicated"]),
        lambda: array(SPECS["split"], shape=(6, 8)),
        lambda: array(SPECS["split"]).at[7, 5].set(0),
    ],
    ids=["dtype", "sharding", "shape", "one-element"],
)
def test_a_digest_tells_apart(other: Callable[[], jax.Array]) -> None:
    assert _digest(other()) != _digest(array(SPECS["split"]))


def test_a_deleted_array_has_no_bits() -> None:
    gone = array(SPECS["split"])
    gone.delete()
    assert _digest(gone) == "deleted"
