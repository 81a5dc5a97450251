"""Connections that break, and runs that outlive them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.unit.vm.client import (
    CONDA,
    WHERE,
    later,
    log_of,
    numbered,
    refused,
    report_folder,
    vm_run,
    vm_stop,
    wait_for,
)
from tests.unit.vm.machine import NAME, PROJECT, ZONE, StandIn, fingerprint, host_key


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


def test_a_run_that_is_slow_to_detach_is_not_taken_along_by_its_connection(machine: StandIn) -> None:
    slow = machine.home() / "miniconda3" / "bin" / "setsid"  # first on the VM's PATH
    slow.write_text(f'#!/bin/sh\nsleep 0.5\nexec {shutil.which("setsid")} "$@"\n')
    slow.chmod(0o755)
    done = vm_run(machine)
    assert done.exit_code == 0, done.output


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


def test_another_host_that_answers_later_is_not_followed(machine: StandIn) -> None:
    offered = fingerprint(host_key(7))
    said = f"The fingerprint for the ED25519 key sent by the remote host is\n{offered}.\nHost key verification failed."
    machine.plant({"verb": "ssh", "match": "follow", "code": 255, "stderr": said})
    done = vm_run(machine)
    assert done.exit_code == 125, done.output
    assert (
        "Following the run failed on my-tpu, worker 0: my-tpu, worker 0, is not the host that is pinned" in done.stderr
    )
    assert f"It offered {offered}; pinned: {machine.vm['fingerprints'][0]}." in done.stderr
    assert len(machine.calls(" follow ")) == 1


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
