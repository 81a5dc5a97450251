"""The parts of sglang-jax that are not its public API and that kvcycle needs, each named once.

Seen on sglang-jax 0.1.0rc0 and 0.0.3rc0; what only one of them has is asked for where it is needed. What reaches an
engine's other processes and hosts is in :mod:`kvcycle.internals_processes`:

- ``engine.scheduler_info["scheduler"]`` (single-process engines), its ``.tp_worker``, and with overlap that one's
  ``.worker``;
- ``model_runner``: ``memory_pools``, ``token_to_kv_pool``, ``model_state_leaves`` (what forwards read) and ``model``;
- ``scheduler.get_next_batch_to_run``: what the loop asks for work, once an iteration unless the user has paused it;
- ``scheduler.on_idle``, or ``check_tree_cache`` (0.0.3rc0): what the loop calls when there is nothing to do;
- ``scheduler.is_fully_idle``, or ``_can_flush_cache`` (0.0.3rc0): whether the pipeline of finished requests is empty;
- ``scheduler.pause_generation``, ``abort_request`` and the queues that they act on;
- of an engine on several hosts ``scheduler.node_rank``, ``.nnodes``, and on a host that is not the first, whose engine
  has no ``scheduler_info``, target and arguments of the scheduler's thread (``scheduler_loop_after_create``);
- ``forward_batch_info.device_array``, on CPU: how a batch's numpy arrays get to the devices;
- ``engine.tokenizer_manager.generate_request``: what generate, async_generate, streaming, encode, rerank and score go
  through, and ``.flush_cache``.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache, wraps
from typing import Any

import jax
import numpy as np

from kvcycle import versions
from kvcycle.errors import EngineBusyError, UnsupportedEngineError, UntestedStackWarning

#: By version, newest first: the last thing that the loop does in an iteration without work.
_IDLE_WORK = ("on_idle", "check_tree_cache")


def scheduler_of(engine: Any) -> Any:
    """The scheduler object of an in-process engine.

    Raises:
        UnsupportedEngineError: it is none, or its scheduler runs in another process.
    """
    info = getattr(engine, "scheduler_info", None)
    if info is None and (scheduler := _scheduler_of_a_later_host(engine)) is not None:
        # Where the first host has it, also after the thread's end.
        info = engine.scheduler_info = {"scheduler": scheduler}
    if not isinstance(info, dict):
        raise UnsupportedEngineError(
            f"{type(engine).__name__} is no booted sglang-jax Engine: it has no scheduler_info. Pass the object that "
            "sgl_jax.srt.entrypoints.engine.Engine(...) returned."
        )
    scheduler = info.get("scheduler")
    if scheduler is None:
        raise UnsupportedEngineError(
            "The engine's scheduler runs in another process; boot the Engine with enable_single_process=True, or, to "
            "drop and rebuild its KV cache from here, with Engine(server_args=kvcycle.ServerArgs(...))."
        )
    needed = [
        ("_request_dispatcher",),
        ("tp_worker",),
        ("get_next_batch_to_run",),
        ("flush_cache",),
        _IDLE_WORK,
        ("is_fully_idle", "_can_flush_cache"),
    ]
    missing = [" or ".join(names) for names in needed if not any(hasattr(scheduler, name) for name in names)]
    if missing:
        raise UnsupportedEngineError(
            f"This sglang-jax's scheduler has no {', no '.join(missing)}; kvcycle was tested with {_tested_stacks()}."
        )
    return scheduler


def _scheduler_of_a_later_host(engine: Any) -> Any:
    """On a host that is not the first sglang-jax keeps its scheduler nowhere but in the thread that runs it."""
    for thread in threading.enumerate():
        target: Any = getattr(thread, "_target", None)
        arguments: Any = getattr(thread, "_args", ())
        if getattr(target, "__name__", "") == "scheduler_loop_after_create" and (
            arguments[0] is getattr(engine, "server_args", arguments)
        ):
            return arguments[1]
    return None


def rank_and_count(scheduler: Any) -> tuple[int, int]:
    """Which of its engine's hosts a scheduler is on, and how many there are."""
    return int(getattr(scheduler, "node_rank", 0)), int(getattr(scheduler, "nnodes", 1) or 1)


def warn_if_untested() -> None:
    """Warn, once in a process, when the installed sglang-jax or jax is none that kvcycle was tested with."""
    version = versions.installed() or "of an unknown version"  # run from a checkout
    if versions.TESTED_STACKS.get(version) != jax.__version__:
        _warn_untested(version, jax.__version__)


@cache
def _warn_untested(sglang_jax: str, jax_version: str) -> None:
    warnings.warn(
        f"This is sglang-jax {sglang_jax} on jax {jax_version}; kvcycle was tested with {_tested_stacks()}. It goes "
        "on: what it needs of sglang-jax is there, and the checks say whether it still does what it did.",
        UntestedStackWarning,
        stacklevel=3,
    )


def _tested_stacks() -> str:
    stacks = versions.TESTED_STACKS.items()
    return " and ".join(f"sglang-jax {version} on jax {jax_version}" for version, jax_version in stacks)


def worker_of(engine: Any) -> Any:
    """What runs each batch's forward; under overlap the scheduler has a client that holds it."""
    worker = scheduler_of(engine).tp_worker
    return getattr(worker, "worker", worker)


def runner_of(engine: Any) -> Any:
    """The model runner: it owns the pools, the compiled forward and the weights' leaves."""
    return worker_of(engine).model_runner


def pools_of(engine: Any) -> dict[str, Any]:
    """The runner's pool objects by name: what the walk for KV and state buffers starts from."""
    pools = getattr(runner_of(engine).memory_pools, "_pools", None)
    return dict(pools) if pools else {"token_to_kv_pool": runner_of(engine).token_to_kv_pool}


def claimed_kv_bytes(engine: Any) -> int | None:
    """What the engine itself says its KV cache occupies, None if its pool cannot say."""
    try:
        size = runner_of(engine).token_to_kv_pool.get_kv_size_bytes()
    except (AttributeError, NotImplementedError):
        return None
    return int(sum(size)) if isinstance(size, tuple) else int(size)


def _running_requests(scheduler: Any) -> list[Any]:
    running: dict[int, Any] = {}
    for batch in (scheduler.running_batch, scheduler.cur_batch, scheduler.last_batch):
        if batch is not None:
            for info in batch.reqs_info:
                running.update((id(request), request) for request in (info.reqs or ()) if not request.finished())
    running.update((id(request), request) for request in scheduler.chunked_reqs if request is not None)
    return list(running.values())


def is_fully_idle(scheduler: Any) -> bool:
    """Whether no request is queued or running and the pipeline of finished ones has drained."""
    if hasattr(scheduler, "is_fully_idle"):
        return bool(scheduler.is_fully_idle())
    can_flush, _ = scheduler._can_flush_cache()
    return bool(can_flush) and not scheduler.grammar_queue


def after_idle_work(scheduler: Any, then: Callable[[], None]) -> None:
    """Call ``then`` on the scheduler's thread at the end of every iteration of its loop that found nothing to do."""
    name = idle_work(scheduler)
    work = getattr(scheduler, name)

    def work_then() -> None:
        work()
        then()

    setattr(scheduler, name, work_then)


def idle_work(scheduler: Any) -> str:
    """The name of the method that the loop calls last when it found nothing to do."""
    return next(name for name in _IDLE_WORK if hasattr(scheduler, name))


def unfinished_requests(scheduler: Any) -> dict[str, int]:
    """Requests that are queued or running, by place; finished ones whose results still drain do not count."""
    return {
        "waiting": len(scheduler.waiting_queue) + len(scheduler.grammar_queue) + len(scheduler.pending_dp_reqs),
        "running": len(_running_requests(scheduler)),
    }


def abort_requests(scheduler: Any) -> list[str]:
    """Abort every queued and running request and return their ids; on the scheduler's thread.

    A running one ends after one more step, so the engine is idle only a few iterations later.
    """
    from sgl_jax.srt.managers.io_struct import AbortReq

    ids = [
        request.rid for request in (*scheduler.waiting_queue, *scheduler.grammar_queue, *_running_requests(scheduler))
    ]
    scheduler.abort_request(AbortReq(abort_all=True))
    return ids


def between_batches(scheduler: Any) -> bool:
    """Whether running requests can be retracted now; on the scheduler's thread, before it asks for the next batch.

    ``pause_generation`` looks for them in ``running_batch`` and forgets a batch that was just prefilled and not merged
    into it yet: its requests would never be answered.
    """
    last = scheduler.last_batch
    parked = getattr(scheduler, "_eagle3_overlap_parked_batch", None)
    # 0.0.3rc0 forgets also a request whose prompt is computed in chunks and waits for its next one.
    chunked = not hasattr(scheduler, "_retract_parked_chunked_reqs") and any(
        request is not None for request in scheduler.chunked_reqs
    )
    return parked is None and not chunked and (last is None or not last.forward_mode.is_extend())


def retract_requests(scheduler: Any) -> list[str]:
    """Put every running request back into the queue, from where it is computed again; returns their ids.

    On the scheduler's thread, :func:`between_batches`. The pipeline is drained; the prompts and the tokens so far are
    kept, the requests' KV slots are not.
    """
    from sgl_jax.srt.managers.io_struct import PauseGenerationReqInput

    paused_before = scheduler._engine_paused
    running = _running_requests(scheduler)
    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
    scheduler._engine_paused = paused_before
    return [request.rid for request in running if not request.finished()]


def flush(scheduler: Any, *, keep_waiting: bool = False) -> None:
    """Return all slots to the allocator and clear the prefix cache; on the scheduler's thread, when idle.

    Args:
        scheduler: whose cache.
        keep_waiting: flush although requests wait: they have computed nothing, and stay queued.

    Raises:
        EngineBusyError: the scheduler refused, with its own reason.
    """
    if scheduler.grammar_queue:  # 0.0.3rc0 does not count them, and would reset their grammars
        reason = f"requests wait for their grammar: {len(scheduler.grammar_queue)}"
        raise EngineBusyError(f"The engine's cache cannot be flushed: {reason}.", unfinished_requests(scheduler))
    queues = {name: getattr(scheduler, name) for name in ("waiting_queue", "pending_dp_reqs")} if keep_waiting else {}
    for name in queues:
        setattr(scheduler, name, [])
    try:
        success, reason, _ = scheduler.flush_cache()
    finally:
        for name, queue in queues.items():
            setattr(scheduler, name, queue)
    if not success:
        raise EngineBusyError(f"The engine refused to flush its cache: {reason}", unfinished_requests(scheduler))


def rest_when_idle(scheduler: Any, seconds: float = 0.001) -> None:
    """Let the idle loop rest between two looks: it otherwise spins, and takes a core and the interpreter's lock.

    For virtual devices only, where a machine of few cores is everything: on an accelerator it would add latency.
    """
    after_idle_work(scheduler, lambda: time.sleep(seconds))


def own_batch_arrays() -> None:
    """Give every batch arrays that share their memory with nothing on the host; for virtual devices only.

    A CPU device takes a numpy array that happens to be aligned to 64 bytes as it is, without a copy. sglang-jax counts
    on the copy: 0.1.0rc0 writes the cache locations of every batch into one buffer (``cache_loc_host_buf``), which the
    forward before may still be reading, so that under overlap several requests at once read each other's keys and
    values, in one process and not in the next. And two arrays of a batch made from one numpy array (its lengths) are
    then one buffer or two, so that a few bytes seem to come and go.
    """
    from sgl_jax.srt.model_executor import forward_batch_info

    to_devices = forward_batch_info.device_array
    if hasattr(to_devices, "__wrapped__"):
        return  # an earlier engine of this process needed it too

    @wraps(to_devices)
    def copied_to_devices(data: Any, *args: Any, **kwargs: Any) -> Any:
        own = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, data)
        return to_devices(own, *args, **kwargs)

    forward_batch_info.device_array = copied_to_devices


def refuse_requests(engine: Any, reason: Callable[[], Exception | None]) -> None:
    """Let every request and every flush ask ``reason()`` first, and fail in its caller with what it returns, if any."""
    manager = engine.tokenizer_manager
    generate, flush_cache = manager.generate_request, manager.flush_cache

    async def generate_request(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        if (refusal := reason()) is not None:
            raise refusal
        async for chunk in generate(*args, **kwargs):
            yield chunk

    async def flush_unless_refused() -> Any:
        if (refusal := reason()) is not None:
            raise refusal
        return await flush_cache()

    manager.generate_request = generate_request
    manager.flush_cache = flush_unless_refused


def weight_leaves(engine: Any) -> list[jax.Array]:
    """The arrays that every forward reads as the model's weights, in the runner's order."""
    return list(runner_of(engine).model_state_leaves)


def model_variables(engine: Any) -> list[Any]:
    """The flax variables of the model object that hold device arrays: the second owner of the same weights."""
    from flax import nnx

    return [
        node
        for _, node in nnx.iter_graph(runner_of(engine).model)
        if isinstance(node, nnx.Variable) and isinstance(node.get_value(), jax.Array)
    ]


def weight_names(engine: Any) -> dict[int, str]:
    """The names of the model's weights by the id() of their array: ``model.layers.0.self_attn.q_proj.weight``."""
    from flax import nnx

    return {
        id(node.get_value()): ".".join(str(part) for part in path)
        for path, node in nnx.iter_graph(runner_of(engine).model)
        if isinstance(node, nnx.Variable)
    }


def set_weights(engine: Any, leaves: Sequence[jax.Array]) -> None:
    """Replace the weights in both owners; on the scheduler's thread, idle."""
    runner = runner_of(engine)
    successor = {id(old): new for old, new in zip(runner.model_state_leaves, leaves, strict=True)}
    for variable in model_variables(engine):
        if (new := successor.get(id(variable.get_value()))) is not None:
            variable.set_value(new)
    # A new list: SGLANG_JAX_AOT_DISPATCH=1 compares the list it was given with this one, by identity.
    runner.model_state_leaves = list(leaves)
