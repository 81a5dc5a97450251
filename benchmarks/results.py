"""What a run of the benchmarks found: figures and curves by scenario, as JSON and back."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.stats import Interval, Outcome, PowerLaw, Sense, interval, outcome, power_law

#: Of the machine's cores, what others may take before nothing that was measured meanwhile is called a result.
QUIET = 0.05

Unit = Literal["x", "ms", "%", "compilations", "calls"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Target(_Part):
    """What a figure should reach.

    Attributes:
        sense: on which side of the limit.
        limit: in the figure's unit.
        best: what the figure would have been in each round, had nothing but the machine limited it; empty where nobody
            knows. A target that lies beyond is out of reach on that machine.
    """

    sense: Sense
    limit: float
    best: tuple[float, ...] = ()

    def is_out_of_reach(self) -> bool:
        """Whether even the best would miss it."""
        return bool(self.best) and outcome(interval(self.best), self.sense, self.limit) == "missed"


class Figure(_Part):
    """One number that was measured in several rounds."""

    name: str
    unit: Unit
    rounds: tuple[float, ...] = Field(min_length=1)
    target: Target | None = None

    @property
    def interval(self) -> Interval:
        """The median of the rounds and its interval."""
        return interval(self.rounds)

    def outcome(self, is_result: bool = True) -> Outcome | None:
        """Whether the target is met, by what is a result or not (see :class:`Scenario`); None without a target."""
        if self.target is None:
            return None
        if self.unit == "compilations":  # counted, not timed: no round may be off, and no load excuses one
            return "met" if max(self.rounds) <= self.target.limit else "missed"
        if not is_result:
            return "not resolved"
        found = outcome(self.interval, self.target.sense, self.target.limit)
        return "out of reach" if found != "met" and self.target.is_out_of_reach() else found


class Point(_Part):
    """One point of a curve: the seconds of every round at ``x``."""

    x: float
    rounds_s: tuple[float, ...] = Field(min_length=1)

    @property
    def interval(self) -> Interval:
        """The median of the rounds and its interval, in seconds."""
        return interval(self.rounds_s)


class Curve(_Part):
    """Seconds over something that grows, and the power law through the medians."""

    name: str
    x_name: str
    points: tuple[Point, ...] = Field(min_length=2)

    @property
    def law(self) -> PowerLaw:
        """The power law through the medians."""
        return power_law([point.x for point in self.points], [point.interval.median for point in self.points])


class Scenario(_Part):
    """What one process measured."""

    name: str
    title: str
    figures: tuple[Figure, ...] = ()
    curves: tuple[Curve, ...] = ()
    seconds: float
    #: What other processes, and a hypervisor, took of the machine's cores meanwhile.
    others_share: float
    #: Why the rounds are not of the state that they are meant to be of; "" if they are.
    disturbed: str = ""

    @property
    def why_no_result(self) -> str:
        """Why nothing that was timed is a result; "" if it is."""
        if self.others_share > QUIET:
            return f"others took {self.others_share:.0%} of the cores meanwhile (limit {QUIET:.0%})"
        return self.disturbed

    def outcomes(self) -> list[tuple[Figure, Outcome | None]]:
        """Every figure with its outcome."""
        return [(figure, figure.outcome(not self.why_no_result)) for figure in self.figures]


class Report(_Part):
    """A whole run."""

    version: Literal[1] = Field(default=1, alias="schema", serialization_alias="schema")
    evidence: str
    created: str
    stack: dict[str, str | None]
    cores: int
    memory_bytes: int
    scenarios: tuple[Scenario, ...]

    def outcomes(self) -> list[Outcome]:
        """The outcome of every target."""
        return [found for scenario in self.scenarios for _, found in scenario.outcomes() if found is not None]
