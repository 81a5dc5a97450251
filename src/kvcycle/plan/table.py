"""A plan for people: what each phase takes, what is left, what the steps take, and what dropping buys."""

from __future__ import annotations

import re
from itertools import groupby, zip_longest

import humanize
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvcycle import reference
from kvcycle.plan.model import ForwardPlan, MaxTokens, PhasePlan, Plan, TokenLimit
from kvcycle.record_parts import Owner
from kvcycle.report.hosts import of_hosts
from kvcycle.text import exact_bytes

_WORDS: dict[Owner, str] = {"weights": "weights", "kv": "KV", "params2": "2nd set", "other": "other"}

#: Stands in every line that says TPU; a record of another evidence cannot be in a plan.
_LABEL = escape("[compiled-for-tpu]")

#: From this many columns on a phase's name stands in one line; below it, exact bytes still do.
_WIDE = 96
_NARROW_NAME = 22


def show(plan: Plan, console: Console) -> None:
    """Print a plan: its evidence and capacity, the phases, the steps if there are any, and the verdict."""
    record = plan.record
    count, kind = len(record.devices), record.devices[0].kind
    stack = record.stack
    console.print(
        f"[bold]{_LABEL}[/] {escape(str(record.profile['name']))} on {plan.topology}: "
        f"{count:,} {escape(kind)} device{'s' if count > 1 else ''}{of_hosts(record)}",
        soft_wrap=True,
    )
    console.print(
        f"by libtpu {escape(stack.libtpu or '?')}, jax {escape(stack.jax)}, sglang-jax {escape(stack.sglang_jax)}",
        soft_wrap=True,
    )
    console.print(f"capacity  {exact_bytes(plan.capacity_bytes)} on a device")
    tokens = record.profile["engine"]["max_total_tokens"]
    console.print(f"weights   {exact_bytes(record.params.bytes_on_devices)} summed, {record.params.arrays} arrays")
    console.print(f"KV cache  {exact_bytes(record.kv.bytes)} summed, {record.kv.buffers} buffers, {tokens:,} tokens")
    if record.kv.predicted_bytes is not None and record.kv.predicted_bytes != record.kv.bytes:
        console.print(
            f"  the config's arithmetic says {exact_bytes(record.kv.predicted_bytes)}: the rest is the layout's padding"
        )
    console.print(_phase_table(plan, console.width))
    if plan.forward:
        console.print()
        console.print(_forward_table(plan))
    console.print(verdict(plan))
    for note in _notes(plan):
        console.print(f"[dim]{escape(note)}[/]")


def verdict(plan: Plan) -> str:
    """One line, with rich markup: that everything fits, or what does not, and by how many bytes on a device."""
    misfits = f"[bold red]DOES NOT FIT[/] {_LABEL} on {plan.topology}"
    if (misfit := plan.first_misfit) is not None:
        others = sum(not phase.fits for phase in plan.phases) - 1
        least = "" if misfit.exact else "at least "
        return (
            f"{misfits}: {misfit.name} ({_held(misfit)}) is {least}"
            f"{exact_bytes(-misfit.headroom_bytes)} over on each device"
            + (f", and {others} more phase{'s' if others > 1 else ''}" if others else "")
        )
    for step in plan.forward:
        if not step.fits:
            return f"{misfits}: {_step(step)}: {escape(step.refusal or '')}"
        if not step.fits_with_params2 and step.headroom_with_params2_bytes is not None:
            return (
                f"{misfits}: {_step(step)} beside a second parameter set is "
                f"{exact_bytes(-step.headroom_with_params2_bytes)} over on each device"
            )
    return (
        f"[bold green]FITS[/] {_LABEL} on {plan.topology}: every phase, with {exact_bytes(plan.headroom_bytes)} or "
        "more left on each device"
    )


def show_max_tokens(limits: MaxTokens, console: Console) -> None:
    """Print the token limits and what dropping the KV cache buys."""
    console.print(
        f"[bold]{_LABEL}[/] {escape(limits.profile)} on {limits.topology}: the largest "
        f"engine.max_total_tokens (page_size {limits.page_size})",
        soft_wrap=True,
    )
    for words, limit in (
        ("beside a second parameter set", limits.with_params2),
        ("with one parameter set", limits.without_params2),
    ):
        console.print(f"{words:<30} {limit.tokens:>14,}  {_left(limit)}")
    console.print(what_dropping_buys(limits))


def what_dropping_buys(limits: MaxTokens) -> str:
    """One sentence: the tokens that a second set costs while it stays, and drop and rebuild give back."""
    together, alone = limits.with_params2.tokens, limits.without_params2.tokens
    if alone == 0:
        return "The weights alone leave no room for a KV cache on this topology."
    if not limits.params2_fits_alone:
        return "Two parameter sets do not fit on a device together: dropping the KV cache is not enough here."
    if together == 0:
        return (
            f"Dropping buys all {alone:,} tokens: beside a second parameter set no KV cache fits, and with a drop "
            "before it and a rebuild after it both have their turn."
        )
    gain = alone - together
    share = f" ({gain / together:.1%} more)" if gain / together >= 0.001 else ""
    return (
        f"Dropping buys {gain:,} tokens{share}: a second set that "
        "lives only between drop and rebuild takes no room from the KV cache."
    )


def _phase_table(plan: Plan, width: int) -> Table:
    """One row for each run of phases that hold the same buffers: rounded sizes, and the exact ones below them."""
    gap = 1 if width >= _WIDE else 0
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
    table.add_column("phase", no_wrap=True)
    for heading in ("summed", "on a device", "headroom"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for index, (_, group) in enumerate(groupby(plan.phases, key=lambda phase: phase.held)):
        phases = list(group)
        first = phases[0]
        if index:
            table.add_section()
        sizes = (first.bytes_sum, first.bytes_per_device, first.headroom_bytes)
        least = "" if first.exact else "≥ "
        figures: list[tuple[str, ...]] = [
            (*(_rounded(size) for size in sizes), "[green]yes[/]" if first.fits else "[bold red]no[/]"),
            tuple(f"{least}{size:,} B" for size in sizes),
        ]
        names = [line for phase in phases for line in (_folded(phase.name) if width < _WIDE else [phase.name])]
        for name, cells in zip_longest([*names, f"[dim]({_held(first)})[/]"], figures, fillvalue=()):
            table.add_row(name or "", *cells)
    return table


def _folded(name: str) -> list[str]:
    """A phase's name in lines of up to 22 characters, broken behind an underscore."""
    lines = [""]
    for word in re.findall(r"[^_]+_?", name):
        if len(lines[-1] + word) > _NARROW_NAME:
            lines.append("  ")
        lines[-1] += word
    return lines


def _forward_table(plan: Plan) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 0),
        title_justify="left",
        title="the model's steps, on a device",
        title_style="bold",
    )
    table.add_column("", no_wrap=True)
    for step in plan.forward:
        table.add_column(_step(step), justify="right", min_width=28)
    rows: tuple[tuple[str, str], ...] = (
        ("arguments", "argument_bytes"),
        ("output", "output_bytes"),
        ("aliased to arguments", "alias_bytes"),
        ("temporaries", "temporary_bytes"),
        ("program", "program_bytes"),
        ("headroom", "headroom_bytes"),
        ("headroom, 2nd set held", "headroom_with_params2_bytes"),
    )
    for label, name in rows:
        values = [getattr(step, name) for step in plan.forward]
        table.add_row(label, *("refused" if value is None else exact_bytes(value) for value in values))
    table.add_row("KV cache donated", *(_donated(step) for step in plan.forward))
    table.add_row("compiled in", *(f"{step.seconds:.0f} s" for step in plan.forward))
    return table


def _donated(step: ForwardPlan) -> str:
    if step.kv_donated is None:
        return "refused"
    return f"in full ({step.kv_bytes:,} B)" if step.kv_donated else f"[bold red]no: {step.alias_bytes:,} B[/]"


def _step(step: ForwardPlan) -> str:
    requests = f"{step.batch} request{'s' if step.batch > 1 else ''}"
    return f"{step.step} of {step.tokens:,} token{'s' if step.tokens > 1 else ''} ({requests})"


def _left(limit: TokenLimit) -> str:
    proof = f"{limit.refused_tokens:,} is {limit.missing_bytes:,} B over"
    return f"({limit.headroom_bytes:,} B left; {proof})" if limit.headroom_bytes is not None else f"({proof})"


def _rounded(size: int) -> str:
    """``19.45 GiB``, ``-3.71 GiB``: two decimals; the exact number stands below it."""
    return humanize.naturalsize(size, binary=True, format="%.2f")


def _held(phase: PhasePlan) -> str:
    return " + ".join(_WORDS[owner] for owner in phase.held)


def _notes(plan: Plan) -> list[str]:
    noted = reference.load()
    run, evidence = noted.runs[0], noted.evidence
    others = run.bytes_in_use["flush_cache_before_kv_drop"] - run.kv_bytes - run.params_bytes
    counted = (
        "Counted are weights, KV cache and second set, and the few KiB of the program that asks. Not counted is what "
        f"else an engine allocates; the reference run ({evidence}) had {others:,} B of it, summed over its devices."
    )
    notes = [counted]
    if plan.engine_token_cap is not None:
        wanted = plan.record.profile["engine"]["max_total_tokens"]
        notes.append(
            f"By engine.mem_fraction_static the engine would itself lower max_total_tokens from {wanted:,} to about "
            f"{plan.engine_token_cap:,}."
        )
    prefills = [step.tokens for step in plan.forward if step.step == "prefill"]
    if prefills and max(prefills) < plan.largest_prefill_tokens:
        notes.append(
            f"The engine also runs prefills of up to {plan.largest_prefill_tokens:,} tokens, whose temporaries are "
            f"larger: --prefill-tokens {plan.largest_prefill_tokens} compiles that one."
        )
    return notes
