"""The checks on identity: the rebuilt buffers are what they were, where they were; the swapped set is really used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvcycle.checks.verdicts import count, left_out, scope, unmeasured
from kvcycle.record import Record
from kvcycle.record_info import Layout, RebuildInfo
from kvcycle.record_parts import Verdict


def _count_slots(
    check: str, record: Record, find: Callable[[RebuildInfo], list[str] | None], what: str, cause: str
) -> Iterator[Verdict]:
    """One verdict a cycle on the number of slots that ``find`` names, of which there must be none.

    ``find`` returns None where the rebuild lacks what it needs; ``what`` goes on "slots (of 36) …".
    """
    for index, cycle in enumerate(record.cycles):
        phase = cycle.phase("kv_cache_rebuilt")
        info = phase.info if phase is not None else None
        found = find(info) if isinstance(info, RebuildInfo) else None
        if found is None or not isinstance(info, RebuildInfo):
            yield unmeasured(check, scope(index), "the rebuild was not recorded")
            continue
        first = f"; first: {found[0]}" if found else ""
        yield count(
            check,
            scope(index),
            expected=0,
            measured=len(found),
            unit="slots",
            what=f"slots (of {len(info.layouts_before)}) {what}{first}",
            causes=(cause,),
        )


def _differences(before: Layout, after: Layout | None) -> str:
    if after is None:
        return "is gone"
    was, now = before.model_dump(), after.model_dump()
    return ", ".join(f"{key} was {was[key]} and is {now[key]}" for key in was if was[key] != now[key])


def _unlike(info: RebuildInfo) -> list[str] | None:
    if not info.layouts_before:
        return None
    different = [
        f"{path}: {_differences(layout, info.layouts_after.get(path))}"
        for path, layout in info.layouts_before.items()
        if info.layouts_after.get(path) != layout
    ]
    return different + [f"{path}: is new" for path in info.layouts_after if path not in info.layouts_before]


def same_layout(record: Record) -> Iterator[Verdict]:
    """Every slot holds a buffer of the same shape, dtype, sharding, memory kind and committedness as before."""
    yield from _count_slots(
        "rebuild.same_layout",
        record,
        _unlike,
        "whose layout differs after the rebuild",
        "any other layout makes the compiled forward compile again",
    )


def in_place(record: Record) -> Iterator[Verdict]:
    """Every buffer is back in the same slot of the same object, since the engine holds its pools in several places."""
    yield from _count_slots(
        "rebuild.in_place",
        record,
        lambda info: list(info.moved_owners),
        "whose owner is another object than before the drop",
        "the pool object or its list was replaced: the allocator and the runner then disagree",
    )


def zeroed(record: Record) -> Iterator[Verdict]:
    """Every rebuilt buffer holds zeros and nothing else."""
    yield from _count_slots(
        "rebuild.zeroed",
        record,
        lambda info: list(info.nonzero_slots),
        "that hold anything but zeros after the rebuild",
        "the buffers were not initialised: NaNs there can reach the attention's padding",
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
