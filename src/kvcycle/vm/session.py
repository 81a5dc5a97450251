"""A pinned connection to a VM: gcloud is there and logged in, the VM is READY, and its host keys are the right ones."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvcycle.checkpoint import cache_root
from kvcycle.errors import VMError
from kvcycle.text import printable
from kvcycle.vm import explain, gcloud, host_key, remote
from kvcycle.vm.gcloud import Node, Route, Target
from kvcycle.vm.shell import Done, Shell


def work_folder(target: Target) -> Path:
    """A private folder for what travels to and from this VM, and for the known_hosts file that has its pins."""
    root = cache_root() / "vm"
    gcloud.plain_path("The cache folder", root, "Set KVCYCLE_CACHE to another folder.")
    folder = root / f"{target.project.replace(':', '_')}-{target.zone}-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise VMError(f"{folder} cannot be used ({error.strerror}). Set KVCYCLE_CACHE to another folder.") from error
    return folder


@dataclass
class Session:
    """What every step needs: the VM, its hosts, the pins, and how to run and to tell."""

    target: Target
    asked_workers: str
    pins: tuple[str, ...]
    shell: Shell
    say: Callable[[str], None]
    work: Path
    workers: tuple[int, ...] = ()
    #: Where the hosts of one run meet, as ``HOST:PORT``; None where there is one.
    meeting: str | None = None

    @property
    def known_hosts(self) -> Path:
        """The file that ssh is given, with the pinned keys and no others."""
        return self.work / "known_hosts"

    def open(self) -> None:
        """Check gcloud, the VM and the host keys, connect to every worker, and bring the script.

        Raises:
            VMError: one of them is not as it must be.
        """
        self._check_gcloud()
        node = self._describe()
        self.workers = gcloud.workers_of(node, self.asked_workers, self.target.name)
        if len(self.workers) > 1:
            self.meeting = gcloud.meeting_place(node, self.target.name)
        self._pin(node)
        self._introduce()
        for worker in self.workers:
            lines = self.ssh(worker, "Connecting", remote.HELLO).split("\n")
            self.say(f"worker {worker}: connected, {printable(' '.join(lines[:2]).strip())}")
            self.scp_to(worker, "Copying the script", remote.SCRIPT, remote.script_name())

    def _check_gcloud(self) -> None:
        if shutil.which("gcloud") is None:
            raise VMError(explain.no_gcloud())
        done = self.shell.run(gcloud.active_account())
        if done.code != 0:
            raise VMError(explain.no_account(done))
        if not done.stdout.strip():
            raise VMError(explain.not_logged_in())

    def _describe(self) -> Node:
        done = self.shell.run(gcloud.describe(self.target))
        if done.code != 0:
            raise VMError(explain.failure("Looking the VM up", done, self.target, 0))
        node = Node.parse(done.stdout)
        if (reason := gcloud.not_ready(node, self.target)) is not None:
            raise VMError(reason)
        self.say(f"{self.target.name} is READY: {node.accelerator}, {len(node.hosts)} host(s)")
        return node

    def _pin(self, node: Node) -> None:
        lines = []
        for worker in self.workers:
            if self.target.route is Route.IAP:  # no address to ask; the connection itself is still held to the pin
                offered = host_key.parse_guest_attributes(
                    self.shell.run(gcloud.guest_host_keys(self.target, worker)).stdout
                )
            else:
                offered = self._scan(node.host(worker, self.target.route), worker)
            key = host_key.choose(offered, self.pins, self.target, worker)
            lines.append(host_key.known_hosts_line(gcloud.host_key_alias(self.target, worker), key))
            self.say(f"worker {worker}: host key {key.fingerprint} is the pinned one")
        self.known_hosts.write_text("".join(lines), encoding="ascii")

    def _scan(self, host: str, worker: int) -> list[host_key.HostKey]:
        done = self.shell.run(gcloud.keyscan(host))
        offered = host_key.parse_keyscan(done.stdout)
        if not offered:
            raise VMError(
                explain.failure(f"Asking {host} for its host keys", Done(255, "", done.stderr), self.target, worker)
            )
        return offered

    def _introduce(self) -> None:
        done = self.shell.run(gcloud.introduce(self.target, self.workers[0]))
        if done.code != 0:
            raise VMError(explain.failure("Preparing the SSH key", done, self.target, self.workers[0]))
        user = gcloud.ssh_user(done.stdout.splitlines())
        if user is None:
            raise VMError("gcloud did not say as which user it connects: give one with --user.")
        if self.target.user is None:
            self.target = dataclasses.replace(self.target, user=user)

    def ssh(self, worker: int, step: str, command: str, on_line: Callable[[bytes], bool | None] | None = None) -> str:
        """Run a command on a worker and return what it printed.

        Raises:
            VMError: it failed; the sentence says why.
        """
        done = self.try_ssh(worker, command, on_line)
        if done.code != 0:
            raise VMError(explain.failure(step, done, self.target, worker, self.pins))
        return done.stdout

    def try_ssh(self, worker: int, command: str, on_line: Callable[[bytes], bool | None] | None = None) -> Done:
        """Run a command on a worker, and say how it ended."""
        return self.shell.run(gcloud.ssh(self.target, worker, self.known_hosts, command), on_line)

    def scp_to(self, worker: int, step: str, local: Path, remote_path: str) -> None:
        """Copy a file to a worker.

        Raises:
            VMError: it failed; the sentence says why.
        """
        done = self.shell.run(gcloud.scp_to(self.target, worker, self.known_hosts, local, remote_path))
        if done.code != 0:
            raise VMError(explain.failure(step, done, self.target, worker, self.pins))

    def scp_from(self, worker: int, step: str, remote_path: str, local: Path) -> None:
        """Copy a folder from a worker.

        Raises:
            VMError: it failed; the sentence says why.
        """
        done = self.shell.run(gcloud.scp_from(self.target, worker, self.known_hosts, remote_path, local))
        if done.code != 0:
            raise VMError(explain.failure(step, done, self.target, worker, self.pins))


def harmless(text: str) -> str:
    """A log's text for a terminal: line breaks and tabs as they are, everything else that it could obey escaped."""
    return re.sub(r"[^\n\t]+", lambda found: printable(found.group()), text)
