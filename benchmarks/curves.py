"""What an allocation of all layers costs as bytes, layers and devices grow; every page is mapped already."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import engines
from benchmarks.measure import Way, in_turn, load, seconds_of
from benchmarks.results import Curve, Point, Scenario
from benchmarks.sizes import Sizes
from kvcycle import platform
from kvcycle.buffers import BufferSpec, ZeroAllocator, delete

_MIB = 2**20
#: A token's K and V of one layer on one device.
_ROW = (1, 2, 128)
_ITEM_BYTES = 2


def run(sizes: Sizes) -> Scenario:
    """One allocator for each point, called in turn."""
    with engines.malloc_as_started("mapped"):
        platform.prepare("cpu", max(*sizes.devices, engines.DEVICES))
    fixed = sizes.kv_fixed_bytes
    over_bytes = {size: (size, sizes.layers, engines.DEVICES) for size in sizes.kv_bytes}
    over_layers = {layers: (fixed, layers, engines.DEVICES) for layers in sizes.kv_layers}
    over_devices = {devices: (fixed, sizes.layers, devices) for devices in sizes.devices}
    every = {point: _specs(*point) for points in (over_bytes, over_layers, over_devices) for point in points.values()}
    with load() as busy:
        allocators = {point: ZeroAllocator(specs) for point, specs in every.items()}
        ways: dict[str, Way] = {str(point): partial(_allocate, allocators[point]) for point in every}
        in_turn(ways, 1)
        found = in_turn(ways, sizes.curve_rounds)
        compiling: dict[str, Way] = {
            str(point): partial(seconds_of, partial(ZeroAllocator, every[point])) for point in over_layers.values()
        }
        compiled = in_turn(compiling, sizes.curve_rounds)

    def curve(
        name: str, x_name: str, points: dict[int, tuple[int, int, int]], of: dict[str, list[float]],
        x_of: Callable[[int], float] = float,
    ) -> Curve:  # fmt: skip
        return Curve(
            name=name,
            x_name=x_name,
            points=tuple(Point(x=x_of(x), rounds_s=tuple(of[str(point)])) for x, point in points.items()),
        )

    size = f"{fixed // _MIB} MiB"
    return Scenario(
        name="curves",
        title="allocation of all layers in one call, every page already mapped",
        curves=(
            curve(f"{sizes.layers} layers, {engines.DEVICES} devices", "MiB", over_bytes, found, lambda x: x / _MIB),
            curve(f"{size}, {engines.DEVICES} devices", "layers", over_layers, found),
            curve(f"{size}, {sizes.layers} layers", "devices", over_devices, found),
            curve("compiling it, once an engine", "layers", over_layers, compiled),
        ),
        seconds=busy.seconds,
        others_share=busy.others_share,
    )


def _specs(size_bytes: int, layers: int, devices: int) -> list[BufferSpec]:
    """The specs of a cache of about so many bytes, laid out as sglang-jax's MHA pool is."""
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("data", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None, None))
    tokens = max(1, size_bytes // (layers * devices * int(np.prod(_ROW)) * _ITEM_BYTES))
    shape = (tokens, 1, devices * _ROW[0], *_ROW[1:])
    spec = BufferSpec(shape, np.dtype(jnp.bfloat16), sharding, committed=True, weak_type=False)
    return [spec] * layers


def _allocate(allocate: ZeroAllocator) -> float:
    made: list[jax.Array] = []
    seconds = seconds_of(lambda: made.extend(allocate()))
    delete(made)
    return seconds
