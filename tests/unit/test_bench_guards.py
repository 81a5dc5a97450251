"""The guards' own time: of planted guards, what they add is found, and what they wrap is not taken for theirs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import overhead
from benchmarks.guards import Noted, Replay, around_nothing
from benchmarks.stats import Outcome
from kvcycle import internals

#: Of a generation in these tests, and of a guard that is planted to be slow.
GENERATION_S, SLOW_S, CALLS = 0.75, 0.003, 5


class Scheduler:
    """Counts how often the engine's own method is called."""

    def __init__(self) -> None:
        self.asked = 0

    def next_batch(self) -> int:
        self.asked += 1
        return self.asked


def guarded(wrapped: Callable[[], int], more: Callable[[], object]) -> Callable[[], int]:
    """A wrapper as kvcycle's: it does more, and calls what it holds."""

    def guard() -> int:
        more()
        return wrapped()

    return guard


def of_a_generation(function: Callable[..., Any], *args: Any) -> Noted:
    """A guard that one generation has called."""
    noted = Noted(function)
    for _ in range(CALLS):
        noted(*args)
    return noted


def judged(replays: list[Replay], repeat: int) -> Outcome | None:
    """The outcome of eight rounds of a generation with these guards."""
    own = [sum(replay.own_s(repeat) for replay in replays) for _ in range(8)]
    same = [GENERATION_S] * 8
    found = overhead.figures({"bare": same, "guarded": same, "own": own}, CALLS)
    judged = [figure for figure in found if figure.target]
    assert [figure.name for figure in judged] == ["generation + guards' own time ÷ generation"]
    return judged[0].outcome()


@pytest.mark.parametrize(("more", "expected"), [(lambda: time.sleep(SLOW_S), "missed"), (lambda: None, "met")])
def test_a_guard_that_costs_milliseconds_a_call_misses_the_target(
    more: Callable[[], object], expected: Outcome
) -> None:
    scheduler = Scheduler()
    # The difference of two generations would hardly show it: 15 ms of 750, which vary by 40.
    slow = of_a_generation(guarded(scheduler.next_batch, more)).around("next_batch", scheduler.next_batch)
    assert slow.calls == CALLS
    assert judged([slow], repeat=5) == expected


def test_what_a_guard_wraps_is_not_called_again_and_not_counted_as_its_own() -> None:
    class Slow(Scheduler):
        def next_batch(self) -> int:
            time.sleep(SLOW_S)
            return super().next_batch()

    scheduler = Slow()
    guard = guarded(scheduler.next_batch, lambda: None)
    replay = of_a_generation(guard).around("next_batch", scheduler.next_batch)
    assert judged([replay], repeat=5) == "met"
    assert scheduler.asked == CALLS, "by the generation alone"
    assert guard() == CALLS + 1, "the guard that the engine calls is as it was"


def test_of_guards_around_guards_each_does_its_own_and_none_reaches_the_engine() -> None:
    scheduler, did = Scheduler(), []
    inner = guarded(scheduler.next_batch, lambda: did.append("inner"))
    outer = guarded(inner, lambda: did.append("outer"))
    around_nothing(outer, scheduler.next_batch, lambda: 0)()
    assert (did, scheduler.asked) == (["outer", "inner"], 0)


def test_a_guard_whose_own_time_cannot_be_told_is_refused() -> None:
    scheduler = Scheduler()

    def guard(next_batch: Callable[[], int] = scheduler.next_batch) -> int:
        return next_batch()

    for unknown in (guard, scheduler.next_batch, guarded(Scheduler().next_batch, lambda: None)):
        with pytest.raises(ValueError, match=r"does not hold Scheduler.next_batch in its closure, so its own time"):
            around_nothing(unknown, scheduler.next_batch, lambda: 0)


def test_kvcycles_own_wrappers_are_found_around_what_they_wrap() -> None:
    asked: list[str] = []

    async def generate_request(_request: str) -> AsyncIterator[str]:
        asked.append("engine")
        yield "chunk"

    manager = SimpleNamespace(generate_request=generate_request, flush_cache=generate_request)
    engine = SimpleNamespace(tokenizer_manager=manager)
    for name in ("kv cache", "weights"):
        internals.refuse_requests(engine, lambda name=name: asked.append(name))  # type: ignore[misc] # append returns None
    manager.generate_request = noted = Noted(manager.generate_request)

    async def one() -> list[str]:
        return [chunk async for chunk in manager.generate_request("prompt")]

    assert asyncio.run(one()) == ["chunk"]
    assert asked == ["weights", "kv cache", "engine"]
    asked.clear()
    replay = noted.around("generate_request", generate_request)
    replay.guarded()
    assert (replay.calls, asked) == (1, ["weights", "kv cache"])
    replay.bare()
    assert asked == ["weights", "kv cache"]

    scheduler = SimpleNamespace(on_idle=lambda: asked.append("engine"))
    idle = scheduler.on_idle
    internals.after_idle_work(scheduler, lambda: asked.append("deferred"))
    channels = scheduler.on_idle
    internals.after_idle_work(scheduler, lambda: asked.append("rest"))
    asked.clear()
    of_a_generation(scheduler.on_idle).around("on_idle", idle, channels).guarded()
    assert asked == ["engine", "deferred", "rest"] * CALLS + ["deferred"] * CALLS


def test_a_guard_is_given_what_the_generation_gave_it() -> None:
    copied: list[int] = []

    def to_devices(data: Any) -> Any:
        return data

    @wraps(to_devices)
    def copied_to_devices(data: Any) -> Any:
        copied.append(data.nbytes)
        return to_devices(data.copy())

    replay = of_a_generation(copied_to_devices, np.zeros(4096)).around("device_array", to_devices)
    replay.guarded()
    assert copied == [4096 * 8] * CALLS * 2


def test_a_listener_wraps_nothing_and_costs_all_it_takes() -> None:
    heard: list[str] = []

    def listener(event: str) -> None:
        time.sleep(SLOW_S)
        heard.append(event)

    replay = of_a_generation(listener, "/jax/event").alone("listener")
    assert judged([replay], repeat=2) == "missed"
    assert len(heard) == CALLS * (1 + 2 * 8)
