"""One greedy generation of a profile's prompt, timed, with the compiler watched: what a record knows of generating."""

from __future__ import annotations

import time
from typing import Any

from kvcycle import compiles, inband, merge
from kvcycle.deadline import step_deadline
from kvcycle.hosts import Hosts
from kvcycle.profile import Profile
from kvcycle.record_parts import Generate, When
from kvcycle.spending import spending


def generate_once(engine: Any, profile: Profile, when: When, cycle: int) -> Generate:
    """One greedy generation of the profile's prompt, with the compiler watched meanwhile.

    Of several hosts the first is asked, and what it answered is every host's answer.

    Raises:
        StepTimeoutError: it did not end within ``timeouts.step_s``.
    """
    hosts = inband.channel_of(engine).hosts
    deadline = step_deadline(engine, profile, f"cycle {cycle}: generate {when}")
    with spending("generate"), deadline, compiles.counting() as span:
        answered = _on_first(hosts, engine, profile, when, cycle)
    mine = answered.model_copy(update={"compiles": span.compiles})
    return merge.together(hosts, Generate, mine, merge.generate)


def _on_first(hosts: Hosts, engine: Any, profile: Profile, when: When, cycle: int) -> Generate:
    """The first host is asked, and tells the others."""
    if not hosts.several:
        return _ask(engine, profile, when, cycle)

    def ask() -> str:
        return _ask(engine, profile, when, cycle).model_dump_json()

    return Generate.model_validate_json(hosts.from_first(f"generate {when}", ask, profile.timeouts.step_s))


def _ask(engine: Any, profile: Profile, when: When, cycle: int) -> Generate:
    started = time.perf_counter()
    answer = engine.generate(
        prompt=profile.cycle.prompt,
        sampling_params={
            "temperature": 0,
            "max_new_tokens": profile.cycle.max_new_tokens,
            "ignore_eos": True,
        },
        return_logprob=True,
    )
    elapsed = time.perf_counter() - started
    meta = answer["meta_info"]
    # Over-long above 50 new tokens (0.1.0rc0), so cut to what was completed.
    output = meta["output_token_logprobs"][: meta["completion_tokens"]]
    return Generate(
        when=when,
        cycle=cycle,
        seconds=elapsed,
        token_ids=tuple(int(entry[1]) for entry in output),
        logprobs=tuple(float(entry[0]) for entry in output),
        cached_tokens=int(meta.get("cached_tokens", 0)),
    )
