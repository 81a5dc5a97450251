"""What an engine keeps on its devices besides a step's own data: its pools, its draft workers' pools, its weights.

Seen on sglang-jax 0.1.0rc0, and 0.0.3rc0, which has neither relay buffers nor HiCache nor disaggregation:

- ``scheduler.draft_worker`` (EAGLE, MTP, DFlash): the model workers in it, each with a runner and pools of its own, and
  ``spec_relay_buffers``, a tuple that every step replaces;
- HiCache (``tree_cache.hicache_enabled``): its LRUHostKVPool reads the pool's buffers through the pool object when it
  copies, and the flush before a drop waits for its copies, so it needs nothing more;
- disaggregation (``disaggregation_mode``, ``pd_disaggregation``): refused, see :func:`refuse_what_copies_buffers`;
- LoRA: the adapters' buffers stand in ``model_runner.lora_manager.memory_pool``, and those of the modules that the
  model has are weights of the model as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from kvcycle import internals
from kvcycle.buffers import Attribute, Slot, bytes_by_device, find_slots
from kvcycle.errors import UnsupportedEngineError
from kvcycle.record_parts import Pool


def all_pools(engine: Any) -> dict[str, Any]:
    """The engine's pools by name, those of its draft workers and their relay buffers included.

    Raises:
        UnsupportedEngineError: something copies the buffers behind the scheduler's back.
    """
    scheduler = internals.scheduler_of(engine)
    refuse_what_copies_buffers(scheduler)
    pools = internals.pools_of(engine)
    for name, worker in draft_workers(scheduler):
        runner = worker.model_runner
        own = getattr(getattr(runner, "memory_pools", None), "_pools", None)
        own = own or {"token_to_kv_pool": runner.token_to_kv_pool}
        pools |= {f"{name}.{pool}": value for pool, value in own.items()}
    draft = getattr(scheduler, "draft_worker", None)
    if getattr(draft, "spec_relay_buffers", None) is not None:
        pools["spec_relay_buffers"] = Attribute(draft, "spec_relay_buffers")
    return pools


def pool_facts(engine: Any, slots: Sequence[Slot]) -> tuple[Pool, ...]:
    """What a record says about each pool: its class, and how many of the slots and of their bytes are its."""
    facts = []
    for name, pool in all_pools(engine).items():
        kind = type(vars(pool.owner)[pool.name] if isinstance(pool, Attribute) else pool).__name__
        arrays = [slot.get() for slot in slots if slot.path.startswith((f"{name}.", f"{name}["))]
        facts.append(Pool(type=kind, buffers=len(arrays), bytes=sum(bytes_by_device(arrays).values())))
    return tuple(facts)


def slots_of(engine: Any) -> list[Slot]:
    """The slots of all pools of the engine.

    A pool may point back to what uses it: the walk stops at the engine, its scheduler and workers, the runners and the
    models, and refuses an array that is one of their weights.

    Raises:
        UnknownBufferError: an array that cannot be replaced in place.
        UnsupportedEngineError: as :func:`all_pools`.
    """
    scheduler = internals.scheduler_of(engine)
    runners = list(_runners(engine))
    workers = [scheduler.tp_worker, getattr(scheduler.tp_worker, "worker", None)]
    workers += [worker for _, worker in draft_workers(scheduler)]
    users = [engine, scheduler, getattr(scheduler, "draft_worker", None), *workers, *runners]
    users += [getattr(runner, "model", None) for runner in runners]
    return find_slots(
        all_pools(engine), beyond=[user for user in users if user is not None], weights=weight_arrays(engine)
    )


def claimed_bytes(engine: Any) -> int | None:
    """What the engine itself says that its KV cache occupies on the devices; None where it says nothing.

    Its word is for one copy of its KV pool: what is replicated over devices counts as often, and what it says nothing
    of (recurrent states, draft workers' pools) counts as the shards' sum.
    """
    claim = internals.claimed_kv_bytes(engine)
    if claim is None:
        return None
    spoken_of: list[jax.Array] = []
    others: list[jax.Array] = []
    for slot in slots_of(engine):
        (spoken_of if slot.path.startswith("token_to_kv_pool.") else others).append(slot.get())
    held, one_copy = sum(bytes_by_device(spoken_of).values()), sum(int(array.nbytes) for array in spoken_of)
    return claim * held // one_copy + sum(bytes_by_device(others).values())


def draft_workers(scheduler: Any) -> Iterator[tuple[str, Any]]:
    """The model workers of speculative decoding, by name: none, one, or one a layer."""
    draft = getattr(scheduler, "draft_worker", None)
    if draft is None:
        return
    # EAGLE's and MTP's orchestrator holds a draft worker that holds the model workers; DFlash's holds its one itself.
    holder = getattr(draft, "_draft_worker", None) or draft
    workers = getattr(holder, "_workers", None)
    if workers is None and (worker := getattr(holder, "_worker", None)) is not None:
        workers = [worker]
    if not workers:
        raise UnsupportedEngineError(
            f"The engine decodes speculatively, and its {type(draft).__name__} holds no model worker that kvcycle "
            "knows, so the draft model's KV cache cannot be found. Nothing was deleted; boot the engine without "
            "speculative_algorithm."
        )
    for number, worker in enumerate(workers):
        yield ("draft" if len(workers) == 1 else f"draft[{number}]"), worker


def weight_arrays(engine: Any) -> list[jax.Array]:
    """Every array that counts as weights, each once: the model's, its LoRA adapters', the draft models'."""
    arrays: dict[int, jax.Array] = {}
    for runner in _runners(engine):
        held = [*getattr(runner, "model_state_leaves", ()), *_lora_buffers(runner)]
        arrays.update((id(array), array) for array in held if isinstance(array, jax.Array))
    return list(arrays.values())


def _runners(engine: Any) -> Iterator[Any]:
    yield internals.runner_of(engine)
    for _, worker in draft_workers(internals.scheduler_of(engine)):
        yield worker.model_runner


def _lora_buffers(runner: Any) -> Iterator[jax.Array]:
    pool = getattr(getattr(runner, "lora_manager", None), "memory_pool", None)
    for name in ("A_buffer", "B_buffer"):
        for layers in getattr(pool, name, {}).values():
            yield from layers


def refuse_what_copies_buffers(scheduler: Any) -> None:
    """Refuse an engine in which something moves KV pages at times that the scheduler's queues do not tell.

    Raises:
        UnsupportedEngineError: it is one half of a disaggregated deployment, or both.
    """
    arguments = getattr(scheduler, "server_args", None)
    mode = getattr(arguments, "disaggregation_mode", "null") or "null"
    manager = getattr(scheduler, "disagg_kv_manager", None)
    if manager is not None or mode != "null":
        raise UnsupportedEngineError(
            f"The engine is disaggregated (disaggregation_mode={mode!r}): its {type(manager).__name__} moves KV pages "
            "when its peer asks, not when the scheduler runs a batch, and Raiden keeps a list of the very buffers that "
            "a rebuild would replace. Nothing was deleted; boot the engine with disaggregation_mode='null'."
        )
    if pathways := getattr(scheduler, "pd", None):
        raise UnsupportedEngineError(
            f"The engine prefills and decodes on separate devices (pd_disaggregation={pathways!r}), each with pools of "
            "its own that KV pages move between outside of any batch. Nothing was deleted; boot the engine without "
            "pd_disaggregation."
        )
