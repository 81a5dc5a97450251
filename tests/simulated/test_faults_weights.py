"""The faults that show when weights are released and resumed, or only in many cycles: each caught, and nothing else."""

from __future__ import annotations

from tests.simulated.faulted import (
    WEIGHTS,
    test_a_run_without_a_fault_accuses_nothing,
    test_every_fault_is_caught,
)

__all__ = ["test_a_run_without_a_fault_accuses_nothing", "test_every_fault_is_caught"]

PLANTED = WEIGHTS
