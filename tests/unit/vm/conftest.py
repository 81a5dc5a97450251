"""The stand-in VM, with the client in the small repository."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcycle.vm import run as steps
from tests.unit.vm.machine import StandIn, small_repository


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


@pytest.fixture
def own_repository(tmp_path: Path, repository: Path, machine: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change."""
    copy = tmp_path / "own"
    shutil.copytree(repository, copy)
    monkeypatch.chdir(copy)
    return copy
