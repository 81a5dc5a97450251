"""The suite in a process group of its own, with a fault planted in it, under a shell that must outlive it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from junitparser import Error, Failure, JUnitXml, Skipped

from kvcycle.record import Record

_SCRIPT = """
import ctypes, os, signal, sys, threading, time

import pytest

import kvcycle

booted_by_kvcycle = kvcycle.boot


def never(*_, **__):
    threading.Event().wait()


def broken(*_, **__):
    raise ZeroDivisionError("planted")


def before_the_boot():
    {before}


def after_the_boot(engine, scheduler, channel):
    {after}


def boot(*arguments):
    from kvcycle import inband

    before_the_boot()
    booted = booted_by_kvcycle(*arguments)
    channel = inband.channel_of(booted.engine)
    after_the_boot(booted.engine, channel.scheduler, channel)
    return booted


kvcycle.boot = boot
sys.exit(pytest.main(sys.argv[1:]))
"""

#: The suite made small, and the TPU compiler not asked, which takes longer than the rest. The shell's last word is the
#: run's exit code.
_SMALL = ("cycle.generate=false", "engine.tp_size=1", 'topology=""')
_SHELL = '"$@"; echo "the shell lives, code $?"'


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, what it printed, and its folder."""

    code: int
    output: str
    folder: Path

    def phases(self) -> list[str]:
        """Of the first cycle, as the record on disk has them."""
        return [phase.name for phase in Record.load(self.folder / "record.json").cycles[0].phases]

    def outcomes(self) -> Counter[str]:
        """Tests by outcome in the JUnit file."""
        kinds = {Failure: "failure", Error: "error", Skipped: "skipped"}
        return Counter(
            next((kinds[type(result)] for result in case.result), "passed")
            for suite in JUnitXml.fromfile(str(self.folder / "junit.xml"))
            for case in suite
        )

    def cause(self) -> str:
        """The text of the only error or failure in the JUnit file."""
        results = [
            r for suite in JUnitXml.fromfile(str(self.folder / "junit.xml")) for case in suite for r in case.result
        ]
        (bad,) = [result for result in results if isinstance(result, Error | Failure)]
        return f"{bad.message} {bad.text or ''}"


def run_planted(
    folder: Path, project_root: Path, *, before: str = "", after: str = "", keys: tuple[str, ...] = (),
    arguments: tuple[str, ...] = (), guard: bool = True, send: signal.Signals | None = None, when: str = "",
    limit_s: float = 180,
) -> Ended:  # fmt: skip
    """Run the suite to its end, which must come within ``limit_s``, leave no process behind and the shell alive.

    Args:
        folder: where the script and the reports are written.
        project_root: the folder of pyproject.toml.
        before: statements to run before the engine boots.
        after: statements to run when it has booted, with ``engine``, ``scheduler`` and ``channel`` at hand.
        keys: further ``--kv-set`` assignments.
        arguments: further arguments of pytest.
        guard: whether scripts/guard.py stands between the shell and the suite.
        send: a signal for the suite's process, sent as soon as it has printed ``when``.
        when: see ``send``.
    """
    script, reports = folder / "planted.py", folder / "reports"
    script.write_text(_SCRIPT.format(before=_body(before), after=_body(after)))
    command = [sys.executable, "-u", str(script), "-c", str(project_root / "pyproject.toml"), "tests/tpu", *arguments]
    command += ["-m", "tpu", "--kv-platform", "cpu", "--kv-cycles", "1", "--kv-report-dir", str(reports)]
    for key in (*_SMALL, *keys):
        command += ["--kv-set", key]
    if guard:
        command = [sys.executable, str(project_root / "scripts" / "guard.py"), *command]
    lines: list[str] = []
    with subprocess.Popen(
        ["sh", "-c", _SHELL, "sh", *command], cwd=project_root, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as shell:  # fmt: skip
        too_long = threading.Timer(limit_s, _kill_session, (shell.pid,))
        too_long.start()
        try:
            assert shell.stdout is not None
            for line in shell.stdout:
                lines.append(line)
                if send is not None and when in line:
                    _suite_under(shell.pid, script).send_signal(send)
                    send = None
        except BaseException:
            _kill_session(shell.pid)
            raise
        finally:
            too_long.cancel()
    left_behind = _kill_session(shell.pid)
    output = "".join(lines)
    code = re.search(r"the shell lives, code (\d+)\n$", output)
    assert code is not None, f"the shell was killed, or the run took more than {limit_s:g} s:\n{output}"
    assert send is None, f"{when!r} was never printed:\n{output}"
    assert left_behind == [], output
    return Ended(int(code[1]), output, (reports / "latest").resolve())


def _body(statements: str) -> str:
    return textwrap.indent(textwrap.dedent(statements or "pass"), "    ").strip()


def _suite_under(shell: int, script: Path) -> psutil.Process:
    return next(p for p in psutil.Process(shell).children(recursive=True) if p.cmdline()[2:3] == [str(script)])


def _kill_session(session: int) -> list[psutil.Process]:
    """Kill whatever runs in a session, and return it; a process that has ended and waits to be reaped does not run."""
    killed = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                killed.append(process)
    return killed
