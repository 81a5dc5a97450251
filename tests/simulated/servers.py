"""An HTTP server of sglang-jax's, ours or the stock one, in a process group of its own that ends with the test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from kvcycle.profile import Profile

API_KEY = "of this test only"
#: Names a file to all processes of ``held_server``; while it is there a token is decoded only when a message came.
HELD = "KVCYCLE_TEST_HELD"
#: What the file says if it is to go once a call was withdrawn.
UNTIL_WITHDRAWN = "until a call was withdrawn"
ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """A server that answers, and what it has said."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Post a JSON body."""
        return self.client.post(path, json=body)

    def state(self) -> Any:
        """What the server says of its memory."""
        return self.client.get("/get_server_info").json()["kvcycle"]

    def in_use(self, owner: str | None = None) -> dict[str, int]:
        """Bytes by device, by the ledger of the scheduler's process."""
        uses = self.state()["memory"]["devices"]
        return {str(use["id"]): use["by_owner"][owner] if owner else use["ledger_bytes"] for use in uses}

    def generate(self, tokens: int = 16) -> list[int]:
        """Generate greedily, and wait for it."""
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        answer = self.post("/generate", text="Hello", sampling_params=sampling)
        assert answer.status_code == 200, answer.text
        return [int(token) for token in answer.json()["output_ids"]]

    def generating(self, tokens: int = 16) -> Future[list[int]]:
        """The same in a thread."""
        future: Future[list[int]] = Future()

        def run() -> None:
            try:
                future.set_result(self.generate(tokens))
            except BaseException as error:  # noqa: BLE001 - for whoever asks the future
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def until_requests(self, **counts: int) -> None:
        """Wait until so many requests are waiting, or running."""
        deadline = time.monotonic() + 60
        while any(self.state()["requests"][place] != number for place, number in counts.items()):
            assert time.monotonic() < deadline, self.state()
            time.sleep(0.02)

    def until_resident(self, at_most: float) -> None:
        """Wait until the operating system has taken back what the scheduler's process has freed."""
        deadline = time.monotonic() + 60
        while (rss := self.scheduler_rss_bytes()) > at_most:
            assert time.monotonic() < deadline, rss
            time.sleep(0.02)

    def scheduler(self) -> psutil.Process:
        """The process that holds the engine."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        (scheduler,) = [child for child in children if child.name().startswith("sglang::schedul")]
        return scheduler

    def scheduler_rss_bytes(self) -> int:
        """Resident memory of the scheduler's process, by the operating system's word."""
        return int(self.scheduler().memory_info().rss)


def arguments_of(profile: Profile) -> dict[str, Any]:
    """The engine's arguments for a scheduler in another process on virtual devices."""
    settings = {"disable_precompile": True, "skip_server_warmup": True, "log_level": "error"}
    return {"model_path": str(profile.model_folder()), **profile.engine_args("cpu"), **settings}


def environment(profile: Profile, cache: Path) -> dict[str, str]:
    """Virtual devices, memory that goes back when it is freed, and what was compiled once."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={profile.devices_needed}",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def serving(module: str, profile: Profile, folder: Path, *more: str) -> Iterator[Server]:
    """Start ``python -m module`` on loopback, wait until it answers, and end its whole process group in any case."""
    port = free_port()
    flags = [*more, "--host", "127.0.0.1", "--port", str(port)]
    for name, value in arguments_of(profile).items():
        if value is not None and value is not False:
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    log = folder / f"{module}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *flags],
            cwd=ROOT,  # where tests' own modules are found
            env=environment(profile, folder / "compiled"),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # sglang-jax kills parents and children alike
        )
    try:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120) as client:
            _wait_until_it_answers(process, client, log)
            yield Server(process, client, log)
    finally:
        with suppress(ProcessLookupError):  # it has ended itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _wait_until_it_answers(process: subprocess.Popen[bytes], client: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + 180
    while True:
        assert process.poll() is None, f"the server ended with {process.returncode}:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"the server does not answer:\n{log.read_text()}"
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
