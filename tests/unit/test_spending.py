"""Where the time went: each second counted once, in all processes, and shown at the end of a session."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures import times
from kvcycle import compiles, spending
from kvcycle.spending import FOLDER, Kind, Spent, of_all_processes

pytest_plugins = ["pytester"]

_BOOTS = """
import os, subprocess, sys
from kvcycle.spending import spending

CHILD = "from kvcycle.spending import spending\\nwith spending('boot'): pass"

def test_boots():
    with spending("boot"):
        pass
    subprocess.run([sys.executable, "-c", CHILD], check=True)
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, as a list of one number; with nothing spent so far."""
    now = [0.0]
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(spending, "_spent", {})
    yield now
    assert spending._open == []


def test_what_lies_within_a_span_is_taken_out_of_it(clock: list[float]) -> None:
    with spending.spending("fault"):
        clock[0] += 1
        with spending.spending("cycle"):
            clock[0] += 2
            for _ in range(2):
                with spending.spending("generate"):
                    clock[0] += 4
    assert spending._spent == {"generate": Spent(2, 8.0), "cycle": Spent(1, 2.0), "fault": Spent(1, 1.0)}


def test_what_another_thread_compiles_is_taken_out_of_the_span_that_waits(clock: list[float]) -> None:
    with spending.spending("generate"):
        clock[0] += 10
        compiles.total()  # listens from now on
        thread = threading.Thread(
            target=compiles._on_duration, args=("/jax/core/compile/backend_compile_duration", 7.0)
        )
        thread.start()
        thread.join()
        compiles._on_duration("/jax/core/compile/jaxpr_trace_duration", 3.0)
    assert spending._spent == {"compile": Spent(1, 7.0), "generate": Spent(1, 3.0)}


def test_a_span_of_another_thread_counts_nothing(clock: list[float]) -> None:
    def generate() -> None:
        with spending.spending("generate"):
            clock[0] += 1

    with spending.spending("cycle"):
        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
    assert spending._spent == {"cycle": Spent(1, 1.0)}


def test_a_span_that_fails_is_counted_and_closed(clock: list[float]) -> None:
    def fail() -> None:
        clock[0] += 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), spending.spending("boot"):
        fail()
    assert spending._spent == {"boot": Spent(1, 1.0)}


def test_processes_leave_their_sums_once_nothing_is_open(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with spending.spending("cycle"):
        with spending.spending("generate"):
            clock[0] += 1
        assert of_all_processes(tmp_path) == ({}, 0)
    (tmp_path / "1.json").write_text('{"generate": {"times": 2, "seconds": 0.5}}')
    assert of_all_processes(tmp_path) == ({"cycle": Spent(1, 0.0), "generate": Spent(3, 1.5)}, 2)


def test_a_folder_that_is_gone_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "gone"))
    with spending.spending("cycle"):
        pass
    assert not (tmp_path / "gone").exists()


def test_the_table_adds_up_and_lines_up() -> None:
    spent: dict[Kind, Spent] = {"boot": Spent(3, 6.0), "generate": Spent(1_234, 30.0)}
    lines = times.table(spent, processes=3, wall_s=50.0, workers=2).splitlines()
    assert [line.rstrip() for line in lines] == [
        "what (3 processes with an engine)                  times   seconds   share",
        "──────────────────────────────────────────────────────────────────────────",
        "booting engines                                        3       6.0      6%",
        "generating                                         1,234      30.0     30%",
        "everything else: starting python, tests, reports              64.0     64%",
        "",
        "all of it: 2 workers, 50.0 s each                            100.0    100%",
    ]


def test_a_session_ends_with_the_table_of_all_its_processes(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    pytester.makepyfile(_BOOTS)
    root = str(Path(times.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "fixtures.times", "-p", "no:anyio"],
        cwd=pytester.path, text=True, stdout=subprocess.PIPE, timeout=100, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "what (2 processes with an engine)" in done.stdout
    (booting,) = [line.split() for line in done.stdout.splitlines() if line.startswith("booting engines")]
    assert booting[2] == "2"


def test_a_session_without_an_engine_has_no_table(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    pytester.makepyfile("def test_nothing(): pass")
    done = pytester.runpytest_inprocess("-p", "fixtures.times", "-p", "no:anyio", "-p", "no:unraisableexception")
    assert "where the time went" not in done.stdout.str()
    assert FOLDER not in os.environ
