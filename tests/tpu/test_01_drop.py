"""The drop: every device gets back the KV cache's bytes, and nothing else is touched."""

from collections.abc import Callable

import pytest

from kvcycle.record_parts import Verdict

Assert = Callable[[Verdict], None]


@pytest.mark.check("drop.frees_kv", per=("cycle{cycle}-device{device}-{witness}", "cycle{cycle}-rss"))
def test_drop_frees_the_kv_cache(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("drop.deletes_every_buffer", per=("cycle{cycle}",))
def test_drop_deletes_every_buffer(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("drop.size_is_predicted", per=("device{device}", "engine_claim"))
def test_size_is_predicted(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)


@pytest.mark.check("drop.leaves_weights", per=("cycle{cycle}-device{device}",))
def test_drop_leaves_the_weights(verdict: Verdict, assert_passes: Assert) -> None:
    assert_passes(verdict)
