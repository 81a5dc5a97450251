"""Drop and rebuild on a live engine: exact bytes, states, errors, races."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import kvcycle
from kvcycle import internals, versions
from kvcycle.buffers import BufferSpec, find_slots
from kvcycle.errors import KVCacheStateError, RebuildError, UnknownBufferError, UnsupportedEngineError
from kvcycle.pools import slots_of
from kvcycle.record_parts import Generate
from kvcycle.sizing import predict_kv


def in_use(kv: kvcycle.KVCache) -> dict[int, int]:
    return {use.id: use.ledger_bytes for use in kvcycle.snapshot({"kv": kv.arrays()}).devices}


def test_the_size_is_the_predicted_one(kv: kvcycle.KVCache, tiny: kvcycle.Profile) -> None:
    config = tiny.model_config_json()
    assert config is not None
    predicted = predict_kv(config, tiny.engine_args("cpu"))
    assert predicted is not None
    assert kv.bytes == predicted.total_bytes
    assert kv.bytes_by_device == dict.fromkeys(range(4), predicted.bytes_per_device)
    assert kv.buffers == 4


def test_released_frees_every_byte_and_gives_it_back(
    kv: kvcycle.KVCache, generate: Callable[[], Generate], cold: Generate
) -> None:
    kv.flush()
    before = in_use(kv)
    arrays = kv.arrays()
    with kv.released() as freed:
        assert kv.state == "dropped"
        assert all(array.is_deleted() for array in arrays)
        during = in_use(kv)
        assert {device: before[device] - during[device] for device in before} == freed.bytes_by_device
        assert (freed.deleted_buffers, freed.missing_delete_method) == (kv.buffers, 0)
    assert kv.state == "resident"
    assert in_use(kv) == before
    after = generate()
    assert after.compiles.any_work == 0
    assert after.token_ids == cold.token_ids
    assert after.logprobs == cold.logprobs


def test_rebuild_compiles_nothing_and_yields_zeros(kv: kvcycle.KVCache, generate: Callable[[], Generate]) -> None:
    from kvcycle.compiles import counting

    generate()
    kv.flush()
    assert kv.nonzero_slots() == [slot.path for slot in kv.slots]  # the control: what was written is seen
    kv.drop()
    with counting() as span:
        kv.rebuild()
    assert span.compiles.model_dump() == {"trace": 0, "lower": 0, "backend": 0, "cache_hits": 0}
    assert kv.nonzero_slots() == []


def addresses(arrays: Iterable[Any]) -> list[int]:
    """Where they lie in memory, device by device; read through aliases, so that no view of theirs stays."""
    aliases = [array.clone() for array in arrays]
    return [shard.data.unsafe_buffer_pointer() for alias in aliases for shard in alias.addressable_shards]


def test_no_forward_moves_the_buffers(
    kv: kvcycle.KVCache, generate: Callable[[], Generate], live_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = internals.worker_of(live_engine)
    forward, after_each_step = worker.forward_batch_generation, [addresses(kv.arrays())]

    def then_look(*arguments: Any, **further: Any) -> Any:
        result = forward(*arguments, **further)
        after_each_step.append(addresses(kv.arrays()))
        return result

    monkeypatch.setattr(worker, "forward_batch_generation", then_look)
    generate()
    assert len(after_each_step) > 8
    assert all(after == after_each_step[0] for after in after_each_step)
    copies = addresses(jnp.copy(array) for array in kv.arrays())
    assert not set(copies) & set(after_each_step[0]), "the control: a copy lies elsewhere"


def test_specs_and_owners_survive(kv: kvcycle.KVCache, live_engine: Any) -> None:
    owners = [slot.owner for slot in kv.slots]
    with kv.released():
        pass
    assert [BufferSpec.of(array) for array in kv.arrays()] == kv.specs
    found = find_slots(internals.pools_of(live_engine))
    assert all(slot.owner is owner for slot, owner in zip(found, owners, strict=True))


def test_a_second_drop_names_the_state_and_the_way_out(kv: kvcycle.KVCache) -> None:
    kv.drop()
    with pytest.raises(KVCacheStateError, match=r"dropped already; call rebuild\(\) first"):
        kv.drop()
    kv.rebuild()
    assert kv.state == "resident"


def test_a_rebuild_while_resident_is_refused(kv: kvcycle.KVCache) -> None:
    with pytest.raises(KVCacheStateError, match="resident already; there is nothing to rebuild"):
        kv.rebuild()


def test_two_objects_on_one_engine_are_the_same_cache(kv: kvcycle.KVCache, live_engine: Any) -> None:
    other = kvcycle.KVCache(live_engine)
    kv.drop()
    assert other.state == "dropped"
    other.rebuild()
    assert kv.state == "resident"


def test_of_two_threads_that_drop_at_once_one_wins(kv: kvcycle.KVCache) -> None:
    barrier = threading.Barrier(2)

    def drop() -> object:
        barrier.wait()
        try:
            return kv.drop()
        except KVCacheStateError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        results = [future.result() for future in [pool.submit(drop), pool.submit(drop)]]
    assert sorted(type(result).__name__ for result in results) == ["Freed", "KVCacheStateError"]
    kv.rebuild()


def test_a_drop_right_after_a_generate_waits_for_the_pipeline(
    kv: kvcycle.KVCache, generate: Callable[[], Generate]
) -> None:
    generate()
    freed = kv.drop()
    assert freed.bytes == kv.bytes


def test_both_are_told_if_the_block_and_the_rebuild_fail(kv: kvcycle.KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted() -> list[jax.Array]:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with monkeypatch.context() as patch:
        patch.setattr(kv._buffers, "allocate", exhausted)
        with pytest.raises(RebuildError) as failure, kv.released():
            raise ValueError("the training step failed")
    assert isinstance(failure.value.__cause__, ValueError)
    told = "".join(traceback.format_exception(failure.value))
    assert "ValueError: the training step failed" in told
    assert "The KV cache could not be rebuilt: RESOURCE_EXHAUSTED. Needed: device 0:" in told
    assert kv.state == "dropped"


def test_a_pool_that_points_back_to_the_model_is_not_walked_into_it(
    kv: kvcycle.KVCache, live_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = internals.runner_of(live_engine)
    monkeypatch.setattr(runner.token_to_kv_pool, "model_runner", runner, raising=False)
    monkeypatch.setattr(runner.token_to_kv_pool, "model", runner.model, raising=False)
    assert [slot.path for slot in slots_of(live_engine)] == [slot.path for slot in kv.slots]
    monkeypatch.setattr(runner.token_to_kv_pool, "layers", runner.model.model.layers, raising=False)
    with pytest.raises(UnknownBufferError, match=r"^token_to_kv_pool\.layers.* is one of the model's weights, of \("):
        slots_of(live_engine)


# That it lacks it is tested in tests/unit/test_versions.py.
@pytest.mark.skipif(
    not versions.has(versions.DISAGGREGATION, versions.installed()), reason="this sglang-jax cannot be disaggregated"
)
def test_an_engine_whose_pages_move_behind_its_back_is_refused_and_keeps_them(
    kv: kvcycle.KVCache, live_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sgl_jax.srt.disaggregation.raiden_transfer.conn import RaidenTransferKVManager

    manager = object.__new__(RaidenTransferKVManager)  # its own constructor needs a TPU
    monkeypatch.setattr(internals.scheduler_of(live_engine), "disagg_kv_manager", manager)
    with pytest.raises(UnsupportedEngineError, match="its RaidenTransferKVManager moves KV pages when its peer asks"):
        slots_of(live_engine)
    assert not any(array.is_deleted() for array in kv.arrays())
