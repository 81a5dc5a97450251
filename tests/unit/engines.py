"""An engine made of plain objects, with what kvcycle needs of a real one, as one or the other sglang-jax has it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any


class Scheduler:
    """What schedulers of both versions have; idle, and nothing queued."""

    def __init__(self, pools: dict[str, Any] | None = None) -> None:
        self._request_dispatcher = SimpleNamespace(_mapping=[])
        runner = SimpleNamespace(memory_pools=SimpleNamespace(_pools=pools or {}), model_state_leaves=[])
        self.tp_worker = SimpleNamespace(model_runner=runner)
        self.waiting_queue: list[Any] = []
        self.grammar_queue: list[Any] = []
        self.pending_dp_reqs: list[Any] = []
        self.chunked_reqs: list[Any] = [None]
        self.running_batch = self.cur_batch = self.last_batch = None
        self.did: list[str] = []

    def get_next_batch_to_run(self) -> None:
        return None

    def _can_flush_cache(self) -> tuple[bool, str]:
        return not self.waiting_queue, f"waiting={len(self.waiting_queue)}"

    def flush_cache(self) -> tuple[bool, str, int]:
        can_flush, reason = self._can_flush_cache()
        self.did += ["flush"] * can_flush
        return can_flush, reason, 0


class Scheduler003(Scheduler):
    """As 0.0.3rc0's: idle work is two calls of the loop itself, of which this is the last."""

    def check_tree_cache(self) -> None:
        self.did.append("idle work")

    def idle_iteration(self) -> None:
        self.check_tree_cache()


class Scheduler010(Scheduler):
    """As 0.1.0rc0's: it also keeps requests between two chunks of their prompts when it retracts."""

    def is_fully_idle(self) -> bool:
        return not self.waiting_queue and not self.grammar_queue

    def on_idle(self) -> None:
        self.did.append("idle work")
        self.check_tree_cache()

    def check_tree_cache(self) -> None:
        pass

    def _retract_parked_chunked_reqs(self) -> None:
        pass

    def idle_iteration(self) -> None:
        self.on_idle()


def engine_of(scheduler: Any) -> Any:
    """An engine whose scheduler takes a message the moment it is sent."""

    async def generate_request() -> AsyncIterator[None]:
        yield None

    async def flush_cache() -> None:
        return None

    def deliver(message: object) -> None:
        for kind, handler in scheduler._request_dispatcher._mapping:
            if isinstance(message, kind):
                handler(message)

    return SimpleNamespace(
        scheduler_info={"scheduler": scheduler},
        tokenizer_manager=SimpleNamespace(generate_request=generate_request, flush_cache=flush_cache),
        send_to_rpc=SimpleNamespace(send_pyobj=deliver),
    )
