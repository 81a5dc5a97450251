"""Generation goes on: no compilation, no stall, the same output, nothing stale, and nothing grows."""

from collections.abc import Callable

import pytest

from kvcycle.record_parts import Verdict

Assert = Callable[[Verdict], None]


@pytest.mark.check(
    "generate.no_compile",
    per=("cycle{cycle}-rebuild", "cycle{cycle}-generate", "cycle{cycle}-params2", "cycle{cycle}-swap_back"),
)
def test_nothing_compiles(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("generate.below_threshold", per=("cycle{cycle}",))
def test_latency_is_below_the_threshold(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check(
    "generate.same_output",
    per=(
        "cycle{cycle}-generate",
        "cycle{cycle}-generate_logprobs",
        "cycle{cycle}-swap_back",
        "cycle{cycle}-swap_back_logprobs",
    ),
)
def test_output_is_the_same(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("generate.no_stale_prefix", per=("cycle{cycle}",))
def test_no_prefix_is_stale(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("cycles.no_growth", per=("cycle{cycle}-device{device}-{witness}",))
def test_no_cycle_leaves_anything_behind(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)
