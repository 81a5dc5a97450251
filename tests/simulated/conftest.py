"""One real engine on four virtual CPU devices, shared by all tests of this folder that need one in their process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvcycle
from kvcycle.engine import stack
from kvcycle.generate import generate_once
from kvcycle.profile import Profile
from kvcycle.record import Generate


@pytest.fixture(scope="session")
def smaller() -> dict[str, float]:
    """What the tests that generate change in the tiny profile: nothing, but on jax 0.8.1 a quarter of the cache.

    On a CPU that jax interprets the kernel that writes a token's K and V with copies of the whole buffer, which at the
    profile's size takes longer than everything else together. What else the process maps and unmaps meanwhile does not
    shrink with the cache, so the tolerance of its resident memory stays the same in bytes.
    """
    return {"engine.max_total_tokens": 4096, "tolerances.rss_fraction": 0.08} if stack().jax == "0.8.1" else {}


@pytest.fixture(scope="session")
def tiny(smaller: dict[str, float]) -> Profile:
    """The tiny profile with one cycle."""
    return kvcycle.load_profile("tiny", {"cycle.cycles": 1, **smaller})


@pytest.fixture(scope="session")
def live_engine(tiny: Profile) -> Iterator[Any]:
    """A live engine; a test that drops its cache rebuilds it."""
    booted = kvcycle.boot(tiny, "cpu")
    yield booted.engine
    booted.close()


@pytest.fixture(scope="session")
def cold(live_engine: Any, tiny: Profile) -> Generate:
    """The engine's first generation, which compiles."""
    return generate_once(live_engine, tiny, "cold", 0)


@pytest.fixture
def kv(live_engine: Any, cold: Generate) -> Iterator[kvcycle.KVCache]:
    """The engine's KV cache, resident again when the test has ended, whatever it did."""
    cache = kvcycle.KVCache(live_engine)
    yield cache
    if cache.state == "dropped":
        cache.rebuild()


@pytest.fixture
def generate(live_engine: Any, tiny: Profile) -> Callable[[], Generate]:
    """Generate the profile's prompt once more."""
    return lambda: generate_once(live_engine, tiny, "warm", 0)


@pytest.fixture(scope="session")
def project_root(pytestconfig: pytest.Config) -> Path:
    """The folder of pyproject.toml."""
    return pytestconfig.rootpath


Guarded = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def guarded(project_root: Path) -> Guarded:
    """Run python with arguments under the project's guard, in a session of its own: no crash reaches this process.

    Fails with the output so far if it takes longer than ``timeout_s``.
    """

    def run(*arguments: str, cwd: Path = project_root, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(project_root / "scripts" / "guard.py"), sys.executable, "-u", *arguments]
        with subprocess.Popen(
            command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            try:
                output, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                # The whole session: a grandchild that lives would hold the pipe open for ever.
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                pytest.fail(f"{' '.join(arguments[:3])} did not end within {timeout_s:g} s. Its output:\n{output}")
        return subprocess.CompletedProcess(command, process.returncode, output)

    return run
