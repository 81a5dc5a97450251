"""How large and how often: the whole benchmark, and a tiny one that shows that everything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.pages import PageState

MIB = 2**20
Scale = Literal["full", "small"]


@dataclass(frozen=True)
class Sizes:
    """Geometry and rounds of every scenario."""

    layers: int
    tokens: int
    #: Engines booted one after the other, by page state: the boots are timed where there are several.
    sessions: dict[PageState, int]
    #: Rounds on each of them. What has a target gets eight or more: the interval then leaves the outermost pair out.
    rounds: dict[PageState, int]
    #: Of them, those in which a fresh jit is taken too, which takes longer than all other ways together.
    jit_rounds: int
    arrays: tuple[int, ...]
    arrays_by_device: int
    devices: tuple[int, ...]
    #: Of every point of the curves; of the one that has the target, which takes milliseconds; of that one again and of
    #: ten times as many arrays, in turn; of the largest, which takes most of the time.
    snapshot_rounds: int
    snapshot_target_rounds: int
    snapshot_linear_rounds: int
    snapshot_largest_rounds: int
    kv_bytes: tuple[int, ...]
    kv_layers: tuple[int, ...]
    #: What the curves over layers and devices hold fixed.
    kv_fixed_bytes: int
    curve_rounds: int
    generate_rounds: int
    generate_layers: int
    new_tokens: int
    #: Of the synthetic records; the last two are held against each other.
    scale_devices: tuple[int, ...]
    scale_rounds: int


SIZES: dict[Scale, Sizes] = {
    "full": Sizes(
        layers=36,
        tokens=32768,
        sessions={"default": 5, "mapped": 1, "fresh": 1, "huge": 1},
        rounds={"default": 6, "mapped": 8, "fresh": 5, "huge": 5},
        jit_rounds=5,
        arrays=(100, 1_000, 10_000, 100_000),
        arrays_by_device=1_000,
        devices=(1, 2, 4, 8, 16),
        snapshot_rounds=5,
        snapshot_target_rounds=30,
        snapshot_linear_rounds=8,
        snapshot_largest_rounds=2,
        kv_bytes=tuple(64 * MIB * 2**n for n in range(7)),
        kv_layers=(4, 10, 20, 40, 80),
        kv_fixed_bytes=512 * MIB,
        curve_rounds=4,
        generate_rounds=8,
        generate_layers=4,
        new_tokens=16,
        scale_devices=(4, 64, 1_024, 10_000),
        scale_rounds=8,
    ),
    "small": Sizes(
        layers=2,
        tokens=256,
        sessions={"default": 2, "mapped": 1, "fresh": 1, "huge": 1},
        rounds={"default": 2, "mapped": 2, "fresh": 2, "huge": 2},
        jit_rounds=1,
        arrays=(10, 100),
        arrays_by_device=10,
        devices=(1, 2),
        snapshot_rounds=2,
        snapshot_target_rounds=4,
        snapshot_linear_rounds=2,
        snapshot_largest_rounds=2,
        kv_bytes=(MIB, 2 * MIB),
        kv_layers=(1, 2),
        kv_fixed_bytes=MIB,
        curve_rounds=2,
        generate_rounds=2,
        generate_layers=2,
        new_tokens=4,
        scale_devices=(4, 16),
        scale_rounds=2,
    ),
}
