"""What a fault is, and the tools to plant one: a context manager that breaks a live engine and mends it again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import jax

from kvcycle import internals
from kvcycle.kv_cache import KVCache

#: How a fault is run. "bytes": without generation. "cycles": two of them, without generation. "allocator": without
#: generation, on devices whose allocator keeps statistics (simulated). "generate": with generation, the cold one and
#: the recompile control taken from the clean run. "cold": with a cold generation of its own. "recompile": with a
#: recompile control of its own. "weights": as "generate", and the weights are released and resumed. "soak": the
#: shortest soak, after a clean cycle.
Run = Literal["bytes", "cycles", "allocator", "generate", "cold", "recompile", "weights", "soak"]


@dataclass(frozen=True)
class Target:
    """The live engine that faults are planted into."""

    engine: Any
    kv: KVCache

    @property
    def buffers(self) -> Any:
        """What the scheduler's thread does with the buffers: the place to plant a fault of the drop or the rebuild."""
        return self.kv._buffers

    @property
    def arrays(self) -> list[jax.Array]:
        """The KV buffers as they are now."""
        return self.kv.arrays()

    @property
    def weights(self) -> list[jax.Array]:
        """The engine's weights as they are now."""
        return internals.weight_leaves(self.engine)


Plant = Callable[[Target], AbstractContextManager[None]]


@dataclass(frozen=True)
class Fault:
    """A planted fault and what must become of it.

    Attributes:
        id: its name, with hyphens.
        what: one line of what is wrong.
        plant: plants it into a target for the length of a ``with`` block.
        red: the checks that must not pass.
        also: further checks that may not pass, as a consequence. Any other that does not is a false alarm.
        says: what the message or a likely cause of a red verdict must say: it names the cause.
        run: what kind of run shows it.
        group: the module that plants it, for the order.
    """

    id: str
    what: str
    plant: Plant
    red: frozenset[str]
    also: frozenset[str]
    says: str
    run: Run
    group: str


#: Every fault, in the order of the modules that plant them.
FAULTS: list[Fault] = []


def fault(
    *red: str, says: str, run: Run = "bytes", also: tuple[str, ...] = ()
) -> Callable[[Callable[[Target], Iterator[None]]], Callable[[Target], Iterator[None]]]:
    """Register a generator that plants a fault, yields, and mends it; its name and docstring describe the fault."""

    def register(plant: Callable[[Target], Iterator[None]]) -> Callable[[Target], Iterator[None]]:
        FAULTS.append(
            Fault(
                id=plant.__name__.replace("_", "-"),
                what=(plant.__doc__ or "").strip().rstrip("."),
                plant=contextmanager(plant),
                red=frozenset(red),
                also=frozenset(also),
                says=says,
                run=run,
                group=plant.__module__.rpartition(".")[2],
            )
        )
        return plant

    return register


@contextmanager
def wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Let ``owner.name(...)`` call ``wrapper(original, ...)`` meanwhile."""
    with mock.patch.object(owner, name, functools.partial(wrapper, getattr(owner, name))):
        yield


@contextmanager
def before_drop(target: Target, act: Callable[[], None]) -> Iterator[None]:
    """Do something on the scheduler's thread right before the buffers are deleted."""

    def drop(original: Callable[..., Any], **options: Any) -> Any:
        act()
        return original(**options)

    with wrapped(target.buffers, "drop", drop):
        yield


@contextmanager
def after_drop(target: Target, act: Callable[[], None]) -> Iterator[None]:
    """Do something on the scheduler's thread right after the buffers are deleted."""

    def drop(original: Callable[..., Any], **options: Any) -> Any:
        freed = original(**options)
        act()
        return freed

    with wrapped(target.buffers, "drop", drop):
        yield


@contextmanager
def rebuilt_as(target: Target, change: Callable[[list[jax.Array]], list[jax.Array]]) -> Iterator[None]:
    """Let the rebuild put ``change(arrays)`` into the slots; what it leaves out of the allocated is freed."""

    def allocate(original: Callable[[], list[jax.Array]]) -> list[jax.Array]:
        arrays = original()
        changed = jax.block_until_ready(change(arrays))
        kept = {id(array) for array in changed}
        for array in arrays:
            if id(array) not in kept:
                array.delete()
        return list(changed)

    with wrapped(target.buffers, "allocate", allocate):
        yield


@contextmanager
def after_rebuild(target: Target, act: Callable[[], None]) -> Iterator[None]:
    """Do something on the scheduler's thread right after the buffers are back in their slots."""

    def rebuild(original: Callable[[], None]) -> None:
        original()
        act()

    with wrapped(target.buffers, "rebuild", rebuild):
        yield


@contextmanager
def deletes(delete: Callable[[jax.Array, Callable[[jax.Array], None]], None], target: Target) -> Iterator[None]:
    """Let ``array.delete()`` call ``delete(array, original)`` meanwhile, for the KV buffers and every other array."""
    kind = type(target.arrays[0])
    original = kind.delete
    # A function, since a partial is no descriptor: as an attribute of the class it would miss its array.
    with mock.patch.object(kind, "delete", lambda array: delete(array, original)):
        yield


Answer = dict[str, Any]


@contextmanager
def answers(target: Target, change: Callable[[Answer, bool], None]) -> Iterator[None]:
    """Change what ``engine.generate()`` answers; the second argument tells the first generation after a rebuild."""
    fresh = False

    def rebuilt() -> None:
        nonlocal fresh
        fresh = True

    def generate(original: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
        nonlocal fresh
        answer, first, fresh = original(*args, **kwargs), fresh, False
        change(answer, first)
        return answer

    with after_rebuild(target, rebuilt), wrapped(target.engine, "generate", generate):
        yield
