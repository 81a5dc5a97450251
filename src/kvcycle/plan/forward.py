"""The model's real prefill and decode steps, compiled for the TPU from abstract inputs of the engine's own sizes."""

from __future__ import annotations

import time
from typing import Any, Literal

import jax

from kvcycle.plan.abstract import REFUSALS, AbstractEngine, seen_as_tpu
from kvcycle.plan.compiler import TPUCompiler, first_line, memory_refusal
from kvcycle.plan.model import ForwardPlan, PlanError

Step = Literal["prefill", "decode"]


class _OneCallIsEnoughError(Exception):
    """The attention was traced once without an error."""


class ForwardCompiler:
    """Compiles an abstract engine's steps."""

    def __init__(self, engine: AbstractEngine, compiler: TPUCompiler) -> None:
        self.engine = engine
        self.compiler = compiler
        tokens, batches, cache_locs = engine.worker.get_precompile_paddings()
        self._token_buckets: list[int] = list(tokens)
        self._batch_buckets: list[int] = list(batches)
        self._cache_loc_buckets: list[int] = list(cache_locs)

    @property
    def largest_prefill_tokens(self) -> int:
        """Tokens in the largest prefill that the engine runs."""
        return self._token_buckets[-1]

    def check_attention(self) -> None:
        """Trace the first attention of a decode step: cheap, and it shows what the backend does not support.

        Raises:
            PlanError: the attention backend refuses the topology, with the key to change.
        """
        backend = type(self.engine.runner.attn_backend)
        original = backend.__call__

        def once(self: Any, *args: Any, **kwargs: Any) -> Any:
            original(self, *args, **kwargs)
            raise _OneCallIsEnoughError

        backend.__call__ = once
        try:
            batch = self._batch_buckets[0]
            # One page a request: with 1-token pages the fa kernel is traced page by page, which takes minutes at full
            # length and says no more.
            self._lower("decode", batch, batch, batch * int(self.engine.server_args.page_size))
        except _OneCallIsEnoughError:
            pass
        finally:
            backend.__call__ = original

    def decode(self) -> tuple[int, int, int]:
        """Batch, tokens and cache locations of the largest decode step."""
        return self._batch_buckets[-1], self._batch_buckets[-1], self._cache_loc_buckets[-1]

    def prefill(self, tokens: int | None) -> tuple[int, int, int]:
        """Batch, tokens and cache locations of the prefill that holds so many tokens; by default the smallest.

        The engine pads every prefill to its largest batch and its largest number of cache locations.

        Raises:
            PlanError: the engine never runs so large a prefill.
        """
        wanted = tokens if tokens is not None else 1
        bucket = next((size for size in self._token_buckets if size >= wanted), None)
        if bucket is None:
            raise PlanError(
                f"The engine runs prefills of up to {self.largest_prefill_tokens} tokens with this profile, "
                f"not {tokens}; raise engine.chunked_prefill_size and engine.max_prefill_tokens, or ask for fewer."
            )
        return self._batch_buckets[-1], bucket, self._cache_loc_buckets[-1]

    def compile(self, step: Step, sizes: tuple[int, int, int], *, kv_bytes: int, params_bytes: int) -> ForwardPlan:
        """Compile one step and say what it takes on a device.

        Args:
            step: which.
            sizes: batch, tokens and cache locations, as :meth:`decode` and :meth:`prefill` give them.
            kv_bytes: the KV buffers on a device.
            params_bytes: a second parameter set on a device.

        Raises:
            PlanError: the stack or the compiler refuses for another reason than memory.
        """
        batch, tokens, _ = sizes
        started = time.perf_counter()
        lowered = self._lower(step, *sizes)
        try:
            used = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            refusal = memory_refusal(error)
            if refusal is None:
                raise PlanError(self._unsupported(step, error)) from error
            return ForwardPlan(
                step=step,
                batch=batch,
                tokens=tokens,
                kv_bytes=kv_bytes,
                fits=False,
                fits_with_params2=False,
                refusal=refusal,
                seconds=time.perf_counter() - started,
            )
        needed = (
            used.argument_size_in_bytes
            + max(used.output_size_in_bytes - used.alias_size_in_bytes, 0)
            + used.temp_size_in_bytes
            + used.generated_code_size_in_bytes
        )
        left = max(self.compiler.capacity_bytes - needed, 0)  # it was accepted
        return ForwardPlan(
            step=step,
            batch=batch,
            tokens=tokens,
            argument_bytes=used.argument_size_in_bytes,
            output_bytes=used.output_size_in_bytes,
            alias_bytes=used.alias_size_in_bytes,
            temporary_bytes=used.temp_size_in_bytes,
            program_bytes=used.generated_code_size_in_bytes,
            kv_bytes=kv_bytes,
            kv_donated=used.alias_size_in_bytes == kv_bytes,
            headroom_bytes=left,
            headroom_with_params2_bytes=left - params_bytes,
            fits=True,
            fits_with_params2=left >= params_bytes,
            seconds=time.perf_counter() - started,
        )

    def _lower(self, step: Step, batch: int, tokens: int, cache_locs: int) -> Any:
        from sgl_jax.srt.layers.logits_processor import LogitsMetadata
        from sgl_jax.srt.managers.schedule_batch import ForwardMode
        from sgl_jax.srt.model_executor.forward_batch_info import ForwardBatch

        worker, runner, mesh = self.engine.worker, self.engine.runner, self.engine.mesh
        mode = ForwardMode.DECODE if step == "decode" else ForwardMode.EXTEND
        function, first = self.engine.model_function()
        try:
            # As ModelWorker.forward_batch_generation and ModelRunner._forward_raw put it together.
            with seen_as_tpu(self.compiler.devices), jax.set_mesh(mesh):
                dummy = worker.compilation_manager._make_dummy_batch(
                    batch, tokens, mode, cache_locs, dp_size=worker.dp_size, per_dp_bs_size=batch // worker.dp_size
                )
                forward_batch = ForwardBatch.init_new(dummy, runner)
                runner.attn_backend.forward_metadata = runner.attn_backend.get_forward_metadata(dummy)
                logits = LogitsMetadata.from_model_worker_batch(dummy, mesh)
                return function.lower(*first, forward_batch, runner.memory_pools, logits)
        except REFUSALS as error:
            raise PlanError(self._unsupported(step, error)) from error

    def _unsupported(self, step: Step, error: Exception) -> str:
        from kvcycle.engine import stack

        backend = self.engine.server_args.attention_backend
        advice = (
            "Set engine.attention_backend='native', or choose a newer topology"
            if backend != "native"
            else "Set another engine.attention_backend, or choose another topology"
        )
        return (
            f"sglang-jax {stack().sglang_jax} does not run a {step} of {self.engine.profile.name!r} on "
            f"{self.compiler.topology.name} with engine.attention_backend={backend!r}: {first_line(error)} "
            f"({type(error).__name__}). {advice}."
        )
