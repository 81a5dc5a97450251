"""Run one scenario in this process: python -m benchmarks.one NAME SCALE FILE. What it found is in FILE, as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from benchmarks import pages
from benchmarks.results import Scenario
from benchmarks.sizes import SIZES, Scale, Sizes


def _rebuild(sizes: Sizes, state: pages.PageState) -> Scenario:
    from benchmarks import rebuild

    return rebuild.run(sizes, state)


def _snapshots(sizes: Sizes) -> Scenario:
    from benchmarks import snapshots

    return snapshots.run(sizes)


def _curves(sizes: Sizes) -> Scenario:
    from benchmarks import curves

    return curves.run(sizes)


def _overhead(sizes: Sizes) -> Scenario:
    from benchmarks import overhead

    return overhead.run(sizes)


def _scale(sizes: Sizes) -> Scenario:
    from benchmarks import scale

    return scale.run(sizes)


#: By name: how it runs, and the page state that its process must be started in. jax is imported by the one that runs.
SCENARIOS: dict[str, tuple[Callable[[Sizes], Scenario], pages.PageState]] = {
    **{f"rebuild-{state}": (partial(_rebuild, state=state), state) for state in pages.ENVIRONMENT},
    "snapshots": (_snapshots, "default"),
    "curves": (_curves, "mapped"),
    "overhead": (_overhead, "default"),
    "scale": (_scale, "default"),
}
#: What a run has that names none. Nobody's engine has huge pages yet, so those are measured only when they are named.
WHOLE_RUN: tuple[str, ...] = tuple(name for name in SCENARIOS if name != "rebuild-huge")


if __name__ == "__main__":
    name, scale, file = sys.argv[1:]
    found = SCENARIOS[name][0](SIZES[cast(Scale, scale)])
    Path(file).write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
