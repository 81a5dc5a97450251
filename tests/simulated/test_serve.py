"""``python -m kvcycle.serve`` on loopback, and an Engine in another process: released, waited for, resumed.

One server for all of it. The control is the stock server, which the same call kills.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import kvcycle
from kvcycle.profile import Profile
from kvcycle.sizing import predict_kv
from tests.simulated.conftest import Guarded
from tests.simulated.servers import API_KEY, HELD, UNTIL_WITHDRAWN, Server, arguments_of, environment, serving

KV_BYTES, WEIGHTS = 8_390_656, 5_526_528
#: Tokens of a request that runs while something else happens.
LONG = 60
DEVICES = ("0", "1", "2", "3")


@pytest.fixture(scope="module")
def profile() -> Profile:
    return kvcycle.load_profile("tiny", {"engine.max_total_tokens": 4096})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def booted(profile: Profile, folder: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HELD, str(folder / "held"))
        with serving("tests.simulated.held_server", profile, folder, "--api-key", API_KEY) as server:
            yield server


@pytest.fixture
def held(folder: Path) -> Iterator[Path]:
    """While this file is there a request gets a token for each message only: it outlasts what a test does."""
    file = folder / "held"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def undisturbed(booted: Server) -> dict[int, list[int]]:
    """What the engine answers when nobody takes its memory, by the number of tokens."""
    tokens = {tokens: booted.generate(tokens) for tokens in (LONG, 16)}
    assert len(set(tokens[16])) > 8  # an output that repeats one token would prove nothing
    assert tokens[LONG][:16] == tokens[16]
    return tokens


@pytest.fixture
def server(booted: Server, undisturbed: dict[int, list[int]]) -> Iterator[Server]:
    """The server, idle; whatever a test does, everything is resident again after it."""
    booted.until_requests(waiting=0, running=0)
    yield booted
    if booted.state()["released"]:
        assert booted.post("/resume_memory_occupation").status_code == 200


def each(size: int) -> dict[str, int]:
    return dict.fromkeys(DEVICES, size)


def change(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {device: after[device] - before[device] for device in before}


def test_released_memory_falls_to_the_byte_requests_wait_and_get_the_same_tokens(
    server: Server, profile: Profile, undisturbed: dict[int, list[int]]
) -> None:
    config = profile.model_config_json()
    assert config is not None
    predicted = predict_kv(config, profile.engine_args("cpu"))
    assert predicted is not None
    assert predicted.bytes_per_device == KV_BYTES
    before, rss_before = server.in_use(), server.scheduler_rss_bytes()
    compiled = server.state()["compiles"]
    assert compiled["backend"] >= 10  # the control: the first generation was seen to compile
    assert server.in_use("kv") == each(KV_BYTES)

    freed = server.post("/release_memory_occupation", tags=["kv_cache"])
    assert freed.status_code == 200
    assert freed.json()["bytes_by_device"] == each(KV_BYTES)
    assert (freed.json()["bytes"], freed.json()["tags"]) == (4 * KV_BYTES, ["kv_cache"])
    assert change(before, server.in_use()) == each(-KV_BYTES)
    assert (server.state()["released"], server.in_use("kv")) == (["kv_cache"], each(0))
    # Another witness: the operating system's word of the process in which the scheduler says that.
    server.until_resident(at_most=rss_before - 0.9 * 4 * KV_BYTES)

    waiting = server.generating()
    server.until_requests(waiting=1, running=0)
    also = server.post("/release_memory_occupation", tags=["weights"])
    assert also.json()["bytes_by_device"] == each(WEIGHTS)
    assert change(before, server.in_use()) == each(-KV_BYTES - WEIGHTS)
    assert server.post("/resume_memory_occupation", tags=["kv_cache"]).json() == {"success": True, "tags": ["kv_cache"]}
    server.until_requests(waiting=1, running=0)  # it waits for the weights as well
    assert not waiting.done()
    assert server.post("/resume_memory_occupation").json() == {"success": True, "tags": ["weights"]}

    assert waiting.result(60) == undisturbed[16]
    assert server.generate() == undisturbed[16]
    server.until_requests(waiting=0, running=0)
    # By owner: what is left of a generation's last batch differs by some bytes from one generation to the next.
    assert (server.in_use("kv"), server.in_use("weights")) == (each(KV_BYTES), each(WEIGHTS))
    assert server.state()["compiles"] == compiled


def test_the_health_is_503_while_released_and_no_request_is_left_behind(server: Server) -> None:
    server.post("/release_memory_occupation", tags=["kv_cache"])
    assert server.client.get("/health").status_code == 200  # the process lives
    answer = server.client.get("/health_generate")
    assert (answer.status_code, answer.json()["released"]) == (503, ["kv_cache"])
    assert server.state()["requests"] == {"waiting": 0, "running": 0}
    server.post("/resume_memory_occupation")
    assert server.client.get("/health_generate").status_code == 200


def test_a_release_under_load_says_409_in_time_and_the_request_goes_on(
    server: Server, undisturbed: dict[int, list[int]], held: Path
) -> None:
    before = server.in_use("kv")
    running = server.generating(LONG)
    server.until_requests(running=1)
    answer = server.post("/release_memory_occupation", tags=["kv_cache"], timeout_s=0.1)
    assert answer.status_code == 409
    assert answer.json() == {
        "success": False,
        "error": {
            "type": "EngineBusyError",
            "message": "release_memory_occupation() needs an idle engine, and it has requests after 0.1 s: 0 waiting, "
            "1 running. Nothing was released. Wait for them, or end them with engine.abort_request(abort_all=True).",
            "requests": {"waiting": 0, "running": 1},
        },
        "bytes": 0,
        "bytes_by_device": {},
    }
    assert not running.done()
    assert (server.state()["released"], server.in_use("kv")) == ([], before)
    held.unlink()
    assert running.result(60) == undisturbed[LONG]


def test_a_release_under_load_waits_for_the_requests(server: Server, undisturbed: dict[int, list[int]]) -> None:
    running = server.generating(LONG)
    server.until_requests(running=1)
    assert server.post("/release_memory_occupation", tags=["kv_cache"]).json()["bytes_by_device"] == each(KV_BYTES)
    assert running.result(5) == undisturbed[LONG]  # it had ended before


@pytest.mark.parametrize("tags", [["kv_cache"], ["weights"]], ids=str)
def test_a_release_that_retracts_does_not_wait_and_the_requests_go_on_after_it(
    server: Server, undisturbed: dict[int, list[int]], tags: list[str], held: Path
) -> None:
    running = server.generating(LONG)
    server.until_requests(running=1)
    freed = server.post("/release_memory_occupation", tags=tags, timeout_s=0, mode="retract").json()
    assert (freed["tags"], len(freed["retracted"])) == (tags, 1)
    assert server.state()["requests"] == {"waiting": 1, "running": 0}
    assert not running.done()
    held.unlink()
    server.post("/resume_memory_occupation")
    assert running.result(60) == undisturbed[LONG]


def test_a_release_that_aborts_ends_the_requests(server: Server, undisturbed: dict[int, list[int]], held: Path) -> None:
    running = server.generating(LONG)
    server.until_requests(running=1)
    freed = server.post("/release_memory_occupation", timeout_s=0, mode="abort").json()
    assert len(freed["aborted"]) == 1
    held.unlink()
    tokens = running.result(60)
    assert tokens == undisturbed[LONG][: len(tokens)]
    assert len(tokens) < LONG


def test_a_client_that_leaves_has_released_nothing(
    server: Server, undisturbed: dict[int, list[int]], held: Path
) -> None:
    running = server.generating(LONG)
    server.until_requests(running=1)
    held.write_text(UNTIL_WITHDRAWN)
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/release_memory_occupation", json={}, timeout=0.1)
    assert running.result(60) == undisturbed[LONG]
    server.until_requests(waiting=0, running=0)
    # The same release by a client that stays: had the other been due still, it would have come first.
    assert server.post("/release_memory_occupation", tags=["kv_cache"]).status_code == 200
    assert server.state()["released"] == ["kv_cache"]


@pytest.mark.parametrize(
    ("call", "body", "status", "message"),
    [
        ("release", {"tags": ["kv_cash"]}, 400, "'kv_cash' is no tag (did you mean 'kv_cache'?); there are "),
        ("resume", {"tags": ["kv_cash"]}, 400, "'kv_cash' is no tag (did you mean 'kv_cache'?); there are "),
        ("release", {"tag": "kv_cache"}, 400, "(tag: Extra inputs are not permitted)"),
        ("resume", {"tags": ["kv_cache"]}, 409, "'kv_cache' is resident already, so nothing was resumed"),
        ("resume", {}, 409, "and everything is resident already"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_and_changes_nothing(
    server: Server, call: str, body: dict[str, object], status: int, message: str
) -> None:
    before = server.in_use()
    answer = server.client.post(f"/{call}_memory_occupation", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert (server.state()["released"], server.in_use()) == ([], before)


@pytest.mark.parametrize("key", [None, "another"])
def test_without_the_api_key_nothing_is_released_or_told(server: Server, key: str | None) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=server.client.base_url, headers=headers) as stranger:
        for method, path in (
            ("POST", "/release_memory_occupation"),
            ("POST", "/resume_memory_occupation"),
            ("GET", "/get_server_info"),
        ):
            answer = stranger.request(method, path)
            assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
    assert server.state()["released"] == []


def test_what_is_pickled_is_not_unpickled(server: Server) -> None:
    """A pickle that would end the process which loads it is a wrong body, and the server lives."""
    bomb = b"cos\n_exit\n(I3\ntR."
    control = subprocess.run([sys.executable, "-c", f"import pickle; pickle.loads({bomb!r})"], check=False)
    assert control.returncode == 3
    answer = server.client.post("/release_memory_occupation", content=bomb)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "BodyError")
    assert server.process.poll() is None
    port = server.client.base_url.port
    listening = {connection.laddr for connection in _connections(server) if connection.status == "LISTEN"}
    assert {(address.ip, address.port) for address in listening} == {("127.0.0.1", port)}  # all else is ipc


def _connections(server: Server) -> list[Any]:
    parent = psutil.Process(server.process.pid)
    return [found for each in (parent, *parent.children(recursive=True)) for found in each.net_connections("inet")]


def test_a_scheduler_that_was_killed_is_told_at_once(booted: Server) -> None:
    """The last test of this server. A SIGKILL, by the kernel that is out of memory, leaves the HTTP process alive."""
    booted.state()
    booted.scheduler().kill()
    answer = booted.client.post("/release_memory_occupation", json={}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "EngineCrashedError")
    assert answer.json()["error"]["message"].endswith("has ended. Boot the engine anew.")
    assert booted.client.get("/health_generate", timeout=30).status_code == 503


# The control, and an Engine -------------------------------------------------------------------------------------------


def test_the_stock_server_dies_of_the_same_call(profile: Profile, folder: Path) -> None:
    with serving("sgl_jax.launch_server", profile, folder) as stock:
        body = {"request_id": "1", "memory_size": 0}  # what it says it takes
        with pytest.raises(httpx.TransportError):
            stock.post("/release_memory_occupation", **body)
        assert stock.process.wait(60) != 0
        assert "Invalid object: ReleaseMemoryOccupationReqInput" in stock.log.read_text()


def test_an_engine_in_another_process_is_dropped_and_rebuilt_like_any(
    profile: Profile, folder: Path, project_root: Path, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(profile, folder / "compiled").items():
        monkeypatch.setenv(name, value)
    script = project_root / "tests" / "simulated" / "other_process.py"
    ended = guarded(str(script), json.dumps(arguments_of(profile)))
    lines = [line for line in ended.stdout.splitlines() if line.startswith("SEEN ")]
    assert lines, ended.stdout
    seen = json.loads(lines[0].removeprefix("SEEN "))
    assert seen["bytes_by_device"] == seen["freed"]["by_device"] == each(KV_BYTES)
    assert (seen["buffers"], seen["freed"]["buffers"], seen["freed"]["deleted"]) == (4, 4, 4)
    assert seen["states"] == ["resident", "dropped", "resident"]
    assert seen["fell"] == [KV_BYTES] * 4
    assert seen["weights"] == seen["weights_freed"] == [WEIGHTS] * 4
    assert seen["resident"] == [[KV_BYTES, WEIGHTS]] * 4
    assert seen["waiting"] == 1
    assert len(set(seen["before"])) > 4
    assert seen["before"] == seen["waited"] == seen["after"]
    assert seen["nonzero_after_rebuild"]  # of what the waiting request has written since
    assert seen["tags"] == ["kv_cache"]
    assert seen["twice"] == (
        "KVCacheStateError: The KV cache is dropped already; call rebuild() first, or use `with kv.released():`."
    )
    assert seen["arrays"].startswith(
        "UnsupportedEngineError: The engine's scheduler runs in another process, and so do"
    )
    assert seen["update"].startswith("UnsupportedEngineError: resume() was given what cannot be handed to the engine")
