"""The faults that show in the bytes, planted into the shared live engine: each is caught, and nothing else is accused.

Those that show when generation goes on are test_faults_generating.py's, and test_faults_weights.py's.
"""

from __future__ import annotations

from kvcycle.checks import CHECKS
from kvcycle.faults.campaign import CATALOGUE
from tests.simulated.faulted import (
    GENERATING,
    IN_BYTES,
    WEIGHTS,
    test_a_run_without_a_fault_accuses_nothing,
    test_every_fault_is_caught,
)

__all__ = ["test_a_run_without_a_fault_accuses_nothing", "test_every_fault_is_caught"]

PLANTED = IN_BYTES


def test_every_check_is_turned_red_by_a_fault() -> None:
    covered = {check for fault in CATALOGUE for check in fault.red}
    assert covered == set(CHECKS)
    assert len(CATALOGUE) >= 32


def test_three_files_plant_the_whole_catalogue() -> None:
    planted = [*IN_BYTES, *GENERATING, *WEIGHTS]
    assert sorted(fault.id for fault in planted) == sorted(fault.id for fault in CATALOGUE)
