"""The code that goes to the VM: a commit, or a changed tree that is labelled as one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from kvcycle.vm.remote import BASE
from tests.unit.vm.client import (
    later,
    log_of,
    numbered,
    refused,
    report_folder,
    vm_run,
)
from tests.unit.vm.machine import StandIn


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
