"""The script behind ``make mutants``: how it reads what mutmut says."""

from __future__ import annotations

import pytest

from scripts.mutants import LEAST_PERCENT, change, function, score, statuses

LISTING = """\
    kvcycle.record.xǁRecordǁsave__mutmut_8: survived
    kvcycle.checks.verdicts.x_change__mutmut_1: caught by type check
    kvcycle.checks.x_judge__mutmut_2: killed
    kvcycle.memory.x_snapshot__mutmut_3: no tests
"""
DIFF = """\
# kvcycle.checks.verdicts.x_change__mutmut_7: survived
--- src/kvcycle/checks/verdicts.py
+++ src/kvcycle/checks/verdicts.py
@@ -1,5 +1,5 @@
 def change(
-    measured = values[1] - values[0]
+    measured = values[1] + values[0]
     off = measured - expected
"""


def test_statuses_by_name() -> None:
    assert statuses(LISTING) == {
        "kvcycle.record.xǁRecordǁsave__mutmut_8": "survived",
        "kvcycle.checks.verdicts.x_change__mutmut_1": "caught by type check",
        "kvcycle.checks.x_judge__mutmut_2": "killed",
        "kvcycle.memory.x_snapshot__mutmut_3": "no tests",
    }


def test_a_change_is_the_lines_of_the_diff_and_not_its_header() -> None:
    assert change(DIFF) == "measured = values[1] - values[0] → measured = values[1] + values[0]"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("kvcycle.checks.verdicts.x_change__mutmut_7", "checks.verdicts.change"),
        ("kvcycle.checks.controls.x__gap__mutmut_12", "checks.controls._gap"),
        ("kvcycle.record.xǁRecordǁsave__mutmut_8", "record.Record.save"),
    ],
)
def test_a_mutant_is_named_by_its_function(name: str, place: str) -> None:
    assert function(name) == place


def test_only_what_was_noticed_counts() -> None:
    names = ("killed", "caught by type check", "timeout", "survived", "no tests", "suspicious", "segfault", "skipped")
    assert score({status: status for status in names}) == pytest.approx(37.5)
    assert LEAST_PERCENT >= 95
