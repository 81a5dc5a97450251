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

from kvcycle.errors import UnsupportedEngineError


@dataclasses.dataclass
class ServerArgs(_ServerArgs):  # type: ignore[misc] # sglang-jax has no types
    """sglang-jax's own ServerArgs, with the same arguments; see the module's text."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self.enable_single_process:
            from kvcycle.service import install

            install()


def check_served(arguments: Any) -> None:
    """Refuse, before anything boots, an engine that could not be served.

    Raises:
        UnsupportedEngineError: it is on several hosts, disaggregated, or multimodal with several stages.
    """
    refused = {
        "nnodes": 1,
        "multimodal": False,
        "disaggregation_mode": "null",
        "pd_disaggregation": None,
    }
    for name, usual in refused.items():
        value = getattr(arguments, name, usual)
        if value and value != usual:
            raise UnsupportedEngineError(
                f"kvcycle cannot serve an engine with {name}={value!r}: its memory is not one scheduler's to release. "
                f"Start it without that, or with sgl_jax.launch_server and without release_memory_occupation."
            )
