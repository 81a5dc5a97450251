"""The faults that show when weights are released and resumed, or only in many cycles: each is caught, and nothing else.

The catalogue is planted by three files, so that two workers do it at once, each into an engine of its own.
"""

from __future__ import annotations

import pytest

from kvcycle.faults.campaign import Campaign, Result
from kvcycle.faults.catalogue import Fault, Run
from kvcycle.report.faults import why_not
from tests.simulated.faulted import WEIGHTS, controls_of


@pytest.mark.parametrize("run", controls_of(WEIGHTS))
def test_a_run_without_a_fault_accuses_nothing(campaign: Campaign, run: Run) -> None:
    assert [f"{verdict.id}: {verdict.message}" for verdict in campaign.red_without_a_fault(run)] == []


@pytest.mark.parametrize("fault", WEIGHTS, ids=lambda fault: fault.id)
def test_every_fault_is_caught(campaign: Campaign, fault: Fault, results: list[Result]) -> None:
    result = campaign.run(fault)
    results.append(result)
    assert result.caught, why_not(result)
