"""Records of soaks that pass every check, and small edits of them: one edit is one planted fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kvcycle.checks.soak import WINDOW
from kvcycle.record import Record
from kvcycle.record_parts import Owner, Soak, SoakPoint
from tests.unit.records import KV_BYTES, OTHER, RSS_BASE, UNOWNED, WEIGHTS, good_record

HELD = WEIGHTS + KV_BYTES + OTHER


def soak_of(record: Record) -> Soak:
    assert record.soak is not None
    return record.soak


def good_soak(cycles: int = 40, devices: int = 4, allocator: bool = False) -> Record:
    """A soak that passes every check: of a TPU with an allocator's statistics, or of virtual devices with RSS."""
    ids = range(devices)
    point = SoakPoint(
        seconds=1.5,
        rss_bytes=None if allocator else RSS_BASE,
        by_owner={
            "weights": dict.fromkeys(ids, WEIGHTS),
            "kv": dict.fromkeys(ids, KV_BYTES),
            "other": dict.fromkeys(ids, OTHER),
        },
        allocator_bytes=dict.fromkeys(ids, HELD + UNOWNED) if allocator else {},
        different_tokens=0,
        logprobs_off=0.0,
    )
    soak = Soak(cycles=cycles, new_tokens=4, before=(point,) * WINDOW, points=(point,) * cycles)
    return good_record(cycles=1, devices=devices, allocator=allocator).model_copy(update={"soak": soak})


def edit_soak(record: Record, **changes: Any) -> Record:
    """The record with fields of its soak replaced."""
    return record.model_copy(update={"soak": soak_of(record).model_copy(update=changes)})


def edit_points(record: Record, cycles: Iterable[int], change: Callable[[SoakPoint, int], SoakPoint]) -> Record:
    """The record with the points after these cycles (from 1) replaced by ``change(point, cycle)``."""
    chosen = set(cycles)
    points = enumerate(soak_of(record).points, start=1)
    return edit_soak(record, points=tuple(change(p, number) if number in chosen else p for number, p in points))


def set_points(record: Record, cycles: Iterable[int], **changes: Any) -> Record:
    """The record with the same fields replaced in the points after these cycles."""
    return edit_points(record, cycles, lambda point, _: point.model_copy(update=changes))


def hold(record: Record, cycles: Iterable[int], more: Callable[[int], int], owner: Owner = "other") -> Record:
    """The record with ``more(cycle)`` more bytes of one owner on device 1 after these cycles."""

    def change(point: SoakPoint, cycle: int) -> SoakPoint:
        return more_on_device_1(point, more(cycle), owner)

    return edit_points(record, cycles, change)


def hold_before(record: Record, *more: int) -> Record:
    """The record with so many more bytes on device 1 at the idle points before the first drop."""
    before = zip(soak_of(record).before, more, strict=True)
    return edit_soak(record, before=tuple(more_on_device_1(point, by, "other") for point, by in before))


def more_on_device_1(point: SoakPoint, by: int, owner: Owner) -> SoakPoint:
    held = point.by_owner[owner]
    return point.model_copy(update={"by_owner": point.by_owner | {owner: held | {1: held[1] + by}}})
