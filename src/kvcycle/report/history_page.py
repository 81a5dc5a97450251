"""A history as a page: a curve for each figure and group of records, in one HTML file without scripts or a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from kvcycle.report.history import Entry, Figure, figure, groups, shown
from kvcycle.text import printable

#: Of a drawing, in its own units; it is as wide as the page has room for.
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 900.0, 200.0, 140.0, 16.0, 26.0


@dataclass(frozen=True)
class Point:
    """One record in a drawing: where, and what is said of it."""

    x: float
    y: float
    said: str
    failed: bool


@dataclass(frozen=True)
class Curve:
    """One figure of one group: its points, and the highest value, to which the axis goes from 0."""

    group: str
    points: tuple[Point, ...]
    highest: str
    first: str
    last: str

    @property
    def line(self) -> str:
        """The points as an SVG polyline takes them."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


def write(entries: Sequence[Entry], figures: Sequence[str], path: Path) -> None:
    """Write the page of these figures to ``path``.

    Raises:
        OSError: it cannot be written.
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("kvcycle.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    grouped = groups(entries)
    drawings = [
        (name, figure(name).what, [_curve(group, members, figure(name)) for group, members in grouped.items()])
        for name in figures
    ]
    rows = [
        (group, printable(entry.name), entry.verdict, [shown(figure(name).of(entry.record)) for name in figures])
        for group, members in grouped.items()
        for entry in members
    ]
    page = templates.get_template("history.html").render(
        figures=figures, drawings=drawings, rows=rows, count=len(entries), width=_WIDTH, height=_HEIGHT, left=_LEFT,
        top=_TOP, floor=_HEIGHT - _BOTTOM,
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def _curve(group: str, members: Sequence[Entry], chosen: Figure) -> Curve:
    found = [(entry, value) for entry in members if (value := chosen.of(entry.record)) is not None]
    highest = max((value for _, value in found), default=0)
    step = (_WIDTH - _LEFT - 20) / max(1, len(found) - 1)
    points = tuple(
        Point(
            x=_LEFT + 10 + index * step,
            y=_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * (value / highest if highest else 0),
            said=f"{printable(entry.name)}: {shown(value)}, {entry.verdict}",
            failed=entry.verdict == "FAILED",
        )
        for index, (entry, value) in enumerate(found)
    )
    ends = (printable(found[0][0].name), printable(found[-1][0].name)) if found else ("", "")
    return Curve(group, points, shown(highest), *ends)
