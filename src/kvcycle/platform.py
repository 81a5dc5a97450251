"""Puts the process on a platform before jax is imported: a real TPU, or N virtual CPU devices."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from kvcycle.errors import PlatformError
from kvcycle.profile import Platform

_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"

#: Numbers of glibc's mallopt (malloc.h). A threshold that is set is also fixed: glibc stops raising it after the first
#: large free.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
#: Of Linux's prctl (linux/prctl.h).
_PR_SET_THP_DISABLE = 41
_MAPPED_FROM_BYTES = 1 << 20
#: How many mappings malloc may make: glibc's own limit.
_MAPPINGS = 65536
#: Free memory at the end of a heap that stays there until :func:`return_freed_memory`.
_KEPT_FREE_BYTES = 1 << 30


def prepare(platform: Platform, devices: int, hosts: int = 1) -> None:
    """Set the process up so that jax comes up on ``platform`` with at least ``devices`` devices.

    Best called before jax is imported; where jax is imported but has not started its backends yet, it still works.

    Args:
        platform: where to run.
        devices: how many devices this process needs.
        hosts: how many hosts there are. Of several, jax is asked for its devices only when they have met.

    Raises:
        PlatformError: jax already runs on another platform, or with fewer devices.
    """
    if platform == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = _with_device_count(os.environ.get("XLA_FLAGS", ""), devices)
        map_large_allocations()  # the engine's own pools are among them
    if "jax" in sys.modules:
        import jax

        if platform == "cpu":
            jax.config.update("jax_platforms", "cpu")  # the variable was read at the import
        if hosts == 1:
            _check_imported(platform, devices)


def _with_device_count(flags: str, devices: int) -> str:
    kept = re.sub(rf"\s*{_DEVICE_COUNT_FLAG}=\d+", "", flags)
    return f"{kept} {_DEVICE_COUNT_FLAG}={devices}".strip()


def _check_imported(platform: Platform, devices: int) -> None:
    import jax

    actual = jax.default_backend()
    if actual != platform or len(jax.devices()) < devices:
        raise PlatformError(
            f"jax was started before kvcycle could choose its platform: it runs on {len(jax.devices())} "
            f"{actual} device(s), but {devices} {platform} device(s) are needed. Start a new process, or set "
            f"JAX_PLATFORMS={platform}"
            + (f" and XLA_FLAGS={_DEVICE_COUNT_FLAG}={devices}" if platform == "cpu" else "")
            + " before anything uses jax."
        )


def map_large_allocations() -> None:
    """Let every allocation of 1 MiB and more be its own memory mapping, so that resident memory follows a free.

    glibc otherwise raises its mmap threshold at the first large free and keeps later buffers on its heap: of 2,304 MiB
    freed as little as 1,120 then went back to the system, and the ``rss`` witness would be wrong. Threads that start
    from now on share one heap, of which all that is free can be given back; of a heap of its own, not its end. Does
    nothing where the C library is not glibc.

    And let the system use plain pages: numpy asks for huge ones for arrays of 4 MiB and more, also in memory that the
    heap uses again for something else, and resident memory then goes by 2 MiB.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    _set(_M_ARENA_MAX, 1)
    _set(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)


def keep_large_allocations() -> bool:
    """Let what comes and goes stay in memory that is mapped already, except in :func:`large_allocations_mapped`.

    A forward's temporaries would otherwise be mapped anew, page by page, at every step, which takes as much processor
    time as everything else in it (the tiny profile's). They are one allocation on each device, which on jax 0.8.1 is
    larger than any threshold that glibc takes: so it may map nothing at all. What is free goes back in
    :func:`return_freed_memory`, but of a second heap not its end: so nothing is kept in a process whose threads had
    heaps of their own before :func:`prepare`. ``MALLOC_ARENA_MAX=1`` in its environment prevents those.

    Returns:
        Whether they are kept.
    """
    if _heaps() != 1:
        return False
    _set(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)
    _set(_M_MMAP_MAX, 0)
    _kept[:] = [True]
    return True


def _heaps() -> int | None:
    """How many heaps malloc has made (glibc's arenas); None where the C library does not say."""
    text, size = ctypes.c_char_p(), ctypes.c_size_t()
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.open_memstream.restype = ctypes.c_void_p
        stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        found = (text.value or b"").count(b"<heap nr=")
        libc.free(text)
        return found or None
    return None


#: Not empty once large allocations are kept.
_kept: list[bool] = []


@contextmanager
def large_allocations_mapped() -> Iterator[None]:
    """Map what is allocated in a ``with`` block, by any thread: buffers that are lent, and must be seen to go."""
    if not _kept:
        yield
        return
    _set(_M_MMAP_MAX, _MAPPINGS)
    try:
        yield
    finally:
        _set(_M_MMAP_MAX, 0)


def _set(option: int, value: int) -> None:
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(option, value)


def return_freed_memory() -> None:
    """Let the C library give back what it holds free, so that resident memory is what is in use and no more.

    Freed heap pages otherwise go back whenever the allocator happens to trim, which looks like a change in use of
    some MiB. Does nothing where the C library is not glibc.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def few_objects_to_collect() -> Iterator[None]:
    """Keep what lives already out of the garbage collections that every sample needs: they then take 1 ms, not 0.3 s.

    What is left behind meanwhile is younger, and collected as before.
    """
    frozen_before = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:  # else not ours to thaw
            gc.unfreeze()


def tpu_is_present() -> bool:
    """Whether jax finds a TPU; starts jax's backends, so call :func:`prepare` first."""
    import jax

    try:
        return any(device.platform == "tpu" for device in jax.devices("tpu"))
    except RuntimeError:
        return False
