"""What is printed to be pasted, and that a secret is in nothing that is printed or called."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from kvcycle.vm.remote import BASE
from tests.unit.vm.client import (
    refused,
    report_folder,
    vm_run,
)
from tests.unit.vm.machine import USER, StandIn


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
