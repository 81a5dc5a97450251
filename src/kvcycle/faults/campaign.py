"""Runs the faults on one live engine: each is planted, a cycle is run and judged, and the engine is mended."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from kvcycle import capacity, inband, internals
from kvcycle.checks import CHECKS, judge
from kvcycle.checks.soak import MIN_CYCLES
from kvcycle.cycle import run_cycle
from kvcycle.faults import borrowing, dropping, generating, rebuilding, soaking, weights, witnesses
from kvcycle.faults.catalogue import FAULTS, Fault, Run, Target
from kvcycle.faults.witnesses import simulated_allocator
from kvcycle.kv_cache import KVCache
from kvcycle.profile import Profile
from kvcycle.record import Record
from kvcycle.record_parts import Outcome, Verdict, When
from kvcycle.report.phases import by_check, worst
from kvcycle.soak import soak_on
from kvcycle.spending import spending
from kvcycle.weights import HostCopy

_MODULES = (dropping, borrowing, rebuilding, generating, weights, witnesses, soaking)
_GROUPS = [module.__name__.rpartition(".")[2] for module in _MODULES]
#: Every fault, in the order of the cycle: the modules that plant registered them when they were imported.
CATALOGUE: tuple[Fault, ...] = tuple(sorted(FAULTS, key=lambda fault: _GROUPS.index(fault.group)))

#: What a campaign takes from its clean run: each of them compiles the model's steps anew.
_COMPILING: tuple[When, ...] = ("cold", "after_clear_caches")
_GENERATING: tuple[Run, ...] = ("generate", "cold", "recompile", "weights", "soak")
_RED: tuple[Outcome, ...] = ("fail", "inconclusive")


@dataclass(frozen=True)
class Result:
    """What became of one fault.

    Attributes:
        fault: the fault.
        outcomes: the worst verdict of every check that gave one, by check id.
        missed: checks that should have turned red and did not.
        false_alarms: checks that turned red and should not have.
        named: whether the message or a likely cause of a red verdict names the cause.
        message: the first red verdict's message, of a check that should be red.
        alarm: the first red verdict's message, of a check that should not.
        seconds: how long the run took.
    """

    fault: Fault
    outcomes: dict[str, Outcome]
    missed: tuple[str, ...]
    false_alarms: tuple[str, ...]
    named: bool
    message: str
    alarm: str
    seconds: float

    @property
    def caught(self) -> bool:
        """Every check that should turn red did, none else, and the cause was named."""
        return self.named and not self.missed and not self.false_alarms


class Campaign:
    """The faults of the catalogue, on one engine that is left as it was found.

    Args:
        engine: a live engine that :func:`kvcycle.boot` brought up.
        profile: its profile; the cycle is cut to what a fault needs.
        progress: called with a line of text whenever something begins that takes time.
    """

    def __init__(self, engine: Any, profile: Profile, progress: Callable[[str], None] = lambda _line: None) -> None:
        self.target = Target(engine, KVCache(engine))
        self.progress = progress
        # Short, and with a threshold half-way between a warm generation on a busy machine and one that compiles: the
        # stall that is planted exceeds it, and so does what compiles, which takes two thirds of the first or more.
        self.profile = profile.model_copy(
            update={
                "cycle": profile.cycle.model_copy(
                    update={"cycles": 1, "max_new_tokens": 8, "warm_generates": 1, "release_weights": True}
                ),
                "thresholds": profile.thresholds.model_copy(
                    update={"latency_factor_of_warm": 10.0, "latency_fraction_of_cold": 0.4}
                ),
            }
        )

    @cached_property
    def clean(self) -> Record:
        """One whole cycle without a fault, controls included: the faults borrow its cold and its recompiling one."""
        self.progress("control: a whole cycle without a fault; the model's steps compile twice")
        jax.clear_caches()
        return run_cycle(self.target.engine, self.profile)

    def red_without_a_fault(self, run: Run) -> list[Verdict]:
        """The red verdicts of a run into which nothing is planted: there may be none, or a campaign proves nothing."""
        with self._mended(), simulated_allocator() if run == "allocator" else nullcontext():
            # The whole cycle is the clean one of every run that generates.
            record = self.clean if run in ("generate", "cold", "recompile", "weights") else self._record(run)
        return [verdict for verdict in judge(record) if verdict.verdict in _RED]

    def run(self, fault: Fault) -> Result:
        """Plant the fault, run and judge, mend."""
        if fault.run in _GENERATING:
            _ = self.clean  # before the fault is planted
        began = time.perf_counter()
        with spending("fault"), self._mended():
            if fault.run == "cold":
                jax.clear_caches()
            with fault.plant(self.target):
                verdicts = judge(self._record(fault.run))
        return _result(fault, verdicts, time.perf_counter() - began)

    def _record(self, run: Run) -> Record:
        if run == "soak":
            return soak_on(self.target.engine, self.profile, self.clean, MIN_CYCLES)
        generate = run in _GENERATING
        changes = {
            "generate": generate,
            "cycles": 2 if run == "cycles" else 1,
            "recompile_control": run == "recompile",
            "release_weights": run == "weights",
        }
        cycle = self.profile.cycle.model_copy(update=changes)
        record = run_cycle(self.target.engine, self.profile.model_copy(update={"cycle": cycle}))
        if not generate:
            return record
        own: tuple[When, ...] = ("cold",) if run == "cold" else ("after_clear_caches",) if run == "recompile" else ()
        borrowed = [g for g in self.clean.generates if g.when in _COMPILING and g.when not in own]
        made = [g for g in record.generates if g.when not in _COMPILING or g.when in own]
        # As if the controls had been made in this run; whether the weights were released stays its own.
        profile = record.profile | {"cycle": record.profile["cycle"] | {"recompile_control": True}}
        return record.model_copy(update={"generates": tuple(borrowed + made), "profile": profile})

    @contextmanager
    def _mended(self) -> Iterator[None]:
        """Leave the engine as it was: buffers of the first layout, an empty prefix cache, the first weights."""
        weights = self.target.weights
        bits = [HostCopy(array) for array in weights]  # a run that releases the weights deletes these
        try:
            yield
        finally:
            capacity.simulate(None)
            if any(array.is_deleted() for array in weights):
                weights = [copy.restore() for copy in bits]
            if any(now is not then for now, then in zip(self.target.weights, weights, strict=True)):
                internals.set_weights(self.target.engine, weights)
            inband.channel_of(self.target.engine).call(self._rebuild_whatever_there_is, at="idle")
            gc.collect()

    def _rebuild_whatever_there_is(self) -> None:
        """On the scheduler's thread: a drop would ask for whole buffers, which a fault may not have left."""
        for array in self.target.arrays:
            if not array.is_deleted():
                array.delete()
        self.target.buffers.state = "dropped"
        self.target.buffers.rebuild()
        internals.flush(self.target.buffers.channel.scheduler)


def _result(fault: Fault, verdicts: list[Verdict], seconds: float) -> Result:
    outcomes = {check: outcome for check, given in by_check(verdicts).items() if (outcome := worst(given))}
    red = {check for check, outcome in outcomes.items() if outcome in _RED}
    told = [v for v in verdicts if v.id in fault.red and v.verdict in _RED]
    named = [v for v in told if any(fault.says in text for text in (v.message, *v.causes))]
    false_alarms = red - fault.red - fault.also
    return Result(
        fault=fault,
        outcomes=outcomes,
        missed=tuple(sorted(fault.red - red)),
        false_alarms=tuple(sorted(false_alarms)),
        named=bool(named),
        message=(named or told)[0].message if told else "",
        alarm=next((v.message for v in verdicts if v.id in false_alarms and v.verdict in _RED), ""),
        seconds=seconds,
    )


def uncovered(results: Iterable[Result]) -> list[str]:
    """The checks that no caught fault turned red: nothing shows that they can be."""
    covered = {check for result in results if result.caught for check in result.fault.red}
    return [check for check in CHECKS if check not in covered]
