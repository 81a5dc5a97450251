"""What the suite adds to a generation: with its counters and guards on the engine, and with the engine as it was.

On virtual devices it also maps every large allocation by itself, which is measured too: the temporaries of a forward
then get new pages every time.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any
from unittest.mock import patch

from jax._src import monitoring

import kvcycle
from benchmarks import engines
from benchmarks.measure import in_turn, load, seconds_of
from benchmarks.results import Figure, Scenario, Target
from benchmarks.sizes import Sizes
from benchmarks.stats import ratios
from kvcycle import compiles, inband, internals, platform
from kvcycle.generate import generate_once
from kvcycle.profile import Profile

_MS = 1000.0


def run(sizes: Sizes) -> Scenario:
    """One engine, generating in turn with everything attached and with everything taken off."""
    base = engines.profile(sizes.generate_layers, 4096)
    profile = base.model_copy(update={"cycle": base.cycle.model_copy(update={"max_new_tokens": sizes.new_tokens})})
    attachments: list[_Attachment] = []
    channel_of = inband.channel_of

    def noting(engine: Any) -> inband.Channel:
        if not attachments:  # the first that kvcycle.boot() does to an engine which has booted
            attachments.append(_Attachment(engine))
        return channel_of(engine)

    with load() as busy:
        with patch.object(inband, "channel_of", noting):
            booted = kvcycle.boot(profile, "cpu")
        with booted as engine:
            kvcycle.KVCache(engine)
            compiles.total()
            attachment = attachments[0]
            changed = attachment.note()

            def bare() -> float:
                attachment.take_off()
                try:
                    return seconds_of(lambda: _generate(engine, profile))
                finally:
                    attachment.put_on()

            def guarded() -> float:
                return seconds_of(lambda: generate_once(engine, profile, "warm", 0))

            def unmapped() -> float:
                _keep_large_allocations()
                try:
                    return bare()
                finally:
                    platform.map_large_allocations()

            ways = {"guarded": guarded, "bare": bare, "unmapped": unmapped}
            in_turn(ways, 2)
            found = in_turn(ways, sizes.generate_rounds)
    return Scenario(
        name="overhead",
        title=f"one generation: {sizes.new_tokens} tokens, {sizes.generate_layers} layers, {changed} calls wrapped",
        figures=(
            Figure(name="generate, engine as it was", unit="ms", rounds=tuple(s * _MS for s in found["bare"])),
            Figure(
                name="with counters and guards ÷ without",
                unit="x",
                rounds=ratios(found["guarded"], found["bare"]),
                target=Target(sense="at most", limit=1.01),
            ),
            Figure(
                name="large allocations mapped ÷ kept",
                unit="x",
                rounds=ratios(found["bare"], found["unmapped"]),
            ),
        ),
        seconds=busy.seconds,
        others_share=busy.others_share,
    )


def _keep_large_allocations() -> None:
    """Let glibc keep on its heap what is below 32 MiB, the most that it allows and where its own threshold ends up."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(platform._M_MMAP_THRESHOLD, 32 * 2**20)


def _generate(engine: Any, profile: Profile) -> None:
    """What :func:`kvcycle.generate.generate_once` asks the engine for, and nothing else."""
    engine.generate(
        prompt=profile.cycle.prompt,
        sampling_params={"temperature": 0, "max_new_tokens": profile.cycle.max_new_tokens, "ignore_eos": True},
        return_logprob=True,
    )


class _Attachment:
    """What attaching changed of an engine's parts; it can be taken off and put on again.

    Two things stay: the idle scheduler rests, since one that spins takes a core of this machine from what is measured,
    and the dispatcher keeps its entry for kvcycle's messages, which stands behind the engine's own.
    """

    def __init__(self, engine: Any) -> None:
        scheduler = internals.scheduler_of(engine)
        worker = scheduler.tp_worker
        parts = [engine, engine.tokenizer_manager, scheduler, worker, getattr(worker, "worker", worker)]
        self._scheduler = scheduler
        self._parts = list({id(part): part for part in parts}.values())
        self._before = [dict(vars(part)) for part in self._parts]
        self._changes: list[tuple[Any, str, Any]] = []

    def note(self) -> int:
        """Note what was changed since; returns how many attributes that are called as the engine runs."""
        idle = internals.idle_work(self._scheduler)
        for part, before in zip(self._parts, self._before, strict=True):
            for name, value in vars(part).items():
                if callable(value) and before.get(name) is not value and (part, name) != (self._scheduler, idle):
                    self._changes.append((part, name, value))
        return len(self._changes)

    def take_off(self) -> None:
        for part, name, _ in self._changes:
            before = self._before[self._parts.index(part)]
            if name in before:
                setattr(part, name, before[name])
            else:
                delattr(part, name)  # the class's own is back
        monitoring._event_duration_secs_listeners.remove(compiles._on_duration)
        monitoring._event_listeners.remove(compiles._on_event)

    def put_on(self) -> None:
        for part, name, value in self._changes:
            setattr(part, name, value)
        monitoring._event_duration_secs_listeners.append(compiles._on_duration)
        monitoring._event_listeners.append(compiles._on_event)
