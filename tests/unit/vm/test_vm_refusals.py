"""What ``kvcycle vm run`` refuses, each with its sentence, before anything runs on the VM."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcycle.cli import app
from kvcycle.vm.remote import BASE
from tests.unit.vm.client import (
    refused,
    vm_run,
)
from tests.unit.vm.machine import NAME, PROJECT, ZONE, StandIn, fingerprint, host_key


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
