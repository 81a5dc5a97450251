"""Runs things in turn and takes their time; and asks how much of the machine others took meanwhile."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

#: Does one thing, once, and returns the seconds of the part that counts.
Way = Callable[[], float]


def seconds_of(action: Callable[[], object]) -> float:
    """How long the action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def in_turn(
    ways: Mapping[str, Way],
    rounds: int,
    *,
    counts: Callable[[], bool] = lambda: True,
    spare: int = 0,
    left_out: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Run every way once a round, every other round in the opposite order.

    Args:
        ways: by name.
        rounds: how many that count.
        counts: asked after each round; may look at anything but what the ways took.
        spare: how many rounds may be left out; when they are used up, every round counts.
        left_out: called after each round that is.

    Returns:
        The seconds of every round that counts, by way.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    number = 0
    while rounds:
        gc.collect()
        once = {name: ways[name]() for name in list(ways)[:: 1 if number % 2 == 0 else -1]}
        number += 1
        if not counts() and spare:
            spare -= 1
            left_out()
            continue
        rounds -= 1
        for name in ways:
            found[name].append(once[name])
    return found


def turns[Point](rounds: Mapping[Point, int]) -> Iterator[Point]:
    """Every point as often as it shall have rounds, each point's spread evenly over the whole."""
    most = max(rounds.values())
    for number in range(most):
        yield from (point for point, times in rounds.items() if number * times % most < times)


@dataclass
class Load:
    """How long a block took, and what others took of the machine's cores meanwhile."""

    seconds: float = 0.0
    others_share: float = 0.0
    _began: tuple[float, float, float] = field(default_factory=lambda: _clocks())


def _clocks() -> tuple[float, float, float]:
    """Wall time, the machine's busy time, this process's own."""
    machine, own = psutil.cpu_times(), os.times()
    busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
    # Guests' time is in user and nice already.
    busy -= getattr(machine, "guest", 0.0) + getattr(machine, "guest_nice", 0.0)
    return time.monotonic(), busy, own.user + own.system + own.children_user + own.children_system


@contextmanager
def load() -> Iterator[Load]:
    """Measure a block's :class:`Load`, which is known after it."""
    found = Load()
    yield found
    wall, busy, own = (later - earlier for later, earlier in zip(_clocks(), found._began, strict=True))
    found.seconds = wall
    found.others_share = max(0.0, busy - own) / (wall * (os.cpu_count() or 1)) if wall else 0.0
