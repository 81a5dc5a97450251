"""``kvcycle plan``: the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvcycle.command_line import BAD_INPUT, ProfileOption, SetOption, sentences
from kvcycle.errors import KVCycleError, ProfileError
from kvcycle.plan import table
from kvcycle.plan.api import ask
from kvcycle.plan.model import MaxTokens, Plan
from kvcycle.plan.topologies import find_topology
from kvcycle.profile import Profile
from kvcycle.profile_file import load_profile, parse_overrides
from kvcycle.report import terminal

_DOES_NOT_FIT = 1


def plan_command(
    profile: ProfileOption,
    topologies: Annotated[
        list[str], typer.Option("--topology", "-t", help="a slice: v4-8, v5litepod-4, v6e-8, …; repeatable")
    ],
    assignments: SetOption = None,
    forward: Annotated[
        bool, typer.Option("--forward", help="also compile the model's prefill and decode steps (may take minutes)")
    ] = False,
    prefill_tokens: Annotated[
        int | None, typer.Option(min=1, help="the prefill that --forward compiles; default: the engine's smallest")
    ] = None,
    max_tokens: Annotated[
        bool, typer.Option("--max-tokens", help="find the largest engine.max_total_tokens that fits")
    ] = False,
    fail_if_it_does_not_fit: Annotated[
        bool, typer.Option("--fail-if-it-does-not-fit", help="exit with 1 if a topology cannot hold the cycle")
    ] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="write everything as JSON; - for standard output")
    ] = None,
    record_file: Annotated[
        Path | None, typer.Option("--record", metavar="FILE", help="write the record alone, for kvcycle compare")
    ] = None,
) -> None:
    """Ask the TPU compiler what fits on a TPU slice, phase by phase. No TPU is needed."""
    # Standard output is JSON's alone if it is asked for there.
    console = Console(stderr=True, highlight=False) if json_file == "-" else terminal.console()
    with sentences():
        loaded = load_profile(profile, parse_overrides(assignments or []))
        names = list(dict.fromkeys(find_topology(name).name for name in topologies))
        if record_file is not None and len(names) > 1:
            raise ProfileError("--record takes one topology: a record is of one machine.")
    plans, limits, failures = _ask_for_all(loaded, names, console, forward, prefill_tokens, max_tokens)
    if json_file is not None:
        _write_json(json_file, plans, limits, failures)
    if record_file is not None and plans:
        plans[0].record.save(record_file)
    if failures:
        raise typer.Exit(BAD_INPUT)
    if fail_if_it_does_not_fit and not all(plan.fits for plan in plans):
        raise typer.Exit(_DOES_NOT_FIT)


def _ask_for_all(
    profile: Profile,
    topologies: list[str],
    console: Console,
    forward: bool,
    prefill_tokens: int | None,
    max_tokens: bool,
) -> tuple[list[Plan], list[MaxTokens], dict[str, str]]:
    """Plan for each topology and print it; what one of them refuses does not keep the others from being planned."""
    plans: list[Plan] = []
    limits: list[MaxTokens] = []
    failures: dict[str, str] = {}
    phases = profile.engine.max_total_tokens is not None or not max_tokens
    for index, name in enumerate(topologies):
        try:
            with console.status(f"asking the TPU compiler for {name}" + (", minutes for its steps" if forward else "")):
                reply = ask(
                    profile,
                    name,
                    phases=phases,
                    forward=forward and phases,
                    prefill_tokens=prefill_tokens,
                    max_tokens=max_tokens,
                )
        except KVCycleError as error:
            failures[name] = str(error)
            typer.echo(str(error), err=True)
            continue
        if index:
            console.print()
        if reply.plan is not None:
            plans.append(reply.plan)
            table.show(reply.plan, console)
        if reply.max_tokens is not None:
            limits.append(reply.max_tokens)
            table.show_max_tokens(reply.max_tokens, console)
    return plans, limits, failures


def _write_json(target: str, plans: list[Plan], limits: list[MaxTokens], failures: dict[str, str]) -> None:
    whole: dict[str, Any] = {
        "evidence": "compiled-for-tpu",
        "plans": [plan.model_dump(mode="json", by_alias=True) for plan in plans],
        "max_tokens": [limit.model_dump(mode="json") for limit in limits],
        "failures": failures,
    }
    text = json.dumps(whole, indent=1)
    if target == "-":
        typer.echo(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        typer.echo(f"The plan cannot be written to {target}: {error}.", err=True)
        raise typer.Exit(BAD_INPUT) from error
