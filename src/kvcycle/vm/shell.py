"""Runs a command line, hands its output on line by line, and leaves none running behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kvcycle.errors import VMError

#: What ssh says when the host's key is not the one in its file. gcloud would try that ten more times.
_HOST_KEY_REFUSED = b"Host key verification failed"
_KEPT_LINES = 200


@dataclass(frozen=True)
class Done:
    """How a command ended: exit code, its standard output unless it was handed on, the end of its standard error."""

    code: int
    stdout: str
    stderr: tuple[str, ...]


@dataclass
class Shell:
    """Starts commands in process groups of their own: a terminal's Ctrl-C reaches kvcycle, which then ends them."""

    _live: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def run(
        self,
        argv: Sequence[str],
        on_line: Callable[[bytes], bool | None] | None = None,
        *,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> Done:
        """Run a command to its end.

        Args:
            argv: the command and its arguments; no shell reads them.
            on_line: is given each line of standard output; True ends the command, whose work is then done.
            cwd: the folder to run it in.
            env: variables to add to the environment.

        Raises:
            VMError: the command is not installed.
        """
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                cwd=cwd,
                env={**os.environ, **(env or {})},
            )
        except OSError as error:
            raise VMError(f"{argv[0]} cannot be run here: {error.strerror}. Install it, or put it on PATH.") from error
        self._live.add(process)
        assert process.stdout is not None
        assert process.stderr is not None
        kept: deque[str] = deque(maxlen=_KEPT_LINES)
        errors = process.stderr

        def read_errors() -> None:
            for line in errors:
                kept.append(line.decode(errors="replace").rstrip())
                if _HOST_KEY_REFUSED in line:
                    _end(process)

        reader = threading.Thread(target=read_errors, daemon=True)
        reader.start()
        output: list[bytes] = []
        enough = False
        try:
            for line in process.stdout:
                if on_line is None:
                    output.append(line)
                elif enough := bool(on_line(line)):
                    break
        except BaseException:
            _end(process)
            raise
        finally:
            if enough:
                _end(process)
            process.stdout.close()
            code = process.wait()
            reader.join(timeout=5)
            if not reader.is_alive():  # else a process that outlived the command holds the pipe open
                process.stderr.close()
            self._live.discard(process)
        return Done(0 if enough else code, b"".join(output).decode(errors="replace"), tuple(kept))

    def close(self) -> None:
        """End whatever still runs."""
        for process in list(self._live):
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
