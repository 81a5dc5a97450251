"""One run: boot evidence, cold and warm generates, the cycles of drop, borrow, rebuild and generate, the controls.

Read :meth:`_Run.cycle`: it is the SOP. Everything that is measured goes into the Record as soon as it is known, so
that a run that ends early has lost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from kvcycle import compiles, inband, memory, merge
from kvcycle.buffers import BufferSpec
from kvcycle.canary import release_canaries
from kvcycle.deadline import step_deadline
from kvcycle.engine import boot_evidence, stack
from kvcycle.errors import ParamSetError
from kvcycle.facts import device_facts, kv_facts, params_facts
from kvcycle.generate import generate_once
from kvcycle.kv_cache import KVCache
from kvcycle.params import ParamSet, Sharing, perturbed, sharing, swap
from kvcycle.platform import few_objects_to_collect
from kvcycle.pools import slots_of, weight_arrays
from kvcycle.predict import predict_by_arithmetic
from kvcycle.profile import Profile
from kvcycle.record import Record, now
from kvcycle.record_info import DropInfo, Params2Info, PhaseInfo, RebuildInfo, WeightsReleasedInfo, WeightsResumedInfo
from kvcycle.record_parts import (
    KV,
    Boot,
    Canary,
    Cycle,
    Device,
    Evidence,
    Generate,
    Owner,
    Params,
    Phase,
    PhaseName,
    SwapInfo,
    When,
)
from kvcycle.settling import leave_room_for_names, settle
from kvcycle.sizing import KVPrediction
from kvcycle.spending import spending
from kvcycle.text import exact_bytes, seconds
from kvcycle.weights import Weights, digests, leaf_names

Progress = Callable[[str], None]

_EVIDENCE: dict[str, Evidence] = {"tpu": "measured-on-tpu", "gpu": "measured-on-gpu", "cpu": "simulated-on-cpu"}


def run_cycle(
    engine: Any,
    profile: Profile,
    *,
    predicted: KVPrediction | None = None,
    save_to: Path | None = None,
    progress: Progress | None = None,
    details: Progress | None = None,
) -> Record:
    """Run the profile's cycles on an engine and return what was measured; judge it with :func:`kvcycle.judge`.

    Args:
        engine: any in-process sglang-jax Engine; the boot's evidence is in the record only if kvcycle booted it.
        profile: how many cycles, which prompt, whether to generate.
        predicted: the KV cache's size as :func:`kvcycle.predict.predict` has it; by default the config's arithmetic.
        save_to: a file that holds the record so far after every phase, whatever happens next.
        progress: called with one line of text whenever something begins that takes time, and after every phase.
        details: called with more: what begins, and the bytes of every device by owner after every phase.

    Raises:
        KVCycleError: a step of the cycle could not be done, or did not end within ``timeouts.step_s``; what was
            measured before it is in ``save_to``.
    """
    with spending("cycle"):
        return _Run(engine, profile, predicted, save_to, progress or _silent, details or _silent).run()


def _silent(_line: str) -> None:
    """Tell nobody."""


class _Run:
    """The state of one run, and its Record so far."""

    def __init__(
        self,
        engine: Any,
        profile: Profile,
        predicted: KVPrediction | None,
        save_to: Path | None,
        progress: Progress,
        details: Progress,
    ) -> None:
        self.engine, self.profile, self.save_to = engine, profile, save_to
        self.progress, self.details = progress, details
        self.predicted = predicted or predict_by_arithmetic(profile, "cpu" if jax.default_backend() == "cpu" else "tpu")
        self.kv = KVCache(engine)
        self.hosts = inband.channel_of(engine).hosts
        #: The record's number of every device by its id: on virtual devices those of several hosts are far apart.
        self.numbers = {id_: number for number, id_ in enumerate(sorted(device.id for device in jax.devices()))}
        self.params2: ParamSet | None = None
        self.started = time.perf_counter()
        self.phases: list[list[Phase]] = []
        self.residues: list[list[dict[int, int]]] = []
        self.residues_before: dict[int, int] = {}
        self.swaps: dict[int, SwapInfo] = {}
        self.generates: list[Generate] = []
        self.canaries: tuple[Canary, ...] = ()
        self.created = now()
        # Taken once: neither may depend on what the run does to the engine.
        self.devices = self._together(tuple[Device, ...], device_facts(self._devices(), self.hosts.rank), merge.devices)
        self.kv_facts = self._together(KV, kv_facts(engine, self.kv, self.predicted), merge.kv)
        self.params_facts = self._together(Params, params_facts(engine), merge.params)
        self.boot = boot_evidence(engine)
        if self.boot is not None:
            self.boot = self._together(Boot, self.boot, merge.boot)

    def run(self) -> Record:
        """Everything, in order."""
        leave_room_for_names()
        with few_objects_to_collect():
            return self._run()

    def _run(self) -> Record:
        self.progress("control: does every witness see an allocation of known size?")
        with step_deadline(self.engine, self.profile, "the control of the witnesses"):
            seen = release_canaries(self._devices(), self.profile.cycle.canary_bytes, self._sample)
            self.canaries = self._together(tuple[Canary, ...], seen, merge.canaries)
        for index in range(self.profile.cycle.cycles):
            self.cycle(index)
        if self.profile.cycle.generate and self.profile.cycle.recompile_control:
            self._control_for_recompilation()
        return self._save()

    def cycle(self, index: int) -> None:
        """Generate, flush, drop, borrow, rebuild, generate on, give back: the SOP, with a sample at every phase."""
        self.phases.append([])
        self.residues.append([])
        with self._phase("engine_ready"):
            pass
        with self._phase("generate_result"):
            self._generate_before_the_drop(index)
        with self._phase("flush_cache_before_kv_drop"):
            self.kv.flush()

        self.residues_before[index] = len(self.residues[-1])
        with self._phase("kv_cache_dropped") as told:
            freed = self.kv.drop()
            told(
                DropInfo(
                    buffers=freed.buffers,
                    deleted_buffers=freed.deleted_buffers,
                    missing_delete_method=freed.missing_delete_method,
                    bytes_by_device=freed.bytes_by_device,
                )
            )
        try:
            with self._phase("sglang_param_dict2_ready") as told:
                told(self._borrow())
        finally:
            with self._phase("kv_cache_rebuilt") as told:
                self.kv.rebuild()
                told(self._rebuilt())

        with self._phase("generate_result_after_kv_rebuild"):
            self._generate("after_rebuild", index)
            self._note_residue()
        if self.profile.cycle.generate and self.params2 is not None:
            self._swap_there_and_back(index, self.params2)
        with self._phase("after_drop_param_dict2"):
            self._give_back()
        if self.profile.cycle.release_weights:
            self._release_weights_and_resume(index)

    def _generate_before_the_drop(self, index: int) -> None:
        """Cold and warm times, and once a generation that hits the prefix cache: the controls of what follows."""
        if index:
            self.kv.flush()
            self._generate("warm", index)
            return
        self._generate("cold", index)
        for _ in range(self.profile.cycle.warm_generates):
            self._note_residue()
            self._generate("warm", index)
        self._generate("prefix_hit", index)

    def _generate(self, when: When, index: int) -> None:
        if not self.profile.cycle.generate:
            return
        self.progress(
            f"cycle {index}: generate {when}" + (", compiling the model's steps first" if when == "cold" else "")
        )
        self.generates.append(generate_once(self.engine, self.profile, when, index))

    def _note_residue(self) -> None:
        """Drain and flush, and note what nobody owns: the engine's last batch, and whatever leaks."""
        self.kv.flush()
        if self.profile.cycle.generate:
            residue = {use.id: use.by_owner.get("other", 0) for use in self._sample().devices}
            self.residues[-1].append(self._together(dict[int, int], residue, merge.residue))

    def _borrow(self) -> Params2Info:
        """Allocate the second parameter set in the freed memory."""
        first = ParamSet.of(self.engine)
        requested = first.bytes_by_device
        try:
            # Perturbed only where the output is compared: it must then follow the weights.
            change = perturbed(self.profile.cycle.perturb) if self.profile.cycle.generate else None
            self.params2 = ParamSet.clone(self.engine, change)
        except ParamSetError as error:
            return Params2Info(
                arrays=0, requested_bytes_by_device=requested, buffers=0, buffers_shared_with_engine=0, error=str(error)
            )
        theirs = set(first.buffers())
        ours = self.params2.buffers()
        return Params2Info(
            arrays=len(self.params2.leaves),
            requested_bytes_by_device=requested,
            buffers=len(ours),
            buffers_shared_with_engine=sum(buffer in theirs for buffer in ours),
        )

    def _rebuilt(self) -> RebuildInfo:
        """Walk the engine's pools anew, so that what is compared is what the engine holds, not what was put there."""
        found = slots_of(self.engine)
        before = {slot.path: slot.owner for slot in self.kv.slots}
        after = {slot.path: slot.owner for slot in found}
        return RebuildInfo(
            layouts_before={slot.path: spec.layout for slot, spec in zip(self.kv.slots, self.kv.specs, strict=True)},
            layouts_after={slot.path: BufferSpec.of(slot.get()).layout for slot in found},
            moved_owners=tuple(path for path, owner in before.items() if after.get(path) is not owner),
            nonzero_slots=tuple(self.kv.nonzero_slots()),
        )

    def _swap_there_and_back(self, index: int, params2: ParamSet) -> None:
        """Run on the second set and on the first again: the output must follow the weights, without compiling."""
        with step_deadline(self.engine, self.profile, f"cycle {index}: the swap to the second parameter set"):
            before = swap(self.engine, params2)
        try:
            shared: Sharing = sharing(self.engine, params2)
            self._generate("with_params2", index)
        finally:
            with step_deadline(self.engine, self.profile, f"cycle {index}: the swap back to the first parameter set"):
                swap(self.engine, before)
        swapped = SwapInfo(
            leaves=shared.leaves,
            runner_shared=shared.runner_shared,
            model_shared=shared.model_shared,
            model_params=shared.model_params,
            restored=sharing(self.engine, before).runner_shared,
        )
        self.swaps[index] = self._together(SwapInfo, swapped, merge.swap)
        self._generate("after_swap_back", index)
        self._note_residue()

    def _give_back(self) -> None:
        if self.params2 is not None:
            self.params2.delete()
            self.params2 = None
        # The last generation's result is still in the engine's pipeline; sampled before it drains it looks like growth.
        self.kv.flush()

    def _release_weights_and_resume(self, index: int) -> None:
        """The engine's weights wait in host memory, and come back bit for bit."""
        weights = Weights(self.engine)
        with self._phase("weights_released") as told:
            names = leaf_names(self.engine)
            before = digests(self.engine, names)
            freed = weights.release()
            told(
                WeightsReleasedInfo(
                    arrays=freed.arrays,
                    deleted_arrays=freed.deleted_arrays,
                    host_bytes=freed.host_bytes,
                    digests=before,
                )
            )
        with self._phase("weights_resumed") as told:
            weights.resume()
            used = sharing(self.engine, ParamSet.of(self.engine))
            told(
                WeightsResumedInfo(
                    digests=digests(self.engine, names), model_params=used.model_params, model_shared=used.model_shared
                )
            )
        # Not the prefix cache's answer: the prompt is computed with the weights that came back.
        self.kv.flush()
        self._generate("after_weights", index)
        self.kv.flush()

    def _control_for_recompilation(self) -> None:
        """Drop once more and clear jax's caches: the counter must see this compile, and the clock must feel it."""
        self.progress("control: drop, clear jax's caches, rebuild, generate (compiles again, on purpose)")
        with step_deadline(self.engine, self.profile, "the control for recompilation"), self.kv.released():
            jax.clear_caches()
        self._generate("after_clear_caches", self.profile.cycle.cycles - 1)

    @contextmanager
    def _phase(self, name: PhaseName) -> Iterator[Callable[[PhaseInfo], None]]:
        """Time a phase, count its compilations, and sample every witness at its end."""
        index = len(self.phases) - 1
        self.details(f"cycle {index}: {name} begins")
        began = time.perf_counter()
        span = compiles.Span()
        info: list[PhaseInfo] = []
        with step_deadline(self.engine, self.profile, f"cycle {index}: {name}"):
            yield info.append
        ended = time.perf_counter()
        sample = self._sample()
        measured = Phase(
            name=name,
            t_s=ended - self.started,
            seconds=ended - began,
            rss_bytes=sample.rss_bytes,
            devices=sample.devices,
            ledger_bytes_sum=sample.ledger_bytes_sum,
            compiles=span.end(),
            info=info[0] if info else None,
        )
        self.phases[-1].append(self._together(Phase, measured, merge.phase))
        self._save()  # first: what was said to be done is on disk
        self._tell(index, self.phases[-1])

    def _tell(self, index: int, phases: list[Phase]) -> None:
        """The last of the phases in a line; as details, every device of it."""
        phase, before = phases[-1], phases[-2] if len(phases) > 1 else None
        change = f", {phase.ledger_bytes_sum - before.ledger_bytes_sum:+,} B" if before is not None else ""
        held = exact_bytes(phase.ledger_bytes_sum)
        self.progress(f"cycle {index}: {phase.name}: {held} in use{change}, {seconds(phase.seconds)}")
        for use in phase.devices:
            owners = ", ".join(f"{owner} {size:,} B" for owner, size in use.by_owner.items() if size)
            allocator = f"; allocator {use.allocator_bytes:,} B" if use.allocator_bytes is not None else ""
            self.details(f"  device {use.id}: {owners or 'nothing'}{allocator}")

    def _sample(self) -> memory.MemorySnapshot:
        settle()
        owners: dict[Owner, Iterable[jax.Array]] = {
            "weights": weight_arrays(self.engine),
            "kv": self.kv.arrays(),
            "params2": self.params2.leaves if self.params2 else (),
        }
        return memory.snapshot(owners, devices=self._devices())

    def _devices(self) -> list[jax.Device]:
        local = {device.id: device for device in jax.local_devices()}
        return [local[device_id] for device_id in self.kv.bytes_by_device if device_id in local]

    def _together[T](self, kind: Any, mine: T, merged: Callable[[Sequence[T]], T]) -> T:
        """What all hosts have measured; on one host, and on those that are not the first, what this one has."""
        return merge.together(self.hosts, kind, mine, merged, self.numbers)

    def _cycle(self, index: int) -> Cycle:
        noted, before = self.residues[index], self.residues_before.get(index)
        return Cycle(
            phases=tuple(self.phases[index]),
            swap=self.swaps.get(index),
            residue_before=tuple(noted[:before]),
            residue_after=tuple(noted[before:]) if before is not None else (),
        )

    def _save(self) -> Record:
        record = Record(
            evidence=_EVIDENCE[jax.default_backend()],
            created=self.created,
            profile=self.profile.model_dump(mode="json", exclude={"engine": {"node_rank", "dist_init_addr"}}),
            stack=stack(),
            devices=self.devices,
            kv=self.kv_facts,
            params=self.params_facts,
            boot=self.boot,
            canaries=self.canaries,
            cycles=tuple(self._cycle(index) for index in range(len(self.phases))),
            generates=tuple(self.generates),
        )
        if self.save_to is not None:
            record.save(self.save_to)
        return record
