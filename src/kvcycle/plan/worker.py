"""The planning process: ``python -m kvcycle.plan.worker REQUEST ANSWER``, two JSON files.

It is a process of its own because libtpu and the replaced parts of sglang-jax (abstract.py) must not stay in the
caller's, and because the compiler may abort. The files hold a ``Request`` and a ``Reply`` (protocol.py).
"""

from __future__ import annotations

import importlib.util
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcycle.errors import KVCycleError, PlatformError, ProfileError
from kvcycle.plan.model import ForwardPlan, PhasePlan, Plan, PlanError, peak_rss_bytes
from kvcycle.plan.protocol import Failure, Reply, Request
from kvcycle.plan.topologies import Topology, find_topology
from kvcycle.profile import Profile
from kvcycle.record import Record, now
from kvcycle.record_parts import KV, PHASES, Cycle, Device, DeviceUse, Owner, Params, Phase, PhaseName, Pool

if TYPE_CHECKING:
    from kvcycle.plan.abstract import AbstractEngine
    from kvcycle.plan.compiler import Answer, Size, TPUCompiler

#: Whose buffers are on the devices at the end of each phase of the cycle (cycle.py).
HELD: dict[PhaseName, tuple[Owner, ...]] = {
    "engine_ready": ("weights", "kv"),
    "generate_result": ("weights", "kv"),
    "flush_cache_before_kv_drop": ("weights", "kv"),
    "kv_cache_dropped": ("weights",),
    "sglang_param_dict2_ready": ("weights", "params2"),
    "kv_cache_rebuilt": ("weights", "kv", "params2"),
    "generate_result_after_kv_rebuild": ("weights", "kv", "params2"),
    "after_drop_param_dict2": ("weights", "kv"),
}


def main(request_file: str, answer_file: str) -> None:
    """Answer the request in one file with another file; see the module."""
    try:
        reply = answer(Request.model_validate_json(Path(request_file).read_text(encoding="utf-8")))
    except KVCycleError as error:
        traceback.print_exc()
        kind: Failure = "plan"
        if isinstance(error, ProfileError):
            kind = "profile"
        elif isinstance(error, PlatformError):
            kind = "platform"
        reply = Reply(failure=kind, message=str(error))
    Path(answer_file).write_text(reply.model_dump_json(by_alias=True), encoding="utf-8")


def answer(request: Request) -> Reply:
    """Plan what the request asks for.

    Raises:
        PlatformError: libtpu or sglang-jax is not installed.
        ProfileError: the profile does not go with the topology.
        PlanError: the stack or the compiler refuses for another reason than memory.
    """
    started = time.perf_counter()
    _check_installed()
    topology = find_topology(request.topology)

    from kvcycle.plan.abstract import AbstractEngine
    from kvcycle.plan.compiler import TPUCompiler
    from kvcycle.plan.forward import ForwardCompiler
    from kvcycle.plan.limits import max_tokens

    compiler = TPUCompiler(topology)
    engine = AbstractEngine(_with_tokens(request.profile), request.config_folder, compiler.devices)
    forward = ForwardCompiler(engine, compiler)
    forward.check_attention()
    plan, limits = None, None
    if request.phases:
        plan = _Planner(request, topology, compiler, engine, forward, started).plan()
    if request.max_tokens:
        limits = max_tokens(compiler, engine, started)
    return Reply(plan=plan, max_tokens=limits)


class _Planner:
    """Makes one plan."""

    def __init__(
        self,
        request: Request,
        topology: Topology,
        compiler: TPUCompiler,
        engine: AbstractEngine,
        forward: Any,
        started: float,
    ) -> None:
        self.request, self.topology, self.compiler, self.engine = request, topology, compiler, engine
        self.forward, self.started = forward, started
        self.buffers: dict[Owner, list[Any]] = {
            "weights": engine.params,
            "kv": engine.kv,
            "params2": engine.params,
        }
        weights = compiler.size(engine.params)
        self.sizes: dict[Owner, Size] = {"weights": weights, "kv": compiler.size(engine.kv), "params2": weights}
        self.answers: dict[tuple[Owner, ...], Answer] = {}

    def plan(self) -> Plan:
        phases = tuple(self._phase(name) for name in PHASES)
        steps: tuple[ForwardPlan, ...] = ()
        if self.request.forward:
            sizes = {"kv_bytes": self.sizes["kv"].bytes, "params_bytes": self.sizes["weights"].bytes}
            steps = (
                self.forward.compile("decode", self.forward.decode(), **sizes),
                self.forward.compile("prefill", self.forward.prefill(self.request.prefill_tokens), **sizes),
            )
        headrooms = [phase.headroom_bytes for phase in phases]
        headrooms += [
            step.headroom_with_params2_bytes for step in steps if step.headroom_with_params2_bytes is not None
        ]
        cap = self.engine.token_cap(self.compiler.capacity_bytes, self.sizes["weights"].bytes)
        wanted = self.request.profile.engine.max_total_tokens or 0
        return Plan(
            record=self._record(phases),
            topology=self.topology.name,
            capacity_bytes=self.compiler.capacity_bytes,
            phases=phases,
            forward=steps,
            largest_prefill_tokens=self.forward.largest_prefill_tokens,
            engine_token_cap=cap if cap is not None and cap < wanted else None,
            fits=all(phase.fits for phase in phases) and all(step.fits_with_params2 for step in steps),
            headroom_bytes=min(headrooms),
            seconds=time.perf_counter() - self.started,
            peak_rss_bytes=peak_rss_bytes(),
        )

    def _phase(self, name: PhaseName) -> PhasePlan:
        held = HELD[name]
        if held not in self.answers:
            self.answers[held] = self.compiler.hold([buffer for owner in held for buffer in self.buffers[owner]])
        answered = self.answers[held]
        size = _sum([self.sizes[owner] for owner in held])
        if answered.argument_bytes is not None and answered.argument_bytes != size.bytes:
            raise PlanError(
                f"The compiler lays {' and '.join(held)} out in {answered.argument_bytes} bytes together and in "
                f"{size.bytes} bytes apart; this version of kvcycle cannot plan with this libtpu."
            )
        return PhasePlan(
            name=name,
            held=held,
            bytes_per_device=size.bytes,
            bytes_sum=size.bytes * len(self.engine.devices),
            exact=size.exact,
            program_bytes=answered.program_bytes,
            headroom_bytes=self.compiler.headroom(size.bytes, answered),
            fits=answered.refusal is None,
            refusal=answered.refusal,
        )

    def _record(self, phases: tuple[PhasePlan, ...]) -> Record:
        from kvcycle.engine import stack

        profile, devices = self.request.profile, self.engine.devices
        return Record(
            evidence="compiled-for-tpu",
            created=now(),
            profile=profile.model_dump(mode="json"),
            stack=stack(),
            devices=tuple(
                Device(
                    id=device.id,
                    kind=device.device_kind,
                    limit_bytes=self.compiler.capacity_bytes,
                    host=device.process_index,
                )
                for device in devices
            ),
            kv=self._kv(),
            params=Params(
                arrays=len(self.engine.params),
                bytes_on_devices=self.sizes["weights"].bytes * len(devices),
                bytes_by_device={device.id: self.sizes["weights"].bytes for device in devices},
            ),
            # A prediction takes no time: what the phases take is not known without a TPU.
            cycles=(Cycle(phases=tuple(self._recorded(phase) for phase in phases)),),
        )

    def _recorded(self, phase: PhasePlan) -> Phase:
        by_owner: dict[Owner, int] = {owner: self.sizes[owner].bytes for owner in phase.held}
        return Phase(
            name=phase.name,
            t_s=0.0,
            seconds=0.0,
            devices=tuple(
                DeviceUse(id=device.id, ledger_bytes=phase.bytes_per_device, by_owner=by_owner)
                for device in self.engine.devices
            ),
            ledger_bytes_sum=phase.bytes_sum,
        )

    def _kv(self) -> KV:
        from kvcycle.sizing import predict_kv

        profile, devices = self.request.profile, self.engine.devices
        config = profile.model_config_json()
        arithmetic = predict_kv(config, profile.engine_args("tpu")) if config else None
        count = len(devices)
        return KV(
            buffers=len(self.buffers["kv"]),
            bytes=self.sizes["kv"].bytes * count,
            bytes_by_device={device.id: self.sizes["kv"].bytes for device in devices},
            predicted_bytes=arithmetic.total_bytes if arithmetic else None,
            predicted_bytes_by_device={device.id: arithmetic.bytes_per_device for device in devices}
            if arithmetic
            else None,
            predicted_by="config arithmetic" if arithmetic else None,
            predicted_how=arithmetic.formula if arithmetic else None,
            claimed_bytes=self.engine.claimed_kv_bytes,
            pools=tuple(
                Pool(type=type(pool).__name__, buffers=len(leaves), bytes=self.compiler.size(leaves).bytes * count)
                for pool, leaves in self.engine.pool_buffers()
            ),
        )


def _sum(sizes: list[Size]) -> Size:
    total = sizes[0]
    for size in sizes[1:]:
        total += size
    return total


def _with_tokens(profile: Profile) -> Profile:
    """The profile with some number of tokens, where only the limits are asked for: they do not depend on it."""
    if profile.engine.max_total_tokens is not None:
        return profile
    engine = profile.engine.model_copy(update={"max_total_tokens": 64 * profile.engine.page_size})
    return profile.model_copy(update={"engine": engine})


def _check_installed() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise PlatformError(
            "The plan asks the TPU compiler, and libtpu is not installed. It needs no TPU: pip install 'kvcycle[plan]'."
        )
    if importlib.util.find_spec("sgl_jax") is None:
        raise PlatformError("The plan needs sglang-jax, which is not installed: pip install 'kvcycle[plan]'.")


if __name__ == "__main__":
    main(*sys.argv[1:])
