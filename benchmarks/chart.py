"""A run of the benchmarks as a page: ratios with their intervals and targets, and the curves. It needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import Curve, Figure, Report, Scenario
from benchmarks.table import number, summary

_COLORS = {"met": "#009E73", "missed": "#D55E00", "not resolved": "#E69F00", "out of reach": "#CC79A7", None: "#0072B2"}


def write(report: Report, path: Path) -> None:
    """Write the page to ``path``."""
    from plotly.io import to_html  # takes a third of a second

    parts: list[str] = []
    for figure in (_ratios(report), _curves(report)):
        if figure is not None:
            parts.append(to_html(figure, include_plotlyjs=not parts, full_html=False, config={"displaylogo": False}))
    versions = ", ".join(f"{name.replace('_', '-')} {report.stack[name]}" for name in ("sglang_jax", "jax"))
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>kvcycle benchmarks</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "h1{font-size:1.6rem;margin-bottom:0}</style></head><body>"
        f"<h1>kvcycle benchmarks</h1><p>{report.evidence}; {versions}; {report.cores} cores; {report.created}.<br>"
        f"{summary(report)}</p>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )


def _ratios(report: Report) -> Any:
    """Every ratio, its interval, and its target as a tick; logarithmic, so that a half and a double look alike."""
    from plotly.graph_objects import Figure as Plot
    from plotly.graph_objects import Scatter

    rows: list[tuple[Scenario, Figure]] = [
        (scenario, figure) for scenario in report.scenarios for figure in scenario.figures if figure.unit == "x"
    ]
    if not rows:
        return None
    plot = Plot()
    labels = [f"{figure.name}<br><i>{scenario.title.split(':')[0]}</i>" for scenario, figure in rows]
    outcomes = [figure.outcome(not scenario.why_no_result) for scenario, figure in rows]
    for outcome in dict.fromkeys(outcomes):
        chosen = [index for index, one in enumerate(outcomes) if one == outcome]
        found = [rows[index][1].interval for index in chosen]
        plot.add_trace(
            Scatter(
                x=[one.median for one in found],
                y=[labels[index] for index in chosen],
                mode="markers",
                name=outcome or "no target",
                marker={"color": _COLORS[outcome], "size": 11},
                error_x={
                    "array": [one.high - one.median for one in found],
                    "arrayminus": [one.median - one.low for one in found],
                    "thickness": 1.5,
                },
                hovertext=[f"{number(one.median)} ({number(one.low)} to {number(one.high)})" for one in found],
                hoverinfo="text",
            )
        )
    targets = [(figure.target, label) for (_, figure), label in zip(rows, labels, strict=True) if figure.target]
    if targets:
        plot.add_trace(
            Scatter(
                x=[target.limit for target, _ in targets], y=[label for _, label in targets], mode="markers",
                name="target", hovertext=[f"{target.sense} {number(target.limit)}" for target, _ in targets],
                hoverinfo="text", marker={"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": "#222"}},
            )
        )  # fmt: skip
    plot.update_xaxes(type="log", title_text="ratio of two times, median and 90 % interval")
    plot.update_yaxes(categoryorder="array", categoryarray=labels[::-1], automargin=True)
    plot.update_layout(
        height=140 + 48 * len(rows), template="plotly_white", margin={"l": 10, "r": 20, "t": 60, "b": 50},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    )  # fmt: skip
    return plot


def _curves(report: Report) -> Any:
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    curves: list[tuple[str, Curve]] = [(s.title, curve) for s in report.scenarios for curve in s.curves]
    if not curves:
        return None
    rows = -(-len(curves) // 2)
    titles = [f"{curve.name}<br>∝ {curve.x_name}^{curve.law.exponent:.2f}" for _, curve in curves]
    plot = make_subplots(rows=rows, cols=2, subplot_titles=titles, vertical_spacing=0.13, horizontal_spacing=0.12)
    for index, (_, curve) in enumerate(curves):
        row, col = index // 2 + 1, index % 2 + 1
        xs = [point.x for point in curve.points]
        found = [point.interval for point in curve.points]
        plot.add_trace(
            Scatter(
                x=xs, y=[one.median * 1000 for one in found], mode="markers", showlegend=False,
                marker={"color": _COLORS[None], "size": 8},
                error_y={
                    "array": [(one.high - one.median) * 1000 for one in found],
                    "arrayminus": [(one.median - one.low) * 1000 for one in found],
                },
            ),
            row=row, col=col,
        )  # fmt: skip
        law = curve.law
        plot.add_trace(
            Scatter(
                x=xs, y=[law.factor * x**law.exponent * 1000 for x in xs], mode="lines", showlegend=False,
                line={"color": "#888", "dash": "dot", "width": 1.5}, hoverinfo="skip",
            ),
            row=row, col=col,
        )  # fmt: skip
        plot.update_xaxes(type="log", title_text=curve.x_name, row=row, col=col)
        plot.update_yaxes(type="log", title_text="ms", row=row, col=col)
    plot.update_layout(height=360 * rows, template="plotly_white", margin={"l": 60, "r": 20, "t": 70, "b": 50})
    return plot
