"""``kvcycle vm run`` all the way: code, environment, log, exit code, reports, one host and several."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvcycle.vm.remote import BASE
from tests.unit.vm.client import (
    later,
    log_of,
    numbered,
    refused,
    report_folder,
    vm_run,
)
from tests.unit.vm.machine import NAME, ROOT, StandIn
from tests.unit.vm.machine import this_repository as copy_of_this_repository


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
    assert (kept["KVCYCLE_RANK"], kept["KVCYCLE_HOSTS"], kept["KVCYCLE_COORDINATOR"]) == (None, None, None)
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


def test_a_conda_environment_that_is_not_there(machine: StandIn) -> None:
    done = vm_run(machine, "--conda-env=other")
    refused(
        done, machine, "Preparing the environment failed on", "There is no conda environment other", "base sglang-jax"
    )


def test_a_virtual_environment_is_made_once(machine: StandIn) -> None:
    first = vm_run(machine, conda=False)
    assert first.exit_code == 0, first.output
    assert "worker 0: a new virtual environment with Python 3.1" in first.output
    assert "worker 0: installing constraints/sglang-jax-0.1.0rc0.txt, about 2 GB" in first.output
    assert "worker 0: Collecting jax==0.10.2" in first.output
    assert "worker 0: environment made " in first.output
    (call,) = (machine.home() / "pip-calls").read_text().splitlines()
    assert "install -c constraints/sglang-jax-0.1.0rc0.txt -r " in call
    assert (machine.home() / BASE / "requirements.txt").read_text() == "pytest\njax\n"
    second = later(machine, conda=False)
    assert second.exit_code == 0, second.output
    assert "worker 0: environment kept " in second.output
    assert "installing" not in second.output


def test_no_python_to_make_an_environment_with(machine: StandIn) -> None:
    shutil.rmtree(machine.home() / "system")
    refused(vm_run(machine, conda=False), machine, "Preparing the environment failed", "No working Python 3.13 or 3.12")


def test_a_full_disk_while_pip_installs(machine: StandIn) -> None:
    (machine.home() / "miniconda3" / "envs" / "sglang-jax" / "bin" / "python.ready").unlink()
    (machine.home() / "pip-says").write_text("ERROR: Could not install: [Errno 28] No space left on device\n")
    done = vm_run(machine)
    refused(done, machine, "Preparing the environment failed on", "the VM's disk is full", "~/kvcycle-vm/runs")
    assert "progress" not in done.output
    assert "worker 0: installing constraints/sglang-jax-0.1.0rc0.txt" in done.output


def test_a_full_disk_while_the_code_is_copied(machine: StandIn) -> None:
    machine.plant({"verb": "scp", "match": "bundle", "code": 1, "stderr": "scp: write remote: No space left on device"})
    refused(vm_run(machine), machine, f"Copying the code failed on {NAME}, worker 0: the VM's disk is full")
    assert not list((machine.root / "cache").rglob("*.bundle"))


@pytest.mark.parametrize("hosts", [2])
def test_every_host_of_a_slice_runs_and_is_collected(machine: StandIn) -> None:
    done = vm_run(machine, "--worker=all")
    assert done.exit_code == 0, done.output
    folder = report_folder(machine)
    for worker in (0, 1):
        kept = json.loads((folder / f"worker{worker}" / "record.json").read_text())
        assert (kept["KVCYCLE_RANK"], kept["KVCYCLE_HOSTS"]) == (str(worker), "2")
        assert kept["KVCYCLE_COORDINATOR"] == "10.0.0.0:10011"
        assert numbered(log_of(folder / f"worker{worker}")) == list(range(400))
        assert f"worker {worker}: the suite exited with 0" in done.output
    assert numbered(done.output) == list(range(400))  # the first host's log alone
    assert "The 2 hosts are one run, and meet at 10.0.0.0:10011; worker 0 has its report." in done.output


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


def test_the_suite_of_this_project_fails_there_for_want_of_a_tpu(
    machine: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of_this_repository(tmp_path / "this"))
    # With this test's own environment, which its constraints file and the real pip are to find complete.
    stack = f"sglang-jax-{importlib.metadata.version('sglang-jax')}"
    machine.real_python()
    machine.set(environment={"PIP_NO_INDEX": "1"})
    done = vm_run(machine, f"--stack={stack}", further=("tests/tpu",))
    assert "worker 0: environment kept " in done.output
    assert done.exit_code == 1, done.output
    assert "There is no TPU here, and --require-tpu makes that a failure." in log_of(report_folder(machine))
    assert "no TPU" in (report_folder(machine) / "junit.xml").read_text()


def test_an_environment_that_is_not_what_the_constraints_say_is_not_kept(
    machine: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: the real pip, an index that it may not ask, and one version that is another."""
    stack = f"sglang-jax-{importlib.metadata.version('sglang-jax')}"
    pins = Path("constraints", f"{stack}.txt")
    folder = copy_of_this_repository(
        tmp_path / "this", {pins: re.sub(r"(?m)^rich==.*", "rich==14.0.0", (ROOT / pins).read_text())}
    )
    monkeypatch.chdir(folder)
    machine.real_python()
    machine.set(environment={"PIP_NO_INDEX": "1"})
    done = vm_run(machine, f"--stack={stack}")
    refused(done, machine, "Preparing the environment failed on", "pip did not make the environment", "rich")
