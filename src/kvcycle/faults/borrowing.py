"""Faults of the second parameter set: it is not its own, it does not fit, it stays, or the engine does not use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from kvcycle import capacity, internals
from kvcycle import cycle as cycles
from kvcycle.faults.catalogue import Change, Target, exchanged, fault, wrapped
from kvcycle.memory import snapshot
from kvcycle.params import ParamSet

_FITS, _OWN, _GROWS = "params2.fits", "params2.is_its_own_memory", "cycles.no_growth"


@contextmanager
def _cloned_as(change: Change, *, spared: Sequence[jax.Array] = ()) -> Iterator[None]:
    """Let every clone be ``change(its leaves)``. Freeing it spares what is the engine's as well."""
    others = {id(array) for array in spared}

    def clone(original: Callable[..., ParamSet], *args: Any, **kwargs: Any) -> ParamSet:
        return ParamSet(tuple(exchanged(original(*args, **kwargs).leaves, change)))

    def delete(params: ParamSet) -> None:
        for leaf in params.leaves:
            if id(leaf) not in others:
                leaf.delete()

    with wrapped(ParamSet, "clone", clone), mock.patch.object(ParamSet, "delete", delete):
        yield


@fault(_OWN, _FITS, says="device_put to the same sharding returns the same buffer: copy")
def the_second_set_is_the_first(target: Target) -> Iterator[None]:
    """The second set's arrays are the engine's own."""
    weights = target.weights
    with _cloned_as(lambda _: weights, spared=weights):
        yield


@fault(_OWN, _FITS, says="buffers of the second set (of")
def one_array_of_the_second_set_is_the_engines(target: Target) -> Iterator[None]:
    """device_put instead of a copy for one array: it is the engine's own buffer."""
    shared = jax.device_put(target.weights[0], target.weights[0].sharding)
    with _cloned_as(lambda leaves: [shared, *leaves[1:]], spared=[shared]):
        yield


@fault(_FITS, says="sglang_param_dict2_ready, cycle0-device0, ledger: bytes in use changed by")
def the_second_set_is_too_large(target: Target) -> Iterator[None]:
    """One array of the second set has twice the precision."""
    with _cloned_as(lambda leaves: [leaves[0].astype(jnp.float32), *leaves[1:]]):
        yield


@fault(_FITS, says="part of it lies on another device")
def a_part_lies_on_another_device(target: Target) -> Iterator[None]:
    """One array of the second set lies on device 0 as a whole: the sum over the devices is what it should be."""
    sharded = next(i for i, leaf in enumerate(target.weights) if not leaf.is_fully_replicated)
    first = jax.local_devices()[0]
    with _cloned_as(lambda leaves: [jax.device_put(x, first) if i == sharded else x for i, x in enumerate(leaves)]):
        yield


@fault(_FITS, also=(_OWN,), says="could not be allocated: RESOURCE_EXHAUSTED")
def the_second_set_does_not_fit(target: Target) -> Iterator[None]:
    """The devices have one byte less than the second set needs."""

    def clone(original: Callable[..., ParamSet], *args: Any, **kwargs: Any) -> ParamSet:
        used = max(use.ledger_bytes for use in snapshot().devices)
        capacity.simulate(used + max(ParamSet.of(target.engine).bytes_by_device.values()) - 1)
        try:
            return original(*args, **kwargs)
        finally:
            capacity.simulate(None)

    with wrapped(ParamSet, "clone", clone):
        yield


@fault(_FITS, says="in use, but the device has")
def more_is_in_use_than_the_device_has(target: Target) -> Iterator[None]:
    """The device states a capacity that the rebuilt cache and the second set exceed by a byte."""
    peak = snapshot().devices[0].ledger_bytes + ParamSet.of(target.engine).bytes_by_device[0] - 1
    with mock.patch.object(capacity, "limit_bytes", lambda _: peak):
        yield


@fault(_GROWS, says="something of every cycle stays alive: the second set, a copy, a cached result")
def the_second_set_is_not_given_back(target: Target) -> Iterator[None]:
    """Nobody frees the second set."""
    held: list[ParamSet] = []
    with mock.patch.object(ParamSet, "delete", lambda params: held.append(params)):
        yield
    for params in held:  # after the patch is gone
        params.delete()


@fault(_GROWS, run="cycles", says="cycle1-device1, ledger: bytes in use changed by +1.00 KiB (1,024 B)")
def a_leak_of_512_bytes_a_cycle(target: Target) -> Iterator[None]:
    """Every cycle leaves 512 bytes behind on device 1."""
    leaked: list[jax.Array] = []
    second = jax.local_devices()[1]

    def delete(params: ParamSet) -> None:
        for leaf in params.leaves:
            leaf.delete()
        leaked.append(jax.block_until_ready(jax.device_put(np.zeros(512, np.uint8), second)))

    with mock.patch.object(ParamSet, "delete", delete):
        yield
    for array in leaked:
        array.delete()


@fault("swap.shares_buffers", "controls.output_follows_weights", run="generate", says="(runner 0 and model")
def the_forward_does_not_see_the_swap(target: Target) -> Iterator[None]:
    """The swap reaches the model object and not the list that forwards read."""
    runner = internals.runner_of(target.engine)

    def set_weights(original: Callable[..., None], engine: Any, leaves: Any) -> None:
        before = runner.model_state_leaves
        original(engine, leaves)
        runner.model_state_leaves = before

    with _mended_weights(target), wrapped(internals, "set_weights", set_weights):
        yield


@fault("swap.shares_buffers", run="generate", says="and model 0 of the second set")
def the_model_keeps_the_old_weights(target: Target) -> Iterator[None]:
    """The swap reaches the list that forwards read and not the model object."""
    runner = internals.runner_of(target.engine)

    def set_weights(_: Any, leaves: Any) -> None:
        runner.model_state_leaves = list(leaves)

    with _mended_weights(target), mock.patch.object(internals, "set_weights", set_weights):
        yield


@fault(
    "swap.shares_buffers", "generate.same_output", run="generate", says="of the first after the swap back",
    also=(_GROWS,),
)  # fmt: skip
def the_way_back_is_forgotten(target: Target) -> Iterator[None]:
    """The second set stays in the engine."""
    calls = 0

    def set_weights(original: Callable[..., None], engine: Any, leaves: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            original(engine, leaves)

    with _mended_weights(target), wrapped(internals, "set_weights", set_weights):
        yield


@fault(
    "drop.size_is_predicted", "drop.frees_kv", "rebuild.restores_bytes",
    says="the engine rounded or cut max_total_tokens",
)  # fmt: skip
def the_engine_has_fewer_tokens_than_asked_for(target: Target) -> Iterator[None]:
    """The profile asks for one page more than the engine has."""

    def predict(original: Callable[..., Any], profile: Any, platform: Any) -> Any:
        tokens = profile.engine.max_total_tokens + profile.engine.page_size
        asked = profile.engine.model_copy(update={"max_total_tokens": tokens})
        return original(profile.model_copy(update={"engine": asked}), platform)

    with wrapped(cycles, "predict_by_arithmetic", predict):
        yield


@fault("drop.size_is_predicted", says="KV bytes by the engine's own claim")
def the_engine_claims_another_size(target: Target) -> Iterator[None]:
    """The pool says that it is one byte larger than it is."""
    with wrapped(internals, "claimed_kv_bytes", lambda original, engine: original(engine) + 1):
        yield


@contextmanager
def _mended_weights(target: Target) -> Iterator[None]:
    weights = target.weights
    variables = [(variable, variable.get_value()) for variable in internals.model_variables(target.engine)]
    try:
        yield
    finally:
        internals.runner_of(target.engine).model_state_leaves = weights
        for variable, value in variables:
            variable.set_value(value)
