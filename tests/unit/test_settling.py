"""What a sample waits for: other threads' work, and a collection of garbage that is under way."""

from __future__ import annotations

import gc
import hashlib
import itertools
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvcycle import settling

ASLEEP = "7 (a worker) S 1 7 7"
RUNS = "7 (a worker) R 1 7 7"


def threads(folder: Path, **stats: str) -> Path:
    """A folder as Linux has of a process's threads."""
    for number, stat in stats.items():
        (folder / number).mkdir()
        (folder / number / "stat").write_text(stat + "\n")
    return folder


@pytest.mark.parametrize(
    ("stat", "quiet"),
    [
        (ASLEEP, True),
        (RUNS, False),
        ("7 (waits for a page) D 1 7 7", False),
        ("7 (a name) R) S 1 7 7", True),
        ("7 (a name) S) R 1 7 7", False),
        ("", True),  # it ends
    ],
)
def test_every_other_thread_must_sleep(tmp_path: Path, stat: str, quiet: bool) -> None:
    found = threads(tmp_path, one=ASLEEP, two=stat)
    assert settling.wait_for_other_threads(0.01, found) is quiet


def test_a_thread_that_falls_asleep_is_waited_for(tmp_path: Path) -> None:
    found = threads(tmp_path, one=RUNS)
    timer = threading.Timer(0.05, lambda: (found / "one" / "stat").write_text(ASLEEP))
    timer.start()
    assert settling.wait_for_other_threads(60, found) is True
    timer.join()


@pytest.mark.parametrize(
    ("runs_away", "quiet"),
    [
        ({"monotonic"}, True),
        ({"process_time"}, True),
        ({"monotonic", "process_time"}, False),
    ],
    ids=["nothing of this process may run", "many of its threads run", "both"],
)
def test_both_clocks_must_say_that_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_away: set[str], quiet: bool
) -> None:
    found = threads(tmp_path, one=RUNS)
    looks = itertools.count()

    def sleep(_seconds: float) -> None:
        if next(looks) == 10:
            (found / "one" / "stat").write_text(ASLEEP)

    clocks = {name: itertools.count(step=3600 * (name in runs_away)) for name in ("monotonic", "process_time")}
    monkeypatch.setattr(
        settling, "time", SimpleNamespace(sleep=sleep, **{name: partial(next, clock) for name, clock in clocks.items()})
    )
    assert settling.wait_for_other_threads(60, found) is quiet


def test_the_caller_does_not_wait_for_itself(tmp_path: Path) -> None:
    found = threads(tmp_path, **{str(threading.get_native_id()): RUNS})
    assert settling.wait_for_other_threads(0.01, found) is True


def test_where_the_system_does_not_list_threads_nothing_is_waited_for(tmp_path: Path) -> None:
    assert settling.wait_for_other_threads(60, tmp_path / "absent") is True


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists a process's threads there")
def test_a_real_thread_at_work_is_seen() -> None:
    done, begun = threading.Event(), threading.Event()

    def work() -> None:
        while not done.is_set():
            begun.set()
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 1_000_000)  # without the interpreter's lock

    worker = threading.Thread(target=work)
    worker.start()
    begun.wait()
    while not settling._is_busy(Path("/proc/self/task", str(worker.native_id))):
        time.sleep(0)  # it waits for the interpreter still
    try:
        assert settling.wait_for_other_threads(0.2) is False
    finally:
        done.set()
        worker.join()
    assert settling.wait_for_other_threads(60) is True


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.own = self


class Slow(Cycle):
    """The same, of which the collection must wait."""

    begun, done = threading.Event(), threading.Event()

    def __del__(self) -> None:
        self.begun.set()
        self.done.wait()


def test_another_threads_collection_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    Slow()
    other = threading.Thread(target=gc.collect)
    other.start()
    Slow.begun.wait()  # it is in the middle of its collection
    garbage = weakref.ref(Cycle())
    asked, collect = [], gc.collect

    def counting() -> int:
        asked.append(time.monotonic())
        if len(asked) == 3:
            assert garbage() is not None  # the first two did nothing: this is why it asks again
            Slow.done.set()
            other.join()
        return collect()

    monkeypatch.setattr(settling, "_LIMIT_S", 600)
    monkeypatch.setattr(gc, "collect", counting)
    try:
        settling.collect_garbage()
    finally:
        Slow.done.set()
        other.join()
    assert garbage() is None
    assert len(asked) >= 3


_NAMES = """
import sys

import psutil

from kvcycle.settling import leave_room_for_names

kept = [sys.intern(f"a name {number}") for number in range(100_000)]
if "room" in sys.argv:
    leave_room_for_names()
process, steps = psutil.Process(), 0
for number in range(200_000):
    if number % 100 == 0:
        before = process.memory_info().rss
    sys.intern(f"another name {number}")  # gone at once, and its place is not used again
    if number % 100 == 99:
        steps += process.memory_info().rss - before > 1_500_000  # the table, and not the hundred
print(steps)
"""


@pytest.mark.parametrize(("argument", "steps"), [("as it is", "1"), ("room", "0")])
def test_the_table_of_names_grows_before_the_first_sample(argument: str, steps: str) -> None:
    done = subprocess.run([sys.executable, "-c", _NAMES, argument], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [steps]
