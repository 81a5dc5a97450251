"""How long the generations took, as bars against the threshold."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from kvcycle.checks.generation import thresholds_s
from kvcycle.record import Record
from kvcycle.record_parts import When

_WHEN: tuple[tuple[When, str, str], ...] = (
    ("cold", "cold, the first of all", "slow"),
    ("warm", "warm, median", "plain"),
    ("after_rebuild", "after the rebuild, slowest", "judged"),
    ("with_params2", "on the second set, slowest", "plain"),
    ("after_swap_back", "after the swap back, slowest", "plain"),
    ("after_weights", "after the weights came back, slowest", "plain"),
    ("after_clear_caches", "control: jax's caches cleared", "slow"),
)


@dataclass(frozen=True)
class Bar:
    """Generations of one kind: the figure that stands for them, and its share of the longest bar."""

    label: str
    kind: str
    seconds: float
    fraction: float
    count: int
    compilations: int
    cached_tokens: int


@dataclass(frozen=True)
class Latencies:
    """The bars, and the threshold that the generation after the rebuild is held to (None if it is unknown)."""

    bars: tuple[Bar, ...]
    threshold_s: float | None
    threshold_fraction: float


def latencies(record: Record) -> Latencies | None:
    """The generations of a record, None where there were none."""
    limits = thresholds_s(record)
    figures = []
    for when, label, kind in _WHEN:
        if found := record.generates_when(when):
            times = [generate.seconds for generate in found]
            figures.append((found, label, kind, statistics.median(times) if when == "warm" else max(times)))
    if not figures:
        return None
    threshold = limits[1] if limits else None
    longest = max([threshold or 0.0, *(figure[3] for figure in figures)]) or 1.0
    bars = tuple(
        Bar(
            label=label,
            kind=kind,
            seconds=value,
            fraction=value / longest,
            count=len(found),
            compilations=max(generate.compiles.backend for generate in found),
            cached_tokens=max(generate.cached_tokens for generate in found),
        )
        for found, label, kind, value in figures
    )
    return Latencies(bars, threshold, (threshold or 0.0) / longest)
