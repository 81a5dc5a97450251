"""Engine arguments that take kvcycle along into the scheduler's process.

    engine = Engine(server_args=kvcycle.ServerArgs(model_path=…, tp_size=4))   # enable_single_process=False
    kv = kvcycle.KVCache(engine)

sglang-jax starts its scheduler as a new python, which imports nothing of ours by itself. It unpickles the arguments of
the engine, though, and unpickling these imports kvcycle there and lets it serve the scheduler.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sgl_jax.srt.server_args import ServerArgs as _ServerArgs


@dataclasses.dataclass
class ServerArgs(_ServerArgs):  # type: ignore[misc] # sglang-jax has no types
    """sglang-jax's own ServerArgs, with the same arguments; see the module's text."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self.enable_single_process:
            from kvcycle.service import install

            install()
