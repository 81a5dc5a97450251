"""``python -m benchmarks``: run the scenarios, print what they found, and say whether the targets are met."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks import chart, pages, table
from benchmarks.one import SCENARIOS, WHOLE_RUN
from benchmarks.results import Report, Scenario
from benchmarks.sizes import Scale
from kvcycle.command_line import ReportDirOption, sentences, teller
from kvcycle.errors import KVCycleError
from kvcycle.report.folder import new_run_dir
from kvcycle.report.terminal import console as make_console

#: Exit codes: a target was missed; none was, but the noise leaves one open.
MISSED, NOT_RESOLVED = 1, 3

_ROOT = Path(__file__).resolve().parent.parent
#: At full size: the KV cache, as much for another way's arrays, as much for the limit, and the engine.
_LEAST_MEMORY_BYTES = 8 * 2**30
_LAST_WORDS = 15
#: Ten times what the longest took on slow cores: one that takes longer does not end.
_LIMIT_S = 1800.0
_ONLY = "a scenario by name; repeatable. Only when named: " + ", ".join(sorted({*SCENARIOS} - {*WHOLE_RUN}))


class _ScaleName(StrEnum):
    FULL = "full"
    SMALL = "small"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option("--only", help=_ONLY)] = None,
    scale: Annotated[_ScaleName, typer.Option(help="small shows that everything runs, and measures nothing")] = (
        _ScaleName.FULL
    ),
    report_dir: ReportDirOption = Path("reports/bench"),
) -> None:
    """Measure the rebuild and what the suite costs, as ratios of things run in turn in one process."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    console = make_console()
    say = teller(console)
    with sentences():
        names = _chosen(only or [])
        _check_memory(scale.value)
        run_dir = new_run_dir(report_dir)
        scenarios: list[Scenario] = []
        failures: list[KVCycleError] = []
        for name in names:
            say(name)
            try:
                scenarios.append(_run(name, scale.value, run_dir))
            except KVCycleError as error:
                say(f"{name} failed; the others are measured all the same")
                failures.append(error)
        if not scenarios:
            raise failures[0]
    report = _report(scenarios)
    (run_dir / "bench.json").write_text(report.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")
    chart.write(report, run_dir / "bench.html")
    table.show(report, console)
    console.print(f"Reports: {run_dir} (bench.html has the curves, bench.json every round)", soft_wrap=True)
    with sentences():
        if failures:
            raise KVCycleError("\n".join(map(str, failures)))
    outcomes = report.outcomes()
    if "missed" in outcomes:
        raise typer.Exit(MISSED)
    if "not resolved" in outcomes:
        raise typer.Exit(NOT_RESOLVED)


def _chosen(only: list[str]) -> list[str]:
    unknown = [name for name in only if name not in SCENARIOS]
    if unknown:
        raise KVCycleError(f"There is no scenario {unknown[0]!r}; there are: {', '.join(SCENARIOS)}.")
    return [name for name in SCENARIOS if name in (only or WHOLE_RUN)]


def _check_memory(scale: Scale) -> None:
    free = psutil.virtual_memory().available
    if scale == "full" and free < _LEAST_MEMORY_BYTES:
        raise KVCycleError(
            f"The benchmarks need {_LEAST_MEMORY_BYTES:,} bytes of free memory, and {free:,} are free; "
            "end something else, or try --scale small."
        )


def _run(name: str, scale: Scale, run_dir: Path) -> Scenario:
    """Run one scenario in a process of its own; what it says goes into a log beside the reports."""
    file, log = run_dir / f"{name}.json", run_dir / f"{name}.log"
    environment = os.environ | pages.ENVIRONMENT[SCENARIOS[name][1]]
    # Set by a caller for other programs, they would change what is measured.
    for variable in {key for state in pages.ENVIRONMENT.values() for key in state}:
        if variable not in pages.ENVIRONMENT[SCENARIOS[name][1]]:
            environment.pop(variable, None)
    command = [sys.executable, str(_ROOT / "scripts" / "guard.py"), sys.executable, "-m", "benchmarks.one"]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, name, scale, str(file.resolve())],
            cwd=_ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            code = process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise KVCycleError(f"The scenario {name} did not end within {_LIMIT_S:g} s; its log is {log}.") from None
        except BaseException:
            process.terminate()  # the guard hands it on: nothing is left that measures on
            raise
    if code or not file.is_file():
        with log.open(encoding="utf-8", errors="replace") as lines:
            words = "".join(deque(lines, _LAST_WORDS))
        raise KVCycleError(f"The scenario {name} ended with exit code {code}. Its last words, of {log}:\n{words}")
    found = Scenario.model_validate_json(file.read_text(encoding="utf-8"))
    file.unlink()
    return found


def _report(scenarios: list[Scenario]) -> Report:
    from kvcycle.engine import stack

    return Report(
        schema=1,
        evidence="simulated-on-cpu",
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        stack=stack().model_dump(),
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        scenarios=tuple(scenarios),
    )


if __name__ == "__main__":
    app()
