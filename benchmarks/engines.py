"""Engines for the scenarios: the reference run's KV cache, and weights so small that a boot is the engine's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import kvcycle
from benchmarks.pages import PageState
from kvcycle import checkpoint, platform
from kvcycle.profile import Profile

#: Virtual devices of every engine here.
DEVICES = 4


def profile(layers: int, tokens: int) -> Profile:
    """A Qwen2 of so many layers with the KV heads of Qwen2.5-3B on four devices; its dummy weights take 0.2 GiB."""
    config = checkpoint.TINY_QWEN2 | {"num_hidden_layers": layers}
    folder = checkpoint.ensure(f"bench-{layers}-layers", config, weights=False)
    return kvcycle.load_profile(
        "tiny",
        {
            "name": f"bench-{layers}-layers",
            "model.path": str(folder),
            "engine.max_total_tokens": tokens,
            "engine.load_format": "dummy",
            "engine.tp_size": DEVICES,
        },
    )


@contextmanager
def malloc_as_started(pages: PageState) -> Iterator[None]:
    """Keep :func:`kvcycle.boot` from mapping every large allocation, in plain pages, but where that is measured."""
    if pages == "fresh":
        yield
        return
    with patch.object(platform, "map_large_allocations"), patch.object(platform, "keep_large_allocations"):
        yield
