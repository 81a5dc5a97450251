"""Where the time goes: seconds by what they were spent on, each counted once, in this process and those under it.

``make demo`` and ``make test`` end with the table. A span that lies within another is taken out of it: the generations
of a cycle are no part of "cycle", and what they compile is no part of "generate". What was measured is for looking at;
no check reads it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["boot", "compile", "generate", "cycle", "fault"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Names a folder: every process that has it leaves its own sums there, whenever no span is open.
FOLDER = "KVCYCLE_TIMES"


@dataclass
class Spent:
    """How often, and how many seconds in all."""

    times: int = 0
    seconds: float = 0.0


_spent: dict[Kind, Spent] = {}
_open: list[float] = []  # of each open span, outermost first, the seconds that belong to spans within it
_lock = threading.Lock()


@contextmanager
def spending(kind: Kind) -> Iterator[None]:
    """Count what happens in a ``with`` block to ``kind``; outside of the main thread nothing is counted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.perf_counter()
    _open.append(0.0)
    try:
        yield
    finally:
        with _lock:
            took = time.perf_counter() - began
            _add(kind, took - _open.pop())
            if _open:
                _open[-1] += took
        if not _open:
            _leave()


def compiled(seconds: float) -> None:
    """Count seconds of the compiler, in whichever thread, and take them out of the span that waits for it."""
    with _lock:
        _add("compile", seconds)
        if _open:
            _open[-1] += seconds


def _add(kind: Kind, seconds: float) -> None:
    spent = _spent.setdefault(kind, Spent())
    spent.times += 1
    spent.seconds += max(0.0, seconds)  # programs that compile at the same time take more than passes


def _leave() -> None:
    if folder := os.environ.get(FOLDER):
        path = Path(folder, f"{os.getpid()}.json")
        if path.parent.is_dir():  # else whoever asked for it is gone
            path.write_text(json.dumps({kind: asdict(spent) for kind, spent in _spent.items()}))


def of_all_processes(folder: Path) -> tuple[dict[Kind, Spent], int]:
    """The sums that processes left in a folder, added up, and how many processes that were."""
    total: dict[Kind, Spent] = {}
    files = sorted(folder.glob("*.json"))
    for file in files:
        for kind, spent in json.loads(file.read_text()).items():
            mine = total.setdefault(kind, Spent())
            mine.times += spent["times"]
            mine.seconds += spent["seconds"]
    return total, len(files)
