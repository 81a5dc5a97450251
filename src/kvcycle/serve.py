"""sglang-jax's HTTP server, in which ``/release_memory_occupation`` and ``/resume_memory_occupation`` work.

    python -m kvcycle.serve --model-path … --tp-size 4        # the arguments of sgl_jax.launch_server

docs/serve.md has the calls and what each answer means. The scheduler's process imports kvcycle because it unpickles
:class:`kvcycle.ServerArgs`; the HTTP process keeps this module's imports few, since every process imports it once more.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def main() -> None:
    """Start the server; ends when it does."""
    from kvcycle import http_api, internals, internals_processes, service
    from kvcycle.errors import UnsupportedEngineError
    from kvcycle.occupation import MemoryOccupation
    from kvcycle.remote import Remote
    from kvcycle.server_args import ServerArgs

    arguments = ServerArgs.from_cli()
    stock = internals_processes.http_server()
    endpoints = http_api.Endpoints(stock)
    try:
        service.check_served(arguments)
        http_api.install(stock.app, endpoints)
    except UnsupportedEngineError as error:
        sys.exit(f"kvcycle.serve: {error}")
    internals.warn_if_untested()
    if arguments.enable_single_process:  # its scheduler is a thread of this process
        service.install()
    from sgl_jax.srt.utils import kill_process_tree

    def connected(socket: Any) -> None:
        occupation = MemoryOccupation(Remote(socket))
        occupation.state()  # a scheduler that does not answer should not wait for the first release to say so
        endpoints.serve(occupation)

    try:
        internals_processes.launch_http_server(arguments, connected)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
