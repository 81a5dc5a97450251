"""scripts/guard.py around commands that crash as the engine does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

GUARD = Path(__file__).parents[2] / "scripts" / "guard.py"
QUIT_PARENT = "import os, signal, sys, time; os.kill(os.getppid(), signal.SIGQUIT); time.sleep(0.1); "


def guarded(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GUARD), sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("code", [0, 1, 5])
def test_exits_as_the_command_did(code: int) -> None:
    result = guarded(f"raise SystemExit({code})")
    assert (result.returncode, result.stderr) == (code, "")


@pytest.mark.parametrize(("code", "expected"), [(0, 128 + signal.SIGQUIT), (3, 3)])
def test_survives_the_signal_of_a_crash_and_does_not_pass(code: int, expected: int) -> None:
    result = guarded(f"{QUIT_PARENT} sys.exit({code})")
    assert result.returncode == expected
    assert result.stderr.startswith("guard: SIGQUIT arrived, which is how sglang-jax tells its parent process")


def test_the_command_has_its_own_default_handling_of_the_signals() -> None:
    states = "(signal.getsignal(signal.SIGQUIT) is signal.SIG_DFL, signal.getsignal(signal.SIGINT).__name__)"
    command = [sys.executable, str(GUARD), sys.executable, "-c", f"import signal; print({states})"]
    # The guard itself is started with both ignored, as in a shell's background job.
    ignored = ["sh", "-c", "trap '' QUIT INT; exec \"$@\"", "sh", *command]
    result = subprocess.run(ignored, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "(True, 'default_int_handler')\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT, signal.SIGTERM])
def test_says_which_signal_killed_the_command(number: signal.Signals) -> None:
    result = guarded(f"import os; os.kill(os.getpid(), {int(number)})")
    assert result.returncode == 128 + number
    assert f"was killed by {number.name}; what it had reported by then is in reports/." in result.stderr
    assert "Of a run of the suite, 'kvcycle report --recover' makes the JUnit file." in result.stderr


def test_a_terminals_interrupt_reaches_the_command_which_ends_in_its_own_time() -> None:
    code = (
        "import time\n"
        "try: print('ready', flush=True); time.sleep(50)\n"
        "except KeyboardInterrupt: time.sleep(0.2); print('reported'); raise SystemExit(2)\n"
    )
    command = [sys.executable, str(GUARD), sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to the whole foreground group
        assert process.stdout.read() == "reported\n"
    assert process.returncode == 2


def test_passes_a_termination_on() -> None:
    code = "import time; print('ready', flush=True); time.sleep(50)"
    command = [sys.executable, str(GUARD), sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        process.terminate()
        process.wait(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - start < 30


def test_says_when_the_command_does_not_exist() -> None:
    command = [sys.executable, str(GUARD), "nowhere/pytest"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 127
    assert result.stderr == "guard: nowhere/pytest cannot be run: No such file or directory.\n"
