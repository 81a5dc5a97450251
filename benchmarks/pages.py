"""Memory as the limit sees it: mapped once, filled again and again by one thread, in plain 4 KiB pages.

And the states in which malloc gives a buffer its pages, which decide what a rebuild on virtual devices costs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np

PageState = Literal["default", "mapped", "fresh", "huge"]

#: What a process must be started with; glibc reads it then.
ENVIRONMENT: dict[PageState, dict[str, str]] = {
    "default": {},
    # Freed memory stays on the heap, so every buffer is of pages that were written before.
    "mapped": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**12), "MALLOC_ARENA_MAX": "1"},
    "fresh": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    "huge": {"MALLOC_MMAP_THRESHOLD_": "65536", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}

TITLES: dict[PageState, str] = {
    "default": "default malloc",
    "mapped": "every page already mapped",
    "fresh": "every buffer freshly mapped",
    "huge": "freshly mapped, huge pages",
}


class Region:
    """Memory of its own mapping, without huge pages, since XLA asks for none."""

    def __init__(self, size_bytes: int, buffers: int = 1) -> None:
        """Map it; ``buffers`` is how many equal ones of a KV cache it stands for, each device's share counted."""
        self._map = mmap.mmap(-1, size_bytes)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._size_bytes = size_bytes
        self._buffers = buffers
        # By two bytes, as bfloat16: numpy writes them with plain stores.
        self._elements: np.ndarray[tuple[int, ...], np.dtype[np.uint16]] | None = np.frombuffer(self._map, np.uint16)
        self._cores = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def fill(self) -> None:
        """Write every byte with plain stores: what any loop over the elements must do."""
        if self._elements is not None:
            self._elements.fill(0)

    def fill_by_every_core(self) -> None:
        """The same with a thread on every core, an equal share each: no way that uses plain stores can be faster."""
        if self._elements is not None:
            shares = np.array_split(self._elements, len(os.sched_getaffinity(0)))
            for _ in self._cores.map(lambda share: share.fill(0), shares):
                pass

    def memset(self) -> None:
        """Write every byte as the C library does, which on some processors need not read what it overwrites."""
        if self._elements is not None:
            ctypes.memset(self._elements.ctypes.data, 0, self._size_bytes)

    def memset_by_every_core(self) -> None:
        """The same with a thread on every core, a call for each buffer: the library chooses its stores by the size."""
        if self._elements is not None:
            buffers = np.array_split(self._elements, self._buffers)
            for _ in self._cores.map(lambda one: ctypes.memset(one.ctypes.data, 0, one.nbytes), buffers):
                pass

    def unmap(self) -> None:
        """Give it back to the system."""
        self._cores.shutdown()  # its threads hold no share by then
        self._elements = None
        self._map.close()


class Used(NamedTuple):
    """What this process has used so far."""

    #: Pages that the system has mapped into it.
    faults: int
    user_s: float
    system_s: float


def used() -> Used:
    """What this process, all its threads, has used so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Used(usage.ru_minflt, usage.ru_utime, usage.ru_stime)
