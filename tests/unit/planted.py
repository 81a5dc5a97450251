"""A planted fault in a record, and the questions that every test of the checks asks of verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcycle.checks import CHECKS, SOAK_CHECKS, WEIGHTS_CHECKS
from kvcycle.record import Record
from kvcycle.record_parts import Compiles, PhaseName, Verdict
from tests.unit.records import (
    LAYOUT,
    SLOTS,
    edit_cycle,
    edit_info,
    edit_phase,
    good_record,
)

#: The checks that every record of cycles concerns; the weights' and the soak's have tests of their own.
OF_CYCLES = [check for check in CHECKS if check not in WEIGHTS_CHECKS | SOAK_CHECKS]

ON_CPU = good_record()
ON_TPU = good_record(allocator=True)

DROPPED: PhaseName = "kv_cache_dropped"
BORROWING: PhaseName = "sglang_param_dict2_ready"
REBUILT: PhaseName = "kv_cache_rebuilt"
END: PhaseName = "after_drop_param_dict2"


def only(verdicts: Sequence[Verdict], check: str, name: str) -> Verdict:
    found = [verdict for verdict in verdicts if (verdict.id, verdict.name) == (check, name)]
    assert len(found) == 1, f"{len(found)} verdicts of {check} on {name}"
    return found[0]


def named(verdicts: Sequence[Verdict], outcome: str) -> set[str]:
    return {f"{verdict.id}[{verdict.name}]" for verdict in verdicts if verdict.verdict == outcome}


def checks_that(verdicts: Sequence[Verdict], outcome: str) -> set[str]:
    return {verdict.id for verdict in verdicts if verdict.verdict == outcome}


def compiles_in_rebuild(record: Record) -> Record:
    return edit_phase(record, REBUILT, lambda phase: phase.model_copy(update={"compiles": Compiles(trace=1)}), 1)


def relayout(record: Record, **changes: object) -> Record:
    """The second slot rebuilt with another layout."""
    return edit_info(
        record, REBUILT, layouts_after=dict.fromkeys(SLOTS, LAYOUT) | {SLOTS[1]: LAYOUT.model_copy(update=changes)}
    )


def edit_swap(record: Record, **changes: int) -> Record:
    swap = record.cycles[1].swap
    assert swap is not None
    return edit_cycle(record, 1, swap=swap.model_copy(update=changes))


def cannot_see(witness: str, device: int | None) -> frozenset[str]:
    """The verdicts that rest on a witness, as they are named."""
    place = "" if device is None else f"-device{device}"
    checks = ["drop.frees_kv", "rebuild.restores_bytes"]
    if device is not None:
        checks += ["params2.fits", "cycles.no_growth"]
    return frozenset(f"{check}[cycle{cycle}{place}-{witness}]" for check in checks for cycle in (0, 1))


@dataclass(frozen=True)
class Fault:
    """A planted fault, and the one verdict (``red``: the checks) that it turns red."""

    check: str
    name: str
    plant: Callable[[Record], Record]
    message: str
    likely: str | None = None
    base: Record = ON_CPU
    also: frozenset[str] = frozenset()
    #: Tells apart what is planted for the same verdict.
    what: str = ""

    def __str__(self) -> str:
        return f"{self.check}[{self.name}]{self.what}"
