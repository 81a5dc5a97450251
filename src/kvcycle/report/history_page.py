"""A history as a page: one curve for each group of records, in one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from kvcycle.report.history import Entry, figure, groups, shown
from kvcycle.text import printable

_CONFIG = {"displaylogo": False}


def write(entries: Sequence[Entry], figures: Sequence[str], path: Path) -> None:
    """Write the page of these figures to ``path``.

    Raises:
        OSError: it cannot be written.
    """
    from plotly.io import to_html  # takes a third of a second, which no other command should wait for

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("kvcycle.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    curves = [
        # Plotly's own markup; the records' words in it are escaped below.
        Markup(
            to_html(_curve(entries, name), include_plotlyjs=not index, full_html=False, config={"displaylogo": False})
        )
        for index, name in enumerate(figures)
    ]
    rows = [
        (group, printable(entry.name), entry.verdict, [shown(figure(name).of(entry.record)) for name in figures])
        for group, members in groups(entries).items()
        for entry in members
    ]
    page = templates.get_template("history.html").render(figures=figures, curves=curves, rows=rows, count=len(entries))
    path.write_text(page, encoding="utf-8")


def _curve(entries: Sequence[Entry], name: str) -> Any:
    from plotly.graph_objects import Figure, Scatter

    drawn: Figure = Figure()
    for group, members in groups(entries).items():
        values = [figure(name).of(entry.record) for entry in members]
        drawn.add_trace(
            Scatter(
                # Plotly reads its own tags in text.
                x=[str(escape(printable(entry.record.created))) for entry in members],
                y=values,
                name=str(escape(group)),
                mode="lines+markers",
                text=[
                    f"{escape(printable(entry.name))}: {shown(value)}, {entry.verdict}"
                    for value, entry in zip(values, members, strict=True)
                ],
                hovertemplate="%{x}<br>%{text}",
            )
        )
    drawn.update_layout(
        title=f"{name}: {figure(name).what}", height=380, template="plotly_white", showlegend=True,
        legend={"orientation": "h", "y": -0.25}, margin={"l": 70, "r": 20, "t": 60, "b": 60},
    )  # fmt: skip
    exact = all(isinstance(value, int) for entry in entries if (value := figure(name).of(entry.record)) is not None)
    drawn.update_yaxes(rangemode="tozero", tickformat=",d" if exact else "")
    return drawn
