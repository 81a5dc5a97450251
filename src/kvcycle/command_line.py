"""What the commands have in common: options, how they refuse, and the lines that tell where they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcycle.errors import KVCycleError

#: The exit code of what was refused before anything was measured.
BAD_INPUT = 2

ProfileOption = Annotated[str, typer.Option("--profile", "-p", help="profile by name or path")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="set a profile key; repeatable")
]
ReportDirOption = Annotated[Path, typer.Option(help="where the run gets a folder")]


@contextmanager
def sentences() -> Iterator[None]:
    """Print what kvcycle refuses as its sentence, with exit code 2; a traceback is for what nobody foresaw."""
    try:
        yield
    except KVCycleError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(BAD_INPUT) from error


def teller(console: Console) -> Callable[[str], None]:
    """A function that prints a line with the seconds since this was called."""
    started = time.monotonic()

    def say(line: str) -> None:
        console.print(f"kvcycle {time.monotonic() - started:7.1f} s  {line}", markup=False, soft_wrap=True)

    return say
