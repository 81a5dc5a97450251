"""One engine of :data:`kvcycle.compatibility.ENGINE_RUNS` through its cycle: a script, for a process of its own.

Prints what the test asserts as one line of JSON, the last.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import kvcycle
from kvcycle import checkpoint, internals, pools, versions
from kvcycle.compatibility import ENGINE_RUNS, EngineRun
from kvcycle.engine import stack
from kvcycle.record_info import DropInfo
from kvcycle.record_parts import Verdict


def geometry(name: str) -> Path:
    return checkpoint.ensure(name, checkpoint.GEOMETRIES[name], weights=False)


def profile_of(run: EngineRun) -> kvcycle.Profile:
    overrides = run.overrides()
    if run.model in checkpoint.GEOMETRIES:
        overrides |= {"model.path": str(geometry(run.model)), "engine.load_format": "dummy"}
    if run.generate and stack().jax == "0.8.1":
        # On a CPU that jax interprets the kernel that writes a token's K and V, with copies of the whole buffer.
        overrides["engine.max_total_tokens"] = 1024
        # Its devices wait for each other in threads of one pool that has as many as the machine has cores: with two,
        # fp32 on two devices waited for ever. It takes the number from here.
        os.environ["NPROC"] = "16"
    if run.pool == "draft":
        overrides["engine.speculative_draft_model_path"] = str(geometry("tiny-llama-eagle3"))
        # The draft's pool takes what memory is free, whatever max_total_tokens says; this is upstream's way to cap it.
        os.environ["SGLANG_CI_SMALL_KV_SIZE"] = "4096"
    return kvcycle.load_profile("tiny", overrides)


def off(verdict: Verdict) -> float | None:
    """How far the measurement is from what was expected, where both are numbers."""
    if isinstance(verdict.measured, (int, float)) and isinstance(verdict.expected, (int, float)):
        return verdict.measured - verdict.expected
    return None


def facts(run: EngineRun, engine: Any, profile: kvcycle.Profile) -> dict[str, Any]:
    scheduler = internals.scheduler_of(engine)
    if run.pool == "draft" and versions.has(versions.RELAY_BUFFERS, versions.installed()):
        # Upstream makes them under overlap, which on CPU no draft model has: its own call makes the real ones here.
        scheduler.draft_worker.init_spec_relay_buffers()
    record = kvcycle.run_cycle(engine, profile)
    (cycle,) = record.cycles
    ready, dropped = cycle.phase("engine_ready"), cycle.phase("kv_cache_dropped")
    assert ready is not None
    assert dropped is not None
    assert isinstance(dropped.info, DropInfo)
    manager = getattr(internals.runner_of(engine), "lora_manager", None)
    lora = [*manager.memory_pool.A_buffer.values(), *manager.memory_pool.B_buffer.values()] if manager else []
    weights = {id(array) for array in pools.weight_arrays(engine)}
    return {
        "verdicts": [
            (verdict.verdict, f"{verdict.id}[{verdict.name}]", verdict.message, off(verdict))
            for verdict in kvcycle.judge(record)
        ],
        "pools": [pool.type for pool in record.kv.pools],
        "buffers": record.kv.buffers,
        "bytes": record.kv.bytes,
        "predicted_bytes": record.kv.predicted_bytes,
        "deleted": dropped.info.deleted_buffers,
        "generates": [generate.when for generate in record.generates],
        "weights_bytes": sum(use.by_owner["weights"] for use in ready.devices),
        "weights_bytes_while_dropped": sum(use.by_owner["weights"] for use in dropped.devices),
        "lora_buffers": sum(len(layers) for layers in lora),
        "lora_buffers_that_are_weights": sum(id(array) in weights for layers in lora for array in layers),
        "hicache": bool(getattr(scheduler.tree_cache, "hicache_enabled", False)),
        "overlap": bool(scheduler.enable_overlap),
        "tree_cache": type(scheduler.tree_cache).__name__,
        "chunked_prefill_size": scheduler.chunked_prefill_size,
    }


def main(run_id: str) -> None:
    (run,) = [run for run in ENGINE_RUNS if run.id == run_id]
    profile = profile_of(run)
    with kvcycle.boot(profile, "cpu") as engine:
        print(json.dumps(facts(run, engine, profile)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
