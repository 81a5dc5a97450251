"""A second parameter set: its own memory, swapped in and back, without compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import kvcycle
from kvcycle.errors import ParamSetError
from kvcycle.params import perturbed
from kvcycle.record_parts import Generate


def test_a_clone_takes_the_engines_bytes_in_memory_of_its_own(live_engine: Any, kv: kvcycle.KVCache) -> None:
    first = kvcycle.ParamSet.of(live_engine)
    with kv.released():
        before = kvcycle.snapshot().ledger_bytes_sum
        second = kvcycle.ParamSet.clone(live_engine)
        grown = kvcycle.snapshot().ledger_bytes_sum - before
        assert grown == second.bytes == first.bytes
        assert second.bytes_by_device == first.bytes_by_device
        assert not set(first.buffers()) & set(second.buffers())
        second.delete()
        assert kvcycle.snapshot().ledger_bytes_sum == before


def test_a_perturbed_set_changes_the_output_and_the_way_back_restores_it(
    live_engine: Any, kv: kvcycle.KVCache, generate: Callable[[], Generate], cold: Generate
) -> None:
    second = kvcycle.ParamSet.clone(live_engine, perturbed(0.5))
    with kvcycle.swapped(live_engine, second) as first:
        assert kvcycle.sharing(live_engine, second).complete
        assert not kvcycle.sharing(live_engine, first).complete
        there = generate()
    back = generate()
    second.delete()
    assert kvcycle.sharing(live_engine, first).complete
    assert there.token_ids != cold.token_ids
    assert back.token_ids == cold.token_ids
    assert (there.compiles.any_work, back.compiles.any_work) == (0, 0)
    # Keys and values of the other weights would be stale: the swap flushes the prefix cache.
    assert (there.cached_tokens, back.cached_tokens) == (0, 0)


def test_an_equal_clone_gives_the_same_output(
    live_engine: Any, kv: kvcycle.KVCache, generate: Callable[[], Generate], cold: Generate
) -> None:
    second = kvcycle.ParamSet.clone(live_engine)
    with kvcycle.swapped(live_engine, second):
        assert generate().token_ids == cold.token_ids
    second.delete()


def test_a_set_of_another_layout_is_refused_before_anything_changes(live_engine: Any, kv: kvcycle.KVCache) -> None:
    first = kvcycle.ParamSet.of(live_engine)
    with pytest.raises(ParamSetError, match=r"has 51 parameter arrays, the given set 50"):
        kvcycle.swap(live_engine, kvcycle.ParamSet(first.leaves[:-1]))
    wrong = (first.leaves[0].astype("float32"), *first.leaves[1:])
    with pytest.raises(ParamSetError, match=r"Array 0 of the given set is float32"):
        kvcycle.swap(live_engine, kvcycle.ParamSet(wrong))
    assert kvcycle.sharing(live_engine, first).complete


def test_a_deleted_set_is_refused(live_engine: Any, kv: kvcycle.KVCache) -> None:
    second = kvcycle.ParamSet.clone(live_engine)
    second.delete()
    with pytest.raises(ParamSetError, match="Array 0 of the given set is deleted"):
        kvcycle.swap(live_engine, second)
