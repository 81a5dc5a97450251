"""``kvcycle vm``: the commands."""

from __future__ import annotations

import getpass
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kvcycle.command_line import BAD_INPUT, ReportDirOption, sentences, teller
from kvcycle.errors import VMError, VMRunLostError
from kvcycle.profile_file import load_profile
from kvcycle.report import terminal
from kvcycle.vm import dry_run, gcloud, host_key, remote
from kvcycle.vm.gcloud import Route, Target
from kvcycle.vm.remote import Job
from kvcycle.vm.run import UNKNOWN, VMRun, new_run_id
from kvcycle.vm.session import Session, work_folder
from kvcycle.vm.shell import Shell
from kvcycle.vm.source import Source, find_source

vm_app = typer.Typer(no_args_is_help=True, help="Run the suite on a TPU VM, through gcloud.")

_INTERRUPTED = 130
DEFAULT_STACK = "sglang-jax-0.1.0rc0"

_Name = Annotated[str, typer.Argument(metavar="NAME", help="the TPU VM")]
_Zone = Annotated[str, typer.Option("--zone", "-z", help="its zone, for example us-central2-b")]
_Project = Annotated[str, typer.Option("--project", help="its project")]
_Worker = Annotated[str, typer.Option("--worker", help="a host of the slice by its index, or all")]
_HostKey = Annotated[
    list[str] | None,
    typer.Option("--host-key", metavar="SHA256:…", help="the host key's fingerprint; once for each host"),
]
_User = Annotated[str | None, typer.Option("--user", help="the user there; default: the one that gcloud takes")]
_KeyFile = Annotated[Path, typer.Option("--ssh-key-file", help="the private key that gcloud uses")]
_Internal = Annotated[bool, typer.Option("--internal-ip", help="connect to the internal address")]
_IAP = Annotated[bool, typer.Option("--tunnel-through-iap", help="connect through the Identity-Aware Proxy")]


@vm_app.command("run")
def run_command(
    name: _Name,
    zone: _Zone,
    project: _Project,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- PYTEST_ARGUMENT]...", help="further arguments for pytest")
    ] = None,
    host_keys: _HostKey = None,
    profile: Annotated[str, typer.Option("--profile", "-p", help="by name, or by path in this checkout")] = "tiny",
    worker: _Worker = "0",
    stack: Annotated[str, typer.Option("--stack", help="a file of constraints/")] = DEFAULT_STACK,
    conda_env: Annotated[
        str | None, typer.Option("--conda-env", help="the VM's conda environment; default: a venv that kvcycle makes")
    ] = None,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="bring the working tree as it is, and label it so")
    ] = False,
    send_hf_token: Annotated[
        bool, typer.Option("--send-hf-token", help="give the run this environment's HF_TOKEN, in a file")
    ] = False,
    report_dir: ReportDirOption = Path("reports"),
    user: _User = None,
    ssh_key_file: _KeyFile = gcloud.DEFAULT_KEY,
    internal_ip: _Internal = False,
    tunnel_through_iap: _IAP = False,
    reconnects: Annotated[int, typer.Option(min=0, help="attempts in a row to take up a broken connection")] = 5,
    print_only: Annotated[bool, typer.Option("--dry-run", help="print the commands, and run none")] = False,
) -> None:
    """Bring this commit to a TPU VM, run the suite there, stream its log, bring its reports, exit as it did."""
    shell, console = Shell(), terminal.console()
    with _outcome(shell), ExitStack() as cleanup:
        target = _target(name, zone, project, user, ssh_key_file, internal_ip, tunnel_through_iap)
        pins = host_key.parse_pins(host_keys or [])
        token = _token() if send_hf_token else None
        further = list(arguments or [])
        work = cleanup.enter_context(_scratch(work_folder(target), keep=print_only))
        source = find_source(shell, Path.cwd(), work, allow_dirty=allow_dirty)
        job = _job(source, stack, conda_env, profile, further)
        if print_only:
            if worker == "all":
                raise VMError("--dry-run does not ask the VM how many hosts it has: give one with --worker.")
            _print(
                target, replace(job, workers=(_index(worker),)), source, pins, work, report_dir, token=token is not None
            )
            return
        say = teller(console)
        if source.dirty:
            say(f"The tree differs from its commit: it goes as {source.label}, which is no commit of the repository.")
        session = Session(target, worker, pins, shell, say, work)
        session.open()
        if len(session.workers) > 1:
            say(
                f"The {len(session.workers)} hosts are one run, and meet at {session.meeting}; worker 0 has its report."
            )
        run = VMRun(
            session=session,
            job=replace(job, workers=session.workers),
            source=source,
            stop_command=_again("stop", session.target, worker, pins),
            report_dir=report_dir,
            write=lambda text: console.out(text, end="", highlight=False),
            token=token,
            reconnects=reconnects,
        )
        code = run.execute()
    raise typer.Exit(code)


@vm_app.command("stop")
def stop_command(
    name: _Name,
    zone: _Zone,
    project: _Project,
    host_keys: _HostKey = None,
    worker: _Worker = "0",
    kill: Annotated[bool, typer.Option("--kill", help="at once, without reports (SIGKILL)")] = False,
    user: _User = None,
    ssh_key_file: _KeyFile = gcloud.DEFAULT_KEY,
    internal_ip: _Internal = False,
    tunnel_through_iap: _IAP = False,
) -> None:
    """End the run that lives on a TPU VM; its suite writes its reports first. The VM itself is left alone."""
    shell, console = Shell(), terminal.console()
    with _outcome(shell), ExitStack() as cleanup:
        target = _target(name, zone, project, user, ssh_key_file, internal_ip, tunnel_through_iap)
        pins = host_key.parse_pins(host_keys or [])
        work = cleanup.enter_context(_scratch(work_folder(target), keep=False))
        session = Session(target, worker, pins, shell, teller(console), work)
        session.open()
        living = []
        for index in session.workers:
            answer = session.ssh(index, "Ending the run", remote.call("stop", "kill" if kill else "term"))
            outcome, _, run = answer.strip().partition(" ")
            if outcome == "living":
                living.append(index)
            said = _STOPPED["none"] if run == "none" else _STOPPED.get(outcome, answer.strip())
            session.say(f"worker {index}: {said.format(run=run)}")
        if living:
            raise VMError("--kill ends it at once, without reports.")


_STOPPED = {
    "none": "no run lives there",
    "stopped": "the run {run} has ended",
    "living": "the run {run} was asked to end, and still lives after a minute",
}


@contextmanager
def _outcome(shell: Shell) -> Iterator[None]:
    """Sentences and exit codes; no gcloud is left running."""
    try:
        with sentences():
            yield
    except KeyboardInterrupt as interrupt:
        raise typer.Exit(_INTERRUPTED) from interrupt
    except typer.Exit as exit_:
        if exit_.exit_code == BAD_INPUT and isinstance(exit_.__cause__, VMRunLostError):
            raise typer.Exit(UNKNOWN) from exit_
        raise
    finally:
        shell.close()


@contextmanager
def _scratch(folder: Path, *, keep: bool) -> Iterator[Path]:
    """The VM's folder itself, where what is pasted finds its files; or one in it that lives as long as this process."""
    if keep:
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def _target(
    name: str, zone: str, project: str, user: str | None, key: Path, internal_ip: bool, tunnel_through_iap: bool
) -> Target:
    if internal_ip and tunnel_through_iap:
        raise VMError("--internal-ip and --tunnel-through-iap are two ways to the VM: give one.")
    route = Route.IAP if tunnel_through_iap else Route.INTERNAL if internal_ip else Route.EXTERNAL
    return Target(name, zone, project, user, route, key)


def _token() -> str:
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise VMError("--send-hf-token was given, and this environment has no HF_TOKEN.")
    return token


def _job(source: Source, stack: str, conda_env: str | None, profile: str, further: list[str]) -> Job:
    """What is to run, checked as far as it can be before anything is brought."""
    stacks = sorted(path.stem for path in (source.root / "constraints").glob("*.txt"))
    if stack not in stacks:
        raise VMError(f"There is no constraints/{stack}.txt; there are: {', '.join(stacks)}.")
    if conda_env is not None and (not conda_env or conda_env.startswith("-")):
        raise VMError(f"--conda-env {conda_env!r} is no name of an environment.")
    for word in further:
        if word.startswith("--kv-report-dir"):
            raise VMError("--kv-report-dir is a folder on the VM, which kvcycle chooses: --report-dir is the one here.")
    if profile.endswith(".toml") or "/" in profile:
        path = Path(profile).resolve()
        if not path.is_relative_to(source.root):
            raise VMError(f"The profile {profile} is not in {source.root}, and so would not be on the VM.")
        load_profile(profile)
        profile = str(path.relative_to(source.root))
    else:
        load_profile(profile)
    return Job(
        revision=source.revision,
        stack=stack,
        conda_env=conda_env,
        pytest_arguments=("-m", "tpu", "--require-tpu", f"--kv-profile={profile}", *further),
        workers=(),
    )


def _index(worker: str) -> int:
    if not worker.isdecimal():
        raise VMError(f"--worker {worker!r} is no index of a host: give 0, 1, …, or all.")
    return int(worker)


def _print(
    target: Target, job: Job, source: Source, pins: tuple[str, ...], work: Path, report_dir: Path, *, token: bool
) -> None:
    run_id = new_run_id()
    shown = replace(target, user=target.user or getpass.getuser())
    folder = report_dir.absolute() / f"{target.name}-{run_id}"
    if not pins:
        typer.echo(dry_run.no_pin_comment(shown), nl=False)
    typer.echo(dry_run.script(shown, job, source, pins, work, run_id, folder, token=token), nl=False)


def _again(command: str, target: Target, worker: str, pins: tuple[str, ...]) -> str:
    words = ["kvcycle", "vm", command, target.name, *target.where]
    if worker != "0":
        words.append(f"--worker={worker}")
    words += [f"--host-key={pin}" for pin in pins]
    words += [f"--user={target.user}"] if target.user else []
    words += {Route.EXTERNAL: [], Route.INTERNAL: ["--internal-ip"], Route.IAP: ["--tunnel-through-iap"]}[target.route]
    if target.key_file != gcloud.DEFAULT_KEY:
        words.append(f"--ssh-key-file={target.key_file}")
    return shlex.join(words)
