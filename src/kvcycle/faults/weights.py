"""Faults of the weights' release and resume: bytes that stay, bits or layouts that change, one owner forgotten."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvcycle import internals
from kvcycle import weights as module
from kvcycle.faults.catalogue import Answer, Change, Target, answers, around, deletes, exchanged, fault, wrapped
from kvcycle.weights import Weights

_RELEASED, _RESTORED, _BITS = "weights.released_exact", "weights.restored_exact", "weights.restored_bits"
_OUTPUT, _COMPILES = "weights.same_output", "weights.no_compile"


def _holder(target: Target) -> Any:
    return Weights(target.engine)._here


def _resumed_as(target: Target, change: Change) -> AbstractContextManager[None]:
    """Let the resume put ``change(arrays)`` into the engine."""
    return wrapped(_holder(target), "_allocate", lambda original, kept: exchanged(original(kept), change))


def _after_resume(target: Target, act: Callable[[], object]) -> AbstractContextManager[None]:
    """Do something on the scheduler's thread right after the weights are back."""
    return around(_holder(target), "resume", after=act)


def _first_answer(target: Target, change: Callable[[Answer], object]) -> AbstractContextManager[None]:
    """Let the first generation after a resume do ``change(its answer)`` before it returns."""
    return answers(target, lambda answer, first: first and change(answer), after=_after_resume)


@fault(_RELEASED, run="weights", also=(_RESTORED,), says="an array of the weights is still held elsewhere")
def an_array_of_the_weights_survives_its_delete(target: Target) -> Iterator[None]:
    """delete() does nothing to one array of the weights."""
    survivor = target.weights[0]

    def delete(array: jax.Array, original: Callable[[jax.Array], None]) -> None:
        if array is not survivor:
            original(array)

    with deletes(delete, target):
        yield
    survivor.delete()


@fault(_RELEASED, _RESTORED, run="weights", says="a copy of it is alive on the device")
def the_weights_are_kept_on_the_device(target: Target) -> Iterator[None]:
    """The copy that should be the host's is one on the devices."""
    copies: list[jax.Array] = []

    def copied(original: Callable[..., Any], arrays: Sequence[jax.Array]) -> Any:
        copies.extend(jax.block_until_ready([jnp.copy(array) for array in arrays]))
        return original(arrays)

    def forget() -> None:
        for copy in copies:
            copy.delete()
        copies.clear()

    with wrapped(module, "_copied_to_host", copied), _after_resume(target, forget):
        yield


@fault(_RESTORED, run="weights", says="the resume left a copy alive on the device")
def the_resume_leaves_a_copy(target: Target) -> Iterator[None]:
    """What was put on the devices on the way to the weights' places stays there."""
    stayed: list[jax.Array] = []

    def stage(arrays: list[jax.Array]) -> list[jax.Array]:
        stayed.append(jax.device_put(np.zeros(4096, np.uint8), jax.local_devices()[1]))
        return arrays

    with _resumed_as(target, stage):
        yield
    for array in stayed:
        array.delete()


@fault(_BITS, run="weights", also=(_OUTPUT,), says="arrays (of 51) that are not what they were; first: 0 lm_head")
def one_bit_of_the_weights_changes(target: Target) -> Iterator[None]:
    """One bit of one array flips while it waits in host memory."""

    def flip(original: Callable[..., Any], arrays: Sequence[jax.Array]) -> Any:
        kept = original(arrays)
        block = next(iter(kept[0]._blocks.values()))
        block.reshape(-1).view(np.uint8)[-1] ^= 1
        return kept

    with wrapped(module, "_copied_to_host", flip):
        yield


@fault(_BITS, _OUTPUT, run="weights", says="the resumed weights are not what they were")
def the_weights_of_two_layers_change_places(target: Target) -> Iterator[None]:
    """Two layers get each other's weights: every array is of the right shape, and the bytes are the same."""
    names = internals.weight_names(target.engine)
    places = {names[id(leaf)]: number for number, leaf in enumerate(target.weights)}
    pairs = [(places[name], places[name.replace("layers.0.", "layers.3.")]) for name in places if "layers.0." in name]

    def exchange(arrays: list[jax.Array]) -> list[jax.Array]:
        changed = list(arrays)
        for one, other in pairs:
            changed[one], changed[other] = arrays[other], arrays[one]
        return changed

    with _resumed_as(target, exchange):
        yield


@fault(_BITS, run="weights", says="only one of the weights' two owners was given the arrays")
def the_model_is_not_given_its_weights(target: Target) -> Iterator[None]:
    """Only the runner's list gets the resumed arrays; the model keeps the deleted ones, and generates all the same."""
    variables = internals.model_variables(target.engine)
    before = [variable.get_value() for variable in variables]
    place = {id(leaf): number for number, leaf in enumerate(target.weights)}

    def give(arrays: Sequence[jax.Array]) -> None:
        for variable, array in zip(variables, arrays, strict=True):
            variable.set_value(array)

    with _after_resume(target, lambda: give(before)):
        yield
    now = target.weights
    give([now[place[id(old)]] for old in before])


@fault(_OUTPUT, run="weights", says="log-probabilities differ from the warm generation's by at most 0.015625")
def the_output_changes_with_the_resume(target: Target) -> Iterator[None]:
    """One log-probability of the generation after the resume is off by a bit; the weights' bits are the same."""

    def change(answer: Answer) -> None:
        output = answer["meta_info"]["output_token_logprobs"]
        output[3] = (output[3][0] + 2**-6, *output[3][1:])

    with _first_answer(target, change):
        yield


@fault(_COMPILES, run="weights", says="compilations and traces while resuming the weights")
def a_resume_that_compiles(target: Target) -> Iterator[None]:
    """The resume jits something anew."""
    with _after_resume(target, lambda: jax.jit(lambda x: x + time.perf_counter())(1.0).delete()):
        yield


@fault(_COMPILES, run="weights", says="compilations in the generation after it")
def the_first_generation_on_resumed_weights_compiles(target: Target) -> Iterator[None]:
    """Something small compiles in the generation after the resume; the weights are the same."""
    with _first_answer(target, lambda _: jax.jit(lambda x: x + time.perf_counter())(1.0).delete()):
        yield


@fault(_BITS, run="weights", says="an array came back in another layout or place")
def the_weights_come_back_with_another_spec(target: Target) -> Iterator[None]:
    """Replicated arrays come back with a spec that leaves out its axes: the same bits at the same places."""

    def respelled(array: jax.Array) -> jax.Array:
        sharding = array.sharding
        assert isinstance(sharding, NamedSharding)
        if not sharding.is_fully_replicated:
            return array
        respelt: jax.Array = jax.device_put(np.array(array), NamedSharding(sharding.mesh, PartitionSpec()))
        return respelt

    with _resumed_as(target, lambda arrays: [respelled(array) for array in arrays]):
        yield
