"""gcloud's command lines for one TPU VM, as lists of arguments; nothing here runs anything.

Two things about gcloud shape them. It puts its own ``-o`` options before those of ``--ssh-flag``, and OpenSSH keeps the
first value of an option: a known_hosts file of one's own counts only with ``--plain``, which leaves gcloud's options
away. And it splits each ``--ssh-flag`` at blanks: an option and its value are one word, ``-oNAME=VALUE``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from kvcycle.errors import VMError

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
_PROJECT = re.compile(r"([a-z][-a-z0-9.]*:)?[a-z][-a-z0-9]*[a-z0-9]")
_USER = re.compile(r"[A-Za-z_][-.\w]*", re.ASCII)

#: gcloud's own default; it makes the key at the first use.
DEFAULT_KEY = Path("~/.ssh/google_compute_engine")


class Route(StrEnum):
    """How the VM is reached."""

    EXTERNAL = "external"
    INTERNAL = "internal"
    IAP = "iap"


@dataclass(frozen=True)
class Target:
    """A TPU VM, and how to reach it.

    ``user`` is None until it is known: gcloud's own default, which OS Login may replace.
    """

    name: str
    zone: str
    project: str
    user: str | None = None
    route: Route = Route.EXTERNAL
    key_file: Path = DEFAULT_KEY

    def __post_init__(self) -> None:
        for what, value, pattern, example in (
            ("name", self.name, _NAME, "my-tpu"),
            ("zone", self.zone, _ZONE, "us-central2-b"),
            ("project", self.project, _PROJECT, "my-project"),
            ("user", self.user or "root", _USER, "root"),
        ):
            if not pattern.fullmatch(value):
                raise VMError(f"{value!r} is no {what} of a TPU VM; one looks like {example}.")
        plain_path("The SSH key's path", self.key_file.expanduser(), "Name another with --ssh-key-file.")

    @property
    def where(self) -> tuple[str, str]:
        """The two options that every command has."""
        return f"--zone={self.zone}", f"--project={self.project}"

    @property
    def address(self) -> str:
        """``user@name``, or the name alone."""
        return f"{self.user}@{self.name}" if self.user else self.name


def plain_path(what: str, path: Path, remedy: str) -> Path:
    """The path, if gcloud and OpenSSH take it as it is.

    Raises:
        VMError: it has a blank (gcloud splits there), a colon (scp's separator), a percent sign or a quote (OpenSSH's).
    """
    if bad := sorted(set(re.findall(r"[\s:%\"'\\]", str(path)))):
        raise VMError(f"{what}, {str(path)!r}, has {' and '.join(map(repr, bad))}, which would not reach ssh. {remedy}")
    return path


def active_account() -> list[str]:
    """Prints the account that is logged in, or nothing."""
    return ["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]


def describe(target: Target, output: str = "json") -> list[str]:
    """Prints what the VM is, its state and its addresses."""
    return [*_tpu_vm(target, "describe"), target.name, *target.where, f"--format={output}"]


def guest_host_keys(target: Target, worker: int, output: str = "json") -> list[str]:
    """Prints the host keys that the VM's guest agent published at its boot: another channel than the connection."""
    command = [*_tpu_vm(target, "get-guest-attributes"), target.name, *target.where, "--query-path=hostkeys/"]
    return [*command, f"--filter=worker_id:{worker}", f"--format={output}"]


def keyscan(host: str) -> list[str]:
    """Prints the host keys that are offered at an address; authenticates nobody."""
    return ["ssh-keyscan", "-T", "10", "-t", "ed25519,ecdsa,rsa", host]


def introduce(target: Target, worker: int) -> list[str]:
    """Lets gcloud make the SSH key, hand it to the VM choose a user; ``ssh -G`` prints that and connects nowhere."""
    command = [*_tpu_vm(target, "ssh"), target.address, *target.where, "--quiet", f"--worker={worker}", *_route(target)]
    return [*command, f"--ssh-key-file={target.key_file.expanduser()}", "--ssh-flag=-G", "--command=true"]


def ssh(target: Target, worker: int, known_hosts: Path, command: str) -> list[str]:
    """Runs a command on the VM, over a connection whose host key must be in ``known_hosts``."""
    flags = [f"--ssh-flag={option}" for option in _pinned(target, worker, known_hosts)]
    return [
        *_tpu_vm(target, "ssh"),
        target.address,
        *target.where,
        "--quiet",
        f"--worker={worker}",
        *_route(target),
        "--plain",
        f"--ssh-key-file={target.key_file.expanduser()}",
        *flags,
        f"--command={command}",
    ]


def scp_to(target: Target, worker: int, known_hosts: Path, local: Path, remote: str) -> list[str]:
    """Copies a file to the VM; ``remote`` is relative to the home folder there."""
    return [*_scp(target, worker, known_hosts), str(local), f"{target.address}:{remote}"]


def scp_from(target: Target, worker: int, known_hosts: Path, remote: str, local: Path) -> list[str]:
    """Copies a folder from the VM, under its own name if ``local`` is there."""
    return [*_scp(target, worker, known_hosts), "--recurse", f"{target.address}:{remote}", str(local)]


def host_key_alias(target: Target, worker: int) -> str:
    """The name by which the known_hosts file has the host: addresses change, the pin does not."""
    return f"kvcycle-{target.name}-{worker}"


def _tpu_vm(target: Target, verb: str) -> list[str]:
    track = ["alpha"] if target.route is Route.IAP else []  # the only one whose ssh and scp have --tunnel-through-iap
    return ["gcloud", *track, "compute", "tpus", "tpu-vm", verb]


def _route(target: Target) -> list[str]:
    flags = {Route.EXTERNAL: [], Route.INTERNAL: ["--internal-ip"], Route.IAP: ["--tunnel-through-iap"]}
    return flags[target.route]


def _scp(target: Target, worker: int, known_hosts: Path) -> list[str]:
    command = [*_tpu_vm(target, "scp"), *target.where, "--quiet", f"--worker={worker}", *_route(target), "--plain"]
    flags = [f"--scp-flag={option}" for option in _pinned(target, worker, known_hosts)]
    return [*command, f"--ssh-key-file={target.key_file.expanduser()}", *flags]


def _pinned(target: Target, worker: int, known_hosts: Path) -> list[str]:
    return [
        f"-oIdentityFile={target.key_file.expanduser()}",
        "-oIdentitiesOnly=yes",
        f"-oUserKnownHostsFile={known_hosts}",
        "-oGlobalKnownHostsFile=/dev/null",
        "-oStrictHostKeyChecking=yes",
        f"-oHostKeyAlias={host_key_alias(target, worker)}",
        "-oUpdateHostKeys=no",
        "-oBatchMode=yes",  # a question that nobody sees would hang the run
        "-oForwardAgent=no",
        "-oConnectTimeout=20",
        "-oServerAliveInterval=15",
        "-oServerAliveCountMax=4",
    ]


@dataclass(frozen=True)
class Node:
    """What gcloud says of a VM: its state, its kind, and the (external, internal) address of each host of the slice."""

    state: str
    health: str
    accelerator: str
    hosts: tuple[tuple[str | None, str], ...]

    @classmethod
    def parse(cls, text: str) -> Node:
        """Read ``describe --format=json``.

        Raises:
            VMError: it is not that.
        """
        try:
            said: dict[str, Any] = json.loads(text)
            # A slice with several networks lists them all; the first of each host is the primary one.
            networks = max(1, len(said.get("networkConfigs") or ()))
            hosts = tuple(
                ((end.get("accessConfig") or {}).get("externalIp"), str(end.get("ipAddress", "")))
                for end in list(said.get("networkEndpoints") or ())[::networks]
            )
            return cls(str(said["state"]), str(said.get("health", "")), str(said.get("acceleratorType", "")), hosts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VMError(f"gcloud described the VM in a way that kvcycle does not know ({error!r}).") from error

    def host(self, worker: int, route: Route) -> str:
        """The address that gcloud will connect to, as it chooses it."""
        external, internal = self.hosts[worker]
        return external if external and route is Route.EXTERNAL else internal


def workers_of(node: Node, asked: str, name: str) -> tuple[int, ...]:
    """The hosts that ``--worker`` means: one by its index, or ``all``.

    Raises:
        VMError: there is no such host.
    """
    count = len(node.hosts)
    if asked == "all":
        return tuple(range(count))
    if asked.isdecimal() and int(asked) < count:
        return (int(asked),)
    there = f"host 0 to {count - 1}" if count > 1 else "host 0 alone"
    raise VMError(f"{name} has no worker {asked!r}: it has {there}. Give one of them, or --worker all.")


#: Where the hosts of one run meet on host 0; sglang-jax also takes the fifth and the sixth port after it.
MEETING_PORT = 10011


def meeting_place(node: Node, name: str) -> str:
    """Where the hosts of a slice meet: at host 0's internal address, since they share a network.

    Raises:
        VMError: gcloud names none.
    """
    _, internal = node.hosts[0]
    if not internal:
        raise VMError(f"gcloud names no internal address of {name}'s host 0, at which the hosts of one run would meet.")
    return f"{internal}:{MEETING_PORT}"


#: What a state means and what to do; every other state is passing.
_STATES = {
    "STOPPED": "Start it: gcloud compute tpus tpu-vm start {name} {where}",
    "STOPPING": "Wait until it is STOPPED, then start it: gcloud compute tpus tpu-vm start {name} {where}",
    "PREEMPTED": "It was preempted and does not come back: delete it and create another.",
    "TERMINATED": "It has reached its end and does not come back: delete it and create another.",
    "DELETING": "It is being deleted.",
    "HIDDEN": "It is hidden and cannot be reached.",
}


def not_ready(node: Node, target: Target) -> str | None:
    """The sentence that says why the VM cannot be used now, or None if it can."""
    if node.state != "READY":
        way_out = _STATES.get(node.state, "Wait until gcloud compute tpus tpu-vm describe {name} {where} says READY.")
        way_out = way_out.format(name=target.name, where=" ".join(target.where))
        return f"{target.name} is {node.state}, and not READY. {way_out}"
    if node.health.startswith("UNHEALTHY"):
        described = f"gcloud compute tpus tpu-vm describe {target.name} {' '.join(target.where)}"
        return f"{target.name} is READY but {node.health}: a verdict from it would be worth little. See {described}"
    if not node.hosts:
        return f"{target.name} is READY but has no network address: nothing can connect to it."
    return None


def ssh_user(config: Sequence[str]) -> str | None:
    """The user that ``ssh -G`` says."""
    return next((line.split(maxsplit=1)[1] for line in config if line.startswith("user ")), None)
