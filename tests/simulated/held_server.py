"""``kvcycle.serve`` in which requests last as long as a test needs: while a file is there each token takes a message.

The scheduler's process imports this module as well, since it imports whatever the server was started from.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import zmq
from sgl_jax.srt.managers.scheduler import Scheduler

from kvcycle import serve, service
from kvcycle.calls import Withdraw
from tests.simulated.servers import HELD, UNTIL_WITHDRAWN

_file = Path(os.environ[HELD])
_run_batch, _withdraw = Scheduler.run_batch, service.Service._withdraw


def _run_when_let(scheduler: Any, batch: Any) -> Any:
    """Wait for a message, or for the file to go: messages are answered between two batches."""
    poller = zmq.Poller()
    for socket in (scheduler.recv_from_rpc, scheduler.recv_from_tokenizer):
        poller.register(socket, zmq.POLLIN)
    while batch.forward_mode.is_decode() and _file.exists() and not poller.poll(10):
        pass
    return _run_batch(scheduler, batch)


def _withdraw_and_let_go(self: service.Service, message: Withdraw) -> None:
    _withdraw(self, message)
    if _file.exists() and _file.read_text() == UNTIL_WITHDRAWN:
        _file.unlink()


Scheduler.run_batch = _run_when_let
service.Service._withdraw = _withdraw_and_let_go  # type: ignore[method-assign]  # that is the point

if __name__ == "__main__":
    serve.main()
