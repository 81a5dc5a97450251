"""What several of the unit tests need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import settings

from kvcycle import checkpoint

pytest.register_assert_rewrite("tests.unit.spoiled")

# The same examples everywhere and every time: what fails in CI fails here. A deadline would be a timed test.
settings.register_profile("kvcycle", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("kvcycle")


@pytest.fixture
def config_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with no more of the tiny checkpoint in it than its config: geometry needs no weights."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KVCYCLE_CACHE", str(folder))
    tiny = folder / "checkpoints" / f"tiny-qwen2-{checkpoint.fingerprint(checkpoint.TINY_QWEN2, 0)}"
    tiny.mkdir(parents=True)
    (tiny / "config.json").write_text(json.dumps(checkpoint.TINY_QWEN2))
    (tiny / "model.safetensors").touch()
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The widest first: of the faults that `make mutants` plants, each on its own, most end here.
    items.sort(key=lambda item: "test_verdict_texts" not in item.nodeid)
