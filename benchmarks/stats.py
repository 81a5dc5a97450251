"""Medians, their intervals, power laws, and when a figure is a result. Pure: no clock, no jax."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: How often an interval must contain the true median, over many runs.
CONFIDENCE = 0.9

Outcome = Literal["met", "missed", "not resolved", "out of reach"]
Sense = Literal["at most", "at least"]


@dataclass(frozen=True)
class Interval:
    """A median, the interval that contains the true one, and how often such an interval does (``coverage``)."""

    median: float
    low: float
    high: float
    coverage: float


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median with the narrowest pair of order statistics that contains the true one often enough.

    It assumes nothing of how the noise is distributed. Fewer than five values cannot reach 90 %: then the interval is
    their whole range, and its ``coverage`` says how little that is.

    Raises:
        ValueError: there is no value.
    """
    ordered, count = sorted(values), len(values)
    if not ordered:
        raise ValueError("The median of no values was asked for; measure at least one round.")
    outside, beyond = 0, 0.0
    while outside < (count - 1) // 2:
        more = beyond + 2 * math.comb(count, outside + 1) / 2**count
        tail = 2 / 2**count + more
        if 1 - tail < confidence:
            break
        outside, beyond = outside + 1, more
    coverage = max(0.0, 1 - 2 / 2**count - beyond)
    return Interval(statistics.median(ordered), ordered[outside], ordered[count - 1 - outside], coverage)


def outcome(found: Interval, sense: Sense, limit: float, *, confidence: float = CONFIDENCE) -> Outcome:
    """Whether a target is met: only if the whole interval says so; missed likewise; else the run did not resolve it."""
    if found.coverage < confidence:
        return "not resolved"
    if sense == "at most":
        return "met" if found.high <= limit else "missed" if found.low > limit else "not resolved"
    return "met" if found.low >= limit else "missed" if found.high < limit else "not resolved"


@dataclass(frozen=True)
class PowerLaw:
    """``y = factor * x ** exponent``, with the exponent's standard error (0 with two points, which any law fits)."""

    exponent: float
    error: float
    factor: float


def power_law(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw:
    """The power law through the points, by least squares of their logarithms.

    Raises:
        ValueError: fewer than two different x, or a value that has no logarithm.
    """
    if len(set(xs)) < 2 or min([*xs, *ys]) <= 0:
        raise ValueError(f"No power law goes through x={list(xs)}, y={list(ys)}: it needs two positive x or more.")
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    slope, intercept = statistics.linear_regression(log_x, log_y)
    mean = statistics.fmean(log_x)
    spread = sum((x - mean) ** 2 for x in log_x)
    left = sum((y - intercept - slope * x) ** 2 for x, y in zip(log_x, log_y, strict=True))
    error = math.sqrt(left / (len(xs) - 2) / spread) if len(xs) > 2 else 0.0
    return PowerLaw(slope, error, math.exp(intercept))


def ratios(over: Sequence[float], under: Sequence[float]) -> tuple[float, ...]:
    """Round by round, so that what slows a whole round cancels."""
    return tuple(a / b for a, b in zip(over, under, strict=True))


def differences(larger: Sequence[float], smaller: Sequence[float]) -> tuple[float, ...]:
    """Round by round, as :func:`ratios`."""
    return tuple(a - b for a, b in zip(larger, smaller, strict=True))
