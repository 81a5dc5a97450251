"""Why a step failed, as a sentence: what gcloud, ssh, scp and pip say when they fail, and what to do then."""

from __future__ import annotations

from collections.abc import Sequence

from kvcycle.text import printable
from kvcycle.vm import host_key, remote
from kvcycle.vm.gcloud import Target
from kvcycle.vm.shell import Done

#: gcloud's progress, which says nothing about a failure.
_NOISE = ("Using ssh batch size", "Using scp batch size", "SSH: Attempting", "SCP: Attempting", "Retrying: ")
_SHOWN_LINES = 6
#: The exit code of ssh, and so of gcloud, for a connection that did not come about or broke.
CONNECTION_FAILED = 255


def failure(step: str, done: Done, target: Target, worker: int, pins: Sequence[str] = ()) -> str:
    """The sentence for a step that failed: its likely cause first, then what was said."""
    return f"{step} failed on {target.name}, worker {worker}: {_cause(done, target, worker, pins)}{_said(done)}"


def _cause(done: Done, target: Target, worker: int, pins: Sequence[str]) -> str:
    text = "\n".join(done.stderr)
    where = " ".join(target.where)
    if "Host key verification failed" in text:
        return host_key.refusal(host_key.offered_in(done.stderr), pins, target, worker)
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return (
            f"the VM's disk is full (df -h says how full). ~/{remote.BASE}/runs has the runs so far, "
            f"~/{remote.BASE}/venvs the environments. Free some space there and start again."
        )
    if any(words in text for words in ("gcloud auth login", "Reauthentication", "refreshing your current auth tokens")):
        return "gcloud's login has run out. Log in again: gcloud auth login"
    if "PERMISSION_DENIED" in text or "does not have permission" in text:
        return f"the account that is logged in may not do this in project {target.project}."
    if "NOT_FOUND" in text or "was not found" in text:
        listed = f"gcloud compute tpus tpu-vm list {where}"
        return f"there is no TPU VM {target.name} in zone {target.zone} of project {target.project}. See {listed}"
    if "Permission denied (publickey" in text:
        return (
            f"the VM takes no connection from {target.user or 'this user'} with the key {target.key_file}. A new key "
            "may need a minute; another user is given with --user, another key with --ssh-key-file."
        )
    if done.code == CONNECTION_FAILED:
        return (
            "the connection did not come about or broke. Is port 22 open to this machine? A VM without an external "
            "address is reached with --internal-ip from its own network, or with --tunnel-through-iap."
        )
    return f"exit code {done.code}."


def _said(done: Done) -> str:
    lines = [line for line in done.stderr if line.strip() and not line.startswith(_NOISE)][-_SHOWN_LINES:]
    return "".join(f"\n  {printable(line)}" for line in lines)


def not_logged_in() -> str:
    """The sentence for a gcloud without an account."""
    return "gcloud is installed, but nobody is logged in. Log in: gcloud auth login"


def no_gcloud() -> str:
    """The sentence for a machine without gcloud."""
    return (
        "There is no gcloud on PATH. Install the Google Cloud CLI (cloud.google.com/sdk/docs/install), "
        "and log in with gcloud auth login."
    )


def no_account(done: Done) -> str:
    """The sentence for a gcloud that cannot say who is logged in."""
    return f"gcloud cannot say who is logged in (exit code {done.code}).{_said(done)}"


def goes_on(target: Target, run: str, stop_command: str) -> str:
    """What a person whose connection ended must know: the run did not."""
    return (
        f"The run {run} goes on on {target.name}. The same command follows it again, from its beginning; "
        f"to end it: {stop_command}"
    )
