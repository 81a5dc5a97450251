"""Which faults are planted in which file, the runs without a fault that belong to them, and the tests of both.

A file that imports the tests names what it plants: ``PLANTED``. The catalogue is planted by three, so that two workers
do it at once, each into an engine of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from kvcycle.faults.campaign import CATALOGUE, Campaign, Result
from kvcycle.faults.catalogue import Fault, Run
from kvcycle.report.faults import why_not

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


def test_a_run_without_a_fault_accuses_nothing(campaign: Campaign, run: Run) -> None:
    red = [f"{verdict.id}: {verdict.message}" for verdict in campaign.red_without_a_fault(run)]
    assert not red, red


def test_every_fault_is_caught(campaign: Campaign, fault: Fault, results: list[Result]) -> None:
    result = campaign.run(fault)
    results.append(result)
    assert result.caught, why_not(result)
