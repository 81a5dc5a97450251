"""Which faults are planted in which file, and the runs without a fault that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from kvcycle.faults.campaign import CATALOGUE
from kvcycle.faults.catalogue import Fault, Run

#: By file: what a fault needs of the run that it is planted into.
_BYTES: tuple[Run, ...] = ("bytes", "cycles", "allocator")
_GENERATING: tuple[Run, ...] = ("generate", "cold", "recompile")
_WEIGHTS: tuple[Run, ...] = ("weights", "soak")


def _planted_into(runs: Sequence[Run]) -> list[Fault]:
    return [fault for fault in CATALOGUE if fault.run in runs]


IN_BYTES, GENERATING, WEIGHTS = _planted_into(_BYTES), _planted_into(_GENERATING), _planted_into(_WEIGHTS)


def controls_of(faults: Sequence[Fault]) -> list[Run]:
    """The kinds of run that these faults are planted into, in their usual order."""
    return [run for run in get_args(Run) if any(fault.run == run for fault in faults)]
