"""The weights wait in host memory and come back: exact bytes, the same bits, the same output, nothing compiled."""

from collections.abc import Callable

import pytest

from kvcycle.profile import Profile
from kvcycle.record_parts import Verdict

Assert = Callable[[Verdict], None]


@pytest.fixture(autouse=True)
def _needs_the_release(profile: Profile) -> None:
    if not profile.cycle.release_weights:
        pytest.skip("the profile does not release the weights (cycle.release_weights = false)")


@pytest.mark.check("weights.released_exact", per=("cycle{cycle}-arrays", "cycle{cycle}-device{device}-{witness}"))
def test_release_frees_the_weights(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("weights.restored_exact", per=("cycle{cycle}-device{device}-{witness}",))
def test_resume_restores_the_bytes(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("weights.restored_bits", per=("cycle{cycle}",))
def test_resume_restores_the_bits(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("weights.same_output", per=("cycle{cycle}-generate", "cycle{cycle}-generate_logprobs"))
def test_output_is_the_same(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("weights.no_compile", per=("cycle{cycle}-resume", "cycle{cycle}-generate"))
def test_nothing_compiles(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)
