"""The compiler's work, counted in every thread of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from kvcycle.compiles import Span, counting, difference, total
from kvcycle.record_parts import Compiles

NONE = Compiles()


def fresh() -> Callable[[jax.Array], jax.Array]:
    """A jitted function that no one has called yet."""
    return jax.jit(lambda x: x * 2 + 1)


@pytest.fixture(scope="module")
def argument() -> jax.Array:
    """Made beforehand, since making one compiles."""
    return jnp.ones(3).block_until_ready()


def test_a_first_call_counts_and_a_warm_one_does_not(argument: jax.Array) -> None:
    function = fresh()
    with counting() as cold:
        function(argument)
    with counting() as warm:
        function(argument)
    assert (cold.compiles.lower, cold.compiles.backend, cold.compiles.any_work) == (1, 1, 2)
    assert cold.compiles.trace >= 1
    assert warm.compiles == NONE


def test_another_shape_counts_again(argument: jax.Array) -> None:
    function, other = fresh(), jax.block_until_ready(jnp.ones(4))
    function(argument)
    with counting() as span:
        function(other)
    assert span.compiles.backend == 1


def test_a_compilation_in_another_thread_counts(argument: jax.Array) -> None:
    function = fresh()
    thread = threading.Thread(target=function, args=(argument,))
    with counting() as span:
        thread.start()
        thread.join()
    assert (span.compiles.lower, span.compiles.backend) == (1, 1)


def test_a_compilation_ahead_of_time_counts_and_its_call_does_not(argument: jax.Array) -> None:
    with counting() as ahead:
        compiled = jax.jit(lambda x: x - 7).lower(argument).compile()
    with counting() as call:
        compiled(argument)
    assert ahead.compiles.backend == 1
    assert call.compiles == NONE


def test_cleared_caches_cause_what_had_been_saved(argument: jax.Array) -> None:
    function = fresh()
    function(argument)
    with counting() as cleared:
        jax.clear_caches()
    with counting() as span:
        function(argument)
    assert cleared.compiles == NONE
    assert (span.compiles.lower, span.compiles.backend) == (1, 1)


def test_a_span_counts_on_until_it_ends(argument: jax.Array) -> None:
    span = Span()
    assert span.compiles == NONE
    fresh()(argument)
    assert span.compiles.backend == 1
    assert span.end().backend == 1
    fresh()(argument)
    assert span.compiles.backend == 1


def test_spans_may_overlap(argument: jax.Array) -> None:
    with counting() as outer:
        fresh()(argument)
        with counting() as inner:
            fresh()(argument)
    assert (outer.compiles.backend, inner.compiles.backend) == (2, 1)


def test_a_span_ends_with_an_error_too(argument: jax.Array) -> None:
    with pytest.raises(ZeroDivisionError), counting() as span:
        raise ZeroDivisionError
    fresh()(argument)
    assert span.compiles == NONE


def test_a_hit_in_the_persistent_cache_is_counted_as_one() -> None:
    before = total()
    jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
    jax.monitoring.record_event("/jax/compilation_cache/cache_misses")
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 0.1)
    jax.monitoring.record_event_duration_secs("/jax/core/compile/something_else", 0.1)
    assert difference(total(), before) == Compiles(cache_hits=1, backend=1)


def test_a_difference_is_taken_field_by_field() -> None:
    later, earlier = Compiles(trace=9, lower=8, backend=7, cache_hits=6), Compiles(trace=1, lower=2, backend=3)
    assert difference(later, earlier) == Compiles(trace=8, lower=6, backend=4, cache_hits=6)
