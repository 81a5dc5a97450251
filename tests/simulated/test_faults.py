"""Every fault of the catalogue, planted into the shared live engine: each is caught, and nothing else is accused."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from rich.console import Console

import kvcycle
from kvcycle.checks import CHECKS
from kvcycle.faults.campaign import CATALOGUE, Campaign, Result
from kvcycle.faults.catalogue import Fault, Run
from kvcycle.record import Generate
from kvcycle.report.faults import show_matrix, summary, why_not


@pytest.fixture(scope="module")
def campaign(live_engine: Any, tiny: kvcycle.Profile, cold: Generate, compiling_anew: None) -> Campaign:
    """Asks for the first generation although it makes its own: other tests count on that it came first."""
    return Campaign(live_engine, tiny)


@pytest.fixture(scope="module")
def results() -> Iterator[list[Result]]:
    """What became of the faults so far; printed as the matrix when all have run (pytest -s)."""
    collected: list[Result] = []
    yield collected
    buffer = io.StringIO()
    show_matrix(collected, Console(file=buffer, width=110, highlight=False))
    print(buffer.getvalue(), summary(collected)[0], sep="")


@pytest.mark.parametrize("run", get_args(Run))
def test_a_run_without_a_fault_accuses_nothing(campaign: Campaign, run: Run) -> None:
    assert [f"{verdict.id}: {verdict.message}" for verdict in campaign.red_without_a_fault(run)] == []


@pytest.mark.parametrize("fault", CATALOGUE, ids=lambda fault: fault.id)
def test_every_fault_is_caught(campaign: Campaign, fault: Fault, results: list[Result]) -> None:
    result = campaign.run(fault)
    results.append(result)
    assert result.caught, why_not(result)


def test_every_check_is_turned_red_by_a_fault() -> None:
    covered = {check for fault in CATALOGUE for check in fault.red}
    assert covered == set(CHECKS)
    assert len(CATALOGUE) >= 32
