"""Run a command and outlive its crash: guard.py COMMAND [ARGUMENT...]

When its scheduler dies, sglang-jax sends SIGQUIT to its parent process. Were that make, a shell or a CI runner, the run
would end without a report or an exit code. The guard stands between: it survives SIGQUIT, waits for the command, and
exits as the command did. Two results that would mislead are mended: a command that ends well after its engine crashed
has failed, and one killed by a signal is said to be.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


def say(sentence: str) -> None:
    print(f"guard: {sentence}", file=sys.stderr, flush=True)


def run(command: list[str]) -> int:
    """Run the command in this process group, so that a terminal's Ctrl-C reaches it, and return an exit code."""
    child: subprocess.Popen[bytes] | None = None
    crashed = False

    def forward(number: int, _frame: FrameType | None) -> None:
        if child is None:
            sys.exit(128 + number)
        child.send_signal(number)

    def survive(_number: int, _frame: FrameType | None) -> None:
        nonlocal crashed
        crashed = True
        say("SIGQUIT arrived, which is how sglang-jax tells its parent process that the engine crashed.")

    def wait_on(_number: int, _frame: FrameType | None) -> None:
        """The terminal has sent the same Ctrl-C to the command, which writes its report before it ends."""

    # Handlers, not SIG_IGN: an ignored signal would stay ignored in the command, a handled one is reset to its default.
    signal.signal(signal.SIGQUIT, survive)
    signal.signal(signal.SIGINT, wait_on)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)

    try:
        child = subprocess.Popen(command)
    except OSError as error:
        say(f"{command[0]} cannot be run: {error.strerror}.")
        return 127
    code = child.wait()

    if code < 0:
        killer = signal.Signals(-code).name
        say(f"{command[0]} was killed by {killer}; what it had reported by then is in reports/.")
        say("Of a run of the suite, 'kvcycle report --recover' makes the JUnit file.")
        return 128 - code
    return code or (128 + signal.SIGQUIT if crashed else 0)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("guard.py needs a command to run.")
    sys.exit(run(sys.argv[1:]))
