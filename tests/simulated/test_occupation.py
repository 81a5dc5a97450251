"""release_memory_occupation and resume_memory_occupation on a live engine: tags, states, bytes, bits, errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import kvcycle
from kvcycle import capacity, host_memory
from kvcycle import weights as weights_module
from kvcycle.compiles import counting
from kvcycle.errors import (
    EngineBusyError,
    KVCacheDroppedError,
    MemoryOccupationError,
    ParamSetError,
    WeightsReleasedError,
    WeightsStateError,
)
from kvcycle.occupation import TAGS
from kvcycle.params import perturbed
from kvcycle.record_parts import Generate
from kvcycle.weights import digests
from tests.simulated.holding import each_has_two_tokens, held

#: On a device: 4 layers of K and V, one head of 128 bfloat16.
KV_BYTES_A_TOKEN = 4 * 2 * 128 * 2
WEIGHTS = 5_526_528
#: Sampling tensors, the last batch, random keys: what an engine of 512 tokens of vocabulary holds besides.
SMALL_BYTES = 16_384


@pytest.fixture
def occupation(live_engine: Any, kv: kvcycle.KVCache) -> Iterator[kvcycle.MemoryOccupation]:
    """The engine with its two calls alive; whatever a test does, everything is resident again after it."""
    found = kvcycle.enable_memory_occupation(live_engine)
    yield found
    if found.released:
        found.resume()
    kvcycle.enable_memory_occupation(live_engine)


def in_use() -> dict[int, int]:
    return {use.id: use.ledger_bytes for use in kvcycle.snapshot().devices}


def change(before: dict[int, int]) -> set[int]:
    """The changes in bytes since then, of all devices."""
    return {size - before[device] for device, size in in_use().items()}


@pytest.mark.parametrize(
    ("tags", "caches", "weights"),
    [
        (["kv_cache"], 1, 0),
        (["weights"], 0, 1),
        (["weights", "kv_cache"], 1, 1),
        (None, 1, 1),
        ([], 1, 1),
        (["cuda_graph"], 0, 0),
    ],
    ids=str,
)
def test_every_tag_is_freed_to_the_byte_and_comes_back_without_compiling(
    live_engine: Any,
    occupation: kvcycle.MemoryOccupation,
    kv: kvcycle.KVCache,
    generate: Callable[[], Generate],
    cold: Generate,
    tiny: kvcycle.Profile,
    tags: list[str] | None,
    caches: int,
    weights: int,
) -> None:
    assert tiny.engine.max_total_tokens is not None
    tokens = tiny.engine.max_total_tokens + tiny.engine.page_size
    bytes_each = caches * tokens * KV_BYTES_A_TOKEN + weights * WEIGHTS
    kv.flush()
    before, bits = in_use(), digests(live_engine)
    freed = live_engine.release_memory_occupation(tags=tags)
    assert change(before) == {-bytes_each}
    assert freed.bytes_by_device == (dict.fromkeys(range(4), bytes_each) if bytes_each else {})
    assert freed.bytes == 4 * bytes_each
    assert freed.tags == occupation.released == (tuple(t for t in TAGS if not tags or t in tags))
    with counting() as span:
        live_engine.resume_memory_occupation(tags=tags)
    assert (span.compiles.any_work, span.compiles.trace) == (0, 0)
    assert occupation.released == ()
    assert change(before) == {0}
    assert digests(live_engine) == bits
    assert kvcycle.sharing(live_engine, kvcycle.ParamSet.of(live_engine)).complete
    kv.flush()
    after = generate()
    assert (after.compiles.any_work, after.token_ids, after.logprobs) == (0, cold.token_ids, cold.logprobs)


def test_what_stays_when_all_is_released_is_named_and_small(
    live_engine: Any, occupation: kvcycle.MemoryOccupation, kv: kvcycle.KVCache
) -> None:
    kv.flush()
    freed = live_engine.release_memory_occupation()
    assert freed.remaining_bytes_by_device == in_use()
    assert all(0 < size < SMALL_BYTES for size in freed.remaining_bytes_by_device.values())
    assert sum(size for _, size in freed.remaining) <= sum(freed.remaining_bytes_by_device.values())
    assert freed.remaining[0][1] >= freed.remaining[-1][1] > 0
    # Replicated blocks are kept once: less than the devices held, at least what one replica of each is.
    assert WEIGHTS <= freed.host_bytes < 4 * WEIGHTS


@pytest.mark.parametrize("order", [("kv_cache", "weights"), ("weights", "kv_cache")], ids=str)
def test_partial_resumes_in_any_order_and_no_request_before_the_last(
    live_engine: Any,
    occupation: kvcycle.MemoryOccupation,
    generate: Callable[[], Generate],
    cold: Generate,
    order: tuple[str, str],
) -> None:
    live_engine.release_memory_occupation(tags=[order[1]])
    live_engine.release_memory_occupation(tags=[order[0]])
    live_engine.resume_memory_occupation(tags=[order[0]])
    error = WeightsReleasedError if order[1] == "weights" else KVCacheDroppedError
    with pytest.raises(error, match="The engine cannot serve a request"):
        generate()
    live_engine.resume_memory_occupation(tags=[order[1]])
    assert generate().token_ids == cold.token_ids


def test_weights_that_come_back_keep_what_the_prefix_cache_knows(
    live_engine: Any, occupation: kvcycle.MemoryOccupation, generate: Callable[[], Generate], cold: Generate
) -> None:
    generate()
    live_engine.release_memory_occupation(tags=["weights"])
    live_engine.resume_memory_occupation(tags=["weights"])
    again = generate()
    assert again.cached_tokens > 0
    assert again.token_ids == cold.token_ids


# New weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["keep", "discard"])
@pytest.mark.parametrize("how", ["update", "list", "swap"])
def test_new_weights_at_the_resume(
    live_engine: Any,
    occupation: kvcycle.MemoryOccupation,
    kv: kvcycle.KVCache,
    generate: Callable[[], Generate],
    cold: Generate,
    mode: Any,
    how: str,
) -> None:
    kvcycle.enable_memory_occupation(live_engine, weights=mode)
    generate()  # the prefix cache knows the prompt, by the old weights
    old, new = kvcycle.ParamSet.clone(live_engine), kvcycle.ParamSet.clone(live_engine, perturbed(0.5))
    freed = live_engine.release_memory_occupation(tags=["weights"])
    assert (freed.host_bytes > 0) == (mode == "keep")
    if how == "swap":
        kvcycle.swap(live_engine, new)
        live_engine.resume_memory_occupation(tags=["weights"])
    else:
        update = new if how == "update" else list(new.leaves)
        live_engine.resume_memory_occupation(tags=["weights"], update=update)
    assert kvcycle.sharing(live_engine, new).complete
    uses = kvcycle.snapshot({"weights": new.leaves, "params2": old.leaves, "kv": kv.arrays()}).devices
    assert {(use.by_owner["weights"], use.by_owner["params2"]) for use in uses} == {(WEIGHTS, WEIGHTS)}
    assert all(use.by_owner["other"] < SMALL_BYTES for use in uses)  # nothing of the released set
    there = generate()
    assert (there.compiles.any_work, there.cached_tokens) == (0, 0)
    assert there.token_ids != cold.token_ids
    kvcycle.swap(live_engine, old)
    new.delete()
    assert generate().token_ids == cold.token_ids


def test_discarded_weights_need_new_ones(live_engine: Any, occupation: kvcycle.MemoryOccupation) -> None:
    copy = kvcycle.ParamSet.clone(live_engine)
    kvcycle.enable_memory_occupation(live_engine, weights="discard")
    assert live_engine.release_memory_occupation(tags=["weights"]).host_bytes == 0
    with pytest.raises(WeightsStateError, match=r"were discarded when they were released, .*; give a new set"):
        live_engine.resume_memory_occupation()
    with pytest.raises(ParamSetError, match=r"The engine has 51 parameter arrays, the given set 50\."):
        live_engine.resume_memory_occupation(update=copy.leaves[:-1])
    assert occupation.released == ("weights",)
    live_engine.resume_memory_occupation(update=copy)


# What does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("released", "call", "tags", "sentence"),
    [
        (
            [], "release", ["weight"],
            ("release_memory_occupation(tags=['weight']): 'weight' is no tag (did you mean 'weights'?); there are "
             "kv_cache, weights, cuda_graph, and None for all."),
        ),
        (
            [], "release", "kv_cache",
            "release_memory_occupation(tags='kv_cache'): tags are a list; write tags=['kv_cache'].",
        ),
        (
            ["weights"], "release", ["kv_cache", "weights"],
            ("release_memory_occupation(tags=['kv_cache', 'weights']): 'weights' is released already, so nothing was "
             "released; call resume_memory_occupation(tags=['weights']) first."),
        ),
        (
            None, "release", None,
            ("release_memory_occupation() was called, and everything is released already; call "
             "resume_memory_occupation() first."),
        ),
        (
            ["kv_cache"], "resume", ["weights", "kv_cache"],
            ("resume_memory_occupation(tags=['weights', 'kv_cache']): 'weights' is resident already, so nothing was "
             "resumed; call release_memory_occupation(tags=['weights']) first."),
        ),
        (
            [], "resume", None,
            ("resume_memory_occupation() was called, and everything is resident already; call "
             "release_memory_occupation() first."),
        ),
    ],
    ids=["no-tag", "no-list", "released-twice", "all-released-twice", "resumed-half", "resumed-without-release"],
)  # fmt: skip
def test_a_call_that_does_not_fit_says_so_and_does_nothing(
    live_engine: Any,
    occupation: kvcycle.MemoryOccupation,
    released: Sequence[str] | None,
    call: str,
    tags: Any,
    sentence: str,
) -> None:
    if released is None or released:
        live_engine.release_memory_occupation(tags=released)
    before = in_use(), occupation.released
    with pytest.raises(MemoryOccupationError) as caught:
        getattr(live_engine, f"{call}_memory_occupation")(tags=tags)
    assert str(caught.value) == sentence
    assert (in_use(), occupation.released) == before


def test_new_weights_without_the_weights_tag_are_refused(
    live_engine: Any, occupation: kvcycle.MemoryOccupation
) -> None:
    live_engine.release_memory_occupation(tags=["kv_cache"])
    with pytest.raises(MemoryOccupationError, match=r"was given new weights \(update=…\) and does not resume"):
        live_engine.resume_memory_occupation(update=kvcycle.ParamSet.of(live_engine))
    assert occupation.released == ("kv_cache",)


def test_a_mode_that_is_none(live_engine: Any, kv: kvcycle.KVCache) -> None:
    with pytest.raises(ValueError, match="weights='host' is none; use one of keep, discard"):
        kvcycle.enable_memory_occupation(live_engine, weights="host")  # type: ignore[arg-type]


def test_a_busy_engine_keeps_everything(live_engine: Any, occupation: kvcycle.MemoryOccupation) -> None:
    async def release_meanwhile() -> tuple[BaseException, dict[str, Any]]:
        request = asyncio.ensure_future(
            live_engine.async_generate(
                prompt="Hello", sampling_params={"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
            )
        )
        while not hold.reached.is_set() and not request.done():
            await asyncio.sleep(0)
        with pytest.raises(EngineBusyError) as caught:
            await live_engine.async_release_memory_occupation(tags=["kv_cache", "weights"])
        return caught.value, await request

    with held(live_engine, each_has_two_tokens(live_engine, 1)) as hold:
        error, answer = live_engine.loop.run_until_complete(release_meanwhile())
    assert str(error).startswith("release_memory_occupation() needs an idle engine, and it has requests: ")
    assert str(error).endswith("Wait for them, or end them with engine.abort_request(abort_all=True).")
    assert occupation.released == ()
    assert answer["meta_info"]["completion_tokens"] == 40


def test_a_host_without_room_for_the_copy_releases_nothing(
    live_engine: Any, occupation: kvcycle.MemoryOccupation, kv: kvcycle.KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv.flush()
    before = in_use()
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 1000)
    with pytest.raises(WeightsStateError, match=r"they need .*, and 1,000 B is free\. Nothing was released\."):
        live_engine.release_memory_occupation()
    assert occupation.released == ()  # the KV cache is back as well
    assert change(before) == {0}


def test_a_resume_without_room_says_what_is_missing_and_can_be_repeated(
    live_engine: Any, occupation: kvcycle.MemoryOccupation, generate: Callable[[], Generate], cold: Generate
) -> None:
    bits = digests(live_engine)
    live_engine.release_memory_occupation(tags=["weights"])
    capacity.simulate(max(in_use().values()) + WEIGHTS - 1)
    try:
        with pytest.raises(ParamSetError) as caught:
            live_engine.resume_memory_occupation()
    finally:
        capacity.simulate(None)
    assert str(caught.value).startswith("The weights could not be resumed: RESOURCE_EXHAUSTED")
    assert "Needed: device 0: 5.27 MiB (5,526,528 B), free 5.27 MiB (5,526," in str(caught.value)
    assert str(caught.value).endswith("They stay released: delete what is no longer needed, then resume again.")
    assert occupation.released == ("weights",)
    live_engine.resume_memory_occupation()
    assert digests(live_engine) == bits
    assert generate().token_ids == cold.token_ids


def test_an_allocation_that_fails_half_way_leaves_nothing_behind(
    live_engine: Any, occupation: kvcycle.MemoryOccupation, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_engine.release_memory_occupation(tags=["weights"])
    before = in_use()
    restore, calls = weights_module.HostCopy.restore, iter(range(100))

    def exhausted(copy: Any) -> jax.Array:
        if next(calls) == 20:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: planted")
        return restore(copy)

    with monkeypatch.context() as patch:
        patch.setattr(weights_module.HostCopy, "restore", exhausted)
        with pytest.raises(ParamSetError, match="RESOURCE_EXHAUSTED: planted"):
            live_engine.resume_memory_occupation()
    assert change(before) == {0}
    live_engine.resume_memory_occupation()


# Ways in -------------------------------------------------------------------------------------------------------------


def test_the_async_forms_and_the_tokenizer_managers_do_not_block_the_loop(
    live_engine: Any, occupation: kvcycle.MemoryOccupation
) -> None:
    async def there_and_back() -> list[tuple[str, ...]]:
        states = []
        await live_engine.async_release_memory_occupation(tags=["weights"])
        states.append(occupation.released)
        await live_engine.async_resume_memory_occupation()
        states.append(occupation.released)
        manager = live_engine.tokenizer_manager
        await manager.release_memory_occupation(SimpleNamespace(tags=["kv_cache"]), None)
        states.append(occupation.released)
        await manager.release_memory_occupation(SimpleNamespace(request_id="1", memory_size=0))
        states.append(occupation.released)
        await manager.resume_memory_occupation(SimpleNamespace(tags=None), None)
        return [*states, occupation.released]

    states = live_engine.loop.run_until_complete(there_and_back())
    assert states == [("weights",), (), ("kv_cache",), ("kv_cache", "weights", "cuda_graph"), ()]


def test_of_two_threads_that_release_at_once_one_is_told(
    live_engine: Any, occupation: kvcycle.MemoryOccupation
) -> None:
    barrier, results = threading.Barrier(2), []

    def release() -> None:
        barrier.wait()
        try:
            results.append(type(live_engine.release_memory_occupation(tags=["weights"])).__name__)
        except MemoryOccupationError as error:
            results.append(type(error).__name__)

    threads = [threading.Thread(target=release) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == ["Occupation", "OccupationStateError"]


def test_a_cache_that_was_dropped_by_hand_is_resumed_like_any(
    live_engine: Any, occupation: kvcycle.MemoryOccupation, kv: kvcycle.KVCache
) -> None:
    kv.drop()
    assert occupation.released == ("kv_cache",)
    live_engine.release_memory_occupation()
    live_engine.resume_memory_occupation()
    assert kv.state == "resident"


def test_enabling_twice_is_one_occupation(live_engine: Any, occupation: kvcycle.MemoryOccupation) -> None:
    release = live_engine.release_memory_occupation
    assert kvcycle.enable_memory_occupation(live_engine, weights="discard") is occupation
    assert (occupation.mode, live_engine.release_memory_occupation) == ("discard", release)
