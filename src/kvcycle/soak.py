"""The soak: hundreds of cycles on one engine, and nothing may grow, compile or change its answer.

It begins with one whole cycle as :func:`kvcycle.run_cycle` runs it, controls included, so that every zero after it has
been seen to be able to be something else. Then comes the loop: drop, borrow, rebuild, generate, give back, and one
sample at the idle point. It ends at the first violation.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from kvcycle import compiles, memory
from kvcycle.checks import judge, passed
from kvcycle.checks.soak import WINDOW, violation
from kvcycle.cycle import Progress, run_cycle
from kvcycle.generate import generate_once
from kvcycle.kv_cache import KVCache
from kvcycle.params import ParamSetMaker, perturbed
from kvcycle.platform import few_objects_to_collect
from kvcycle.pools import weight_arrays
from kvcycle.profile import Profile
from kvcycle.record import Record
from kvcycle.record_parts import Generate, Owner, Soak, SoakPoint
from kvcycle.settling import settle
from kvcycle.sizing import KVPrediction
from kvcycle.spending import spending

#: New tokens of each cycle's generation: enough to be a prefill and some decode steps, few enough to run a thousand.
NEW_TOKENS = 4

#: How often the record is written meanwhile: the whole of it each time, so not after every cycle.
_SAVE_EVERY_S = 30.0

#: Called with the record so far after every cycle.
OnCycle = Callable[[Record], None]


def run_soak(
    engine: Any,
    profile: Profile,
    cycles: int,
    *,
    predicted: KVPrediction | None = None,
    save_to: Path | None = None,
    progress: Progress | None = None,
    on_cycle: OnCycle | None = None,
) -> Record:
    """Run one whole cycle and then many short ones; returns the record, which :func:`kvcycle.judge` judges.

    Args:
        engine: any in-process sglang-jax Engine.
        profile: which prompt, whether to generate, the tolerances.
        cycles: how many cycles at most; the first violation ends the soak, and so does Ctrl-C, once the cycle it
            comes in is done.
        predicted: as in :func:`kvcycle.run_cycle`.
        save_to: a file that holds the record so far, written every half minute and at the end.
        progress: called with one line of text whenever something of the first, whole cycle begins.
        on_cycle: called with the record so far after every cycle.

    Returns:
        The record; without a cycle of the soak if the whole cycle before it did not pass.

    Raises:
        KVCycleError: a step could not be done; what was measured before it is in ``save_to``.
    """
    opening = run_cycle(
        engine,
        profile.model_copy(update={"cycle": profile.cycle.model_copy(update={"cycles": 1})}),
        predicted=predicted,
        save_to=save_to,
        progress=progress,
    )
    if not passed(judge(opening)):
        # Its checks are the controls of the soak's: nothing after it would be believed.
        unsoaked = opening.model_copy(update={"soak": Soak(cycles=cycles, new_tokens=0)})
        if save_to is not None:
            unsoaked.save(save_to)
        return unsoaked
    return soak_on(engine, profile, opening, cycles, save_to=save_to, on_cycle=on_cycle)


def soak_on(
    engine: Any,
    profile: Profile,
    opening: Record,
    cycles: int,
    *,
    save_to: Path | None = None,
    on_cycle: OnCycle | None = None,
) -> Record:
    """The loop alone, on an engine whose whole cycle ``opening`` has recorded; see :func:`run_soak`."""
    with spending("cycle"):
        return _Loop(engine, profile, opening, cycles, save_to, on_cycle or (lambda _record: None)).run()


class _Loop:
    """The state of one soak. Nothing here may compile after :meth:`run` has begun to count."""

    def __init__(
        self, engine: Any, profile: Profile, opening: Record, cycles: int, save_to: Path | None, on_cycle: OnCycle
    ) -> None:
        self.engine, self.opening, self.cycles, self.save_to, self.on_cycle = engine, opening, cycles, save_to, on_cycle
        self.new_tokens = min(NEW_TOKENS, profile.cycle.max_new_tokens)
        self.profile = profile.model_copy(
            update={"cycle": profile.cycle.model_copy(update={"max_new_tokens": self.new_tokens})}
        )
        warm = opening.generates_when("warm")
        self.warm = warm[0] if warm else None
        self.kv = KVCache(engine)
        self.devices = [device for device in jax.local_devices() if device.id in self.kv.bytes_by_device]
        self.clone = ParamSetMaker(engine, perturbed(profile.cycle.perturb))
        self.before: list[SoakPoint] = []
        self.points: list[SoakPoint] = []
        # One span begins where the last ended, so that nothing that compiles falls between two of them.
        self.span = compiles.Span()
        self.saved = time.monotonic()

    def run(self) -> Record:
        """All cycles, or those until the first violation or Ctrl-C."""
        with few_objects_to_collect(), _stoppable() as stop_asked:
            try:
                for _ in range(WINDOW):
                    started = time.perf_counter()
                    self.before.append(self._point(started, self._generate()))
                for _ in range(self.cycles):
                    started = time.perf_counter()
                    self.points.append(self._point(started, self._cycle()))
                    record = self._record()
                    self.on_cycle(record)
                    if violation(record) is not None or stop_asked():
                        break
                    if time.monotonic() - self.saved > _SAVE_EVERY_S:
                        self._save(record)
            finally:
                # Whatever ends it: what was measured until then is there.
                record = self._record()
                self._save(record)
        return record

    def _cycle(self) -> Generate | None:
        """Drop, borrow, rebuild, generate, give back; the record has only what the idle point after it shows."""
        with self.kv.released():
            second = self.clone()
        try:
            return self._generate()
        finally:
            second.delete()

    def _generate(self) -> Generate | None:
        if not self.profile.cycle.generate:
            return None
        return generate_once(self.engine, self.profile, "after_rebuild", 0)

    def _point(self, started: float, generated: Generate | None) -> SoakPoint:
        """Let the pipeline drain, and take one sample by every witness."""
        self.kv.flush()
        settle()
        sample = memory.snapshot({"weights": weight_arrays(self.engine), "kv": self.kv.arrays()}, devices=self.devices)
        owners: tuple[Owner, ...] = ("weights", "kv", "other")
        different, off = compared(self.warm, generated, self.new_tokens)
        span, self.span = self.span, compiles.Span()
        return SoakPoint(
            seconds=time.perf_counter() - started,
            rss_bytes=sample.rss_bytes,
            by_owner={owner: {use.id: use.by_owner.get(owner, 0) for use in sample.devices} for owner in owners},
            allocator_bytes={use.id: use.allocator_bytes for use in sample.devices if use.allocator_bytes is not None},
            compiles=span.end(),
            different_tokens=different,
            logprobs_off=off,
        )

    def _record(self) -> Record:
        soak = Soak(
            cycles=self.cycles, new_tokens=self.new_tokens, before=tuple(self.before), points=tuple(self.points)
        )
        return self.opening.model_copy(update={"soak": soak})

    def _save(self, record: Record) -> None:
        self.saved = time.monotonic()
        if self.save_to is not None:
            record.save(self.save_to)


def compared(warm: Generate | None, generated: Generate | None, new_tokens: int) -> tuple[int | None, float | None]:
    """How a cycle's generation differs from the beginning of the warm one, of which it should be ``new_tokens`` long.

    Returns:
        The number of token ids that differ, are missing or are too many, and the largest difference of the
        log-probabilities; None where there is nothing to compare.
    """
    if warm is None or generated is None:
        return None, None
    expected, tokens = warm.token_ids[:new_tokens], generated.token_ids
    different = sum(a != b for a, b in zip(expected, tokens, strict=False)) + abs(len(expected) - len(tokens))
    pairs = zip(warm.logprobs[:new_tokens], generated.logprobs, strict=False)
    return different, max((abs(a - b) for a, b in pairs), default=None)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C was pressed: it ends the loop after the cycle it comes in. A second one is raised."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            signal.default_int_handler(number, frame)
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
