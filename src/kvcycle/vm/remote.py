"""What the VM is asked to do: ``remote.sh``, the command lines that call it, and the lines that it answers with."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvcycle.errors import VMError
from kvcycle.vm.stream import End

SCRIPT = Path(__file__).with_name("remote.sh")
#: Everything that kvcycle keeps on the VM, relative to the home folder.
BASE = "kvcycle-vm"
#: Exit codes of remote.sh.
BUSY, NO_RUN, BAD_DATA, NO_ENVIRONMENT = 75, 66, 65, 69

#: The first command: who and where one is, as the SOP asks, and a place for what comes. Safe to repeat.
HELLO = f"umask 077 && mkdir -p {BASE}/incoming {BASE}/runs && whoami && hostname && date -u"


def script_name() -> str:
    """Where the script goes on the VM: a new name for a new text, since one that runs must not change."""
    return f"{BASE}/remote-{hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]}.sh"


def call(command: str, *arguments: str) -> str:
    """The command line, quoted once for the VM's shell."""
    return shlex.join(["sh", script_name(), command, *arguments])


def bundle_name(revision: str) -> str:
    """Where the bundle goes on the VM."""
    return f"{BASE}/incoming/{revision}.bundle"


def bring(revision: str) -> str:
    """Checks the commit out of the bundle that has arrived."""
    return call("bring", revision)


def token_name(run: str) -> str:
    """Where the hub's token goes on the VM, until the run has read it."""
    return f"{BASE}/incoming/{run}.hf-token"


def log_name(run: str) -> str:
    """The log of a run on the VM, named by UTC time."""
    return f"{BASE}/runs/{run}/{run}.log"


def reports_name(run: str) -> str:
    """The reports of a run on the VM."""
    return f"{BASE}/runs/{run}/reports/latest"


@dataclass(frozen=True)
class Job:
    """One run of the suite: everything that makes two runs the same."""

    revision: str
    stack: str
    conda_env: str | None
    pytest_arguments: tuple[str, ...]
    workers: tuple[int, ...]

    @property
    def identity(self) -> str:
        """A digest: a run that lives is followed only by the same job."""
        parts = [self.revision, self.stack, self.conda_env or "-", repr(self.workers), *self.pytest_arguments]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def prepare(self) -> str:
        """Makes the environment, or keeps it."""
        return call("prepare", self.stack, self.conda_env or "-")

    def start(self, run: str, worker: int, *, token: bool, meeting: str | None = None) -> str:
        """Starts the suite detached, with reports in the run's own folder.

        Args:
            run: its id.
            worker: which host this is.
            token: whether the hub's token was sent.
            meeting: where the hosts of one run meet, as ``HOST:PORT``; None for one host.
        """
        return call(
            "start",
            run,
            self.identity,
            self.stack,
            self.conda_env or "-",
            str(worker),
            str(len(self.workers)),
            meeting or "-",
            token_name(run) if token else "-",
            *self.pytest_arguments,
            # relative to the checkout, where the suite runs; last, since a person may not move it
            f"--kv-report-dir=../runs/{run}/reports",
        )


@dataclass(frozen=True)
class Status:
    """The newest run on a host: its id and identity, how it stands, and whether its reports were brought."""

    run: str = ""
    identity: str = ""
    state: Literal["none", "running", "ended", "lost"] = "none"
    end: End | None = None
    collected: bool = False

    @classmethod
    def parse(cls, output: str) -> Status:
        """Read what ``remote.sh status`` printed.

        Raises:
            VMError: it is not that.
        """
        said = dict(line.split(maxsplit=1) for line in output.splitlines() if len(line.split()) >= 2)
        run, identity, collected = said.get("run", ""), said.get("identity", ""), "collected" in said
        match said.get("state", "").split():
            case ["none"]:
                return cls()
            case ["running"]:
                return cls(run, identity, "running")
            case ["lost"]:
                return cls(run, identity, "lost", End(None), collected)
            case ["ended", code] if code.isdecimal():
                return cls(run, identity, "ended", End(int(code)), collected)
        raise VMError(f"The VM said of its newest run what kvcycle does not understand: {output[-300:]!r}.")


@dataclass(frozen=True)
class Decision:
    """What to do about the runs that are there: start a new one, or follow the run with this id."""

    follow: str | None = None
    why: str = ""


def decide(statuses: dict[int, Status], identity: str, stop_command: str) -> Decision:
    """Start, or follow what lives or ended unseen.

    Raises:
        VMError: another run lives.
    """
    running = {worker: status for worker, status in statuses.items() if status.state == "running"}
    first = next(iter(statuses.values()))
    same = all(status.run == first.run and status.identity == identity for status in statuses.values())
    if running:
        if same:
            why = "of the same commit and arguments lives, and is followed from its beginning."
            return Decision(first.run, f"The run {first.run} {why}")
        ids = ", ".join(f"{status.run} on worker {worker}" for worker, status in running.items())
        raise VMError(
            f"Another run lives there ({ids}), of another commit or other arguments, and one has the TPU at a time. "
            "Wait for it, follow it from the commit and with the arguments it was started with, or end it: "
            f"{stop_command}"
        )
    if same and first.state != "none" and not all(status.collected for status in statuses.values()):
        return Decision(
            first.run,
            f"The run {first.run} of the same commit and arguments has ended, and nobody was there to see it: its log "
            "and reports are brought now. The same command starts a new run after that.",
        )
    return Decision()
