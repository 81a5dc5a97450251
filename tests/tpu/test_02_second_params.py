"""The freed memory holds a second parameter set, and the engine can run on it."""

from collections.abc import Callable

import pytest

from kvcycle.record_parts import Verdict

Assert = Callable[[Verdict], None]


@pytest.mark.check("params2.fits", per=("cycle{cycle}-device{device}-{witness}",))
def test_second_params_fit(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("params2.is_its_own_memory", per=("cycle{cycle}",))
def test_second_params_are_their_own_memory(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("swap.shares_buffers", per=("cycle{cycle}",))
def test_swap_shares_buffers(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)
