"""Lets what was freed be gone, before a sample: garbage, what threads still hold, and what malloc keeps.

And lets what Python would grow in one step at any time grow before the first sample.

A deleted buffer of a CPU device is given back when the last computation that read it has let go of it, which its thread
does after the computation's results are there. On a busy machine that thread may have to wait for a core, so that two
of sixteen buffers were still resident when a drop was sampled.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import jax

from kvcycle.platform import return_freed_memory

#: Of this process; Linux only.
_THREADS = Path("/proc/self/task")

#: After which a sample is taken although a thread is busy: something runs here that has nothing to do with the engine.
_LIMIT_S = 1.0


def settle() -> None:
    """Collect garbage, wait for the process's other threads to have nothing to do, and give free memory back.

    On accelerators nothing but garbage lies between what is freed and the devices' own count.
    """
    collect_garbage()
    if jax.default_backend() == "cpu":
        wait_for_other_threads()
        return_freed_memory()


@cache
def leave_room_for_names() -> None:
    """Let Python's table of interned strings have twice the room that it needs, once in a process.

    It is one block of memory. With sglang-jax 0.1.0rc0 on CPython 3.13 it has 139,000 names, and in 3,846,144 bytes
    places for 174,762, of which one whose name is gone is not used again: a cycle uses up a thousand.
    Whichever phase takes the last place has a table of twice the size made, and resident memory is off by more than a
    KV buffer. Tables after that have the size of the one that they replace: three places for each name that lives.
    """
    if (count := getattr(sys, "getunicodeinternedsize", None)) is not None:  # CPython
        names = [sys.intern(f"kvcycle makes room {number}") for number in range(count())]
        del names


def collect_garbage() -> None:
    """Collect all garbage: arrays in reference cycles live until a collection happens to come.

    ``gc.collect()`` does nothing while another thread's collection is under way, as it may be whenever that thread lets
    go of the interpreter in a finalizer; then it is asked again.
    """
    is_over = _over(_LIMIT_S)
    before = _full_collections()
    gc.collect()
    while _full_collections() == before and not is_over():
        time.sleep(0)  # the other thread goes on
        gc.collect()


def _full_collections() -> int:
    return int(gc.get_stats()[-1]["collections"])


def wait_for_other_threads(limit_s: float = _LIMIT_S, threads: Path = _THREADS) -> bool:
    """Wait until two looks in a row find every other thread of this process asleep.

    Args:
        limit_s: after which to go on, by the clock and of this process's processor time: the first goes on while
            nothing of this process may run, the second faster than the clock where several of its threads do.
        threads: where the system lists them; without it (not Linux) there is nothing to wait for.

    Returns:
        Whether they sleep.
    """
    own = str(threading.get_native_id())
    is_over = _over(limit_s)
    quiet_looks = 0
    while quiet_looks < 2:
        if not threads.is_dir():
            return True
        busy = any(_is_busy(thread) for thread in threads.iterdir() if thread.name != own)
        quiet_looks = 0 if busy else quiet_looks + 1
        if busy and is_over():
            return False
        time.sleep(0)  # a thread that waits for the interpreter sleeps too, and shall have it between two looks
    return True


def _over(limit_s: float) -> Callable[[], bool]:
    """Whether so long has passed from now on, by the clock and of this process's processor time."""
    by_clock, by_use = time.monotonic() + limit_s, time.process_time() + limit_s
    return lambda: time.monotonic() > by_clock and time.process_time() > by_use


def _is_busy(thread: Path) -> bool:
    with suppress(OSError, IndexError):  # it has ended meanwhile
        # proc(5): "pid (name) state …", where a name may hold anything; R runs or waits for a core, D waits for a page.
        return (thread / "stat").read_bytes().rpartition(b")")[2].split()[0] in (b"R", b"D")
    return False
