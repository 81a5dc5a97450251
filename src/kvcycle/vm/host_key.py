"""The host key's pin: which of the keys that are offered has the fingerprint that the user gave."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcycle.errors import VMError
from kvcycle.vm import gcloud

_PIN = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_TYPE = re.compile(r"[a-z0-9@.-]+")


@dataclass(frozen=True)
class HostKey:
    """A public host key: its type, for example ``ssh-ed25519``, and its base64 text."""

    kind: str
    text: str

    @property
    def fingerprint(self) -> str:
        """``SHA256:…``, as OpenSSH writes it."""
        digest = hashlib.sha256(base64.b64decode(self.text)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def parse_pins(given: Iterable[str]) -> tuple[str, ...]:
    """The fingerprints that ``--host-key`` gave, as OpenSSH writes them.

    Raises:
        VMError: one is none.
    """
    pins = []
    for text in given:
        pin = text.strip().rstrip("=")
        if not _PIN.fullmatch(pin):
            raise VMError(
                f"--host-key {text!r} is no fingerprint: one is SHA256: and 43 characters, as ssh-keygen -l prints it."
            )
        pins.append(pin)
    return tuple(pins)


def parse_keyscan(output: str) -> list[HostKey]:
    """The keys that ``ssh-keyscan`` printed; lines that are none are passed over."""
    fields = (line.split() for line in output.splitlines() if not line.startswith("#"))
    return _keys((words[1], words[2]) for words in fields if len(words) >= 3)


def parse_guest_attributes(output: str) -> list[HostKey]:
    """The keys that the VM's guest attributes hold, as JSON."""
    try:
        entries = json.loads(output)
        return _keys((str(entry["key"]), str(entry["value"])) for entry in entries)
    except (ValueError, KeyError, TypeError):
        return []


def _keys(pairs: Iterable[tuple[str, str]]) -> list[HostKey]:
    found = []
    for kind, text in pairs:
        try:
            base64.b64decode(text, validate=True)
        except binascii.Error:
            continue
        if _TYPE.fullmatch(kind):  # it goes into a file that ssh reads line by line
            found.append(HostKey(kind, text))
    return found


def known_hosts_line(alias: str, key: HostKey) -> str:
    """The line by which ssh knows the host."""
    return f"{alias} {key.kind} {key.text}\n"


def choose(offered: Sequence[HostKey], pins: Sequence[str], target: gcloud.Target, worker: int) -> HostKey:
    """The offered key that is pinned.

    Raises:
        VMError: none is; the sentence has the fingerprints that were offered, and the way to the right one.
    """
    for key in offered:
        if key.fingerprint in pins:
            return key
    raise VMError(refusal([f"{key.kind} {key.fingerprint}" for key in offered], pins, target, worker))


def refusal(offered: Sequence[str], pins: Sequence[str], target: gcloud.Target, worker: int) -> str:
    """Says that the host is not known to be the right one, and how to learn its fingerprint over another channel."""
    host = f"{target.name}, worker {worker},"
    shown = ", ".join(offered) or "no key that could be read"
    if pins:
        first = f"{host} is not the host that is pinned, and nothing was sent to it. It offered {shown}; "
        first += f"pinned: {', '.join(pins)}."
    else:
        first = f"No host key is pinned, and nothing was sent to {host} which offered {shown}."
    return (
        f"{first} Do not take the fingerprint from this connection. Google's API has what the VM published at boot:\n"
        f"  {fingerprint_command(target, worker)}\n"
        "Whoever is on the VM already reads it there: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub\n"
        "Give it with --host-key SHA256:…, once for each host."
    )


def fingerprint_command(target: gcloud.Target, worker: int) -> str:
    """A command for a person: it prints the fingerprints that the VM published."""
    return f"{shlex.join(gcloud.guest_host_keys(target, worker, 'value(key,value)'))} | ssh-keygen -lf -"


def offered_in(stderr: Iterable[str]) -> list[str]:
    """The fingerprints that ssh itself says it was offered when it refused."""
    return [found.group() for line in stderr if (found := _PIN.search(line))]
