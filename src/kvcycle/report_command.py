"""``kvcycle report`` and ``kvcycle compare``: records judged again, drawn again, and set side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcycle.checks import judge, passed
from kvcycle.command_line import sentences
from kvcycle.errors import KVCycleError
from kvcycle.record import Record
from kvcycle.record_parts import Verdict
from kvcycle.report import comparison, files, history, history_page, side_by_side, terminal
from kvcycle.report.regressions import is_prediction, regressions

_LATEST = Path("reports/latest")
_FAILED = 1
_DEFAULT_FIGURE = "after_rebuild_of_warm"


def report_command(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="RECORD", help="record.json of any runs, or the runs' folders")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="also write the report's files there")
    ] = None,
    over_time: Annotated[
        bool, typer.Option("--history", help="draw a figure over all the records; a folder stands for its runs")
    ] = False,
    figures: Annotated[
        list[str] | None,
        typer.Option("--figure", metavar="NAME", help=f"with --history; repeatable: {', '.join(history.FIGURES)}"),
    ] = None,
    recover: Annotated[
        bool, typer.Option("--recover", help="make the JUnit file of a run that was killed (reports/latest)")
    ] = False,
) -> None:
    """Judge records again and print them; exit code 1 if one does not pass, and always for a run that was killed."""
    console = terminal.console()
    with sentences():
        if recover:
            if over_time or output or figures or (paths and len(paths) > 1):
                raise KVCycleError("--recover takes one run's folder and no other option.")
            _show_recovered(paths[0] if paths else _LATEST, console)
            raise typer.Exit(_FAILED)
        if figures and not over_time:
            raise KVCycleError("--figure is drawn over many records: give --history as well.")
        if not paths:
            raise KVCycleError(
                "Name the record.json to judge, or --recover [RUN_DIR] for a run that was killed. With --history, "
                "name a folder of runs."
            )
        if over_time:
            _show_history(paths, figures or [_DEFAULT_FIGURE], output, console)
            return
        loaded = [(path, Record.load(record_file(path))) for path in paths]
        judged = [(path, record, judge(record)) for path, record in loaded]
        for path, record, verdicts in judged:
            if len(judged) > 1:
                console.rule(str(path), align="left")
            terminal.show(record, verdicts, console)
        if output is not None:
            _write(judged, output, console)
    if not all(passed(verdicts) for _, _, verdicts in judged):
        raise typer.Exit(_FAILED)


def compare_command(
    first: Annotated[Path, typer.Argument(help="A: a record.json or a run's folder; what was predicted, or before")],
    second: Annotated[Path, typer.Argument(help="B: what is held against it")],
) -> None:
    """Set two records side by side; exit code 1 on a regression from the first to the second."""
    with sentences():
        one, two = Record.load(record_file(first)), Record.load(record_file(second))
        if (reason := side_by_side.comparable(one, two)) is not None:
            raise KVCycleError(f"{first} and {second} cannot be compared: {reason}.")
    console = terminal.console()
    sides = [
        comparison.Side(letter, str(path), record, () if is_prediction(record) else tuple(judge(record)))
        for letter, path, record in (("A", first, one), ("B", second, two))
    ]
    comparison.show(sides[0], sides[1], console)
    found = regressions(one, two, sides[0].verdicts, sides[1].verdicts)
    comparison.show_judgement(one, two, found, console)
    if found:
        raise typer.Exit(_FAILED)


def record_file(path: Path) -> Path:
    """The record of a run's folder; any other path as it is."""
    return path / "record.json" if path.is_dir() else path


def _write(judged: Sequence[tuple[Path, Record, list[Verdict]]], output: Path, console: Console) -> None:
    """Write each record's files: into ``output``, or where there are several into a folder each."""
    taken: set[str] = set()
    for path, record, verdicts in judged:
        folder = output
        if len(judged) > 1:
            name = base = Path(history.called(record_file(path))).stem or "record"
            number = 1
            while name in taken:
                number += 1
                name = f"{base}-{number}"
            taken.add(name)
            folder = output / name
        try:
            written = files.write(record, verdicts, folder)
        except OSError as error:
            raise KVCycleError(f"The report cannot be written to {folder}: {error}.") from error
        for file in written:
            console.print(f"wrote {file}", markup=False, soft_wrap=True)


def _show_history(paths: Sequence[Path], figures: Sequence[str], output: Path | None, console: Console) -> None:
    for name in figures:
        history.figure(name)  # what is no figure is refused before the records are read

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    entries = history.collect(paths, say)
    for index, name in enumerate(figures):
        if index:
            console.print()
        history.show(entries, name, console)
    if output is not None:
        page = output / "history.html"
        try:
            output.mkdir(parents=True, exist_ok=True)
            history_page.write(entries, figures, page)
        except OSError as error:
            raise KVCycleError(f"The history cannot be written to {page}: {error}.") from error
        say(f"wrote {page}")


def _show_recovered(run_dir: Path, console: Console) -> None:
    from kvcycle.report.recover import last_phase, recover

    recovered = recover(run_dir)
    where = f"while {recovered.running} ran" if recovered.running else "after its last test, before its reports"
    told = f"The run was killed {where}. {last_phase(recovered.record)}"
    if recovered.record is not None:
        terminal.show(recovered.record, recovered.record.checks, console)
    if recovered.record_error is not None:
        console.print(recovered.record_error, markup=False, soft_wrap=True)
    console.print(told, markup=False, soft_wrap=True)
    numbers = ", ".join(f"{count} {outcome}" for outcome, count in sorted(recovered.outcomes.items()))
    console.print(f"Recovered {recovered.junit}: {numbers}.", markup=False, soft_wrap=True)
    for line in files.write_killed(recovered.record, told, run_dir):
        console.print(f"warning: {line}", markup=False, soft_wrap=True)
