"""A memory snapshot with owners: over the number of arrays, and over the devices that each is split among."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import engines
from benchmarks.measure import load, seconds_of, turns
from benchmarks.results import Curve, Figure, Point, Scenario, Target
from benchmarks.sizes import Sizes
from benchmarks.stats import ratios
from kvcycle import memory, platform
from kvcycle.record_parts import Owner

_MS = 1000.0
#: Arrays that one compiled call makes.
_AT_ONCE = 100
#: Snapshots in a row that one round's time is of.
_REPEAT = 3
#: A plain loop of so many additions is taken beside each: what slows a core down slows both.
_ADDITIONS = 100_000
#: What a snapshot of 1,000 arrays on four devices may take.
_LIMIT_MS = 5.0
#: What an array may cost where there are ten times as many: looking at every other one would make it ten times as much.
_LINEAR = 2.0


def run(sizes: Sizes) -> Scenario:
    """Each round makes the arrays of every point that is due anew, takes a first snapshot of them, and more."""
    platform.prepare("cpu", max(*sizes.devices, engines.DEVICES))
    by_arrays = [(count, engines.DEVICES) for count in sizes.arrays]
    by_devices = [(sizes.arrays_by_device, count) for count in sizes.devices]
    grid = list(dict.fromkeys([*by_arrays, *by_devices]))
    named = (sizes.arrays_by_device, engines.DEVICES)
    named = named if named in grid else grid[-1]
    rounds = dict.fromkeys(grid, sizes.snapshot_rounds)
    rounds[max(grid)] = sizes.snapshot_largest_rounds
    tenfold = (10 * named[0], named[1])
    rounds[named] = rounds[tenfold] = sizes.snapshot_linear_rounds
    first: dict[tuple[int, int], list[float]] = defaultdict(list)
    later: dict[tuple[int, int], list[float]] = defaultdict(list)
    with load() as busy:
        for arrays, devices in grid:
            _measure(min(arrays, sizes.arrays_by_device), devices)  # imports, and a heap of some size: does not count
        # The one with the target first: afterwards the process has a heap of 100,000 arrays, which an engine never has.
        found = [_measure(*named) for _ in range(sizes.snapshot_target_rounds)]
        for point in turns(rounds):
            seen_s, again_s, _ = _measure(*point)
            first[point].append(seen_s)
            later[point].append(again_s)
    target_first_s, target_later_s, target_loop_s = zip(*found, strict=True)

    def curve(name: str, points: list[tuple[int, int]], of: dict[tuple[int, int], list[float]], axis: int) -> Curve:
        xs = ("arrays", "devices")[axis]
        return Curve(name=name, x_name=xs, points=tuple(Point(x=p[axis], rounds_s=tuple(of[p])) for p in points))

    return Scenario(
        name="snapshots",
        title="memory snapshot with owners",
        figures=(
            Figure(
                name=f"snapshot of {named[0]:,} arrays x {named[1]} devices",
                unit="ms",
                rounds=tuple(s * _MS for s in target_later_s),
                target=Target(sense="at most", limit=_LIMIT_MS),
            ),
            Figure(
                name=f"the same ÷ {_ADDITIONS:,} additions in a loop",
                unit="x",
                rounds=ratios(target_later_s, target_loop_s),
            ),
            Figure(name="the first that sees these arrays", unit="ms", rounds=tuple(s * _MS for s in target_first_s)),
            Figure(
                name=f"an array of {tenfold[0]:,} ÷ an array of {named[0]:,}",
                unit="x",
                rounds=tuple(ratio / 10 for ratio in ratios(later[tenfold], later[named])),
                target=Target(sense="at most", limit=_LINEAR),
            ),
        ),
        curves=(
            curve(f"snapshot, {engines.DEVICES} devices", by_arrays, later, 0),
            curve(f"first snapshot, {engines.DEVICES} devices", by_arrays, first, 0),
            curve(f"snapshot, {sizes.arrays_by_device:,} arrays", by_devices, later, 1),
        ),
        seconds=busy.seconds,
        others_share=busy.others_share,
    )


@cache
def _maker(at_once: int, sharding: NamedSharding) -> Callable[[], list[jax.Array]]:
    """One compiled call that makes so many arrays, the same in every round."""
    shape = sharding.mesh.size * 16
    return jax.jit(lambda: [jnp.zeros(shape, jnp.bfloat16) for _ in range(at_once)], out_shardings=[sharding] * at_once)


def _measure(count: int, devices: int) -> tuple[float, float, float]:
    """Seconds of the first snapshot that sees so many arrays, of a later one, and of the loop beside it."""
    used = jax.devices()[:devices]
    sharding = NamedSharding(Mesh(np.array(used), ("device",)), PartitionSpec("device"))
    at_once = min(_AT_ONCE, count)
    arrays: list[Any] = [array for _ in range(count // at_once) for array in _maker(at_once, sharding)()]
    jax.block_until_ready(arrays)
    owners: dict[Owner, list[Any]] = {"weights": arrays[: count // 2], "kv": arrays[count // 2 : count * 3 // 4]}

    def take() -> memory.MemorySnapshot:
        return memory.snapshot(owners, devices=used)

    # As every sample of the suite is taken: its collections do not go through what lives already.
    with platform.few_objects_to_collect():
        seen_s = seconds_of(take)
        again_s = min(seconds_of(take) for _ in range(_REPEAT))
        loop_s = min(seconds_of(_loop) for _ in range(_REPEAT))
    expected = count // 2 * devices * 16 * 2
    if (held := take().bytes_of("weights")) != expected:
        raise AssertionError(f"The snapshot of {count} arrays on {devices} devices has {held} bytes, not {expected}.")
    return seen_s, again_s, loop_s


def _loop() -> int:
    total = 0
    for number in range(_ADDITIONS):
        total += number
    return total
