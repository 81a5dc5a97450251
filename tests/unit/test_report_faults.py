"""The campaign's matrix: what a person sees of what was caught and what was not."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvcycle.checks import CHECKS
from kvcycle.faults.campaign import Result, uncovered
from kvcycle.faults.catalogue import Fault, Target
from kvcycle.record_parts import Outcome, Verdict
from kvcycle.report.faults import save, show_matrix, summary, why_not
from kvcycle.report.page.faults import draw
from kvcycle.report.phases import worst

FIRST, SECOND, THIRD = list(CHECKS)[:3]


@contextmanager
def plant(_: Target) -> Iterator[None]:
    yield


def result(name: str = "a-fault", **changes: Any) -> Result:
    """A caught fault: the first check fails, the second is inconclusive, the third fails as a consequence."""
    fault = Fault(
        name, "Something is wrong", plant, frozenset({FIRST, SECOND}), frozenset({THIRD}), "why", "bytes", "x"
    )
    outcomes: dict[str, Outcome] = dict.fromkeys(CHECKS, "pass")
    outcomes |= {FIRST: "fail", SECOND: "inconclusive", THIRD: "fail", list(CHECKS)[-1]: "not-run"}
    values: dict[str, Any] = {
        "fault": fault, "outcomes": outcomes, "missed": (), "false_alarms": (), "named": True, "message": "said why",
        "alarm": "", "seconds": 1.25,
    }  # fmt: skip
    return Result(**(values | changes))


MISSED = result("a-missed-fault", missed=(FIRST,), outcomes=dict.fromkeys(CHECKS, "pass") | {SECOND: "inconclusive"})
ACCUSED = result("a-false-alarm", false_alarms=(list(CHECKS)[4],), alarm="4 B more.")


def shown(*results: Result) -> list[str]:
    buffer = io.StringIO()
    show_matrix(results, Console(file=buffer, width=100, highlight=False))
    return buffer.getvalue().splitlines()


def test_the_matrix_has_a_row_for_every_fault_and_a_column_for_every_check() -> None:
    lines = shown(result(), MISSED, ACCUSED)
    rows = [line for line in lines if line.startswith(("a-fault", "a-missed", "a-false"))]
    # As wide as the longest name; the last check of all was not run.
    dots = ". " * (len(CHECKS) - 4)
    assert rows[0] == f"a-fault         F I f {dots}     1.2 s"
    assert rows[1] == f"a-missed-fault  M I . {'. ' * (len(CHECKS) - 3)}   1.2 s"
    assert rows[2] == f"a-false-alarm   F I f . ! {'. ' * (len(CHECKS) - 6)}     1.2 s"
    numbers = [line.removeprefix(" " * 16).split(" ") for line in lines[:2]]
    assert len(numbers[1]) == len(CHECKS)
    assert any(line.startswith(f"   1 {FIRST}") for line in lines)


def test_what_was_not_caught_says_why() -> None:
    lines = "\n".join(shown(result(), MISSED, ACCUSED))
    assert "NOT CAUGHT a-fault " not in lines
    assert f"NOT CAUGHT a-missed-fault (Something is wrong): {FIRST} did not turn red." in lines
    assert why_not(ACCUSED) == f"{list(CHECKS)[4]} turned red and should not have: 4 B more."
    unnamed = result(named=False, message="something else")
    assert why_not(unnamed) == "no message says 'why'; the first says: something else."


@pytest.mark.parametrize("fault", [MISSED, ACCUSED, result(named=False)])
def test_a_fault_is_caught_only_if_nothing_else_is_accused_and_the_cause_is_named(fault: Result) -> None:
    assert result().caught
    assert not fault.caught


def test_the_summary_counts_faults_and_checks() -> None:
    line, good = summary([result(), MISSED])
    assert line.startswith(f"1 of 2 faults caught, 2 of {len(CHECKS)} checks turned red by one; nothing shows that")
    assert THIRD in line
    assert not good
    assert summary([result()], whole=False) == ("1 of 1 faults caught", True)
    assert summary([], whole=False) == ("0 of 0 faults caught", False)


def test_only_a_caught_fault_covers_its_checks() -> None:
    assert uncovered([MISSED]) == list(CHECKS)
    assert uncovered([result()]) == list(CHECKS)[2:]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["pass", "inconclusive", "not-run"], "inconclusive"),
        (["pass", "fail", "inconclusive"], "fail"),
        (["not-run", "pass"], "pass"),
        ([], None),
    ],
)
def test_the_worst_outcome_counts(outcomes: list[Outcome], expected: Outcome | None) -> None:
    assert worst(Verdict(id=FIRST, scope="run", verdict=outcome, message="") for outcome in outcomes) == expected


def test_the_results_are_saved_for_whoever_draws_them(tmp_path: Path) -> None:
    save([result()], tmp_path / "faults.json")
    (entry,) = json.loads((tmp_path / "faults.json").read_text())
    assert entry["id"] == "a-fault"
    assert entry["red"] == sorted([FIRST, SECOND])
    assert entry["outcomes"][SECOND] == "inconclusive"
    assert entry["caught"] is True


def test_the_page_has_the_matrix_and_what_was_not_caught_first() -> None:
    text = draw([result(), MISSED, ACCUSED], name="tiny <b>", whole=False)
    assert text.index('id="fault-a-missed-fault"') < text.index('id="fault-a-fault"')
    assert "FAILED" in text
    assert "simulated-on-cpu" in text
    assert "tiny &lt;b&gt;" in text
    assert f'title="{FIRST} missed: it should have turned red"><i class="wrong">M</i>' in text
    assert text.count("<tr><th") == 3
    assert text.count('<th scope="col"') == len(CHECKS)
    assert "What was not caught" not in draw([result()], name="tiny", whole=False)
    assert "No fault was planted." in draw([], name="tiny")
