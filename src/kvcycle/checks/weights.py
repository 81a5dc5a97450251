"""The checks on the weights' release and resume: exact bytes, the same bits, the same output, nothing compiled.

Silent on a record that neither has these phases nor was to have them: its profile says so (``cycle.release_weights``),
so that a run which ended before them is told from one that never meant to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvcycle.checks.controls import compiles_are_counted
from kvcycle.checks.generation import failed_control, output_as_warm
from kvcycle.checks.memory import device_changes
from kvcycle.checks.verdicts import count, left_out, on_which_host, scope, unmeasured
from kvcycle.record import Record
from kvcycle.record_info import WeightsReleasedInfo, WeightsResumedInfo
from kvcycle.record_parts import WEIGHTS_PHASES, Cycle, Spans, Verdict


def _concerned(record: Record) -> bool:
    """Whether the run was to release its weights, or did."""
    return bool(record.profile.get("cycle", {}).get("release_weights", False)) or any(
        phase.name in WEIGHTS_PHASES for cycle in record.cycles for phase in cycle.phases
    )


def released_exact(record: Record) -> Iterator[Verdict]:
    """On every device, by every witness, the release frees exactly the weights' bytes."""
    if not _concerned(record):
        return
    check = "weights.released_exact"
    for index, cycle in enumerate(record.cycles):
        phase = cycle.phase("weights_released")
        info = phase.info if phase else None
        if isinstance(info, WeightsReleasedInfo):
            yield count(
                check,
                scope(index, part="arrays"),
                expected=info.arrays,
                measured=info.deleted_arrays,
                unit="arrays",
                what="arrays of weights deleted",
                causes=("delete() did not take effect",),
            )
        else:
            yield unmeasured(check, scope(index, part="arrays"), "the release of the weights was not recorded")
    yield from device_changes(
        check,
        record,
        "after_drop_param_dict2",
        "weights_released",
        {device: -size for device, size in record.params.bytes_by_device.items()},
        (
            "an array of the weights is still held elsewhere, or a copy of it is alive on the device",
            "the copy for the host is a view, which keeps the device's memory",
        ),
    )


def restored_exact(record: Record) -> Iterator[Verdict]:
    """On every device, by every witness, the resume takes exactly the weights' bytes."""
    if not _concerned(record):
        return
    yield from device_changes(
        "weights.restored_exact",
        record,
        "weights_released",
        "weights_resumed",
        record.params.bytes_by_device,
        (
            "the weights came back in another dtype or sharding (see weights.restored_bits)",
            "the resume left a copy alive on the device, or an array empty",
        ),
    )


def restored_bits(record: Record) -> Iterator[Verdict]:
    """Every array has the bits and the layout that it had, on every device, and the model holds the same arrays."""
    if not _concerned(record):
        return
    check = "weights.restored_bits"
    for index, cycle in enumerate(record.cycles):
        infos = _infos(cycle)
        if infos is None or not infos[0].digests:
            yield unmeasured(check, scope(index), "the weights' digests before and after were not recorded")
            continue
        before, after = infos[0].digests, infos[1].digests
        names = list(dict.fromkeys([*before, *after]))
        unlike = [name for name in names if before.get(name) != after.get(name)]
        stray = infos[1].model_params - infos[1].model_shared
        first = f"; first: {unlike[0]}" if unlike else ""
        apart = f"; and {stray} of the model's own parameters are other arrays than the runner's" if stray else ""
        yield count(
            check,
            scope(index),
            expected=0,
            measured=len(unlike) + abs(stray),
            unit="arrays",
            what=f"arrays (of {len(names)}) that are not what they were{first}{apart}",
            causes=(
                "the copy in host memory was changed meanwhile, or an array came back in another layout or place",
                "only one of the weights' two owners was given the arrays: the runner's list, or the model",
            ),
        )


def same_output(record: Record) -> Iterator[Verdict]:
    """Greedy output after the resume equals the warm one: ids, and log-probabilities."""
    if not _concerned(record):
        return
    cause = "the resumed weights are not what they were (see weights.restored_bits)"
    yield from output_as_warm("weights.same_output", record, (("after_weights", "generate"),), cause)


def no_compile(record: Record) -> Iterator[Verdict]:
    """Neither the resume nor the generation after it compiles anything."""
    check = "weights.no_compile"
    if not _concerned(record):
        return
    if (verdict := left_out(check, record)) is not None:
        yield verdict
        return
    blind = failed_control(compiles_are_counted(record))
    for index, cycle in enumerate(record.cycles):
        phase, found = cycle.phase("weights_resumed"), record.generates_when("after_weights", index)
        spans: tuple[tuple[str, Spans | None, str, str], ...] = (
            (
                "resume",
                phase,
                "compilations and traces while resuming the weights",
                "the weights were not resumed",
            ),
            (
                "generate",
                found[0] if found else None,
                "compilations in the generation after it",
                "there was no generation on the resumed weights",
            ),
        )
        for part, span, what, missing in spans:
            if span is None:
                yield unmeasured(check, scope(index, part=part), missing)
                continue
            work, resumes = span.compiles, part == "resume"
            yield count(
                check,
                scope(index, part=part),
                expected=0,
                measured=work.any_work + (work.trace if resumes else 0),
                unit="compilations",
                what=what + on_which_host(span.compiles_by_host, traces=resumes),
                causes=(
                    "an array came back with another sharding, uncommitted, or in another layout",
                    "the runner was given another container than a list",
                ),
                blind=blind,
            )


def _infos(cycle: Cycle) -> tuple[WeightsReleasedInfo, WeightsResumedInfo] | None:
    released, resumed = (phase.info if (phase := cycle.phase(name)) else None for name in WEIGHTS_PHASES)
    if isinstance(released, WeightsReleasedInfo) and isinstance(resumed, WeightsResumedInfo):
        return released, resumed
    return None


#: By id, in the order of the phases.
WEIGHTS_CHECKS: dict[str, Callable[[Record], Iterator[Verdict]]] = {
    "weights.released_exact": released_exact,
    "weights.restored_exact": restored_exact,
    "weights.restored_bits": restored_bits,
    "weights.same_output": same_output,
    "weights.no_compile": no_compile,
}
