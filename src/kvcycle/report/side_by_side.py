"""Two runs side by side: the change at every phase on every device, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from kvcycle.record import Record
from kvcycle.record_parts import OWNERS, Cycle, PhaseName
from kvcycle.reference import Reference, ReferenceRun

#: What two runs of one geometry must agree on. "other" is a run's own affair: compiled constants, sampling buffers.
COMPARED_OWNERS = tuple(owner for owner in OWNERS if owner != "other")


@dataclass(frozen=True)
class Difference:
    """Bytes by one owner on one device after one phase, in two records that should agree."""

    phase: PhaseName
    device: int
    owner: str
    first_bytes: int
    second_bytes: int

    @property
    def off_bytes(self) -> int:
        """Second minus first."""
        return self.second_bytes - self.first_bytes


def shared_phases(first: Record, second: Record) -> list[PhaseName]:
    """The phases that both records have in their first cycle, in order."""
    names = {phase.name for phase in _cycle(second).phases}
    return [phase.name for phase in _cycle(first).phases if phase.name in names]


def differences(first: Record, second: Record) -> list[Difference]:
    """Every place where two records disagree, by phase, device and owner; [] if they agree to the byte.

    Devices are matched by their order, since a topology and a machine number them differently.
    """
    found: list[Difference] = []
    for name in shared_phases(first, second):
        one, two = _cycle(first).phase(name), _cycle(second).phase(name)
        if one is None or two is None:
            continue
        for use, other in zip(one.devices, two.devices, strict=False):
            for owner in COMPARED_OWNERS:
                a, b = use.by_owner.get(owner, 0), other.by_owner.get(owner, 0)
                if a != b:
                    found.append(Difference(name, use.id, owner, a, b))
    return found


def comparable(first: Record, second: Record) -> str | None:
    """Why the two records cannot be compared; None if they can."""
    predicted = "compiled-for-tpu" in (first.evidence, second.evidence)
    if predicted and len(first.devices) != len(second.devices):
        return f"the first has {len(first.devices)} devices, the second {len(second.devices)}"
    if not shared_phases(first, second):
        return "they have no phase in common"
    return None


def show_reference(record: Record, reference: Reference, run: ReferenceRun, console: Console) -> bool:
    """Print the reference's changes beside the record's; returns whether every one is equal to the byte.

    A figure in which the reference contradicts its own sizes is shown with a note, and not held against the record.
    """
    table = Table(
        title=f"change in bytes in use, summed over {len(record.devices)} devices", title_justify="left",
        caption=f"reference: {reference.measured_by} ({reference.evidence}). here: {record.evidence}.",
        caption_justify="left",
    )  # fmt: skip
    table.add_column("phase", no_wrap=True)
    for heading in ("reference", "here", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    equal, notes = True, []
    here = _changes(_cycle(record), list(run.bytes_in_use))
    for name, change in run.changes().items():
        mine = here.get(name)
        off = mine - change if mine is not None else None
        unexplained = run.unexplained_bytes(change)
        equal = equal and (off == 0 or (off is not None and abs(off) == abs(unexplained)))
        table.add_row(
            name,
            f"{change:+,}",
            f"{mine:+,}" if mine is not None else "not run",
            "[green]0[/]" if off == 0 else f"[bold red]{off:+,}[/]" if off is not None else "",
        )
        if unexplained:
            notes.append(f"{name}: the reference differs from its own size by {unexplained:+,} B, cause unknown.")
    table.add_section()
    table.add_row("KV buffers", f"{run.kv_buffers}", f"{record.kv.buffers}", f"{record.kv.buffers - run.kv_buffers}")
    console.print(table)
    for note in notes:
        console.print(note)
    return equal and record.kv.buffers == run.kv_buffers


def _cycle(record: Record) -> Cycle:
    return record.cycles[0] if record.cycles else Cycle(phases=())


def _changes(cycle: Cycle, noted: Sequence[PhaseName]) -> dict[PhaseName, int]:
    """The ledger's change at each noted phase since the noted one before it."""
    phases = [phase for phase in cycle.phases if phase.name in noted]
    return {after.name: after.ledger_bytes_sum - before.ledger_bytes_sum for before, after in pairwise(phases)}
