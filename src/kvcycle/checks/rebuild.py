"""The checks on identity: the rebuilt buffers are what they were, where they were; the swapped set is really used."""

from __future__ import annotations

from collections.abc import Iterator

from kvcycle.checks.verdicts import count, left_out, scope, unmeasured
from kvcycle.record import Layout, RebuildInfo, Record, Verdict


def _rebuilds(check: str, record: Record) -> Iterator[tuple[int, RebuildInfo] | Verdict]:
    for index, cycle in enumerate(record.cycles):
        phase = cycle.phase("kv_cache_rebuilt")
        if phase is not None and isinstance(phase.info, RebuildInfo):
            yield index, phase.info
        else:
            yield unmeasured(check, scope(index), "the rebuild was not recorded")


def _differences(before: Layout, after: Layout | None) -> str:
    if after is None:
        return "is gone"
    was, now = before.model_dump(), after.model_dump()
    return ", ".join(f"{key} was {was[key]} and is {now[key]}" for key in was if was[key] != now[key])


def same_layout(record: Record) -> Iterator[Verdict]:
    """Every slot holds a buffer of the same shape, dtype, sharding, memory kind and committedness as before."""
    check = "rebuild.same_layout"
    for entry in _rebuilds(check, record):
        if isinstance(entry, Verdict):
            yield entry
            continue
        index, info = entry
        if not info.layouts_before:
            yield unmeasured(check, scope(index), "no layout was noted before the drop")
            continue
        different = {
            path: _differences(layout, info.layouts_after.get(path))
            for path, layout in info.layouts_before.items()
            if info.layouts_after.get(path) != layout
        }
        different |= {path: "is new" for path in info.layouts_after if path not in info.layouts_before}
        first = next((f"; first: {path}: {how}" for path, how in different.items()), "")
        yield count(
            check,
            scope(index),
            expected=0,
            measured=len(different),
            unit="slots",
            what=f"slots (of {len(info.layouts_before)}) whose layout differs after the rebuild{first}",
            causes=("any other layout makes the compiled forward compile again",),
        )


def in_place(record: Record) -> Iterator[Verdict]:
    """Every buffer is back in the same slot of the same object, since the engine holds its pools in several places."""
    check = "rebuild.in_place"
    for entry in _rebuilds(check, record):
        if isinstance(entry, Verdict):
            yield entry
            continue
        index, info = entry
        first = f"; first: {info.moved_owners[0]}" if info.moved_owners else ""
        yield count(
            check,
            scope(index),
            expected=0,
            measured=len(info.moved_owners),
            unit="slots",
            what=f"slots whose owner is another object than before the drop{first}",
            causes=("the pool object or its list was replaced: the allocator and the runner then disagree",),
        )


def zeroed(record: Record) -> Iterator[Verdict]:
    """Every rebuilt buffer holds zeros and nothing else."""
    check = "rebuild.zeroed"
    for entry in _rebuilds(check, record):
        if isinstance(entry, Verdict):
            yield entry
            continue
        index, info = entry
        first = f"; first: {info.nonzero_slots[0]}" if info.nonzero_slots else ""
        yield count(
            check,
            scope(index),
            expected=0,
            measured=len(info.nonzero_slots),
            unit="slots",
            what=f"rebuilt buffers that hold anything but zeros{first}",
            causes=("the buffers were not initialised: NaNs there can reach the attention's padding",),
        )


def swap_shares_buffers(record: Record) -> Iterator[Verdict]:
    """Swapped in, the second set's arrays *are* the engine's parameters; and after the way back, the first set's."""
    check = "swap.shares_buffers"
    if (verdict := left_out(check, record)) is not None:
        yield verdict
        return
    for index, cycle in enumerate(record.cycles):
        swap = cycle.swap
        if swap is None:
            yield unmeasured(check, scope(index), "the second set was not swapped in")
            continue
        yield count(
            check,
            scope(index),
            expected=2 * swap.leaves + swap.model_params,
            measured=swap.runner_shared + swap.restored + swap.model_shared,
            unit="arrays",
            what=(
                f"parameters that are the given arrays (runner {swap.runner_shared} and model {swap.model_shared} of "
                f"the second set, runner {swap.restored} of the first after the swap back)"
            ),
            causes=("the engine copied the set, or keeps a second list of its own",),
        )
