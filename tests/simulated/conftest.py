"""One real engine on four virtual CPU devices, shared by all tests of this folder that need one in their process."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

import kvcycle
from kvcycle.faults.campaign import Campaign, Result
from kvcycle.faults.catalogue import Fault
from kvcycle.generate import generate_once
from kvcycle.profile import Profile
from kvcycle.record_parts import Generate
from kvcycle.report.faults import show_matrix, summary
from tests.simulated.faulted import controls_of

#: jax's own name of it; the engine reads the variable at its boot.
CACHE = "JAX_COMPILATION_CACHE_DIR"
_CACHE_BYTES = 2**34


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what was compiled, one for all workers of the session."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def compiled_once(compiled: Path) -> Iterator[None]:
    """What one engine of these tests has compiled, the next reads from jax's persistent cache: a quarter of the work.

    What is counted stays: a program that is read is traced, lowered and counted as one that is compiled. What it takes
    does not, so tests of latencies are :func:`compiling_anew`. The folder is the session's own: nothing is read that
    was not compiled here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(compiled))
        # With a limit jax locks the folder, in which other workers write too. This process has read its variables.
        patch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", str(_CACHE_BYTES))
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
        # A suite in a process of its own is no worker of this session; pytest-benchmark would take it for one.
        for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="module")
def compiling_anew(compiled_once: None) -> Iterator[None]:
    """Nothing is read from the persistent cache, so that what compiles takes as long as it does for users."""
    folder = os.environ[CACHE]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(CACHE)
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()  # it looks at the folder once
        yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def smaller() -> dict[str, float]:
    """What the tests that generate change in the tiny profile: a quarter of the cache.

    Every step of a generation on CPU walks the whole of it, and on jax 0.8.1 copies it; at the profile's size that
    takes longer than everything else together. What else the process maps and unmaps meanwhile does not shrink with
    the cache, so the tolerance of its resident memory stays the same in bytes.
    """
    return {"engine.max_total_tokens": 4096, "tolerances.rss_fraction": 0.08}


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The tests of faulted.py, for what the module that imports them plants."""
    faults: list[Fault] = getattr(metafunc.module, "PLANTED", [])
    if faults and "run" in metafunc.fixturenames:
        metafunc.parametrize("run", controls_of(faults))
    if faults and "fault" in metafunc.fixturenames:
        metafunc.parametrize("fault", faults, ids=lambda fault: fault.id)


@pytest.fixture(scope="module")
def campaign(live_engine: Any, tiny: kvcycle.Profile, cold: Generate, compiling_anew: None) -> Campaign:
    """Asks for the first generation although it makes its own: other tests count on that it came first."""
    return Campaign(live_engine, tiny)


@pytest.fixture(scope="module")
def results() -> Iterator[list[Result]]:
    """What became of the faults so far; printed as the matrix when all have run (pytest -s)."""
    collected: list[Result] = []
    yield collected
    buffer = io.StringIO()
    show_matrix(collected, Console(file=buffer, width=110, highlight=False))
    print(buffer.getvalue(), summary(collected)[0], sep="")
