"""A live engine's KV cache under attack: requests in flight, requests while dropped, interruptions."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import kvcycle
from kvcycle import inband, internals
from kvcycle.errors import EngineBusyError, KVCacheDroppedError
from kvcycle.params import perturbed, swapped
from kvcycle.record_parts import Generate
from tests.simulated.holding import after_forwards, each_has_two_tokens, held

PROMPTS = ("Hello", "The capital of France is", "One, two, three,")
GREEDY = {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True}
BUSY_S = 120.0

Tokens = list[int]


@pytest.fixture(scope="module")
def undisturbed(live_engine: Any, cold: Generate) -> list[Tokens]:
    """What the prompts are answered with, served all at once, when nobody drops anything."""

    async def serve() -> list[Tokens]:
        return list(await asyncio.gather(*(_ask(live_engine, prompt) for prompt in PROMPTS)))

    answers: list[Tokens] = live_engine.loop.run_until_complete(serve())
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)  # each is its prompt's own
    return answers


async def _ask(engine: Any, prompt: str) -> Tokens:
    answer = await engine.async_generate(prompt=prompt, sampling_params=GREEDY)
    return list(answer["output_ids"])


async def _stream(engine: Any, prompt: str, started: asyncio.Event) -> dict[str, Any]:
    """Read a stream to its end and return the last chunk's meta_info; ``started`` is set at the first chunk."""
    stream: AsyncIterator[dict[str, Any]] = await engine.async_generate(
        prompt=prompt, sampling_params=GREEDY, stream=True
    )
    chunks: list[dict[str, Any]] = []
    async for chunk in stream:
        started.set()
        chunks.append(chunk["meta_info"])
    return chunks[-1]


@dataclass(frozen=True)
class Streamed:
    """How the streams of all prompts ended: their ids, finish reasons and tokens, in the order of the prompts."""

    ids: list[str]
    reasons: set[str]
    tokens: list[Tokens]


def in_flight[T](engine: Any, meanwhile: Callable[[], Awaitable[T]], messages: int = 1) -> tuple[Streamed, T]:
    """Stream all prompts at once; when each has begun do ``meanwhile``; read them to the end.

    None ends before ``meanwhile`` has sent so many ``messages``, or is done.
    """

    async def run() -> tuple[Streamed, T]:
        events = [asyncio.Event() for _ in PROMPTS]
        streams = [asyncio.ensure_future(_stream(engine, p, e)) for p, e in zip(PROMPTS, events, strict=True)]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in events)), BUSY_S)
        # A stream repeats tokens in its chunks (0.1.0rc0): what was generated is read from the scheduler's requests.
        requests = {request.rid: request for request in internals._running_requests(internals.scheduler_of(engine))}
        assert len(requests) == len(PROMPTS)
        result = await meanwhile()
        hold.go_on.set()
        ends = await asyncio.wait_for(asyncio.gather(*streams), BUSY_S)
        ids = [end["id"] for end in ends]
        tokens = [list(requests[request_id].output_ids) for request_id in ids]
        return Streamed(ids, {end["finish_reason"]["type"] for end in ends}, tokens), result

    with held(engine, each_has_two_tokens(engine, len(PROMPTS)), messages) as hold:
        return engine.loop.run_until_complete(run())  # type: ignore[no-any-return]  # the engine has no types


def test_no_batch_reads_host_memory_that_the_next_one_overwrites(
    live_engine: Any, undisturbed: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On virtual devices: a CPU device may read the scheduler's own array, at any time until the forward has ended."""
    from sgl_jax.srt.model_executor import forward_batch_info

    scheduler = internals.scheduler_of(live_engine)
    aligned = _aligned(getattr(scheduler.req_to_token_pool, "cache_loc_host_buf", np.zeros(4096, np.int32)))
    monkeypatch.setattr(scheduler.req_to_token_pool, "cache_loc_host_buf", aligned, raising=False)
    answers, _ = in_flight(live_engine, partial(asyncio.sleep, 0))
    assert answers.tokens == undisturbed

    mesh = internals.runner_of(live_engine).mesh
    to_devices = forward_batch_info.device_array
    aliased = {}
    for name, function in {"kvcycle": to_devices, "sglang-jax": to_devices.__wrapped__}.items():
        array = function(aligned, sharding=NamedSharding(mesh, PartitionSpec("data")))
        aliased[name] = array.addressable_shards[0].data.unsafe_buffer_pointer() == aligned.ctypes.data
    assert aliased == {"kvcycle": False, "sglang-jax": True}


def _aligned(like: Any) -> Any:
    """Zeros of the same shape and type, aligned to 64 bytes: what a CPU device takes without a copy."""
    raw = np.zeros(like.nbytes + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :][: like.nbytes].view(like.dtype)


def test_a_refused_drop_changes_nothing_for_several_streams(
    kv: kvcycle.KVCache, live_engine: Any, undisturbed: list[Tokens]
) -> None:
    async def attempt() -> EngineBusyError:
        with pytest.raises(EngineBusyError) as refusal:
            await asyncio.to_thread(kv.drop)
        return refusal.value

    answers, refusal = in_flight(live_engine, attempt)
    assert refusal.counts == {"waiting": 0, "running": 3}
    assert "requests 3 running" in str(refusal)
    assert answers.tokens == undisturbed
    assert kv.state == "resident"


def test_a_drop_that_waits_lets_several_streams_finish(
    kv: kvcycle.KVCache, live_engine: Any, undisturbed: list[Tokens]
) -> None:
    async def wait() -> kvcycle.Freed:
        return await asyncio.to_thread(kv.drop, wait_s=BUSY_S)

    answers, freed = in_flight(live_engine, wait)
    assert (freed.bytes, freed.aborted, freed.retracted) == (kv.bytes, (), ())
    assert answers.tokens == undisturbed


def test_a_drop_that_has_waited_long_enough_refuses(
    kv: kvcycle.KVCache, live_engine: Any, cold: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inband, "_POLL_S", 2 * BUSY_S)  # between two looks at a dead engine; not what a caller waits

    async def wait() -> EngineBusyError:
        with pytest.raises(EngineBusyError, match=r"did not become idle within 0\.01 s: requests 3 running") as refusal:
            await asyncio.to_thread(kv.drop, wait_s=0.01)
        return refusal.value

    in_flight(live_engine, wait, messages=2)  # it sends one: the time is up while nothing goes on
    assert kv.state == "resident"


def test_retracted_requests_go_on_to_the_same_end_after_the_rebuild(
    kv: kvcycle.KVCache, live_engine: Any, undisturbed: list[Tokens]
) -> None:
    async def retract_and_rebuild() -> kvcycle.Freed:
        freed = await asyncio.to_thread(kv.drop, mode="retract")
        assert kv.state == "dropped"
        assert internals.unfinished_requests(internals.scheduler_of(live_engine)) == {"waiting": 3, "running": 0}
        assert all(array.is_deleted() for array in [slot.get() for slot in kv.slots])
        await asyncio.to_thread(kv.rebuild)
        return freed

    answers, freed = in_flight(live_engine, retract_and_rebuild)
    assert freed.bytes == kv.bytes
    assert sorted(freed.retracted) == sorted(answers.ids)
    assert answers.tokens == undisturbed
    assert answers.reasons == {"length"}


def test_requests_can_be_retracted_at_any_moment(
    kv: kvcycle.KVCache, live_engine: Any, undisturbed: list[Tokens]
) -> None:
    """Also between the prefill and the running batch, where sglang-jax's own pause loses them."""

    async def serve_while_dropping() -> tuple[list[Tokens], int]:
        asked: list[asyncio.Future[Tokens]] = []
        retracted = 0
        for begun in (0, 1, 0, 2):
            # The drop comes while the prefill runs, or the so manieth forward after it.
            with held(live_engine, after_forwards(begun), messages=2 if asked else 1) as hold:
                if asked:
                    await asyncio.to_thread(kv.rebuild)
                else:
                    asked = [asyncio.ensure_future(_ask(live_engine, prompt)) for prompt in PROMPTS]
                while not hold.reached.is_set() and not all(task.done() for task in asked):
                    await asyncio.sleep(0)
                freed = await asyncio.to_thread(kv.drop, mode="retract")
            retracted += len(freed.retracted)
        await asyncio.to_thread(kv.rebuild)
        return list(await asyncio.wait_for(asyncio.gather(*asked), BUSY_S)), retracted

    answers, retracted = live_engine.loop.run_until_complete(serve_while_dropping())
    assert answers == undisturbed
    assert retracted >= len(PROMPTS)


def test_aborted_requests_end_and_say_so(kv: kvcycle.KVCache, live_engine: Any, undisturbed: list[Tokens]) -> None:
    async def abort() -> kvcycle.Freed:
        return await asyncio.to_thread(kv.drop, mode="abort")

    answers, freed = in_flight(live_engine, abort)
    assert kv.state == "dropped"
    assert sorted(freed.aborted) == sorted(answers.ids)
    assert answers.reasons == {"abort"}
    for tokens, whole in zip(answers.tokens, undisturbed, strict=True):
        assert 0 < len(tokens) < len(whole)
        assert tokens == whole[: len(tokens)]
    kv.rebuild()
    assert live_engine.loop.run_until_complete(_ask(live_engine, PROMPTS[0])) == undisturbed[0]


def test_a_drop_waits_before_it_retracts(kv: kvcycle.KVCache, live_engine: Any, undisturbed: list[Tokens]) -> None:
    async def wait_then_retract() -> kvcycle.Freed:
        freed = await asyncio.to_thread(kv.drop, wait_s=0.01, mode="retract")
        await asyncio.to_thread(kv.rebuild)
        return freed

    answers, freed = in_flight(live_engine, wait_then_retract, messages=2)  # the one that is withdrawn, and its own
    assert len(freed.retracted) == 3
    assert answers.tokens == undisturbed


def test_an_idle_engine_has_nothing_to_retract_or_abort(kv: kvcycle.KVCache) -> None:
    for mode in ("retract", "abort"):
        with kv.released(mode=mode) as freed:
            assert (freed.bytes, freed.retracted, freed.aborted) == (kv.bytes, (), ())


def test_an_unknown_mode_is_refused(kv: kvcycle.KVCache) -> None:
    with pytest.raises(ValueError, match=r"mode='now' is none; use one of refuse, abort, retract\."):
        kv.drop(mode="now")  # type: ignore[arg-type]  # the mistake that is tested
    assert kv.state == "resident"


def test_every_entry_point_fails_in_its_caller_while_dropped(
    kv: kvcycle.KVCache, live_engine: Any, generate: Callable[[], Generate], cold: Generate
) -> None:
    run = live_engine.loop.run_until_complete
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: live_engine.generate(prompt="Hello"),
        "batch": lambda: live_engine.generate(prompt=["Hello", "world"]),
        "async_generate": lambda: run(live_engine.async_generate(prompt="Hello")),
        "stream": lambda: next(iter(live_engine.generate(prompt="Hello", stream=True))),
        "encode": lambda: live_engine.encode(prompt="Hello"),
        "async_encode": lambda: run(live_engine.async_encode(prompt="Hello")),
        "score": lambda: live_engine.score(query="Hello", items=["world"], label_token_ids=[1]),
        "flush_cache": live_engine.flush_cache,
        "async_flush_cache": lambda: run(live_engine.async_flush_cache()),
    }
    refused: dict[str, str] = {}
    with kv.released():
        for name, call in calls.items():
            with pytest.raises(KVCacheDroppedError) as refusal:
                call()
            refused[name] = str(refusal.value)
    sentence = (
        "The engine cannot serve a request: its KV cache is dropped. Call rebuild() on its KVCache, or leave the `with "
        "kv.released():` block, first."
    )
    assert refused == dict.fromkeys(calls, sentence)
    assert generate().token_ids == cold.token_ids
    kv.flush()  # the engine's own refuses while the pipeline of the generation drains
    assert live_engine.flush_cache().success


def test_the_engines_own_continue_does_not_wake_a_dropped_cache(
    kv: kvcycle.KVCache, live_engine: Any, undisturbed: list[Tokens]
) -> None:
    """``continue_generation`` would forward the retracted requests on deleted buffers, which kills the process."""
    scheduler = internals.scheduler_of(live_engine)

    async def retract_and_continue() -> None:
        from sgl_jax.srt.managers.io_struct import ContinueGenerationReqInput

        await asyncio.to_thread(kv.drop, mode="retract")
        await asyncio.to_thread(
            lambda: inband.channel_of(live_engine).call(
                lambda: scheduler.continue_generation(ContinueGenerationReqInput())
            )
        )
        assert internals.unfinished_requests(scheduler)["waiting"] == 3
        await asyncio.to_thread(kv.rebuild)

    answers, _ = in_flight(live_engine, retract_and_continue)
    assert answers.tokens == undisturbed


def test_weights_can_be_changed_while_dropped(
    kv: kvcycle.KVCache, live_engine: Any, generate: Callable[[], Generate], cold: Generate
) -> None:
    second = kvcycle.ParamSet.clone(live_engine, perturbed(0.5))
    kv.drop()
    with swapped(live_engine, second):
        kv.rebuild()
        assert generate().token_ids != cold.token_ids
    second.delete()
    assert generate().token_ids == cold.token_ids


def test_a_second_flush_of_a_dropped_cache_names_the_state(kv: kvcycle.KVCache) -> None:
    with (
        kv.released(),
        pytest.raises(kvcycle.KVCacheStateError, match="is dropped; it has no prefix cache to empty"),
    ):
        kv.flush()


def test_a_rebuild_by_hand_inside_the_block_is_enough(kv: kvcycle.KVCache) -> None:
    with kv.released():
        kv.rebuild()
    assert kv.state == "resident"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(3), ValueError("the step failed")])
def test_whatever_ends_the_block_is_kept_and_the_cache_rebuilt(
    kv: kvcycle.KVCache, interruption: BaseException
) -> None:
    with pytest.raises(type(interruption)) as kept, kv.released():
        raise interruption
    assert kept.value is interruption
    assert kv.state == "resident"
    assert kv.nonzero_slots() == []


def test_ctrl_c_during_the_drop_leaves_the_cache_resident(
    kv: kvcycle.KVCache, monkeypatch: pytest.MonkeyPatch, generate: Callable[[], Generate], cold: Generate
) -> None:
    """The interruption arrives when the buffers are gone already and the caller does not know yet."""
    drop = kv._buffers.drop

    def drop_then_interrupt(**options: Any) -> kvcycle.Freed:
        freed = drop(**options)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return freed

    entered = False
    with monkeypatch.context() as patch:
        patch.setattr(kv._buffers, "drop", drop_then_interrupt)
        with pytest.raises(KeyboardInterrupt), kv.released():
            entered = True
    assert not entered
    assert kv.state == "resident"
    assert generate().token_ids == cold.token_ids


def test_of_two_blocks_at_once_only_the_winner_rebuilds(kv: kvcycle.KVCache) -> None:
    with kv.released():
        with pytest.raises(kvcycle.KVCacheStateError, match="dropped already"), kv.released():
            pytest.fail("the cache was dropped twice")
        assert kv.state == "dropped"
    assert kv.state == "resident"
