"""The same steps as commands for a person to paste, in the order in which ``kvcycle vm run`` does them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcycle.vm import gcloud, host_key, remote
from kvcycle.vm.gcloud import Route, Target
from kvcycle.vm.remote import Job
from kvcycle.vm.source import Source


def script(
    target: Target,
    job: Job,
    source: Source,
    pins: Sequence[str],
    work: Path,
    run_id: str,
    folder: Path,
    *,
    token: bool,
) -> str:
    """A shell script; what kvcycle does beyond it (waiting, reconnecting, judging) is said in its comments."""
    return "\n".join(_lines(target, job, source, pins, work, run_id, folder, token=token)) + "\n"


def _lines(
    target: Target,
    job: Job,
    source: Source,
    pins: Sequence[str],
    work: Path,
    run_id: str,
    folder: Path,
    *,
    token: bool,
) -> Iterator[str]:
    known_hosts, bundle = work / "known_hosts", work / f"{source.revision}.bundle"
    yield "# gcloud is logged in, and the VM is READY."
    yield _line(gcloud.active_account())
    yield _line(gcloud.describe(target, "value(state,health)"))
    yield ""
    yield "# The pin: of the keys that are offered, those with the given fingerprint. With none, nothing connects."
    yield _line(["mkdir", "-p", "-m", "700", str(work)])
    yield _line(["cd", str(source.root)])
    yield f": > {shlex.quote(str(known_hosts))}"
    for worker in job.workers:
        yield from _pin(target, worker, pins, known_hosts)
    yield ""
    yield "# gcloud makes the SSH key if there is none, and hands it to the VM. It prints your user there."
    yield _line(gcloud.introduce(target, job.workers[0]))
    yield ""
    yield f"# The code: commit {source.revision}."
    yield from _bundle(source, bundle, work)
    for worker in job.workers:
        yield ""
        yield f"# Worker {worker}: connect, bring the code, and make the environment or keep it."
        yield _line(gcloud.ssh(target, worker, known_hosts, remote.HELLO))
        yield _line(gcloud.scp_to(target, worker, known_hosts, remote.SCRIPT, remote.script_name()))
        yield _line(gcloud.scp_to(target, worker, known_hosts, bundle, remote.bundle_name(source.revision)))
        yield _line(gcloud.ssh(target, worker, known_hosts, remote.bring(source.revision)))
        yield _line(gcloud.ssh(target, worker, known_hosts, job.prepare()))
    if token:
        file = work / "hf-token"
        yield ""
        yield "# The hub's token, in a file of mode 0600: the run reads it and removes it."
        yield f"""(umask 077 && printf %s "$HF_TOKEN" > {shlex.quote(str(file))})"""
        for worker in job.workers:
            yield _line(gcloud.scp_to(target, worker, known_hosts, file, remote.token_name(run_id)))
        yield _line(["rm", "-f", str(file)])
    yield ""
    yield "# Start the suite detached from the connection."
    for worker in job.workers:
        yield _line(gcloud.ssh(target, worker, known_hosts, job.start(run_id, worker, token=token)))
    yield ""
    yield "# Follow its log to the end; its exit code is the last line. (kvcycle takes a broken connection up again.)"
    run = f"{remote.BASE}/runs/{run_id}"
    follow = f'tail -c +1 -f --pid="$(cat {run}/pid)" {remote.log_name(run_id)}; cat {run}/exit-code'
    yield _line(gcloud.ssh(target, job.workers[0], known_hosts, follow))
    yield ""
    yield "# Bring the reports, also of a run that failed."
    for worker in job.workers:
        into = folder if len(job.workers) == 1 else folder / f"worker{worker}"
        yield _line(["mkdir", "-p", str(into)])
        yield _line(gcloud.scp_from(target, worker, known_hosts, remote.reports_name(run_id), into))


def _pin(target: Target, worker: int, pins: Sequence[str], known_hosts: Path) -> Iterator[str]:
    if target.route is Route.IAP:
        keys = _line(gcloud.guest_host_keys(target, worker, "value(key,value)"))
    else:
        external = f"networkEndpoints[{worker}].accessConfig.externalIp"
        address = external if target.route is Route.EXTERNAL else f"networkEndpoints[{worker}].ipAddress"
        described = _line(gcloud.describe(target, f"value({address})"))
        keys = f"""{_line(gcloud.keyscan("HOST")).removesuffix("HOST")}"$({described})" | cut -d ' ' -f 2,3"""
    wanted = " | ".join(pins) or "SHA256:…"
    alias = gcloud.host_key_alias(target, worker)
    yield (
        f"{keys} | while read -r kind key; do "
        f"""case "$(echo "$kind $key" | ssh-keygen -lf - | cut -d ' ' -f 2)" in {wanted}) """
        f'echo {alias} "$kind" "$key";; esac; done >> {shlex.quote(str(known_hosts))}'
    )


def _bundle(source: Source, bundle: Path, work: Path) -> Iterator[str]:
    if not source.dirty:
        yield _line(["git", "bundle", "create", str(bundle), "HEAD"])
        return
    beside = work / "snapshot.git"
    yield f"# It is the working tree as it was when this was printed, committed beside the repository into {beside}."
    git = ["git", f"--git-dir={beside}"]
    yield _line([*git, "update-ref", "refs/heads/kvcycle-dirty", source.revision])
    yield _line([*git, "bundle", "create", str(bundle), "refs/heads/kvcycle-dirty"])


def _line(argv: Sequence[str]) -> str:
    return shlex.join(argv)


def no_pin_comment(target: Target) -> str:
    """For a dry run without a pin: where the fingerprint comes from."""
    return f"# No host key is pinned. Its fingerprint: {host_key.fingerprint_command(target, 0)}\n"
