"""Which faults are planted in which file, and the runs without a fault that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from kvcycle.faults.campaign import CATALOGUE
from kvcycle.faults.catalogue import Fault, Run

_BYTES: tuple[Run, ...] = ("bytes", "cycles", "allocator")

#: Those that need no generation, and the others.
IN_BYTES = [fault for fault in CATALOGUE if fault.run in _BYTES]
GENERATING = [fault for fault in CATALOGUE if fault.run not in _BYTES]


def controls_of(faults: Sequence[Fault]) -> list[Run]:
    """The kinds of run that these faults are planted into, in their usual order."""
    return [run for run in get_args(Run) if any(fault.run == run for fault in faults)]
