"""The rebuild restores every byte, in the same layout, in the same place, as zeros."""

from collections.abc import Callable

import pytest

from kvcycle.record_parts import Verdict

Assert = Callable[[Verdict], None]


@pytest.mark.check("rebuild.restores_bytes", per=("cycle{cycle}-device{device}-{witness}", "cycle{cycle}-rss"))
def test_rebuild_restores_the_bytes(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("rebuild.same_layout", per=("cycle{cycle}",))
def test_rebuild_has_the_same_layout(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("rebuild.in_place", per=("cycle{cycle}",))
def test_rebuild_is_in_place(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("rebuild.zeroed", per=("cycle{cycle}",))
def test_rebuild_is_zeroed(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)
