"""The other hosts' processes: an early end is a loss, a bad end is told, and none is left."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fixtures.hosts import Started
from fixtures.options import Settings
from kvcycle import hosts
from tests.unit.hosts import no_loss

pytestmark = pytest.mark.usefixtures(no_loss.__name__)
__all__ = ["no_loss"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings("tiny", "cpu", {}, tmp_path, require_tpu=False, run_dir=tmp_path, selected=True, hosts=2)


def started(settings: Settings, monkeypatch: pytest.MonkeyPatch, script: str) -> Started:
    """One other host that runs a script instead of the suite, as this process's own command line would have it."""
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", script])
    others = Started()
    others.start(1, settings, "127.0.0.1:10011")
    return others


def test_a_host_is_told_its_place_and_its_output_is_in_its_log(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import os; print(*(os.environ['KVCYCLE_' + name] for name in ('HOSTS', 'RANK', 'COORDINATOR')))"
    others = started(settings, monkeypatch, script)
    others.ending = True
    assert others.end(at_once=False) == []
    assert others.logs[1].read_text() == "2 1 127.0.0.1:10011\n"
    assert list(others.last_lines()) == [f"The last lines of host 1, {others.logs[1]}:", "  2 1 127.0.0.1:10011"]


def test_a_host_that_ends_early_is_lost(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = threading.Event()
    forget = hosts.listen(lambda _sentence: heard.set())
    others = started(settings, monkeypatch, "import sys; sys.exit(3)")
    assert heard.wait(60)
    forget()
    assert hosts.lost() == f"Host 1 ended with exit code 3 before the run did; its log is {others.logs[1]}."
    assert others.end(at_once=True) == [f"Host 1 ended with exit code 3; its log is {others.logs[1]}."]


def test_a_host_that_goes_on_after_the_end_is_ended(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    others = started(settings, monkeypatch, "import threading; threading.Event().wait()")
    (sentence,) = others.end(at_once=True)
    assert sentence == f"Host 1 was killed by SIGTERM; its log is {others.logs[1]}."
    assert hosts.lost() is None
    assert isinstance(others.processes[1].poll(), int)


def test_a_host_that_takes_no_notice_is_killed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    others = started(settings, monkeypatch, "import threading; threading.Event().wait()")
    process = others.processes[1]
    monkeypatch.setattr(process, "terminate", lambda: None)
    waits: list[float | None] = []
    wait = process.wait

    def wait_no_longer(timeout: float | None = None) -> int:
        if threading.current_thread() is threading.main_thread():  # and not the thread that watches it
            waits.append(timeout)
        if timeout is not None:
            raise subprocess.TimeoutExpired("the host", timeout)
        return wait()

    monkeypatch.setattr(process, "wait", wait_no_longer)
    assert others.end(at_once=True) == [f"Host 1 was killed by SIGKILL; its log is {others.logs[1]}."]
    assert waits == [5, None]
