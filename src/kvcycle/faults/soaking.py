"""Faults that show over many cycles: something small that every one of them leaves, compiles or changes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import jax
import numpy as np
import psutil

from kvcycle.faults.catalogue import Answer, Target, after_rebuild, answers, fault

#: A soak ends at its first violation, and then is too short for what needs many cycles.
_TOO_SHORT = ("soak.no_growth", "soak.rss_is_bounded")


@fault("soak.no_growth", run="soak", also=_TOO_SHORT, says="grown by +512 B, allowed 0 B")
def every_cycle_of_a_soak_leaks(target: Target) -> Iterator[None]:
    """Every cycle leaves 512 bytes behind on device 1."""
    leaked: list[jax.Array] = []
    second = jax.local_devices()[1]
    with after_rebuild(target, lambda: leaked.append(jax.device_put(np.zeros(512, np.uint8), second))):
        yield
    for array in leaked:
        array.delete()


@fault("soak.no_compile", run="soak", also=_TOO_SHORT, says="soak cycle 3 of 9")
def a_cycle_of_a_soak_compiles(target: Target) -> Iterator[None]:
    """The third cycle compiles something small."""
    cycles = 0

    def compile_something() -> None:
        nonlocal cycles
        cycles += 1
        if cycles == 3:
            jax.jit(lambda x: x + time.perf_counter())(1.0)

    with after_rebuild(target, compile_something):
        yield


@fault("soak.same_output", run="soak", also=_TOO_SHORT, says="the weights, are not what they were")
def a_cycle_of_a_soak_answers_otherwise(target: Target) -> Iterator[None]:
    """One token of the third cycle is another one."""
    cycles = 0

    def change(answer: Answer, first: bool) -> None:
        nonlocal cycles
        cycles += first
        if first and cycles == 3:
            output = answer["meta_info"]["output_token_logprobs"]
            output[0] = (output[0][0], output[0][1] + 1, *output[0][2:])

    with answers(target, change):
        yield


@fault("soak.rss_is_bounded", run="soak", says="host memory leaks: a list or log that grows with every cycle")
def every_cycle_of_a_soak_takes_host_memory(target: Target) -> Iterator[None]:
    """Every cycle keeps a twentieth of the process's resident memory in ordinary memory."""
    taken: list[bytearray] = []
    share = psutil.Process().memory_info().rss // 20  # beyond any tolerance after a few cycles, however large it is
    with after_rebuild(target, lambda: taken.append(bytearray(b"\1") * share)):
        yield
    taken.clear()
