"""The parts of sglang-jax and jax that are not public and that reach an engine's other processes and hosts.

Beside :mod:`kvcycle.internals`, and seen on the same versions:

- ``Scheduler.__init__`` and ``scheduler.recv_from_rpc``: the other end of ``engine.send_to_rpc``, whose messages the
  loop takes; both are DEALERs, so an answer goes back through it, which sglang-jax itself never does;
- ``http_server``: ``app``, ``launch``, the ``_launch_subprocesses_or_threads`` that it calls, the routes' functions;
- of jax, ``jax._src.distributed.global_state.client``: the hosts' key-value store, which no public function reaches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax

from kvcycle.errors import UnsupportedEngineError


def is_served_elsewhere(engine: Any) -> bool:
    """Whether the engine's scheduler runs in another process, and took kvcycle along (see ``server_args.py``)."""
    info, arguments = getattr(engine, "scheduler_info", None), getattr(engine, "server_args", None)
    if not isinstance(info, dict) or info.get("scheduler") is not None or arguments is None:
        return False
    ours = sys.modules.get("kvcycle.server_args")  # not imported here: that would import sglang-jax
    return ours is not None and isinstance(arguments, ours.ServerArgs)


def after_making_schedulers(then: Callable[[Any], object]) -> None:
    """Call ``then`` with every Scheduler that this process makes from now on, when it is made; once in a process."""
    from sgl_jax.srt.managers.scheduler import Scheduler

    make = Scheduler.__init__
    if getattr(make, "_kvcycle_then", None) is then:
        return

    @wraps(make)
    def make_then(scheduler: Any, *args: Any, **kwargs: Any) -> None:
        make(scheduler, *args, **kwargs)
        then(scheduler)

    make_then._kvcycle_then = then  # type: ignore[attr-defined] # read above
    Scheduler.__init__ = make_then


def answer_socket(scheduler: Any) -> Any:
    """The socket by which a scheduler answers who sent it a message with ``engine.send_to_rpc``; on its thread."""
    return scheduler.recv_from_rpc


class SharedStore:
    """The key-value store of ``jax.distributed``, which every host of this process's jax can read and write."""

    def __init__(self) -> None:
        from jax._src import distributed

        self._client: Any = distributed.global_state.client
        if self._client is None:
            raise UnsupportedEngineError("jax.distributed has not been started, so there is only this host.")

    def set(self, key: str, value: str) -> None:
        """Set a key, also one that is set already."""
        self._client.key_value_set(key, value, True)

    def wait_for(self, key: str, timeout_s: float) -> str | None:
        """The value of a key, once it is set; None if it was not within ``timeout_s``."""
        try:
            value: str = self._client.blocking_key_value_get(key, max(1, round(timeout_s * 1000)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise
        return value

    def below(self, folder: str) -> dict[str, str]:
        """The keys that are set below ``folder/``, without it, and their values."""
        found: list[tuple[str, str]] = self._client.key_value_dir_get(folder)
        return {key.removeprefix(f"{folder}/"): value for key, value in found}

    def delete(self, key: str) -> None:
        """Delete a key, or all below it."""
        self._client.key_value_delete(key)


def http_server() -> Any:
    """sglang-jax's HTTP server, a module: its ``app`` and the functions of its routes."""
    from sgl_jax.srt.entrypoints import http_server as module

    return module


def launch_http_server(arguments: Any, connected: Callable[[Any], None]) -> None:
    """Boot an engine and serve it over HTTP until the process is told to end.

    Args:
        arguments: sglang-jax's ServerArgs.
        connected: given the socket that takes messages to the engine's scheduler (an Engine's ``send_to_rpc``) when it
            has booted, before the first request.
    """
    import zmq
    from sgl_jax.srt.server_args import PortArgs
    from sgl_jax.srt.utils import get_zmq_socket

    module = http_server()
    launch = module._launch_subprocesses_or_threads

    def launch_and_connect(server_args: Any, port_args: Any = None) -> Any:
        ports = port_args or PortArgs.init_new(server_args)
        parts = launch(server_args=server_args, port_args=ports)
        connected(get_zmq_socket(zmq.Context(1), zmq.DEALER, ports.rpc_ipc_name, True))
        return parts

    module._launch_subprocesses_or_threads = launch_and_connect
    module.launch(arguments)
