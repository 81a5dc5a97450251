"""The faults that show when generation goes on, or with the weights: each is caught, and nothing else is accused.

Beside test_faults.py, so that two workers plant them at once, each into an engine of its own.
"""

from __future__ import annotations

import pytest

from kvcycle.faults.campaign import CATALOGUE, Campaign, Result
from kvcycle.faults.catalogue import Fault, Run
from kvcycle.report.faults import why_not
from tests.simulated.faulted import GENERATING, IN_BYTES, controls_of


@pytest.mark.parametrize("run", controls_of(GENERATING))
def test_a_run_without_a_fault_accuses_nothing(campaign: Campaign, run: Run) -> None:
    assert [f"{verdict.id}: {verdict.message}" for verdict in campaign.red_without_a_fault(run)] == []


@pytest.mark.parametrize("fault", GENERATING, ids=lambda fault: fault.id)
def test_every_fault_is_caught(campaign: Campaign, fault: Fault, results: list[Result]) -> None:
    result = campaign.run(fault)
    results.append(result)
    assert result.caught, why_not(result)


def test_the_two_files_plant_the_whole_catalogue() -> None:
    assert sorted(fault.id for fault in (*IN_BYTES, *GENERATING)) == sorted(fault.id for fault in CATALOGUE)
