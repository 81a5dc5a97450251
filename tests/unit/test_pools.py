"""What belongs to an engine's pools and to its weights, on objects of the engine's shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from kvcycle import pools
from kvcycle.buffers import Attribute
from kvcycle.errors import UnknownBufferError, UnsupportedEngineError


class MHATokenToKVPool:
    def __init__(self, layers: int = 2, **more: Any) -> None:
        self.kv_buffer = [jnp.zeros(4) for _ in range(layers)]
        vars(self).update(more)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        return 8 * len(self.kv_buffer), 8 * len(self.kv_buffer)


class Relay(NamedTuple):
    verified_id: jax.Array


def runner(weights: int = 1, **more: Any) -> SimpleNamespace:
    pool = MHATokenToKVPool()
    return SimpleNamespace(
        memory_pools=SimpleNamespace(_pools={"token_to_kv_pool": pool}), token_to_kv_pool=pool,
        model_state_leaves=[jnp.ones(3) for _ in range(weights)], model=SimpleNamespace(), **more,
    )  # fmt: skip


def engine(**of_the_scheduler: Any) -> SimpleNamespace:
    scheduler = SimpleNamespace(
        _request_dispatcher=None, on_idle=None, is_fully_idle=None, get_next_batch_to_run=None, flush_cache=None,
        tp_worker=SimpleNamespace(model_runner=runner()),
        server_args=SimpleNamespace(disaggregation_mode="null"), disagg_kv_manager=None, pd="",
    )  # fmt: skip
    vars(scheduler).update(of_the_scheduler)
    return SimpleNamespace(scheduler_info={"scheduler": scheduler})


def worker() -> SimpleNamespace:
    return SimpleNamespace(model_runner=runner())


def paths(found: Any) -> list[str]:
    return [slot.path for slot in pools.slots_of(found)]


_OWN = ["token_to_kv_pool.kv_buffer[0]", "token_to_kv_pool.kv_buffer[1]"]


def test_an_engine_without_a_draft_has_its_runners_pools() -> None:
    assert paths(engine(draft_worker=None)) == paths(engine()) == _OWN


@pytest.mark.parametrize(
    ("draft", "names"),
    [
        (SimpleNamespace(_draft_worker=SimpleNamespace(_worker=worker())), ["draft"]),  # EAGLE
        (SimpleNamespace(_worker=worker(), spec_relay_buffers=None), ["draft"]),  # DFlash
        (
            SimpleNamespace(_draft_worker=SimpleNamespace(_worker=None, _workers=[worker(), worker()])),
            ["draft[0]", "draft[1]"],
        ),  # MTP
    ],
    ids=["eagle", "dflash", "mtp"],
)
def test_draft_workers_pools_are_found(draft: Any, names: list[str]) -> None:
    expected = [f"{name}.token_to_kv_pool.kv_buffer[{layer}]" for name in names for layer in range(2)]
    found = engine(draft_worker=draft)
    assert paths(found) == _OWN + expected
    assert pools.claimed_bytes(found) == 32 * (1 + len(names))  # the engine speaks of its own pool only
    assert [(pool.type, pool.buffers, pool.bytes) for pool in pools.pool_facts(found, pools.slots_of(found))] == [
        ("MHATokenToKVPool", 2, 32)
    ] * (1 + len(names))


def test_relay_buffers_are_slots_of_the_tuple_that_holds_them() -> None:
    draft = SimpleNamespace(_worker=worker(), spec_relay_buffers=Relay(jnp.zeros(5)))
    found = engine(draft_worker=draft)
    assert paths(found)[-1] == "spec_relay_buffers.verified_id"
    root = pools.all_pools(found)["spec_relay_buffers"]
    assert isinstance(root, Attribute)
    pools.slots_of(found)[-1].set(new := jnp.zeros(5))
    assert draft.spec_relay_buffers.verified_id is new
    assert pools.pool_facts(found, pools.slots_of(found))[-1].type == "Relay"


def test_a_draft_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UnsupportedEngineError) as caught:
        pools.slots_of(engine(draft_worker=SimpleNamespace()))
    assert str(caught.value) == (
        "The engine decodes speculatively, and its SimpleNamespace holds no model worker that kvcycle knows, so the "
        "draft model's KV cache cannot be found. Nothing was deleted; boot the engine without speculative_algorithm."
    )


class RaidenTransferKVManager:
    """Named as upstream's, whose own needs a TPU."""


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_disaggregated_engine_is_refused(mode: str) -> None:
    found = engine(server_args=SimpleNamespace(disaggregation_mode=mode), disagg_kv_manager=RaidenTransferKVManager())
    with pytest.raises(UnsupportedEngineError) as caught:
        pools.slots_of(found)
    assert str(caught.value) == (
        f"The engine is disaggregated (disaggregation_mode='{mode}'): its RaidenTransferKVManager moves KV pages when "
        "its peer asks, not when the scheduler runs a batch, and Raiden keeps a list of the very buffers that a "
        "rebuild would replace. Nothing was deleted; boot the engine with disaggregation_mode='null'."
    )


def test_an_engine_of_two_meshes_is_refused() -> None:
    with pytest.raises(UnsupportedEngineError) as caught:
        pools.slots_of(engine(pd="pathways"))
    assert str(caught.value) == (
        "The engine prefills and decodes on separate devices (pd_disaggregation='pathways'), each with pools of its "
        "own that KV pages move between outside of any batch. Nothing was deleted; boot the engine without "
        "pd_disaggregation."
    )


def test_a_pool_may_point_back_to_what_uses_it() -> None:
    found = engine()
    scheduler = found.scheduler_info["scheduler"]
    own = scheduler.tp_worker.model_runner
    own.model.embedding = own.model_state_leaves[0]
    vars(own.token_to_kv_pool).update(runner=own, model=own.model, scheduler=scheduler, worker=scheduler.tp_worker)
    assert paths(found) == _OWN


def test_a_weight_in_a_pool_is_an_error_whoever_the_model_is() -> None:
    found = engine()
    own = found.scheduler_info["scheduler"].tp_worker.model_runner
    own.token_to_kv_pool.layers = [SimpleNamespace(weight=own.model_state_leaves[0])]
    with pytest.raises(
        UnknownBufferError, match=r"^token_to_kv_pool\.layers\[0\]\.weight is one of the model's weights"
    ):
        pools.slots_of(found)


def test_weights_are_the_models_the_adapters_and_the_drafts_each_once() -> None:
    draft = SimpleNamespace(_worker=worker())
    found = engine(draft_worker=draft)
    own = found.scheduler_info["scheduler"].tp_worker.model_runner
    shared, adapter = own.model_state_leaves[0], jnp.ones(2)
    draft._worker.model_runner.model_state_leaves.append(shared)  # the target's embedding
    adapters = SimpleNamespace(A_buffer={"q_proj": [adapter]}, B_buffer={"q_proj": [shared]})
    own.lora_manager = SimpleNamespace(memory_pool=adapters)
    counted = pools.weight_arrays(found)
    assert [id(array) for array in counted] == [
        id(shared), id(adapter), id(draft._worker.model_runner.model_state_leaves[0])
    ]  # fmt: skip


def test_the_engines_claim_is_taken_as_often_as_its_pool_is_copied() -> None:
    found = engine()
    own = found.scheduler_info["scheduler"].tp_worker.model_runner
    assert pools.claimed_bytes(found) == 32
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Explicit,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    own.token_to_kv_pool.kv_buffer[:] = [jax.device_put(array, everywhere) for array in own.token_to_kv_pool.kv_buffer]
    assert pools.claimed_bytes(found) == 4 * 32
