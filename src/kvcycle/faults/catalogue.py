"""What a fault is, and the tools to plant one: a context manager that breaks a live engine and mends it again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
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


def _nothing() -> None:
    pass


@contextmanager
def around(
    owner: Any, name: str, *, before: Callable[[], object] = _nothing, after: Callable[[], object] = _nothing
) -> Iterator[None]:
    """Do something right before or after ``owner.name(...)`` meanwhile, on the thread that calls it."""

    def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before()
        result = original(*args, **kwargs)
        after()
        return result

    with wrapped(owner, name, call):
        yield


def before_drop(target: Target, act: Callable[[], object]) -> AbstractContextManager[None]:
    """Do something on the scheduler's thread right before the buffers are deleted."""
    return around(target.buffers, "drop", before=act)


def after_drop(target: Target, act: Callable[[], object]) -> AbstractContextManager[None]:
    """Do something on the scheduler's thread right after the buffers are deleted."""
    return around(target.buffers, "drop", after=act)


def after_rebuild(target: Target, act: Callable[[], object]) -> AbstractContextManager[None]:
    """Do something on the scheduler's thread right after the buffers are back in their slots."""
    return around(target.buffers, "rebuild", after=act)


Change = Callable[[list[jax.Array]], Sequence[jax.Array]]


def exchanged(arrays: Sequence[jax.Array], change: Change) -> list[jax.Array]:
    """``change(arrays)``, once it is there; what it leaves out of the arrays is freed."""
    changed: list[jax.Array] = list(jax.block_until_ready(change(list(arrays))))
    kept = {id(array) for array in changed}
    for array in arrays:
        if id(array) not in kept:
            array.delete()
    return changed


def rebuilt_as(target: Target, change: Change) -> AbstractContextManager[None]:
    """Let the rebuild put ``change(arrays)`` into the slots."""
    return wrapped(target.buffers, "allocate", lambda original: exchanged(original(), change))


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
def answers(
    target: Target,
    change: Callable[[Answer, bool], object],
    after: Callable[[Target, Callable[[], object]], AbstractContextManager[None]] = after_rebuild,
) -> Iterator[None]:
    """Change what ``engine.generate()`` answers; the second argument tells the first one after a rebuild."""
    fresh = False

    def begin() -> None:
        nonlocal fresh
        fresh = True

    def generate(original: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
        nonlocal fresh
        answer, first, fresh = original(*args, **kwargs), fresh, False
        change(answer, first)
        return answer

    with after(target, begin), wrapped(target.engine, "generate", generate):
        yield
