"""The controls: every oracle saw what it is trusted to see. Without them the zeros above prove nothing."""

from collections.abc import Callable

import pytest

from fixtures.suite import SuiteRun
from kvcycle.record import Record
from kvcycle.record_parts import Verdict

Assert = Callable[[Verdict], None]


@pytest.mark.check("controls.witness_sees_allocation", per=("device{device}-{witness}", "run-rss"))
def test_witness_sees_an_allocation(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("controls.witness_saw_boot", per=("device{device}-{witness}",))
def test_witness_saw_the_boot(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check(
    "controls.witnesses_agree", per=("allocator:cycle{cycle}-device{device}-allocator", "cycle{cycle}-rss")
)
def test_witnesses_agree(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("controls.compiles_are_counted", per=("run",))
def test_compiles_are_counted(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("controls.recompilation_is_seen", per=("compiles", "latency"))
def test_recompilation_is_seen(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("controls.output_varies", per=("run",))
def test_output_varies(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("controls.output_follows_weights", per=("cycle{cycle}",))
def test_output_follows_the_weights(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("controls.prefix_hit_is_seen", per=("run",))
def test_prefix_hit_is_seen(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


def test_every_verdict_has_its_test(record: Record, suite: SuiteRun) -> None:
    asserted = {check for check, _ in suite.claimed}
    unclaimed = [
        f"{verdict.id}[{verdict.name}]: {verdict.message}"
        for verdict in record.checks
        if verdict.id in asserted and verdict.verdict != "not-run" and (verdict.id, verdict.name) not in suite.claimed
    ]
    assert unclaimed == []
