"""The guards' own time in one generation: what each call to them costs beyond the call that it wraps.

One percent does not show in the difference of two generations that vary by five. So every call that one generation
makes to a guard is noted, with its arguments; then the same calls are made again, thousands of times, to a copy of the
guard that wraps a function which does nothing, in turn with that function alone.
"""

from __future__ import annotations

import asyncio
import inspect
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import CellType, FunctionType, MethodType
from typing import Any

from benchmarks.measure import seconds_of

#: Generations' worth of calls that one round makes anew; the median of them counts.
REPEAT = 200

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Replay:
    """One guard's calls of one generation, with nothing inside them, and what the engine would do without the guard."""

    name: str
    calls: int
    guarded: Callable[[], object]
    bare: Callable[[], object]

    def own_s(self, repeat: int = REPEAT) -> float:
        """The guard's own seconds in one generation; the median, so that what interrupts one of many is not its own."""
        found = []
        for number in range(repeat):
            both = {True: self.guarded, False: self.bare}
            took = {way: seconds_of(both[way]) for way in ((True, False) if number % 2 else (False, True))}
            found.append(took[True] - took[False])
        return statistics.median(found)


@dataclass
class Noted:
    """A function, and the arguments of every call to it since it stands in the function's place."""

    function: Callable[..., Any]
    calls: list[Arguments] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.function(*args, **kwargs)

    def around(self, name: str, wrapped: Callable[..., Any], guard: Callable[..., Any] | None = None) -> Replay:
        """The calls to a wrapper of ``wrapped``, to be made again; ``guard`` if only a part of the function is one.

        Raises:
            ValueError: the guard does not wrap it.
        """
        guard = guard or self.function
        nothing = _async_nothing if inspect.isasyncgenfunction(guard) else _nothing
        calls = tuple(self.calls)
        return Replay(name, len(calls), _again(around_nothing(guard, wrapped, nothing), calls), _again(nothing, calls))

    def alone(self, name: str) -> Replay:
        """The calls to a function that wraps nothing, which without it nobody would make."""
        calls = tuple(self.calls)
        return Replay(name, len(calls), _again(self.function, calls), _nothing)


def _again(function: Callable[..., Any], calls: Sequence[Arguments]) -> Callable[[], object]:
    """What makes these calls to the function; of a generator it takes everything."""

    def call() -> None:
        for args, kwargs in calls:
            function(*args, **kwargs)

    async def exhaust() -> None:
        for args, kwargs in calls:
            async for _ in function(*args, **kwargs):
                pass

    return (lambda: _loop().run_until_complete(exhaust())) if inspect.isasyncgenfunction(function) else call


def around_nothing(guard: Callable[..., Any], wrapped: Callable[..., Any], nothing: Callable[..., Any]) -> FunctionType:
    """A copy of a wrapper, and of the wrappers that it wraps, in which ``nothing`` stands for what they wrap.

    The guard itself is left as it is: the engine goes on calling it.

    Raises:
        ValueError: the guard does not hold ``wrapped`` where a wrapper does, in its closure.
    """
    copy = _copied(guard, wrapped, nothing)
    if copy is None:
        raise ValueError(
            f"{getattr(guard, '__qualname__', guard)} does not hold {getattr(wrapped, '__qualname__', wrapped)} in its "
            "closure, so its own time cannot be told from what it calls; wrap as kvcycle.internals does."
        )
    return copy


def _copied(guard: object, wrapped: Callable[..., Any], nothing: Callable[..., Any]) -> FunctionType | None:
    if not isinstance(guard, FunctionType) or not guard.__closure__:
        return None
    cells, replaced = [], False
    for cell in guard.__closure__:
        held = cell.cell_contents
        inner = nothing if _is(held, wrapped) else _copied(held, wrapped, nothing)
        cells.append(cell if inner is None else CellType(inner))
        replaced = replaced or inner is not None
    if not replaced:
        return None
    copy = FunctionType(guard.__code__, guard.__globals__, guard.__name__, guard.__defaults__, tuple(cells))
    copy.__kwdefaults__ = guard.__kwdefaults__
    return copy


def _is(held: object, wrapped: Callable[..., Any]) -> bool:
    """Bound methods are made anew each time they are asked for; other things are compared by identity alone."""
    return held is wrapped or (isinstance(held, MethodType) and held == wrapped)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    pass


async def _async_nothing(*_args: Any, **_kwargs: Any) -> AsyncIterator[None]:
    yield None  # of a request that is not streamed there is one chunk


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The measuring thread's own loop, apart from the engine's; it lives as long as the process."""
    return asyncio.new_event_loop()
