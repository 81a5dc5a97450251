"""``kvcycle soak``: the command, and how it tells where it is."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvcycle.checks import judge, passed
from kvcycle.checks.soak import MIN_CYCLES, violation
from kvcycle.command_line import ProfileOption, ReportDirOption, SetOption, sentences, teller
from kvcycle.profile import Platform, Profile
from kvcycle.profile_file import load_profile, parse_overrides
from kvcycle.record import Record
from kvcycle.record_parts import MAX_SOAK_CYCLES
from kvcycle.report import files, terminal
from kvcycle.report.folder import new_run_dir
from kvcycle.report.soak import growth_sum, progress_line

_VIOLATED, _INTERRUPTED = 1, 130

#: How often a log gets a line; a terminal's progress bar moves with every cycle.
_LINE_EVERY_S = 30.0


class _PlatformName(StrEnum):
    TPU = "tpu"
    CPU = "cpu"


def soak_command(
    cycles: Annotated[
        int, typer.Option("--cycles", "-n", min=MIN_CYCLES, max=MAX_SOAK_CYCLES, help="how many cycles")
    ] = 1000,
    profile: ProfileOption = "tiny",
    assignments: SetOption = None,
    platform: Annotated[_PlatformName, typer.Option(help="a TPU, or virtual CPU devices")] = _PlatformName.CPU,
    report_dir: ReportDirOption = Path("reports"),
) -> None:
    """Run many cycles on one engine; stop at the first byte that stays, compilation, or other output."""
    console = terminal.console()
    with sentences():
        loaded = load_profile(profile, parse_overrides(assignments or []))
        run_dir = new_run_dir(report_dir)
        record = _boot_and_soak(loaded, platform.value, cycles, run_dir / "record.json", console)
    if (problem := files.write_or_say(record, record.checks, run_dir)) is not None:
        console.print(f"warning: {problem}", markup=False, soft_wrap=True)
    terminal.show(record, record.checks, console)
    console.print(files.where(run_dir), markup=False, soft_wrap=True)
    if not passed(list(record.checks)):
        ran = len(record.soak.points) if record.soak else 0
        raise typer.Exit(_INTERRUPTED if 0 < ran < cycles and violation(record) is None else _VIOLATED)


def _boot_and_soak(profile: Profile, platform: Platform, cycles: int, save_to: Path, console: Console) -> Record:
    """Boot, soak, judge; the record with its verdicts is also in ``save_to``."""
    import kvcycle
    from kvcycle.predict import predict
    from kvcycle.soak import run_soak

    resolved = profile.on(platform)
    resolved.check_geometry(platform)
    resolved.check_one_host("A soak")
    with SoakProgress(console, cycles) as progress:
        progress.say("predicting the KV cache's size")
        predicted = predict(resolved, platform)
        progress.say(f"booting {resolved.name} on {resolved.devices_needed} {platform} devices")
        with kvcycle.boot(resolved, platform) as engine:
            measured = run_soak(
                engine,
                resolved,
                cycles,
                predicted=predicted,
                save_to=save_to,
                progress=progress.say,
                on_cycle=progress.cycle_ended,
            )
    record = measured.model_copy(update={"checks": tuple(judge(measured))})
    record.save(save_to)
    return record


class SoakProgress:
    """Tells where a soak is: a bar on a terminal; in a log a plain line every half minute, without escape codes."""

    def __init__(self, console: Console, cycles: int) -> None:
        self._console = console
        self._told = time.monotonic()
        #: Prints one line with the time since the beginning.
        self.say = teller(console)
        self._bar = Progress(
            TextColumn("soak"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("soak", total=cycles, start=False, figures="", visible=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def cycle_ended(self, record: Record) -> None:
        """Move the bar; or write a line, after the first cycle, every half minute, and at the end."""
        soak = record.soak
        if soak is None:
            return
        done = len(soak.points)
        if self._console.is_terminal:
            if done == 1:
                self._bar.start_task(self._task)
            self._bar.update(
                self._task, completed=done, visible=True, figures=f"growth {growth_sum(record, soak)[-1]:+,} B"
            )
            return
        now = time.monotonic()
        if done in (1, soak.cycles) or now - self._told >= _LINE_EVERY_S:
            self._told = now
            self.say(progress_line(record))
