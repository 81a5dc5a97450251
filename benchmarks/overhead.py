"""What the suite adds to a generation: its guards' own time, beside a generation of the engine as it was."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from jax._src import monitoring

import kvcycle
from benchmarks import engines
from benchmarks.guards import Noted, Replay
from benchmarks.measure import Way, in_turn, load, seconds_of
from benchmarks.results import Figure, Scenario, Target
from benchmarks.sizes import Sizes
from benchmarks.stats import ratios
from kvcycle import compiles, inband, internals
from kvcycle.generate import generate_once
from kvcycle.profile import Profile
from kvcycle.weights import Weights

_MS = 1000.0


def run(sizes: Sizes) -> Scenario:
    """One engine, generating in turn with everything attached and with everything taken off."""
    base = engines.profile(sizes.generate_layers, 4096)
    profile = base.model_copy(update={"cycle": base.cycle.model_copy(update={"max_new_tokens": sizes.new_tokens})})
    attachments: list[_Attachment] = []
    channel_of = inband.channel_of

    def noting(engine: Any) -> inband.Channel:
        if attachments:
            return channel_of(engine)
        attachments.append(_Attachment(engine))  # the first that kvcycle.boot() does to an engine which has booted
        channel = channel_of(engine)
        attachments[0].note_idle_work()
        return channel

    with load() as busy:
        with patch.object(inband, "channel_of", noting):
            booted = kvcycle.boot(profile, "cpu")
        with booted as engine:
            kvcycle.KVCache(engine)
            Weights(engine)  # a request asks both whether they are there
            compiles.total()
            attachment = attachments[0]
            attachment.note()

            def bare() -> float:
                attachment.take_off()
                try:
                    return seconds_of(lambda: _generate(engine, profile))
                finally:
                    attachment.put_on()

            def guarded() -> float:
                return seconds_of(lambda: generate_once(engine, profile, "warm", 0))

            ways: dict[str, Way] = {"guarded": guarded, "bare": bare}
            in_turn(ways, 2)
            replays = [_generate_once(engine, profile), *attachment.replays(guarded)]
            own = {replay.name: list[float]() for replay in replays}

            def own_time() -> float:
                for replay in replays:
                    own[replay.name].append(replay.own_s())
                return sum(rounds[-1] for rounds in own.values())

            found = in_turn(ways | {"own": own_time}, sizes.generate_rounds)
    for replay in replays:  # for the scenario's log
        print(f"{replay.name}: {replay.calls} calls, {statistics.median(own[replay.name]) * _MS:.4f} ms a generation")
    return Scenario(
        name="overhead",
        title=f"one generation: {sizes.new_tokens} tokens, {sizes.generate_layers} layers",
        figures=figures(found, sum(replay.calls for replay in replays)),
        seconds=busy.seconds,
        others_share=busy.others_share,
    )


def figures(found: Mapping[str, Sequence[float]], calls: int) -> tuple[Figure, ...]:
    """What the seconds of every round say: of a generation by each way, and of the guards by themselves (``own``)."""
    return (
        Figure(name="generate, engine as it was", unit="ms", rounds=tuple(s * _MS for s in found["bare"])),
        Figure(name="guards: calls in one generation", unit="calls", rounds=(calls,)),
        Figure(name="guards: their own time in it", unit="ms", rounds=tuple(s * _MS for s in found["own"])),
        Figure(
            name="generation + guards' own time ÷ generation",
            unit="x",
            rounds=tuple(1 + share for share in ratios(found["own"], found["bare"])),
            target=Target(sense="at most", limit=1.01),
        ),
        # Two generations, which vary by more than the guards take: for looking at.
        Figure(name="generation with guards ÷ without", unit="x", rounds=ratios(found["guarded"], found["bare"])),
    )


def _generate(engine: Any, profile: Profile) -> Any:
    """What :func:`kvcycle.generate.generate_once` asks the engine for, and nothing else."""
    return engine.generate(
        prompt=profile.cycle.prompt,
        sampling_params={"temperature": 0, "max_new_tokens": profile.cycle.max_new_tokens, "ignore_eos": True},
        return_logprob=True,
    )


def _generate_once(engine: Any, profile: Profile) -> Replay:
    """What :func:`kvcycle.generate.generate_once` adds: deadline, span of the compiler's counters, record."""
    answering = _Answering(engine, _generate(engine, profile))
    return Replay(
        "generate_once",
        1,
        lambda: generate_once(answering, profile, "warm", 0),
        lambda: _generate(answering, profile),
    )


class _Answering:
    """An engine that has its answer already."""

    def __init__(self, engine: Any, answer: Any) -> None:
        self._engine, self._answer = engine, answer

    def generate(self, **_: Any) -> Any:
        return self._answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@dataclass(frozen=True)
class _Change:
    """An attribute that attaching put a guard into, and what the guard wraps."""

    part: Any
    name: str
    guard: Callable[..., Any]
    wrapped: Callable[..., Any]
    #: Whether the part had the attribute itself before; else the class has it.
    own: bool

    def take_off(self) -> None:
        if self.own:
            setattr(self.part, self.name, self.wrapped)
        else:
            delattr(self.part, self.name)

    def put_on(self, guard: Callable[..., Any] | None = None) -> None:
        setattr(self.part, self.name, guard or self.guard)


#: By jax.monitoring's list, the listener that kvcycle adds to it.
_LISTENERS: tuple[tuple[list[Any], Callable[..., Any]], ...] = (
    (monitoring._event_duration_secs_listeners, compiles._on_duration),
    (monitoring._event_listeners, compiles._on_event),
)


class _Attachment:
    """What attaching changed of an engine's parts; it can be taken off and put on again.

    Two things stay: what the scheduler does when it is idle, since one that spins instead of resting takes a core of
    this machine from what is measured, and the dispatcher's entry for kvcycle's messages, which stands behind the
    engine's own. Of the idle work the own time is measured all the same, but for the rest.
    """

    def __init__(self, engine: Any) -> None:
        scheduler = internals.scheduler_of(engine)
        worker = scheduler.tp_worker
        parts = [engine, engine.tokenizer_manager, scheduler, worker, getattr(worker, "worker", worker)]
        self._scheduler = scheduler
        self._parts = list({id(part): part for part in parts}.values())
        self._before = [dict(vars(part)) for part in self._parts]
        self._idle_before = getattr(scheduler, internals.idle_work(scheduler))
        self._idle_guard = self._idle_before
        self._changes: list[_Change] = []

    def note_idle_work(self) -> None:
        """Note the channel's part of it, before the rest is added."""
        self._idle_guard = getattr(self._scheduler, internals.idle_work(self._scheduler))

    def note(self) -> None:
        """Note what was changed since: attributes that are called as the engine runs, and the batches' own arrays."""
        from sgl_jax.srt.model_executor import forward_batch_info as module

        idle = internals.idle_work(self._scheduler)
        for part, before in zip(self._parts, self._before, strict=True):
            for name, value in vars(part).items():
                if callable(value) and before.get(name) is not value and (part, name) != (self._scheduler, idle):
                    wrapped = before[name] if name in before else getattr(type(part), name).__get__(part)
                    self._changes.append(_Change(part, name, value, wrapped, own=name in before))
        copied: Any = module.device_array
        self._changes.append(_Change(module, "device_array", copied, copied.__wrapped__, own=True))

    def take_off(self) -> None:
        for change in self._changes:
            change.take_off()
        for listeners, listener in _LISTENERS:
            listeners.remove(listener)

    def put_on(self) -> None:
        for change in self._changes:
            change.put_on()
        for listeners, listener in _LISTENERS:
            listeners.append(listener)

    def replays(self, generate: Callable[[], object]) -> list[Replay]:
        """Every guard with the calls that one generation makes to it."""
        idle = internals.idle_work(self._scheduler)
        idle_noted = Noted(getattr(self._scheduler, idle))
        noted = [Noted(change.guard) for change in self._changes]
        listening = [Noted(listener) for _, listener in _LISTENERS]
        self.take_off()
        for change, one in zip(self._changes, noted, strict=True):
            change.put_on(one)
        for (listeners, _), one in zip(_LISTENERS, listening, strict=True):
            listeners.append(one)
        setattr(self._scheduler, idle, idle_noted)
        try:
            generate()
        finally:
            setattr(self._scheduler, idle, idle_noted.function)
            for (listeners, _), one in zip(_LISTENERS, listening, strict=True):
                listeners.remove(one)
            self.put_on()
        return [
            *(one.around(change.name, change.wrapped) for change, one in zip(self._changes, noted, strict=True)),
            idle_noted.around(idle, self._idle_before, self._idle_guard),
            *(one.alone(f"jax.monitoring, {one.function.__name__}") for one in listening),
        ]
