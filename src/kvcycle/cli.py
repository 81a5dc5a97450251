"""The command line: ``kvcycle report`` re-judges and prints a record, ``kvcycle profiles`` lists what can be run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvcycle.checks import judge, passed
from kvcycle.errors import KVCycleError
from kvcycle.profile import load_profile, profile_names
from kvcycle.record import Record
from kvcycle.report import terminal

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Validate that a KV cache's HBM can be lent.")


@app.command()
def report(record: Annotated[Path, typer.Argument(help="a record.json of any run")]) -> None:
    """Judge a record again and print it; exit code 1 if it does not pass."""
    try:
        loaded = Record.load(record)
    except KVCycleError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    verdicts = judge(loaded)
    terminal.show(loaded, verdicts, Console(highlight=False))
    if not passed(verdicts):
        raise typer.Exit(1)


@app.command()
def profiles() -> None:
    """List the profiles that come with kvcycle."""
    table = Table("profile", "model", "devices", "what it is")
    for name in profile_names():
        profile = load_profile(name)
        table.add_row(name, profile.model.path, str(profile.devices_needed), profile.description)
    Console().print(table)
