"""Faults that show when generation goes on: compilations, stalls, other output, stale prefixes, and blind controls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

from kvcycle import compiles, internals
from kvcycle.faults.catalogue import Answer, Target, after_rebuild, answers, fault, wrapped

_COMPILES, _SLOW, _OUTPUT = "generate.no_compile", "generate.below_threshold", "generate.same_output"
_STALE = "generate.no_stale_prefix"


# The executables' own memory goes with them, which the process feels.
@fault(
    _COMPILES, _SLOW, run="generate", says="jax.clear_caches() was called",
    also=("rebuild.restores_bytes", "controls.witnesses_agree"),
)  # fmt: skip
def jax_caches_are_cleared(target: Target) -> Iterator[None]:
    """The rebuild clears jax's caches, so that every step compiles again."""
    with after_rebuild(target, jax.clear_caches):
        yield


@fault(_COMPILES, run="generate", says="compilations in the generation after_rebuild")
def a_compilation_without_latency(target: Target) -> Iterator[None]:
    """Something small compiles in the generation after the rebuild: no clock would tell."""

    def compile_something(_: Answer, first: bool) -> None:
        if first:
            jax.jit(lambda x: x + time.perf_counter())(1.0)

    with answers(target, compile_something):
        yield


@fault(_SLOW, run="generate", says="the machine was busy with something else")
def a_stall_without_compilation(target: Target) -> Iterator[None]:
    """The generation after the rebuild takes as long as a cold one, and compiles nothing."""
    slowest = 0.0

    def stall(original: Any, *args: Any, **kwargs: Any) -> Answer:
        nonlocal slowest
        began = time.perf_counter()
        answer: Answer = original(*args, **kwargs)
        took = time.perf_counter() - began
        if rebuilt:
            rebuilt.clear()
            time.sleep(11 * slowest)  # the campaign's threshold is at most ten warm generations
        slowest = max(slowest, took)
        return answer

    rebuilt: list[bool] = []
    with after_rebuild(target, lambda: rebuilt.append(True)), wrapped(target.engine, "generate", stall):
        yield


@fault(_OUTPUT, run="generate", says="; first at position 7:")
def one_token_changes(target: Target) -> Iterator[None]:
    """The last token of the generation after the rebuild is another one."""

    def change(answer: Answer, first: bool) -> None:
        if first:
            output = answer["meta_info"]["output_token_logprobs"]
            last = answer["meta_info"]["completion_tokens"] - 1
            output[last] = (output[last][0], output[last][1] + 1, *output[last][2:])

    with answers(target, change):
        yield


@fault(_OUTPUT, run="generate", says="log-probabilities differ from the warm generation's by at most 0.015625")
def one_log_probability_changes(target: Target) -> Iterator[None]:
    """One log-probability of the generation after the rebuild is off by a bit; the tokens are the same."""

    def change(answer: Answer, first: bool) -> None:
        if first:
            output = answer["meta_info"]["output_token_logprobs"]
            output[3] = (output[3][0] + 2**-6, *output[3][1:])

    with answers(target, change):
        yield


@fault(
    _STALE,
    run="generate",
    also=(_OUTPUT, "swap.shares_buffers", "controls.output_follows_weights"),
    says="the drop did not flush the prefix cache",
)
def the_prefix_cache_survives_the_drop(target: Target) -> Iterator[None]:
    """Nobody flushes the prefix cache: its keys and values are zeros after the rebuild."""
    with mock.patch.object(internals, "flush", lambda *_, **__: None):
        yield


@fault(
    "controls.output_varies", _OUTPUT, "controls.output_follows_weights", run="generate",
    says="the output has 1 distinct tokens",
)  # fmt: skip
def the_output_is_constant(target: Target) -> Iterator[None]:
    """The model answers one token for ever, as dummy weights do."""

    def change(answer: Answer, _: bool) -> None:
        output = answer["meta_info"]["output_token_logprobs"]
        answer["meta_info"]["output_token_logprobs"] = [(-1.0, 0, None)] * len(output)

    with answers(target, change):
        yield


@fault("controls.prefix_hit_is_seen", _STALE, run="generate", says="a repeated prompt took 0 tokens")
def the_prefix_counter_is_blind(target: Target) -> Iterator[None]:
    """The engine reports no cached token, whatever came from the prefix cache."""
    with answers(target, lambda answer, _: answer["meta_info"].update(cached_tokens=0)):
        yield


# Its cold generation is its own, the recompiling one the clean cycle's: on a busy machine their times do not compare.
@fault(
    "controls.compiles_are_counted",
    _COMPILES,
    run="cold",
    also=("controls.recompilation_is_seen", _SLOW),
    says="the counter saw 0 compilations in the cold",
)
def the_compile_counter_is_blind(target: Target) -> Iterator[None]:
    """The counter stands still, as thread-local ones do: the cold generation compiles, and it reads 0."""
    with mock.patch.object(compiles, "_count", lambda _: None):
        yield


@fault(
    "controls.recompilation_is_seen", _SLOW, run="recompile", says="after jax.clear_caches() the generation compiled 0"
)
def the_recompile_control_does_nothing(target: Target) -> Iterator[None]:
    """Clearing jax's caches has no effect, so that neither the counter nor the clock was shown a recompilation."""
    with mock.patch.object(jax, "clear_caches", lambda: None):
        yield
