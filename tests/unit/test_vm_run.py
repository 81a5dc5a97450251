"""``kvcycle vm`` with a stand-in gcloud that carries it out: the VM is a local folder, its shell is a real one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcycle.cli import app
from kvcycle.vm import run as steps
from kvcycle.vm.remote import BASE
from tests.unit.vm_machine import NAME, PROJECT, USER, ZONE, StandIn, fingerprint, host_key, small_repository
from tests.unit.vm_machine import this_repository as copy_of_this_repository

WHERE = [NAME, f"--zone={ZONE}", f"--project={PROJECT}"]
CONDA = "--conda-env=sglang-jax"


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "what was waited for did not come about"
        time.sleep(0.02)
    return value


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def hosts() -> int:
    return 1


@pytest.fixture
def machine(tmp_path: Path, repository: Path, hosts: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path / "stand-in", hosts)
    for name, value in stand_in.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(steps, "RECONNECT_WAIT_S", 0.0)
    monkeypatch.chdir(repository)
    yield stand_in
    stand_in.end_what_lives()


def vm_run(machine: StandIn, *arguments: str, pins: list[str] | None = None, further: tuple[str, ...] = ()) -> Any:
    options = [*WHERE, CONDA, f"--report-dir={machine.root / 'reports'}", *(machine.pins if pins is None else pins)]
    return CliRunner().invoke(app, ["vm", "run", *options, *arguments, *(["--", *further] if further else [])])


def later(machine: StandIn, *arguments: str, further: tuple[str, ...] = ()) -> Any:
    """The same command once more, when a run's name by the second is another one."""
    names = {path.name for path in machine.runs()}
    wait_for(lambda: steps.new_run_id() not in names)
    return vm_run(machine, *arguments, further=further)


def vm_stop(machine: StandIn, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["vm", "stop", *WHERE, *machine.pins, *arguments])


def report_folder(machine: StandIn) -> Path:
    (folder,) = (machine.root / "reports").glob(f"{NAME}-*")
    return folder


def log_of(folder: Path) -> str:
    (log,) = folder.glob("*.log")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ\.log", log.name)
    return log.read_text()


def numbered(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"line +(\d+) of the log", text)]


def test_the_whole_way(machine: StandIn, repository: Path) -> None:
    done = vm_run(machine, further=("-k", "suite"))
    assert done.exit_code == 0, done.output
    assert f"{NAME} is READY: v4-8, 1 host(s)" in done.output
    assert "worker 0: connected, " in done.output
    assert f"host key {machine.vm['fingerprints'][0]} is the pinned one" in done.output
    assert "worker 0: environment kept " in done.output
    folder = report_folder(machine)
    assert numbered(log_of(folder)) == numbered(done.output) == list(range(400))
    assert "worker 0: the suite exited with 0" in done.output
    assert f"Reports: {folder}" in done.output
    assert (folder / "junit.xml").is_file()
    kept = json.loads((folder / "record.json").read_text())
    run_id = folder.name.removeprefix(f"{NAME}-")
    assert kept["argv"] == [
        *("-m", "tpu", "--require-tpu", "--kv-profile=tiny", "-k", "suite"),
        f"--kv-report-dir=../runs/{run_id}/reports",
    ]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True)
    there = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=machine.home() / BASE / "checkout", capture_output=True, text=True, check=True
    )
    assert there.stdout == head.stdout


def test_the_log_reaches_the_file_as_it_is_and_the_terminal_without_what_it_could_obey(machine: StandIn) -> None:
    done = vm_run(machine)
    assert "× …" in done.output
    assert "\x1b" not in done.output
    assert "\\x1b[31mred" in done.output
    assert "\x1b[31mred" in log_of(report_folder(machine))


def test_arguments_arrive_as_they_were_given(machine: StandIn) -> None:
    awkward = "model.path=a 'b' \"c\" $HOME `id` ; & \\ * ×\nnext"
    done = vm_run(machine, further=("--kv-set", awkward, "-k", "suite and not (foo or bar)"))
    assert done.exit_code == 0, done.output
    argv = json.loads((report_folder(machine) / "record.json").read_text())["argv"]
    assert argv[4:8] == ["--kv-set", awkward, "-k", "suite and not (foo or bar)"]


def test_a_suite_that_fails_is_its_exit_code_and_its_reports(machine: StandIn) -> None:
    done = vm_run(machine, further=("--kv-set", "fail"))
    assert done.exit_code == 1, done.output
    assert "worker 0: the suite exited with 1" in done.output
    assert (report_folder(machine) / "junit.xml").is_file()
    assert "1 failed" in log_of(report_folder(machine))


def test_a_suite_that_refuses_its_arguments_leaves_no_reports(machine: StandIn) -> None:
    done = vm_run(machine, further=("--no-such-option",))
    assert done.exit_code == 4, done.output
    assert "worker 0: the suite left no reports; " in done.output
    assert "unrecognized arguments: --no-such-option" in log_of(report_folder(machine))


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(done: Any, machine: StandIn, *sentences: str, code: int = 2) -> None:
    """A refusal in sentences, before anything ran."""
    assert done.exit_code == code, done.output
    for sentence in sentences:
        assert sentence in done.stderr, done.stderr
    assert "Traceback" not in done.output
    assert not machine.runs()


def test_without_gcloud(machine: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git = shutil.which("git")
    assert git is not None
    (tmp_path / "only-git").mkdir()
    (tmp_path / "only-git" / "git").symlink_to(git)
    monkeypatch.setenv("PATH", str(tmp_path / "only-git"))
    refused(vm_run(machine), machine, "There is no gcloud on PATH. Install the Google Cloud CLI", "gcloud auth login")


def test_nobody_is_logged_in(machine: StandIn) -> None:
    machine.set(account="")
    refused(vm_run(machine), machine, "nobody is logged in. Log in: gcloud auth login")


def test_a_login_that_ran_out(machine: StandIn) -> None:
    machine.set(describe_error="ERROR: (gcloud) There was a problem refreshing your current auth tokens: invalid_grant")
    refused(vm_run(machine), machine, "gcloud's login has run out. Log in again: gcloud auth login", "invalid_grant")


def test_a_vm_that_is_not_there(machine: StandIn) -> None:
    machine.set(describe_error="ERROR: NOT_FOUND: Resource 'my-tpu' was not found")
    refused(
        vm_run(machine), machine, f"there is no TPU VM {NAME} in zone {ZONE} of project {PROJECT}. See gcloud compute"
    )


@pytest.mark.parametrize(
    ("state", "way_out"),
    [
        ("STOPPED", f"Start it: gcloud compute tpus tpu-vm start {NAME} --zone={ZONE} --project={PROJECT}"),
        ("PREEMPTED", "It was preempted and does not come back: delete it and create another."),
        (
            "CREATING",
            f"Wait until gcloud compute tpus tpu-vm describe {NAME} --zone={ZONE} --project={PROJECT} says READY.",
        ),
    ],
)
def test_a_vm_that_is_not_ready(machine: StandIn, state: str, way_out: str) -> None:
    machine.set(state=state)
    refused(vm_run(machine), machine, f"{NAME} is {state}, and not READY. {way_out}")
    assert not machine.calls("--command")


def test_a_worker_that_is_not_there(machine: StandIn) -> None:
    refused(vm_run(machine, "--worker=1"), machine, f"{NAME} has no worker '1': it has host 0 alone.")


def test_without_a_pin_nothing_connects(machine: StandIn) -> None:
    offered = machine.vm["fingerprints"][0]
    done = vm_run(machine, pins=[])
    refused(
        done,
        machine,
        f"No host key is pinned, and nothing was sent to {NAME}, worker 0, which offered ssh-ed25519 {offered}.",
        f"gcloud compute tpus tpu-vm get-guest-attributes {NAME} --zone={ZONE} --project={PROJECT} "
        "--query-path=hostkeys/ --filter=worker_id:0 '--format=value(key,value)' | ssh-keygen -lf -",
    )
    assert not machine.calls("--command")


def test_a_host_with_another_key_is_refused_before_anything_connects(machine: StandIn) -> None:
    pin = fingerprint(host_key(9))
    done = vm_run(machine, pins=[f"--host-key={pin}"])
    offered = machine.vm["fingerprints"][0]
    refused(
        done,
        machine,
        f"{NAME}, worker 0, is not the host that is pinned, and nothing was sent to it.",
        f"It offered ssh-ed25519 {offered}; pinned: {pin}.",
        "Do not take the fingerprint from this connection.",
    )
    assert not machine.calls("--command")


def test_a_host_that_changes_its_key_after_the_scan_is_refused_by_the_connection(machine: StandIn) -> None:
    imposter = host_key(7)
    machine.set(keys=[imposter], fingerprints=[fingerprint(imposter)])
    pin = fingerprint(machine.vm["scanned_keys"][0])
    done = vm_run(machine, pins=[f"--host-key={pin}"])
    refused(done, machine, "Connecting failed on", f"It offered {fingerprint(imposter)}; pinned: {pin}.")
    assert not (machine.home() / BASE).exists()


def test_a_pin_that_is_no_fingerprint(machine: StandIn) -> None:
    done = vm_run(machine, pins=["--host-key=12:34:56"])
    refused(done, machine, "--host-key '12:34:56' is no fingerprint: one is SHA256: and 43 characters")
    assert not machine.calls()


def test_through_iap_the_keys_come_from_the_guest_attributes(machine: StandIn) -> None:
    done = vm_run(machine, "--tunnel-through-iap")
    assert done.exit_code == 0, done.output
    connections = machine.calls("--command") + machine.calls("scp")
    assert all(call[1] == "alpha" and "--tunnel-through-iap" in call for call in connections)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stack=sglang-jax-9"], "There is no constraints/sglang-jax-9.txt; there are: sglang-jax-0.1.0rc0."),
        (["--profile=tyni"], "There is no profile 'tyni'; there are: "),
        (["--profile=/elsewhere/own.toml"], "The profile /elsewhere/own.toml is not in "),
        (["--conda-env=-x"], "--conda-env '-x' is no name of an environment."),
        (["--send-hf-token"], "--send-hf-token was given, and this environment has no HF_TOKEN."),
        (["--internal-ip", "--tunnel-through-iap"], "are two ways to the VM: give one."),
        (["--user=-oProxyCommand=x"], "'-oProxyCommand=x' is no user of a TPU VM"),
        (["--ssh-key-file=/a b/key"], "The SSH key's path, '/a b/key', has ' ', which would not reach ssh."),
        (["--", "--kv-report-dir=x"], "--kv-report-dir is a folder on the VM"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_refused_before_gcloud_is_asked(machine: StandIn, arguments: list[str], sentence: str) -> None:
    refused(vm_run(machine, *arguments), machine, sentence)
    assert not machine.calls()


@pytest.mark.parametrize("name", ["-x", "My_TPU", "a;b", "a b", ""])
def test_a_name_that_is_none(machine: StandIn, name: str) -> None:
    done = CliRunner().invoke(app, ["vm", "run", f"--zone={ZONE}", f"--project={PROJECT}", "--", name])
    refused(done, machine, f"{name!r} is no name of a TPU VM; one looks like my-tpu.")


def test_outside_a_checkout(machine: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    refused(vm_run(machine), machine, f"{tmp_path} is in no git checkout of kvcycle: ")


# --- the code ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_repository(tmp_path: Path, repository: Path, machine: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change."""
    copy = tmp_path / "own"
    shutil.copytree(repository, copy)
    monkeypatch.chdir(copy)
    return copy


def test_a_changed_tree_is_refused_with_what_changed(machine: StandIn, own_repository: Path) -> None:
    (own_repository / "new.txt").touch()
    done = vm_run(machine)
    refused(done, machine, "differs from its commit ", "in 1 places", "with --allow-dirty.", "?? new.txt")


def test_a_changed_tree_goes_as_it_is_and_is_labelled(machine: StandIn, own_repository: Path) -> None:
    (own_repository / "tests" / "test_suite.py").write_text("import pytest\n@pytest.mark.tpu\ndef test_new(): pass\n")
    (own_repository / "new.txt").write_text("not committed")
    (own_repository / "reports").mkdir()
    (own_repository / "reports" / "ignored").touch()
    before = subprocess.run(["git", "status", "--porcelain"], capture_output=True, check=True).stdout
    done = vm_run(machine, "--allow-dirty")
    assert done.exit_code == 0, done.output
    assert re.search(r"worker 0: the code is there, [0-9a-f]{12}-dirty", done.output)
    checkout = machine.home() / BASE / "checkout"
    assert (checkout / "new.txt").read_text() == "not committed"
    assert not (checkout / "reports").exists()
    assert numbered(log_of(report_folder(machine))) == []
    assert subprocess.run(["git", "status", "--porcelain"], capture_output=True, check=True).stdout == before
    assert not subprocess.run(["git", "for-each-ref", "refs/kvcycle"], capture_output=True, check=True).stdout


def test_a_history_that_is_cut_off(machine: StandIn, own_repository: Path, tmp_path: Path, monkeypatch: Any) -> None:
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@x", "commit", "-q", "--allow-empty", "-mx"], check=True
    )
    shallow = tmp_path / "shallow"
    subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{own_repository}", shallow], check=True)
    monkeypatch.chdir(shallow)
    refused(vm_run(machine), machine, "is cut off, and no bundle of it can be made: git fetch --unshallow.")


def test_what_lies_about_in_the_vms_checkout_is_gone(machine: StandIn) -> None:
    assert vm_run(machine).exit_code == 0
    checkout = machine.home() / BASE / "checkout"
    (checkout / "tests" / "test_stray.py").write_text("raise SystemExit\n")
    (checkout / "conftest.py").write_text("raise SystemExit\n")
    done = later(machine)
    assert done.exit_code == 0, done.output


# --- the environment --------------------------------------------------------------------------------------------------


def test_a_conda_environment_that_is_not_there(machine: StandIn) -> None:
    done = vm_run(machine, "--conda-env=other")
    refused(
        done, machine, "Preparing the environment failed on", "There is no conda environment other", "base sglang-jax"
    )


def test_a_full_disk_while_pip_installs(machine: StandIn) -> None:
    (machine.home() / "pip-says").write_text("ERROR: Could not install: [Errno 28] No space left on device\n")
    done = vm_run(machine)
    refused(done, machine, "Preparing the environment failed on", "the VM's disk is full", "~/kvcycle-vm/runs")
    assert "progress" not in done.output
    assert "worker 0: installing constraints/sglang-jax-0.1.0rc0.txt" in done.output


def test_a_full_disk_while_the_code_is_copied(machine: StandIn) -> None:
    machine.plant({"verb": "scp", "match": "bundle", "code": 1, "stderr": "scp: write remote: No space left on device"})
    refused(vm_run(machine), machine, f"Copying the code failed on {NAME}, worker 0: the VM's disk is full")
    assert not list((machine.root / "cache").rglob("*.bundle"))


# --- connections ------------------------------------------------------------------------------------------------------


def test_a_vm_that_does_not_answer(machine: StandIn) -> None:
    machine.plant(
        {"verb": "ssh", "match": "whoami", "code": 255, "stderr": "ssh: connect to host: Connection timed out"}
    )
    done = vm_run(machine)
    refused(done, machine, "Connecting failed on", "Is port 22 open", "--tunnel-through-iap", "Connection timed out")


def test_another_user_than_the_vms(machine: StandIn) -> None:
    done = vm_run(machine, "--user=root")
    refused(done, machine, "the VM takes no connection from root with the key", "--ssh-key-file")


@pytest.mark.parametrize(("repeated", "after_bytes"), [(False, 0), (False, 5000), (True, 700), (True, 20_000)])
def test_a_connection_that_breaks_loses_nothing(machine: StandIn, repeated: bool, after_bytes: int) -> None:
    machine.plant({"verb": "ssh", "match": "follow", "drop_after_bytes": after_bytes, "repeated": repeated})
    done = vm_run(machine)
    assert done.exit_code == 0, done.output
    assert numbered(log_of(report_folder(machine))) == numbered(done.output) == list(range(400))
    assert len(machine.runs()) == 1
    assert done.output.count("The connection broke at byte ") == (not repeated)
    if not repeated:
        assert "the run goes on there. Connecting again, attempt 1 of 5." in done.output


def test_a_connection_that_stays_broken_and_the_same_command_later(machine: StandIn) -> None:
    machine.plant({"verb": "ssh", "match": "follow", "code": 255, "stderr": "Connection refused", "times": 3})
    done = vm_run(machine, "--reconnects=2")
    assert done.exit_code == 125, done.output
    (run,) = machine.runs()
    assert "attempt 2 of 2." in done.output
    assert f"and 2 attempts to take it up again failed. The run {run.name} goes on on {NAME}." in done.stderr
    assert f"to end it: kvcycle vm stop {NAME} --zone={ZONE} --project={PROJECT} --host-key=SHA256:" in done.stderr
    wait_for(lambda: (run / "exit-code").exists())

    again = vm_run(machine)
    assert again.exit_code == 0, again.output
    assert (
        f"The run {run.name} of the same commit and arguments has ended, and nobody was there to see it" in again.output
    )
    assert machine.runs() == [run]
    assert numbered(log_of(report_folder(machine))) == list(range(400))


def test_a_run_whose_reports_came_is_not_brought_twice(machine: StandIn) -> None:
    assert vm_run(machine).exit_code == 0
    second = later(machine)
    assert second.exit_code == 0, second.output
    assert len(machine.runs()) == 2


def test_reports_that_do_not_come_are_said_and_a_pass_is_none(machine: StandIn) -> None:
    broken = {"verb": "scp", "match": "reports/latest", "code": 255, "stderr": "lost connection"}
    machine.plant(broken)
    done = vm_run(machine)
    assert done.exit_code == 125, done.output
    assert "Bringing the reports failed on" in done.output
    assert "The reports are still there: ~/kvcycle-vm/runs/" in done.output
    machine.plant(broken)
    assert later(machine, further=("--kv-set", "fail")).exit_code == 1


# --- a run that lives -------------------------------------------------------------------------------------------------


def in_the_background(machine: StandIn, *arguments: str) -> subprocess.Popen[str]:
    options = [*WHERE, CONDA, f"--report-dir={machine.root / 'reports'}", *machine.pins, *arguments]
    code = "from kvcycle.cli import app; app()"
    command = [sys.executable, "-c", code, "vm", "run", *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_until_it_waits(client: subprocess.Popen[str]) -> None:
    assert client.stdout is not None
    for line in client.stdout:
        if line == "waiting\n":
            return
    raise AssertionError("the run did not come so far")


def test_ctrl_c_ends_the_client_and_not_the_run(machine: StandIn) -> None:
    with in_the_background(machine, "--", "--kv-set", "wait") as client:
        wait_until_it_waits(client)
        os.killpg(client.pid, signal.SIGINT)
        assert client.stdout is not None
        said = client.stdout.read()
    (run,) = machine.runs()
    assert client.returncode == 130, said
    assert f"The run {run.name} goes on on {NAME}. The same command follows it again" in said
    assert f"to end it: kvcycle vm stop {NAME} --zone={ZONE} --project={PROJECT}" in said
    assert "Traceback" not in said
    assert not (run / "exit-code").exists()

    other = vm_run(machine)
    assert other.exit_code == 2
    assert f"Another run lives there ({run.name} on worker 0), of another commit or other arguments" in other.stderr
    assert "or end it: kvcycle vm stop" in other.stderr

    with in_the_background(machine, "--", "--kv-set", "wait") as client:
        wait_until_it_waits(client)
        (machine.home() / "go").touch()
        assert client.stdout is not None
        rest = client.stdout.read()
    assert client.returncode == 0, rest
    assert machine.runs() == [run]
    assert numbered(log_of(report_folder(machine))) == list(range(400))
    assert "the last line" in rest


def test_stop_ends_the_run_and_its_reports_are_brought(machine: StandIn) -> None:
    assert "worker 0: no run lives there" in vm_stop(machine).output
    with in_the_background(machine, "--", "--kv-set", "wait") as client:
        wait_until_it_waits(client)
        done = vm_stop(machine)
        assert client.stdout is not None
        rest = client.stdout.read()
    (run,) = machine.runs()
    assert done.exit_code == 0, done.output
    assert f"worker 0: the run {run.name} has ended" in done.output
    # The small suite has no handler of its own for SIGTERM: the guard says what ended it.
    assert "was killed by SIGTERM" in rest
    assert client.returncode == 128 + signal.SIGTERM, rest
    assert (report_folder(machine) / "record.json").is_file()


def test_a_run_that_is_killed_with_everything_is_no_pass(machine: StandIn) -> None:
    with in_the_background(machine, "--", "--kv-set", "wait") as client:
        wait_until_it_waits(client)
        done = vm_stop(machine, "--kill")
        assert client.stdout is not None
        rest = client.stdout.read()
    assert done.exit_code == 0, done.output
    assert client.returncode == 125, rest
    assert "the run ended without an exit code: the VM restarted, or the run was killed" in rest


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_the_hubs_token_is_in_no_command_line_log_or_file(machine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_thisIsTheSecret"
    monkeypatch.setenv("HF_TOKEN", token)
    done = vm_run(machine, "--send-hf-token")
    assert done.exit_code == 0, done.output
    assert json.loads((report_folder(machine) / "record.json").read_text())["token_length"] == len(token)
    assert token not in done.output
    holders = [path for path in machine.root.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert holders == []
    assert machine.calls(".hf-token")


def test_without_being_asked_no_token_travels(machine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsTheSecret")
    assert vm_run(machine).exit_code == 0
    assert json.loads((report_folder(machine) / "record.json").read_text())["token_length"] == 0


def test_the_token_of_a_run_that_could_not_start_is_removed(machine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsTheSecret")
    machine.plant({"verb": "ssh", "match": r" start ", "code": 1, "stderr": "fork: Resource temporarily unavailable"})
    done = vm_run(machine, "--send-hf-token")
    refused(done, machine, "Starting the suite failed on", "Resource temporarily unavailable")
    assert not list(machine.home().rglob("*hf-token*"))


# --- several hosts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [2])
def test_every_host_of_a_slice_runs_and_is_collected(machine: StandIn) -> None:
    done = vm_run(machine, "--worker=all")
    assert done.exit_code == 0, done.output
    folder = report_folder(machine)
    for worker in (0, 1):
        kept = json.loads((folder / f"worker{worker}" / "record.json").read_text())
        assert (kept["KVCYCLE_WORKER"], kept["KVCYCLE_WORKERS"]) == (str(worker), "2")
        assert numbered(log_of(folder / f"worker{worker}")) == list(range(400))
        assert f"worker {worker}: the suite exited with 0" in done.output
    assert numbered(done.output) == list(range(400))  # the first host's log alone
    assert "Every host runs a suite of its own" in done.output


@pytest.mark.parametrize("hosts", [2])
def test_each_host_is_held_to_the_pins(machine: StandIn) -> None:
    done = vm_run(machine, "--worker=all", pins=machine.pins[:1])
    refused(done, machine, f"{NAME}, worker 1, is not the host that is pinned")


@pytest.mark.parametrize("hosts", [2])
def test_a_run_that_starts_on_some_hosts_only_is_ended(machine: StandIn) -> None:
    machine.plant({"verb": "ssh", "match": r" start \S+ \S+ \S+ \S+ 1 ", "code": 1, "stderr": "no more processes"})
    done = vm_run(machine, "--worker=all", further=("--kv-set", "wait"))
    assert done.exit_code == 2, done.output
    assert "Starting the suite failed on my-tpu, worker 1" in done.stderr
    (run,) = machine.runs(0)
    assert (run / "exit-code").exists()


# --- the dry run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_calls_nothing_and_prints_what_a_shell_can_run(machine: StandIn, tmp_path: Path) -> None:
    awkward = 'note=it\'s a "test" $HOME'
    done = vm_run(machine, "--dry-run", f"--user={USER}", further=("--kv-set", awkward))
    assert done.exit_code == 0, done.output
    assert not machine.calls()
    assert not (machine.root / "reports").exists()
    script = tmp_path / "pasted.sh"
    script.write_text(done.stdout)
    pasted = subprocess.run(["bash", "-eu", script], capture_output=True, text=True, check=False, timeout=120)
    assert pasted.returncode == 0, pasted.stderr
    assert pasted.stdout.rstrip().endswith("0")
    kept = json.loads((report_folder(machine) / "latest" / "record.json").read_text())
    assert kept["argv"][4:6] == ["--kv-set", awkward]


def test_a_dry_run_of_a_changed_tree_with_a_token(
    machine: StandIn, own_repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsTheSecret")
    (own_repository / "new.txt").touch()
    done = vm_run(machine, "--dry-run", f"--user={USER}", "--allow-dirty", "--send-hf-token")
    assert "hf_thisIsTheSecret" not in done.output
    script = tmp_path / "pasted.sh"
    script.write_text(done.stdout)
    pasted = subprocess.run(["bash", "-eu", script], capture_output=True, text=True, check=False, timeout=120)
    assert pasted.returncode == 0, pasted.stderr
    assert (machine.home() / BASE / "checkout" / "new.txt").exists()
    assert json.loads((report_folder(machine) / "latest" / "record.json").read_text())["token_length"] == 18


# --- the suite itself -------------------------------------------------------------------------------------------------


def test_the_suite_of_this_project_fails_there_for_want_of_a_tpu(
    machine: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of_this_repository(tmp_path / "this"))
    machine.set(environment={})
    done = vm_run(machine, further=("tests/tpu",))
    assert done.exit_code == 1, done.output
    assert "There is no TPU here, and --require-tpu makes that a failure." in log_of(report_folder(machine))
    assert "no TPU" in (report_folder(machine) / "junit.xml").read_text()
