"""When a ratio is a result: intervals, outcomes and fits on planted noise."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.stats import Interval, Outcome, Sense, differences, interval, outcome, power_law, ratios


def noisy(rng: random.Random, rounds: int, median: float = 1.0) -> list[float]:
    """Rounds with a long tail to one side, as times have it, and the occasional one that takes ten times as long."""
    return [median * math.exp(rng.gauss(0, 0.3)) * (10 if rng.random() < 0.02 else 1) for _ in range(rounds)]


@pytest.mark.parametrize(
    ("rounds", "low", "high", "coverage"),
    [
        (1, 1, 1, 0.0),
        (2, 1, 2, 0.5),
        (4, 1, 4, 0.875),
        (5, 1, 5, 0.9375),
        (7, 1, 7, 0.984375),
        (8, 2, 7, 0.9296875),
        (9, 2, 8, 0.9609375),
        (15, 4, 12, 0.96484375),
        (25, 9, 17, 0.89),
    ],
)
def test_an_interval_is_the_narrowest_that_the_binomial_allows(
    rounds: int, low: int, high: int, coverage: float
) -> None:
    values = list(range(1, rounds + 1))
    random.Random(1).shuffle(values)
    found = interval(values)
    if rounds == 25:  # 9 to 17 would be 89.2 %: one further out
        assert (found.low, found.high) == (low - 1, high + 1)
        assert found.coverage > coverage
    else:
        assert (found.median, found.low, found.high) == ((rounds + 1) / 2, low, high)
        assert found.coverage == coverage


@pytest.mark.parametrize("rounds", [5, 9, 15])
def test_an_interval_contains_the_true_median_as_often_as_it_says(rounds: int) -> None:
    rng = random.Random(rounds)
    runs = [interval(noisy(rng, rounds)) for _ in range(4000)]
    # The occasional long round moves the true median up by less than one hundredth.
    hits = sum(run.low <= 1.01 and run.high >= 1.0 for run in runs)
    assert hits / len(runs) == pytest.approx(runs[0].coverage, abs=0.02)


def test_no_rounds_have_no_median() -> None:
    with pytest.raises(ValueError, match="The median of no values was asked for; measure at least one round"):
        interval([])


@pytest.mark.parametrize(
    ("low", "high", "sense", "expected"),
    [
        (1.0, 1.4, "at most", "met"),
        (1.0, 1.5, "at most", "met"),
        (1.5, 1.6, "at most", "not resolved"),
        (1.4, 1.6, "at most", "not resolved"),
        (1.51, 1.6, "at most", "missed"),
        (1.6, 1.7, "at least", "met"),
        (1.5, 1.7, "at least", "met"),
        (1.4, 1.5, "at least", "not resolved"),
        (1.4, 1.49, "at least", "missed"),
    ],
)
def test_a_target_is_met_or_missed_only_with_the_whole_interval(
    low: float, high: float, sense: Sense, expected: Outcome
) -> None:
    assert outcome(Interval((low + high) / 2, low, high, 0.95), sense, 1.5) == expected
    assert outcome(Interval((low + high) / 2, low, high, 0.875), sense, 1.5) == "not resolved", "too few rounds"


def test_noise_as_wide_as_the_distance_to_the_target_is_never_called_a_result() -> None:
    """A run that noise decides is told as such: a wrong word in a twentieth of the runs at most, on either side."""
    rng = random.Random(3)
    outcomes = [outcome(interval(noisy(rng, 9, median=1.5)), "at most", 1.5) for _ in range(2000)]
    assert outcomes.count("not resolved") / len(outcomes) > 0.9
    clear = [outcome(interval(noisy(rng, 15, median=3.0)), "at most", 1.5) for _ in range(500)]
    assert clear.count("missed") / len(clear) > 0.9
    assert "met" not in clear


def test_what_slows_a_whole_round_cancels() -> None:
    rng = random.Random(4)
    slowed = [rng.uniform(1, 6) for _ in range(9)]
    rebuild = [1.2 * factor * rng.uniform(0.99, 1.01) for factor in slowed]
    limit = [1.0 * factor * rng.uniform(0.99, 1.01) for factor in slowed]
    in_turn = interval(ratios(rebuild, limit))
    assert outcome(in_turn, "at most", 1.5) == "met"
    assert in_turn.high - in_turn.low < 0.05
    # The control: the same rounds not held against each other.
    one_after_the_other = interval(ratios(rebuild, limit[1:] + limit[:1]))
    assert outcome(one_after_the_other, "at most", 1.5) == "not resolved"


def test_differences_are_taken_round_by_round_and_none_may_be_missing() -> None:
    assert differences([5, 50], [4, 40]) == (1, 10)
    with pytest.raises(ValueError, match="zip"):
        ratios([1, 2], [1])


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_a_power_law_is_found_again_in_planted_noise(exponent: float) -> None:
    rng = random.Random(5)
    xs = [100, 1_000, 10_000, 100_000]
    exact = power_law(xs, [3 * x**exponent for x in xs])
    assert (exact.exponent, exact.factor) == (pytest.approx(exponent), pytest.approx(3))
    assert exact.error == pytest.approx(0, abs=1e-9)
    found = power_law(xs, [3 * x**exponent * math.exp(rng.gauss(0, 0.1)) for x in xs])
    assert abs(found.exponent - exponent) < 3 * found.error
    assert 0 < found.error < 0.1


def test_two_points_have_a_law_without_an_error_and_one_has_none() -> None:
    assert power_law([1, 2], [1, 4]).error == 0
    for xs, ys in (([1], [1]), ([2, 2], [1, 3]), ([0, 1], [1, 2]), ([1, 2], [0, 2])):
        with pytest.raises(ValueError, match="No power law goes through"):
            power_law(xs, ys)
