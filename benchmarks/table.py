"""A run of the benchmarks in a terminal, at 80 columns and in a log."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.results import Curve, Report, Scenario, Target
from benchmarks.stats import Outcome

_STYLE: dict[Outcome, str] = {"met": "green", "missed": "bold red", "not resolved": "yellow", "out of reach": "cyan"}
_UNITS = {"x": " x", "ms": " ms", "%": " %", "compilations": "", "calls": ""}


def show(report: Report, console: Console) -> None:
    """Print every scenario, its curves, and the line that sums up."""
    versions = ", ".join(f"{name.replace('_', '-')} {report.stack[name]}" for name in ("sglang_jax", "jax"))
    console.print(f"Benchmarks ({report.evidence}): {versions}, {report.cores} cores", style="bold")
    for scenario in report.scenarios:
        console.print()
        console.print(Text.assemble((scenario.title, "bold"), f"  ({scenario.seconds:.0f} s)"))
        if scenario.figures:
            console.print(_figures(scenario))
        if scenario.curves:
            console.print(_curves(scenario.curves))
        if scenario.why_no_result:
            console.print(f"  NOT A RESULT: {scenario.why_no_result}.", style="yellow")
    console.print()
    measured_s = sum(scenario.seconds for scenario in report.scenarios)
    console.print(f"Measured in {measured_s:.0f} s, without starting python for each.")
    console.print(Text(summary(report), style="bold"))


def summary(report: Report) -> str:
    """How many targets are met, missed, open and out of reach, and what an open one needs."""
    counts = Counter(report.outcomes())
    if not counts:
        return "No target was measured."
    line = ", ".join(f"{counts[outcome]} {outcome}" for outcome in _STYLE if counts[outcome])
    sentences = [line]
    if counts["not resolved"]:
        sentences.append(
            "Not resolved: rounds lie on both sides of the target, or the machine was not quiet; run again"
        )
    if counts["out of reach"]:
        sentences.append(
            "Out of reach: on this machine all cores together could not do it, with plain stores or a memset by buffer"
        )
    return ". ".join(sentences) + "."


def _figures(scenario: Scenario) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("in turn, median of rounds", overflow="fold")
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("90 % interval", justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("target", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for figure, outcome in scenario.outcomes():
        found = figure.interval
        table.add_row(
            Text(figure.name),
            number(found.median) + _UNITS[figure.unit],
            f"{number(found.low)} – {number(found.high)}",
            str(len(figure.rounds)),
            _target(figure.target),
            Text(outcome, style=_STYLE[outcome]) if outcome else "",
        )
    return table


def _curves(curves: tuple[Curve, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("curve", overflow="fold")
    table.add_column("from", justify="right", no_wrap=True)
    table.add_column("to", justify="right", no_wrap=True)
    table.add_column("grows as", justify="right", no_wrap=True)
    for curve in curves:
        first, last, law = curve.points[0], curve.points[-1], curve.law
        ends = [f"{number(p.x)} in {number(p.interval.median * 1000)} ms" for p in (first, last)]
        table.add_row(Text(curve.name), *ends, f"{curve.x_name}^{law.exponent:.2f} ± {law.error:.2f}")
    return table


def _target(target: Target | None) -> str:
    if target is None:
        return ""
    return f"{'≤' if target.sense == 'at most' else '≥'} {number(target.limit)}"


def number(value: float) -> str:
    """Three significant figures, without an exponent: ``0.0123``, ``1.23``, ``123``, ``12,345``; near 1 ``1.0012``."""
    if value == 0:
        return "0"
    if 0 < abs(value - 1) < 0.01:  # as good as 1, and a limit may be 1.01
        return f"{value:.4f}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.5f}"
