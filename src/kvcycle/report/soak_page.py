"""A soak as a page: its curves, figures and verdicts in one HTML file that needs no network."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kvcycle.checks import passed
from kvcycle.checks.soak import rss_medians
from kvcycle.checks.verdicts import tolerance_bytes
from kvcycle.record import OUTCOMES, Record, Soak, Verdict
from kvcycle.report.soak import compilations, growth_of, growth_sum
from kvcycle.text import signed_bytes

_MIB = 2**20
#: Told apart also by those who see few colours (Okabe and Ito), and by dashes where lines lie on each other.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_FLAT_BYTES = 8
_DASHES = ("solid", "dash", "dot", "dashdot")


def write(record: Record, verdicts: Sequence[Verdict], path: Path) -> None:
    """Write the page of a judged record to ``path``; nothing for a record without a soak."""
    if (soak := record.soak) is None:
        return
    from plotly.io import to_html  # takes a third of a second, which no other command should wait for

    counts = Counter(verdict.verdict for verdict in verdicts)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("kvcycle.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = templates.get_template("soak.html").render(
        record=record,
        name=record.profile.get("name", "?"),
        kinds=", ".join(sorted({device.kind for device in record.devices})),
        good=passed(list(verdicts)),
        counts=", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]),
        figures=_figures(record, soak),
        verdicts=_failures_first(verdicts),
        # Plotly's own markup, made of numbers and of the names in this module.
        curves=Markup(
            to_html(_curves(record, soak), include_plotlyjs=True, full_html=False, config={"displaylogo": False})
        ),
    )
    path.write_text(page, encoding="utf-8")


def _figures(record: Record, soak: Soak) -> list[tuple[str, str]]:
    growth = growth_sum(record, soak)
    figures = [
        ("Cycles", f"{len(soak.points):,} of {soak.cycles:,}"),
        ("Growth, all devices", signed_bytes(growth[-1]) if growth else "–"),
        ("Compilations and traces", f"{compilations(soak):,}"),
        ("Seconds a cycle, median", f"{statistics.median(p.seconds for p in soak.points):.3f}" if soak.points else "–"),
    ]
    if (ends := rss_medians(_rss(soak))) is not None:
        figures.append(("Resident memory, growth of medians", signed_bytes(ends[1] - ends[0])))
    return figures


def _failures_first(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The soak's verdicts and all that did not pass, those that failed first."""
    shown = [verdict for verdict in verdicts if verdict.id.startswith("soak.") or verdict.verdict != "pass"]
    return sorted(shown, key=lambda verdict: ("fail", "inconclusive", "not-run", "pass").index(verdict.verdict))


def _rss(soak: Soak) -> list[int]:
    return [point.rss_bytes for point in soak.points if point.rss_bytes is not None]


def _curves(record: Record, soak: Soak) -> Any:
    from plotly.graph_objects import Figure, Scatter
    from plotly.subplots import make_subplots

    rss = _rss(soak)
    titles = ["Ledger: growth since before the first drop (bytes)", "Seconds a cycle"]
    if rss:
        titles.insert(1, "Resident memory of the process (MiB)")
    figure: Figure = make_subplots(
        rows=len(titles), cols=1, shared_xaxes=True, vertical_spacing=0.09, subplot_titles=titles
    )
    cycles = list(range(1, len(soak.points) + 1))

    def draw(row: int, name: str, values: Sequence[float], color: int, *, width: float = 1.5, legend: bool) -> None:
        line = {
            "color": _COLORS[color % len(_COLORS)],
            "width": width,
            "dash": _DASHES[color % 4] if legend else "solid",
        }
        figure.add_trace(
            Scatter(x=cycles, y=values, name=name, mode="lines", line=line, showlegend=legend), row=row, col=1
        )

    growth = {device.id: growth_of(soak, device.id) for device in record.devices}
    for index, (device_id, values) in enumerate(growth.items()):
        draw(1, f"device {device_id}", values, index, width=2, legend=True)
    extremes = [extreme(values) for values in growth.values() if values for extreme in (min, max)]
    # The few bytes of the last batch look like what they are: never less than 16 bytes from bottom to top.
    low, high = min([-_FLAT_BYTES, *extremes]), max([_FLAT_BYTES, *extremes])
    figure.update_yaxes(range=[low - (high - low) * 0.05, high + (high - low) * 0.05], row=1, col=1)
    if rss:
        draw(2, "resident memory", [size / _MIB for size in rss], 0, legend=False)
        if (ends := rss_medians(rss)) is not None:
            allowed = ends[0] + tolerance_bytes(record, "rss", ends[0])
            figure.add_hline(
                y=allowed / _MIB, row=2, col=1, line_dash="dot", line_color="#888", line_width=1,
                annotation_text="allowed for the last tenth's median", annotation_position="bottom right",
            )  # fmt: skip
    draw(len(titles), "seconds", [point.seconds for point in soak.points], 0, legend=False)
    figure.update_yaxes(rangemode="tozero", row=len(titles), col=1)
    figure.update_yaxes(tickformat=",d", row=1, col=1)
    figure.update_xaxes(title_text="cycle", row=len(titles), col=1)
    figure.update_layout(
        height=260 * len(titles), margin={"l": 70, "r": 20, "t": 70, "b": 50}, template="plotly_white",
        legend={"orientation": "h", "y": 1.05, "yanchor": "bottom", "x": 0}, hovermode="x unified",
    )  # fmt: skip
    return figure
