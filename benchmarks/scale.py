"""What judging, writing, reading and drawing a record cost as its devices grow, on synthetic records of one cycle."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.gather import DEVICES_ON_HOST
from benchmarks.measure import Way, in_turn, load
from benchmarks.results import Curve, Figure, Point, Scenario, Target
from benchmarks.sizes import Sizes
from kvcycle.checks import judge
from kvcycle.record import Record
from kvcycle.report import markdown, page, terminal
from tests.unit.records import BORROWED, good_record, shift

#: What a device more may cost where there are many, against one where there are a tenth: a scan of all devices for each
#: would make it ten times as much.
_LINEAR = Target(sense="at most", limit=2.0)


def run(sizes: Sizes) -> Scenario:
    """Every part at every number of devices, in turn. The time is this process's own: nothing waits.

    Imports and templates are warmed up with the fewest devices: a round of the most takes as long as all else together.
    """
    with tempfile.TemporaryDirectory(prefix="kvcycle-scale-") as folder, load() as busy:
        parts = {devices: _parts(devices, Path(folder) / f"{devices}.json") for devices in sizes.scale_devices}
        names = list(next(iter(parts.values())))
        ways: dict[str, Way] = {
            f"{name} {devices}": partial(_processor_s, action)
            for devices, actions in parts.items()
            for name, action in actions.items()
        }
        fewest = min(parts)
        in_turn({f"{name} {fewest}": ways[f"{name} {fewest}"] for name in names}, 1)  # does not count
        found = in_turn(ways, sizes.scale_rounds)
    few, many = sizes.scale_devices[-2:]
    return Scenario(
        name="scale",
        title="a record of one cycle, judged and drawn (processor time)",
        figures=tuple(
            Figure(
                name=f"{name}: a device of {many:,} ÷ a device of {few:,}",
                unit="x",
                rounds=tuple(
                    (a / many) / (b / few) for a, b in zip(found[f"{name} {many}"], found[f"{name} {few}"], strict=True)
                ),
                target=_LINEAR,
            )
            for name in names
        ),
        curves=tuple(
            Curve(
                name=name,
                x_name="devices",
                points=tuple(Point(x=n, rounds_s=tuple(found[f"{name} {n}"])) for n in sizes.scale_devices),
            )
            for name in names
        ),
        seconds=busy.seconds,
        others_share=busy.others_share,
    )


def _parts(devices: int, path: Path) -> dict[str, Callable[[], object]]:
    """By name, what is done with a record of so many devices, one of which kept 512 bytes at the drop."""
    hosts = -(-devices // DEVICES_ON_HOST)
    good = good_record(cycles=1, devices=devices, hosts=hosts, allocator=True)
    record = shift(good, BORROWED, 512, device=devices * 2 // 3)
    record.save(path)
    verdicts = judge(record)

    def in_terminal() -> None:
        terminal.show(record, verdicts, Console(file=io.StringIO(), width=80, highlight=False))

    return {
        "judge": partial(judge, record),
        "write record.json": partial(record.save, path),
        "read record.json": partial(Record.load, path),
        "draw index.html": partial(page.draw, record, verdicts),
        "write summary.md": partial(markdown.summary, record, verdicts),
        "print": in_terminal,
    }


def _processor_s(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started
