"""How the tests call ``kvcycle vm``, and what they read of what it leaves."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from kvcycle.cli import app
from kvcycle.vm import run as steps
from tests.unit.vm.machine import NAME, PROJECT, ZONE, StandIn

WHERE = [NAME, f"--zone={ZONE}", f"--project={PROJECT}"]
CONDA = "--conda-env=sglang-jax"


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "what was waited for did not come about"
        time.sleep(0.02)
    return value


def vm_run(
    machine: StandIn,
    *arguments: str,
    pins: list[str] | None = None,
    further: tuple[str, ...] = (),
    conda: bool = True,
) -> Any:
    options = [*WHERE, f"--report-dir={machine.root / 'reports'}", *(machine.pins if pins is None else pins)]
    options += [CONDA] if conda else []
    return CliRunner().invoke(app, ["vm", "run", *options, *arguments, *(["--", *further] if further else [])])


def later(machine: StandIn, *arguments: str, further: tuple[str, ...] = (), conda: bool = True) -> Any:
    """The same command once more, when a run's name by the second is another one."""
    names = {path.name for path in machine.runs()}
    wait_for(lambda: steps.new_run_id() not in names)
    return vm_run(machine, *arguments, further=further, conda=conda)


def vm_stop(machine: StandIn, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["vm", "stop", *WHERE, *machine.pins, *arguments])


def report_folder(machine: StandIn) -> Path:
    (folder,) = (machine.root / "reports").glob(f"{NAME}-*")
    return folder


def log_of(folder: Path) -> str:
    (log,) = folder.glob("*.log")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ\.log", log.name)
    return log.read_text()


def numbered(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"line +(\d+) of the log", text)]


def refused(done: Any, machine: StandIn, *sentences: str, code: int = 2) -> None:
    """A refusal in sentences, before anything ran."""
    assert done.exit_code == code, done.output
    for sentence in sentences:
        assert sentence in done.stderr, done.stderr
    assert "Traceback" not in done.output
    assert not machine.runs()
