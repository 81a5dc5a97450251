"""Slots: the places of an engine's pools that hold device arrays, and the one call that allocates them all anew.

A slot is an (owner, key) pair, not a class: whatever pools an engine has, their arrays are found by walking them and go
back into the same slots of the same objects. A rebuild therefore cannot differ from what was there.
"""

from __future__ import annotations

import enum
import logging
import math
import threading
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from kvcycle import capacity
from kvcycle.errors import UnknownBufferError
from kvcycle.platform import large_allocations_mapped
from kvcycle.record_info import Layout
from kvcycle.zeros import compiled_zeros

#: What a pool may hold besides buffers. Everything else is walked, and refused where it hides an array.
_LEAVES = (
    str, bytes, int, float, complex, bool, type(None), type, enum.Enum, np.dtype, np.generic, np.ndarray,
    Mesh, Sharding, jax.sharding.PartitionSpec, jax.Device, range, slice,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType,
    logging.Logger, threading.Event, type(threading.Lock()), type(threading.RLock()), threading.Thread,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Slot:
    """A place that holds one device array: an attribute, a list index or a dict key of ``owner``.

    ``path`` is for people: ``token_to_kv_pool.kv_buffer[3]``. With ``index`` the place holds a tuple, and the slot is
    that entry of it: see :class:`Attribute`.
    """

    owner: Any
    key: Any
    path: str
    index: int | None = None

    def get(self) -> Any:
        """The array in the slot now."""
        held = self.owner[self.key] if isinstance(self.owner, (list, dict)) else vars(self.owner)[self.key]
        return held if self.index is None else held[self.index]

    def find(self) -> Any | None:
        """The array in the slot now; None if the slot is gone, as a list that became shorter leaves it."""
        try:
            return self.get()
        except LookupError:
            return None

    def set(self, array: jax.Array) -> None:
        """Put ``array`` into the slot."""
        value: Any = array
        if self.index is not None:
            held = vars(self.owner)[self.key]
            entries = [*held[: self.index], array, *held[self.index + 1 :]]
            value = held._make(entries) if hasattr(held, "_make") else tuple(entries)
        if isinstance(self.owner, (list, dict)):
            self.owner[self.key] = value
        else:
            # Past any __setattr__ of the pool: what was read from vars() goes back there.
            vars(self.owner)[self.key] = value


@dataclass(frozen=True, eq=False)
class Attribute:
    """A root of the walk that is one attribute of an object which is no pool itself.

    The engine replaces what stands there, so arrays in a tuple there are slots: the tuple is replaced as a whole. A
    tuple inside a pool may be held elsewhere as well, and is refused.
    """

    owner: Any
    name: str


@dataclass(frozen=True)
class BufferSpec:
    """All that decides whether a compiled forward takes an array without compiling again: not its contents."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: Sharding
    committed: bool
    weak_type: bool

    @classmethod
    def of(cls, array: jax.Array) -> BufferSpec:
        """The spec of an array; also of a deleted one, whose shape and sharding survive."""
        return cls(array.shape, array.dtype, array.sharding, bool(array.committed), bool(array.aval.weak_type))

    @property
    def layout(self) -> Layout:
        """The spec as a record writes it."""
        spec = getattr(self.sharding, "spec", None)
        mesh = getattr(self.sharding, "mesh", None)
        # str() of a sharding repeats the whole mesh; its spec and axis sizes say the same and stay readable.
        where = f"{spec} over {dict(mesh.shape)}" if spec is not None and mesh is not None else str(self.sharding)
        where = where.replace("PartitionSpec(", "P(", 1)  # jax 0.8.1's name for it: records of two stacks compare
        return Layout(
            shape=self.shape,
            dtype=str(self.dtype),
            sharding=where,
            memory_kind=str(self.sharding.memory_kind),
            committed=self.committed,
            weak_type=self.weak_type,
        )


def find_slots(
    roots: Mapping[str, Any], *, beyond: Iterable[object] = (), weights: Iterable[jax.Array] = ()
) -> list[Slot]:
    """List the slots below ``roots`` (name → pool object), each array and each container once, in a stable order.

    Args:
        roots: where the walk starts; an :class:`Attribute` starts at that attribute.
        beyond: objects that are no part of a pool, though a pool may point back to them: the walk stops there.
        weights: arrays that must never be taken for a pool's.

    Raises:
        UnknownBufferError: an array sits where it could not be replaced in place: in a tuple, a set, an object's
            ``__slots__``, or one array in two slots; or it is one of the weights.
    """
    slots: list[Slot] = []
    holders: dict[int, str] = {}
    outside = list(beyond)  # kept, so that no id is given to another object meanwhile
    model = list(weights)
    seen: set[int] = {id(value) for value in outside}
    of_the_model = {id(array) for array in model}

    def visit(value: Any, path: str, place: tuple[Any, Any] | tuple[Any, Any, int] | None) -> None:
        if isinstance(value, jax.Array):
            if id(value) in of_the_model:
                raise UnknownBufferError(
                    f"{path} is one of the model's weights, of {value.shape}, held by a pool: to drop it would delete "
                    "the model; kvcycle does not know this kind of pool."
                )
            if place is None:
                raise UnknownBufferError(
                    f"{path} is a device array of {value.shape} in a place that cannot be assigned, so it could not "
                    "be rebuilt in place; kvcycle does not know this kind of pool."
                )
            if (first := holders.get(id(value))) is not None:
                raise UnknownBufferError(
                    f"{path} and {first} hold the same device array; rebuilding both would need twice the memory."
                )
            holders[id(value)] = path
            owner, key, *entry = place
            slots.append(Slot(owner, key, path, *entry))
            return
        if isinstance(value, _LEAVES) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, list):
            for index, item in enumerate(value):
                visit(item, f"{path}[{index}]", (value, index))
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{path}[{key!r}]", (value, key))
        elif isinstance(value, (tuple, set, frozenset, deque)):
            for index, item in enumerate(value):
                visit(item, f"{path}[{index}]", None)
        elif hasattr(value, "__dict__"):
            for name, item in vars(value).items():
                visit(item, f"{path}.{name}", (value, name))
        else:
            for leaf in jax.tree_util.tree_leaves(value):
                if isinstance(leaf, jax.Array):
                    visit(leaf, f"{path} ({type(value).__name__})", None)
        for name, item in _hidden_attributes(value):
            visit(item, f"{path}.{name}", None)

    for name, root in roots.items():
        if not isinstance(root, Attribute):
            visit(root, name, None)
            continue
        held = vars(root.owner)[root.name]
        if isinstance(held, tuple):
            fields = getattr(held, "_fields", range(len(held)))
            for entry, (field, item) in enumerate(zip(fields, held, strict=True)):
                visit(item, f"{name}.{field}", (root.owner, root.name, entry))
        else:
            visit(held, name, (root.owner, root.name))
    return slots


def _hidden_attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes that the walk has not met: of ``__slots__``, and of a list or dict with a ``__dict__``."""
    if isinstance(value, (list, dict, tuple, set, frozenset, deque)):
        yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType):
                with suppress(AttributeError):  # never assigned
                    yield name, member.__get__(value)


def bytes_by_device(arrays: Iterable[jax.Array]) -> dict[int, int]:
    """Device bytes of the arrays' shards on each local device, by device id.

    A replicated array counts on every device that holds it, which its ``nbytes`` does not. Must be asked before a
    delete: afterwards the shards cannot be read.
    """
    totals: dict[int, int] = {}
    for array in arrays:
        for shard in array.addressable_shards:
            totals[shard.device.id] = totals.get(shard.device.id, 0) + shard.data.on_device_size_in_bytes()
    return dict(sorted(totals.items()))


def delete(arrays: Iterable[jax.Array]) -> None:
    """Free what the arrays hold."""
    for array in arrays:
        array.delete()


def spec_bytes_by_device(specs: Iterable[BufferSpec]) -> dict[int, int]:
    """Logical bytes that arrays of these specs take on each local device, by device id; a device may pad them."""
    totals: dict[int, int] = {}
    for spec in specs:
        size = math.prod(spec.sharding.shard_shape(spec.shape)) * spec.dtype.itemsize
        devices: set[Any] = spec.sharding.addressable_devices  # jax's stubs do not say what a Device is
        for device in devices:
            totals[device.id] = totals.get(device.id, 0) + size
    return dict(sorted(totals.items()))


class ZeroAllocator:
    """Allocates arrays of zeros for a list of specs in one compiled call, compiled when this is made.

    One call for all layers, because a jitted allocator called per layer costs about twice as much and a fresh jit per
    layer ten times (measured on CPU, 36 layers, 2.25 GiB); compiled ahead, because the rebuild must not compile.
    """

    def __init__(self, specs: Sequence[BufferSpec]) -> None:
        self._specs = list(specs)
        self._needed_bytes_by_device = spec_bytes_by_device(self._specs)
        self._groups = [
            (indices, compiled_zeros([self._specs[i] for i in indices], committed=committed))
            for committed in (True, False)
            if (indices := [i for i, spec in enumerate(self._specs) if spec.committed is committed])
        ]

    def __call__(self) -> list[jax.Array]:
        """Allocate; returns the arrays in the order of the specs, once they are really there.

        Raises:
            jax.errors.JaxRuntimeError: the device has not enough memory; nothing stays allocated.
        """
        capacity.claim(self._needed_bytes_by_device)
        arrays: dict[int, jax.Array] = {}
        try:
            with large_allocations_mapped():
                for indices, allocate in self._groups:
                    arrays.update(zip(indices, allocate(), strict=True))
                jax.block_until_ready(list(arrays.values()))
        except BaseException:
            # The exception's traceback would keep what is there already alive for as long as somebody keeps it.
            delete(arrays.values())
            raise
        return [arrays[index] for index in range(len(self._specs))]


class ZeroTester:
    """Tells which arrays hold anything but zeros, in one compiled call, compiled when this is made."""

    def __init__(self, specs: Sequence[BufferSpec]) -> None:
        self._specs = list(specs)
        abstract = [jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=spec.sharding) for spec in specs]
        # != 0 is True for NaN as well.
        self._any_nonzero = (
            jax.jit(lambda *arrays: [jnp.any(array != 0) for array in arrays]).lower(*abstract).compile()
        )

    def __call__(self, arrays: Sequence[jax.Array | None]) -> list[bool]:
        """For each array whether any element is not zero; also True for one that is None or deleted."""
        if all(
            array is not None and not array.is_deleted() and BufferSpec.of(array) == spec
            for array, spec in zip(arrays, self._specs, strict=True)
        ):
            # On every device: to read a flag takes one, and what the others still compute with is in use meanwhile.
            return [bool(flag) for flag in jax.block_until_ready(self._any_nonzero(*arrays))]
        # What was compiled takes no other layout, and this must not fail where there is something to tell.
        return [array is None or array.is_deleted() or _holds_nonzero(array) for array in arrays]


def _holds_nonzero(array: jax.Array) -> bool:
    return any(bool(np.any(np.asarray(shard.data) != 0)) for shard in array.addressable_shards)
