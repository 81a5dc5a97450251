"""Putting a process on a platform: in this one by the variables alone, with jax in processes of their own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from kvcycle import platform

COUNT = "--xla_force_host_platform_device_count"


@pytest.fixture(autouse=True)
def without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as one that has neither imported jax nor been told where to run it."""
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("flags", "merged"),
    [
        (None, f"{COUNT}=4"),
        ("", f"{COUNT}=4"),
        ("--xla_a=1", f"--xla_a=1 {COUNT}=4"),
        (f"{COUNT}=8", f"{COUNT}=4"),
        (f"{COUNT}=8 --xla_a=1", f"--xla_a=1 {COUNT}=4"),
        (f"--xla_a=1 {COUNT}=8 --xla_b=2", f"--xla_a=1 --xla_b=2 {COUNT}=4"),
        (f"{COUNT}=8 {COUNT}=2", f"{COUNT}=4"),
    ],
)
def test_the_device_count_is_merged_into_the_flags(
    flags: str | None, merged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags is not None:
        monkeypatch.setenv("XLA_FLAGS", flags)
    platform.prepare("cpu", 4)
    assert os.environ["XLA_FLAGS"] == merged
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    platform.prepare("cpu", 4)
    assert os.environ["XLA_FLAGS"] == merged


def test_a_tpu_is_left_to_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    platform.prepare("tpu", 4)
    assert os.environ["XLA_FLAGS"] == "--xla_a=1"
    assert "JAX_PLATFORMS" not in os.environ
    assert "jax" not in sys.modules


_SCRIPT = """
import jax

from kvcycle import platform
from kvcycle.errors import PlatformError

platform.prepare("cpu", 2)  # jax is imported, but has not started
print(len(jax.devices()), jax.default_backend(), platform.tpu_is_present())
platform.prepare("cpu", 1)
for name, devices in (("cpu", 3), ("tpu", 1)):
    try:
        platform.prepare(name, devices)
    except PlatformError as error:
        print(error)
"""


def test_jax_that_has_started_elsewhere_is_an_error_that_says_what_to_do() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.splitlines() == [
        "2 cpu False",
        (
            "jax was started before kvcycle could choose its platform: it runs on 2 cpu device(s), but 3 cpu device(s) "
            f"are needed. Start a new process, or set JAX_PLATFORMS=cpu and XLA_FLAGS={COUNT}=3 before anything uses "
            "jax."
        ),
        (
            "jax was started before kvcycle could choose its platform: it runs on 2 cpu device(s), but 1 tpu device(s) "
            "are needed. Start a new process, or set JAX_PLATFORMS=tpu before anything uses jax."
        ),
    ], done.stderr


def test_a_c_library_without_the_calls_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherLibrary:
        """As musl: no mallopt, no malloc_trim."""

        def __init__(self, _: object) -> None:
            self.asked: list[str] = []

        def __getattr__(self, name: str) -> object:
            raise AttributeError(name)

    monkeypatch.setattr(ctypes, "CDLL", OtherLibrary)
    platform.return_freed_memory()
    platform.prepare("cpu", 4)
    assert os.environ["JAX_PLATFORMS"] == "cpu"


_HEAP = """
import os, sys, threading

import psutil

from kvcycle import platform

MIB = 2**20


def resident():
    return psutil.Process().memory_info().rss / MIB


def left_by(mib):
    before = resident()
    block = b"x" * (mib * MIB)  # written, so that it is resident
    assert resident() - before > mib - 1
    del block
    return round((resident() - before) / 8)


if "second heap" in sys.argv:
    thread = threading.Thread(target=bytearray, args=(100_000,))
    thread.start()
    thread.join()
platform.map_large_allocations()
print("mapped", left_by(8))
print("kept:", platform.keep_large_allocations())
print("then", left_by(8))
platform.return_freed_memory()
with platform.large_allocations_mapped():
    print("mapped among it", left_by(8))
print("after it", left_by(48))  # more than any threshold of glibc's
before = resident()
platform.return_freed_memory()
print("given back", round((before - resident()) / 8))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is what is tested")
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "one heap",
            ["mapped 0", "kept: True", "then 1", "mapped among it 0", "after it 6", "given back 6"],
        ),
        (
            "second heap",
            ["mapped 0", "kept: False", "then 0", "mapped among it 0", "after it 0", "given back 0"],
        ),
    ],
)
def test_what_malloc_keeps_of_what_is_freed(argument: str, said: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", _HEAP, argument], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == said, done.stderr


def test_a_process_on_virtual_devices_has_plain_pages() -> None:
    script = "import ctypes\nfrom kvcycle import platform\n{}\nprint(ctypes.CDLL(None).prctl(42, 0, 0, 0, 0))"
    asked = [
        subprocess.run(
            [sys.executable, "-c", script.format(call)], capture_output=True, text=True, check=True
        ).stdout.strip()
        for call in ("", "platform.prepare('cpu', 1)", "platform.prepare('tpu', 1)")
    ]
    assert asked[1] == "1"
    assert asked[0] == asked[2]  # the process's own, whatever it was started with
