"""``kvcycle faults``: the whole catalogue against a live engine, and the matrix of what caught what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvcycle.command_line import ProfileOption, ReportDirOption, SetOption, sentences, teller
from kvcycle.errors import KVCycleError
from kvcycle.profile_file import load_profile, parse_overrides
from kvcycle.report import terminal
from kvcycle.report.folder import new_run_dir


def faults_command(
    profile: ProfileOption = "tiny",
    assignments: SetOption = None,
    only: Annotated[str, typer.Option(help="only the faults whose name contains this")] = "",
    show_list: Annotated[bool, typer.Option("--list", help="list the faults and run none")] = False,
    report_dir: ReportDirOption = Path("reports"),
) -> None:
    """Plant every fault into a live engine on virtual CPU devices; exit code 1 if one slips past the checks."""
    console = terminal.console()
    say = teller(console)
    with sentences():
        loaded = load_profile(profile, parse_overrides(assignments or []))
        loaded.check_geometry("cpu")
        from kvcycle import platform as platforms

        platforms.prepare("cpu", loaded.devices_needed)
        from kvcycle.faults.campaign import CATALOGUE

        chosen = [fault for fault in CATALOGUE if only in fault.id]
        if not chosen:
            raise KVCycleError(f"No fault has {only!r} in its name; `kvcycle faults --list` names them.")
        if show_list:
            table = Table("fault", "what is planted", "must turn red", show_lines=False)
            for fault in chosen:
                table.add_row(fault.id, fault.what, ", ".join(sorted(fault.red)))
            console.print(table)
            return
        loaded.check_one_host("A campaign of faults")
        run_dir = new_run_dir(report_dir)

    import kvcycle
    from kvcycle.faults.campaign import Campaign
    from kvcycle.report import page
    from kvcycle.report.faults import save, show_matrix, summary, why_not
    from kvcycle.report.page import faults as faults_page

    say(f"booting {loaded.name} on {loaded.devices_needed} virtual CPU devices, for {len(chosen)} faults")
    results = []
    with kvcycle.boot(loaded, "cpu") as engine:
        campaign = Campaign(engine, loaded, progress=say)
        for run in dict.fromkeys(fault.run for fault in chosen):
            red = campaign.red_without_a_fault(run)
            if red:
                say(f"a clean run ({run}) is not clean, so that a campaign would prove nothing:")
                for verdict in red:
                    say(f"  {verdict.verdict} {verdict.id}: {verdict.message}")
                raise typer.Exit(1)
            say(f"control: a clean run ({run}) passes every check")
        for number, fault in enumerate(chosen, 1):
            result = campaign.run(fault)
            results.append(result)
            told = ", ".join(sorted(fault.red)) if result.caught else why_not(result)
            say(f"{number:2}/{len(chosen)} {'caught' if result.caught else 'NOT CAUGHT'} {fault.id}: {told}")
            save(results, run_dir / "faults.json")  # after each, so that nothing is lost
    show_matrix(results, console)
    line, good = summary(results, whole=not only)
    style = "bold green" if good else "bold red"
    console.print(f"[{style}]{'PASSED' if good else 'FAILED'}[/] \\[simulated-on-cpu] {line}", soft_wrap=True)
    reports = page.written(run_dir, lambda: faults_page.draw(results, name=loaded.name, whole=not only))
    console.print(reports, soft_wrap=True, markup=False)
    if not good:
        raise typer.Exit(1)
