"""The command line: plan, replay at full size, plant faults, soak, report and compare records, list what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvcycle import compatibility, reference
from kvcycle.checks import judge, passed
from kvcycle.command_line import ProfileOption, ReportDirOption, SetOption, sentences, teller
from kvcycle.errors import KVCycleError
from kvcycle.faults.command import faults_command
from kvcycle.plan.command import plan_command
from kvcycle.profile_file import load_profile, parse_overrides, profile_names
from kvcycle.record import Record
from kvcycle.report import page, side_by_side, terminal
from kvcycle.report.folder import new_run_dir
from kvcycle.soak_command import soak_command

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Validate that a KV cache's HBM can be lent.")

app.command("plan")(plan_command)
app.command("faults")(faults_command)
app.command("soak")(soak_command)


@app.command()
def replay(
    profile: ProfileOption = "qwen2.5-3b-v4-8",
    assignments: SetOption = None,
    report_dir: ReportDirOption = Path("reports"),
) -> None:
    """Run the cycle at full size on virtual CPU devices with dummy weights, and compare with the reference."""
    from kvcycle.replay import replay as run

    console = terminal.console()
    with sentences():
        loaded = load_profile(profile, parse_overrides(assignments or []))
        run_dir = new_run_dir(report_dir)
        record = run(loaded, run_dir / "record.json", teller(console))
    terminal.show(record, record.checks, console)
    noted = reference.run_for(loaded.model_config_json() or {}, loaded.engine.max_total_tokens, loaded.engine.tp_size)
    equal = True
    if noted is not None:
        equal = side_by_side.show_reference(record, reference.load(), noted, console)
        console.print(
            "Every difference equals the reference to the byte." if equal else "[bold red]Not as in the reference.[/]"
        )
    console.print(page.written(run_dir, lambda: page.draw(record, record.checks)), markup=False, soft_wrap=True)
    if not (equal and passed(list(record.checks))):
        raise typer.Exit(1)


@app.command()
def report(
    path: Annotated[
        Path | None, typer.Argument(help="a record.json of any run; with --recover the run's folder")
    ] = None,
    recover: Annotated[
        bool, typer.Option("--recover", help="make the JUnit file of a run that was killed (reports/latest)")
    ] = False,
) -> None:
    """Judge a record again and print it; exit code 1 if it does not pass, and always for a run that was killed."""
    console = terminal.console()
    with sentences():
        if recover:
            _show_recovered(path or Path("reports/latest"), console)
            raise typer.Exit(1)
        if path is None:
            raise KVCycleError("Name the record.json to judge, or --recover [RUN_DIR] for a run that was killed.")
        loaded = Record.load(path)
    verdicts = judge(loaded)
    terminal.show(loaded, verdicts, console)
    if not passed(verdicts):
        raise typer.Exit(1)


def _show_recovered(run_dir: Path, console: Console) -> None:
    from kvcycle.report.recover import last_phase, recover

    recovered = recover(run_dir)
    if recovered.record is not None:
        terminal.show(recovered.record, recovered.record.checks, console)
    if recovered.record_error is not None:
        console.print(recovered.record_error, markup=False, soft_wrap=True)
    where = f"while {recovered.running} ran" if recovered.running else "after its last test, before its reports"
    numbers = ", ".join(f"{count} {outcome}" for outcome, count in sorted(recovered.outcomes.items()))
    console.print(f"The run was killed {where}. {last_phase(recovered.record)}", markup=False, soft_wrap=True)
    console.print(f"Recovered {recovered.junit}: {numbers}.", markup=False, soft_wrap=True)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="a record.json: predicted, or of another run")],
    second: Annotated[Path, typer.Argument(help="the record.json to compare with it")],
) -> None:
    """Compare two records phase by phase and device by device, exactly; exit code 1 if they differ."""
    with sentences():
        one, two = Record.load(first), Record.load(second)
        if (reason := side_by_side.comparable(one, two)) is not None:
            raise KVCycleError(f"{first} and {second} cannot be compared: {reason}.")
    console = terminal.console()
    side_by_side.show_comparison(one, two, console)
    different = side_by_side.differences(one, two)
    if different:
        console.print(f"[bold red]DIFFERENT[/] in {len(different)} places")
        raise typer.Exit(1)
    console.print("[bold green]EQUAL[/] to the byte, on every device and in every phase that both have")


@app.command()
def matrix() -> None:
    """Print what was run at which level: pools, geometries, engines; as Markdown, as docs/compatibility.md has it."""
    typer.echo(compatibility.markdown(), nl=False)


@app.command()
def profiles() -> None:
    """List the profiles that come with kvcycle."""
    table = Table("profile", "model", "devices", "what it is")
    with sentences():
        for name in profile_names():
            loaded = load_profile(name)
            table.add_row(name, loaded.model.path, str(loaded.devices_needed), loaded.description)
    terminal.console().print(table)
