"""The faults that show when generation goes on: each is caught, and nothing else is accused."""

from __future__ import annotations

from tests.simulated.faulted import (
    GENERATING,
    test_a_run_without_a_fault_accuses_nothing,
    test_every_fault_is_caught,
)

__all__ = ["test_a_run_without_a_fault_accuses_nothing", "test_every_fault_is_caught"]

PLANTED = GENERATING
