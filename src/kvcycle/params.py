"""A second parameter set: cloned into the freed memory, swapped into the live engine and back.

sglang-jax holds its weights twice: the list ``model_runner.model_state_leaves``, which every forward reads, and the
parameters of ``model_runner.model``. A swap replaces both, or the engine would keep deleted arrays (or answer with the
old ones after its next flatten).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp

from kvcycle import capacity, inband, internals
from kvcycle.buffers import bytes_by_device, delete
from kvcycle.errors import ParamSetError
from kvcycle.platform import large_allocations_mapped
from kvcycle.text import exact_bytes, first_line

Transform = Callable[[jax.Array], jax.Array]


def perturbed(amount: float) -> Transform:
    """A transform that turns ``x`` into ``x + amount * |x|`` for floating x: elementwise, so shardings stay."""

    def transform(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.copy(x)
        return (x + amount * jnp.abs(x)).astype(x.dtype)

    return transform


@dataclass(frozen=True)
class ParamSet:
    """A parameter set with the structure and the shardings of an engine's: ``leaves`` in the runner's own order."""

    leaves: tuple[jax.Array, ...]

    @classmethod
    def of(cls, engine: Any) -> Self:
        """The engine's own set, as it is: no copy."""
        return cls(tuple(internals.weight_leaves(engine)))

    @classmethod
    def clone(cls, engine: Any, transform: Transform | None = None) -> Self:
        """A second set in memory of its own: a copy of the engine's weights, or ``transform`` of each leaf.

        Raises:
            ParamSetError: there is no room for it; nothing stays allocated.
        """
        return cls(ParamSetMaker(engine, transform)().leaves)

    @property
    def bytes_by_device(self) -> dict[int, int]:
        """Device bytes by device id, replicated leaves counted on every device that holds them."""
        return bytes_by_device(self.leaves)

    @property
    def bytes(self) -> int:
        """Device bytes summed over the devices."""
        return sum(self.bytes_by_device.values())

    def delete(self) -> None:
        """Free the set's memory. Never the set an engine is running on."""
        delete(self.leaves)

    def buffers(self) -> list[tuple[int, int]]:
        """(device id, address) of every shard."""
        return [
            (shard.device.id, shard.data.unsafe_buffer_pointer()) for leaf in self.leaves
            for shard in leaf.addressable_shards
        ]  # fmt: skip


class ParamSetMaker:
    """Clones an engine's weights again and again by one executable, compiled when this is made: no clone compiles.

    Args:
        engine: whose weights are cloned, as they are at each call.
        transform: applied to each leaf; a plain copy by default.

    Raises:
        ParamSetError: there is no room for a second set.
    """

    def __init__(self, engine: Any, transform: Transform | None = None) -> None:
        self._engine = engine
        source = ParamSet.of(engine)
        # jit would hand an untouched argument through as the same buffer; copy() does not.
        apply = transform or jnp.copy
        make = jax.jit(
            lambda leaves: [apply(leaf) for leaf in leaves], out_shardings=[leaf.sharding for leaf in source.leaves]
        )
        with _told_as_no_room(source):
            self._make = make.lower(list(source.leaves)).compile()

    def __call__(self) -> ParamSet:
        """A second set in memory of its own.

        Raises:
            ParamSetError: there is no room for it; nothing stays allocated.
        """
        source = ParamSet.of(self._engine)
        leaves: list[jax.Array] = []
        hosts = inband.channel_of(self._engine).hosts
        with hosts.all_or_none("clone the weights", undo=lambda: delete(leaves)), _told_as_no_room(source):
            capacity.claim(source.bytes_by_device)
            with large_allocations_mapped():
                leaves += jax.block_until_ready(self._make(list(source.leaves)))
        return ParamSet(tuple(leaves))


@contextmanager
def _told_as_no_room(source: ParamSet) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise ParamSetError(
            f"A second parameter set of {exact_bytes(source.bytes)} could not be allocated: {first_line(error)}."
        ) from error


@dataclass(frozen=True)
class Sharing:
    """How much of a given set an engine really uses, by identity of the arrays (the SOP's --verify-param-sharing).

    ``runner_shared`` of ``leaves`` are in the list that forwards read, ``model_shared`` of ``model_params`` in the
    model object.
    """

    leaves: int
    runner_shared: int
    model_params: int
    model_shared: int

    @property
    def complete(self) -> bool:
        """Whether the engine uses the set and nothing else."""
        return self.runner_shared == self.leaves and self.model_shared == self.model_params


def sharing(engine: Any, params: ParamSet) -> Sharing:
    """Compare the arrays an engine uses with a set's, by identity."""
    given = {id(leaf) for leaf in params.leaves}
    model = [variable.get_value() for variable in internals.model_variables(engine)]
    return Sharing(
        leaves=len(params.leaves),
        runner_shared=sum(
            used is leaf for used, leaf in zip(internals.weight_leaves(engine), params.leaves, strict=False)
        ),
        model_params=len(model),
        model_shared=sum(id(array) in given for array in model),
    )


def swap(engine: Any, params: ParamSet) -> ParamSet:
    """Let the engine run on ``params`` from now on; returns the set it ran on before.

    Runs between two iterations of the scheduler when idle, and flushes the prefix cache: keys and values computed
    with other weights would be stale. Compiles nothing if the shardings are the engine's. Works also while the KV cache
    is dropped, which is when a training step has new weights to give.

    Raises:
        ParamSetError: a leaf differs in number, shape, dtype or sharding; nothing was changed.
        EngineBusyError: requests are queued or running.
    """
    channel = inband.channel_of(engine)
    return channel.call(lambda: _swap(channel, params), at="idle", what="swap")


@contextmanager
def swapped(engine: Any, params: ParamSet) -> Iterator[ParamSet]:
    """Run on ``params`` in a ``with`` block, and on the former set again after it."""
    before = swap(engine, params)
    try:
        yield before
    finally:
        swap(engine, before)


def _swap(channel: inband.Channel, params: ParamSet) -> ParamSet:
    before = ParamSet.of(channel.engine)
    with channel.hosts.all_or_none("swap the weights"):
        check_same_layout(before, params)
    if "kv_cache" not in channel.lacking:  # else the prefix cache is empty already
        internals.flush(channel.scheduler, keep_waiting=channel.held)
    internals.set_weights(channel.engine, params.leaves)
    return before


def check_same_layout(ours: ParamSet, given: ParamSet) -> None:
    """Refuse a set that the compiled forward would not take as it is; ``ours`` may be deleted.

    Raises:
        ParamSetError: with the first array that differs in shape, dtype or sharding, or is deleted.
    """
    if len(ours.leaves) != len(given.leaves):
        raise ParamSetError(f"The engine has {len(ours.leaves)} parameter arrays, the given set {len(given.leaves)}.")
    for index, (mine, new) in enumerate(zip(ours.leaves, given.leaves, strict=True)):
        if new.is_deleted():
            raise ParamSetError(f"Array {index} of the given set is deleted.")
        if (mine.shape, mine.dtype, mine.sharding) != (new.shape, new.dtype, new.sharding):
            raise ParamSetError(
                f"Array {index} of the given set is {new.dtype}{list(new.shape)} as {new.sharding}, the engine's is "
                f"{mine.dtype}{list(mine.shape)} as {mine.sharding}; the engine would compile anew, or fail."
            )
