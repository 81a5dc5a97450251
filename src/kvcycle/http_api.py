"""The four routes of sglang-jax's HTTP server that kvcycle replaces: release, resume, the state, and the health.

Bodies are JSON, validated by pydantic; nothing that comes from the network is unpickled. They are routes of
sglang-jax's own app, so its API key guards them as it guards the others.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kvcycle.calls import DRAIN_S
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
)
from kvcycle.kv_cache import Mode
from kvcycle.occupation import MemoryOccupation, Occupation, OccupationState

#: The longest that a release may be made to wait.
_LONGEST_S = 3600.0
#: How long the scheduler may take to say how it is, where somebody asks for its health.
_HEALTH_S = 20.0

#: By error, the first that fits: the status that an HTTP client is given.
_STATUS: tuple[tuple[type[KVCycleError], int], ...] = (
    (HostMemoryError, 503),
    (OccupationStateError, 409),
    (MemoryOccupationError, 400),
    (EngineBusyError, 409),
    (RebuildError, 503),
    (ParamSetError, 503),
    (EngineCrashedError, 503),
    (KVCycleError, 500),
)


class ReleaseBody(BaseModel):
    """The body of a release; none is ``{}``."""

    model_config = ConfigDict(extra="forbid")

    tags: list[str] | None = None
    timeout_s: float = Field(default=DRAIN_S, ge=0, le=_LONGEST_S, allow_inf_nan=False)
    mode: Mode = "refuse"


class ResumeBody(BaseModel):
    """The body of a resume; none is ``{}``."""

    model_config = ConfigDict(extra="forbid")

    tags: list[str] | None = None


class _BodyError(MemoryOccupationError):
    """A body that is none."""


class Endpoints:
    """The routes' functions over one engine.

    Args:
        stock: sglang-jax's HTTP server module, whose own routes answer what is left to them.
    """

    def __init__(self, stock: Any) -> None:
        self._stock = stock
        self._occupation: MemoryOccupation | None = None
        self._threads = ThreadPoolExecutor(max_workers=32, thread_name_prefix="kvcycle-http")

    def serve(self, occupation: MemoryOccupation) -> None:
        """Answer for this engine from now on."""
        self._occupation = occupation

    async def release(self, request: Request) -> JSONResponse:
        """``POST /release_memory_occupation``."""

        def act(occupation: MemoryOccupation, raw: bytes, abandoned: Callable[[], bool]) -> dict[str, Any]:
            body = _read(ReleaseBody, raw)
            freed = occupation.release(body.tags, wait_s=body.timeout_s, mode=body.mode, abandoned=abandoned)
            return _freed_json(freed)

        return await self._answer(request, act)

    async def resume(self, request: Request) -> JSONResponse:
        """``POST /resume_memory_occupation``."""

        def act(occupation: MemoryOccupation, raw: bytes, _: Callable[[], bool]) -> dict[str, Any]:
            return {"tags": list(occupation.resume(_read(ResumeBody, raw).tags))}

        return await self._answer(request, act)

    async def server_info(self) -> dict[str, Any]:
        """``GET /get_server_info``: sglang-jax's own answer, and under ``kvcycle`` what is released and in use."""
        try:
            state = _state_json(await self._in_thread(lambda occupation: occupation.state()))
        except KVCycleError as error:
            state = {"error": _error_json(error)}
        return {**await self._stock.get_server_info(), "kvcycle": state}

    async def health_generate(self, request: Request) -> Response:
        """``GET /health_generate``: sglang-jax's own answer, but 503 at once while something is released."""
        try:
            released = await asyncio.wait_for(self._in_thread(lambda occupation: occupation.released), _HEALTH_S)
        except TimeoutError:
            return JSONResponse({"success": False, "message": f"No answer from the engine in {_HEALTH_S:g} s."}, 503)
        except KVCycleError as error:
            return JSONResponse({"success": False, "error": _error_json(error)}, 503)
        if not released:
            answer: Response = await self._stock.health_generate(request)
            return answer
        named = f"{', '.join(released)} {'is' if len(released) == 1 else 'are'}"
        message = f"The engine serves nothing now: {named} released. Requests wait for the resume."
        return JSONResponse({"success": False, "released": list(released), "message": message}, 503)

    async def _in_thread[T](self, call: Callable[[MemoryOccupation], T]) -> T:
        occupation = self._occupation
        if occupation is None:
            raise EngineCrashedError("The engine has not booted yet.")
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, occupation)

    async def _answer(
        self, request: Request, act: Callable[[MemoryOccupation, bytes, Callable[[], bool]], dict[str, Any]]
    ) -> JSONResponse:
        raw, gone = await request.body(), threading.Event()
        call = asyncio.ensure_future(self._in_thread(lambda occupation: act(occupation, raw, gone.is_set)))
        # A client that has given up must not find the memory released by nobody, later. Not is_disconnected(): behind
        # the middleware that checks the API key it is never True.
        leaving = asyncio.ensure_future(request.receive())
        await asyncio.wait({call, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            gone.set()
            await asyncio.wait({call})
        leaving.cancel()
        try:
            return JSONResponse({"success": True, **call.result()})
        except KVCycleError as error:
            return JSONResponse({"success": False, "error": _error_json(error), **_NOTHING_FREED}, status_of(error))


_NOTHING_FREED: dict[str, Any] = {"bytes": 0, "bytes_by_device": {}}


def install(app: Any, endpoints: Endpoints) -> None:
    """Put our routes in the place of sglang-jax's.

    Raises:
        UnsupportedEngineError: its app has no such routes.
    """
    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("/release_memory_occupation", "POST", endpoints.release),
        ("/resume_memory_occupation", "POST", endpoints.resume),
        ("/get_server_info", "GET", endpoints.server_info),
        ("/health_generate", "GET", endpoints.health_generate),
    ]
    paths = {path for path, _, _ in routes}
    missing = paths - {getattr(route, "path", None) for route in app.router.routes}
    if missing:
        raise UnsupportedEngineError(
            f"This sglang-jax's HTTP server has no {', no '.join(sorted(missing))}; kvcycle.serve replaces its routes "
            "and cannot serve it."
        )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in paths]
    for path, method, function in routes:
        app.add_api_route(path, function, methods=[method], response_model=None)


def status_of(error: KVCycleError) -> int:
    """The HTTP status of a call that failed: 400 wrong, 409 not now, 503 not at all for want of memory or life."""
    return next(status for kind, status in _STATUS if isinstance(error, kind))


def _read[Body: BaseModel](kind: type[Body], raw: bytes) -> Body:
    try:
        return kind.model_validate_json(raw or b"{}")
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in each['loc']) or 'body'}: {each['msg']}" for each in error.errors()
        )
        raise _BodyError(
            f"The body is not what this call takes ({wrong}). It takes JSON with any of "
            f"{', '.join(kind.model_fields)}, and nothing for what they are by default."
        ) from error


def _freed_json(freed: Occupation) -> dict[str, Any]:
    plain: dict[str, Any] = TypeAdapter(Occupation).dump_python(freed, mode="json")
    return {"bytes": freed.bytes, **plain}


def _state_json(state: OccupationState) -> dict[str, Any]:
    plain: dict[str, Any] = TypeAdapter(OccupationState).dump_python(state, mode="json")
    return plain


def _error_json(error: KVCycleError) -> dict[str, Any]:
    counts = {"requests": error.counts} if isinstance(error, EngineBusyError) else {}
    return {"type": type(error).__name__.lstrip("_"), "message": str(error), **counts}
