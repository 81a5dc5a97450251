"""Counts what JAX's compiler does in a span of time, in every thread of the process.

jax's own test counters are thread-local, and sglang-jax's ``cache_miss_count`` reads 0 on a cold generate that ran
twelve compilations: both are false zeros here, since the engine compiles on its own threads. ``jax.monitoring`` is
process-wide and public.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from kvcycle import spending
from kvcycle.record_parts import Compiles

_DURATIONS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    # Also fires when the persistent compilation cache supplies the executable: that is work after a rebuild, too.
    "/jax/core/compile/backend_compile_duration": "backend",
}
_EVENTS = {"/jax/compilation_cache/cache_hits": "cache_hits"}

_lock = threading.Lock()
_totals = {"trace": 0, "lower": 0, "backend": 0, "cache_hits": 0}
_listening = False


def _count(kind: str | None) -> None:
    if kind is not None:
        with _lock:
            _totals[kind] += 1


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
    kind = _DURATIONS.get(event)
    _count(kind)
    if kind in ("lower", "backend"):  # a trace is timed with those within it, which would count twice
        spending.compiled(duration_secs)


def _on_event(event: str, **_: str | int) -> None:
    _count(_EVENTS.get(event))


def _listen() -> None:
    """Register the listeners once; jax.monitoring offers no public way to take one back."""
    global _listening  # one process, one counter: jax.monitoring is process-wide as well
    with _lock:
        if _listening:
            return
        _listening = True
    jax.monitoring.register_event_duration_secs_listener(_on_duration)
    jax.monitoring.register_event_listener(_on_event)


def total() -> Compiles:
    """Everything counted since the first call into this module."""
    _listen()
    with _lock:
        return Compiles(**_totals)


class Span:
    """A span of counting: ``span.compiles`` is what was counted since it began, fixed once it has ended."""

    def __init__(self) -> None:
        self._begin = total()
        self._end: Compiles | None = None

    @property
    def compiles(self) -> Compiles:
        """Compiler work in the span so far."""
        return difference(self._end or total(), self._begin)

    def end(self) -> Compiles:
        """End the span and return its count."""
        self._end = total()
        return self.compiles


@contextmanager
def counting() -> Iterator[Span]:
    """Count the compiler's work in a ``with`` block; read ``span.compiles`` after it."""
    span = Span()
    try:
        yield span
    finally:
        span.end()


def difference(later: Compiles, earlier: Compiles) -> Compiles:
    """``later - earlier``, field by field."""
    before = earlier.model_dump()
    return Compiles(**{kind: count - before[kind] for kind, count in later.model_dump().items()})
