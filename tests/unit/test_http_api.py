"""The four routes over HTTP, without an engine: what each answer's status and body are."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

from kvcycle import http_api
from kvcycle.errors import (
    EngineBusyError,
    EngineCrashedError,
    HostMemoryError,
    KVCycleError,
    MemoryOccupationError,
    OccupationStateError,
    ParamSetError,
    RebuildError,
    UnsupportedEngineError,
    WeightsStateError,
)
from kvcycle.memory import MemorySnapshot
from kvcycle.occupation import Occupation, OccupationState
from kvcycle.record_parts import Compiles, DeviceUse

PATHS = ("/release_memory_occupation", "/resume_memory_occupation", "/get_server_info", "/health_generate")
FREED = Occupation(("kv_cache",), {0: 5, 2048: 7}, 0, {0: 1, 2048: 1}, (("float32[1]", 2),), retracted=("a",))


class Engine:
    """Stands for the MemoryOccupation of an engine: remembers what was asked, and does as it is told."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.error: KVCycleError | None = None
        self.now_released: tuple[str, ...] = ()
        self.until: Callable[[Callable[[], bool]], None] = lambda _: None

    def release(self, tags: Any, *, wait_s: float, mode: str, abandoned: Callable[[], bool]) -> Occupation:
        self.asked.append((tags, wait_s, mode))
        self.until(abandoned)
        return self._unless_error(FREED)

    def resume(self, tags: Any) -> tuple[str, ...]:
        self.asked.append(tags)
        return self._unless_error(("weights",))

    @property
    def released(self) -> tuple[str, ...]:
        return self._unless_error(self.now_released)

    def state(self) -> OccupationState:
        use = DeviceUse(id=2048, ledger_bytes=3, by_owner={"kv": 3})
        memory = MemorySnapshot(t_s=1.0, devices=(use,), rss_bytes=None)
        return self._unless_error(
            OccupationState(("kv_cache",), {"kv_cache": {2048: 3}}, {"waiting": 1}, memory, Compiles(trace=1))
        )

    def _unless_error[T](self, value: T) -> T:
        if self.error is not None:
            raise self.error
        return value


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def endpoints(engine: Engine) -> http_api.Endpoints:
    async def stock_info() -> dict[str, Any]:
        return {"version": "stock"}

    async def stock_health(_: Request) -> Any:
        return Response("stock")

    found = http_api.Endpoints(SimpleNamespace(get_server_info=stock_info, health_generate=stock_health))
    found.serve(engine)  # type: ignore[arg-type] # stands for it
    return found


@pytest.fixture
def client(endpoints: http_api.Endpoints) -> TestClient:
    app = FastAPI()
    for path in (*PATHS, "/generate"):
        app.add_api_route(path, lambda: "stock's", methods=["GET", "POST"])
    http_api.install(app, endpoints)
    return TestClient(app)


def test_a_release_says_what_it_freed(client: TestClient, engine: Engine) -> None:
    answer = client.post("/release_memory_occupation", json={"tags": ["kv_cache"], "timeout_s": 2, "mode": "retract"})
    assert answer.status_code == 200
    assert answer.json() == {
        "success": True,
        "bytes": 12,
        "tags": ["kv_cache"],
        "bytes_by_device": {"0": 5, "2048": 7},
        "host_bytes": 0,
        "remaining_bytes_by_device": {"0": 1, "2048": 1},
        "remaining": [["float32[1]", 2]],
        "aborted": [],
        "retracted": ["a"],
    }
    assert engine.asked == [(["kv_cache"], 2.0, "retract")]


def test_no_body_and_an_empty_one_mean_everything(client: TestClient, engine: Engine) -> None:
    for body in (b"", b"{}"):
        assert client.post("/release_memory_occupation", content=body).status_code == 200
        assert client.post("/resume_memory_occupation", content=body).json() == {"success": True, "tags": ["weights"]}
    assert engine.asked == [(None, 60.0, "refuse"), None] * 2


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("nonsense", "body: Invalid JSON"),
        ('{"tag": ["kv_cache"]}', "tag: Extra inputs are not permitted"),
        ('{"tags": "kv_cache"}', "tags: Input should be a valid"),
        ('{"tags": [1]}', "tags.0: Input should be a valid string"),
        ('{"timeout_s": -1}', "timeout_s: Input should be greater than or equal to 0"),
        ('{"timeout_s": 1e9}', "timeout_s: Input should be less than or equal to 3600"),
        ('{"timeout_s": NaN}', "timeout_s: Input should be a finite number"),
        ('{"mode": "kill"}', "mode: Input should be 'refuse', 'abort' or 'retract'"),
        ("[]", "body: Input should be an object"),
    ],
)
def test_a_wrong_body_is_refused_before_the_engine_is_asked(
    client: TestClient, engine: Engine, body: str, wrong: str
) -> None:
    answer = client.post("/release_memory_occupation", content=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith(f"The body is not what this call takes ({wrong}")
    assert message.endswith(
        "It takes JSON with any of tags, timeout_s, mode, and nothing for what they are by default."
    )
    assert (answer.json()["bytes"], engine.asked) == (0, [])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryOccupationError("wrong tag"), 400),
        (OccupationStateError("released already"), 409),
        (WeightsStateError("resident already"), 409),
        (EngineBusyError("busy", {"waiting": 0, "running": 1}), 409),
        (HostMemoryError("no room in the host"), 503),
        (RebuildError("no room", {0: 1}), 503),
        (ParamSetError("no room"), 503),
        (EngineCrashedError("dead"), 503),
        (KVCycleError("unknown"), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, KVCycleError) else None,
)
@pytest.mark.parametrize("call", ["release", "resume"])
def test_a_refusal_is_never_a_200_and_says_why(
    client: TestClient, engine: Engine, error: KVCycleError, status: int, call: str
) -> None:
    engine.error = error
    answer = client.post(f"/{call}_memory_occupation")
    assert answer.status_code == status == http_api.status_of(error)
    counts = {"requests": {"waiting": 0, "running": 1}} if isinstance(error, EngineBusyError) else {}
    assert answer.json() == {
        "success": False,
        "error": {"type": type(error).__name__, "message": str(error), **counts},
        "bytes": 0,
        "bytes_by_device": {},
    }


def test_only_a_post_changes_anything(client: TestClient, engine: Engine) -> None:
    assert client.get("/release_memory_occupation").status_code == 405
    assert client.get("/resume_memory_occupation").status_code == 405
    assert engine.asked == []
    assert client.get("/generate").json() == "stock's"


def test_the_state_stands_beside_the_servers_own(client: TestClient, engine: Engine) -> None:
    info = client.get("/get_server_info").json()
    assert info["version"] == "stock"
    assert info["kvcycle"]["released"] == ["kv_cache"]
    assert info["kvcycle"]["bytes_by_device"] == {"kv_cache": {"2048": 3}}
    assert info["kvcycle"]["requests"] == {"waiting": 1}
    assert info["kvcycle"]["compiles"] == {"trace": 1, "lower": 0, "backend": 0, "cache_hits": 0}
    assert info["kvcycle"]["memory"]["devices"][0] == {
        "id": 2048, "ledger_bytes": 3, "allocator_bytes": None, "by_owner": {"kv": 3},
    }  # fmt: skip
    engine.error = EngineCrashedError("It does not answer.")
    info = client.get("/get_server_info").json()
    assert info == {
        "version": "stock",
        "kvcycle": {"error": {"type": "EngineCrashedError", "message": "It does not answer."}},
    }


def test_the_health_is_503_while_anything_is_released(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/health_generate").text == "stock"
    engine.now_released = ("kv_cache",)
    answer = client.get("/health_generate")
    assert answer.status_code == 503
    assert answer.json() == {
        "success": False,
        "released": ["kv_cache"],
        "message": "The engine serves nothing now: kv_cache is released. Requests wait for the resume.",
    }
    engine.error = EngineCrashedError("It does not answer.")
    assert client.get("/health_generate").json()["error"]["message"] == "It does not answer."
    monkeypatch.setattr(http_api, "_HEALTH_S", 0.05)
    answered = threading.Event()
    monkeypatch.setattr(Engine, "released", property(lambda _: answered.wait(60)))
    answer = client.get("/health_generate")
    answered.set()
    assert (answer.status_code, answer.json()["message"]) == (503, "No answer from the engine in 0.05 s.")


def test_before_the_engine_has_booted_there_is_no_answer(endpoints: http_api.Endpoints, client: TestClient) -> None:
    endpoints._occupation = None
    answer = client.post("/release_memory_occupation")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "The engine has not booted yet.")


@pytest.mark.parametrize("leaves", [True, False])
def test_a_client_that_leaves_withdraws_its_release(
    endpoints: http_api.Endpoints, engine: Engine, leaves: bool
) -> None:
    seen: list[bool] = []
    left = threading.Event()

    def until_abandoned(abandoned: Callable[[], bool]) -> None:
        assert left.wait(10)
        deadline = time.monotonic() + (10 if leaves else 0.2)
        while not abandoned() and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(abandoned())

    engine.until = until_abandoned

    async def release() -> None:
        messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            left.set()
            if not leaves:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        await endpoints.release(Request({"type": "http", "method": "POST", "headers": []}, receive))

    asyncio.run(release())
    assert seen == [leaves]


def test_a_server_without_these_routes_is_refused(endpoints: http_api.Endpoints) -> None:
    app = FastAPI()
    for path in PATHS[1:]:
        app.add_api_route(path, lambda: None)
    with pytest.raises(UnsupportedEngineError) as caught:
        http_api.install(app, endpoints)
    assert str(caught.value) == (
        "This sglang-jax's HTTP server has no /release_memory_occupation; kvcycle.serve replaces its routes and cannot "
        "serve it."
    )
