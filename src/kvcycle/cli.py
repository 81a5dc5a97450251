"""The command line: plan, replay at full size, plant faults, soak, run on a TPU VM, report and compare, list."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.table import Table

from kvcycle import compatibility, reference
from kvcycle.checks import passed
from kvcycle.command_line import ProfileOption, ReportDirOption, SetOption, sentences, teller
from kvcycle.faults.command import faults_command
from kvcycle.plan.command import plan_command
from kvcycle.profile_file import load_profile, parse_overrides, profile_names
from kvcycle.report import files, side_by_side, terminal
from kvcycle.report.folder import new_run_dir
from kvcycle.report_command import compare_command, report_command
from kvcycle.soak_command import soak_command
from kvcycle.vm.command import vm_app

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Validate that a KV cache's HBM can be lent.")

app.command("plan")(plan_command)
app.command("faults")(faults_command)
app.command("soak")(soak_command)
app.command("report")(report_command)
app.command("compare")(compare_command)
app.add_typer(vm_app, name="vm")


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
    if (problem := files.write_or_say(record, record.checks, run_dir)) is not None:
        console.print(f"warning: {problem}", markup=False, soft_wrap=True)
    terminal.show(record, record.checks, console)
    noted = reference.run_for(loaded.model_config_json() or {}, loaded.engine.max_total_tokens, loaded.engine.tp_size)
    equal = True
    if noted is not None:
        equal = side_by_side.show_reference(record, reference.load(), noted, console)
        console.print(
            "Every difference equals the reference to the byte." if equal else "[bold red]Not as in the reference.[/]"
        )
    console.print(files.where(run_dir), markup=False, soft_wrap=True)
    if not (equal and passed(list(record.checks))):
        raise typer.Exit(1)


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
