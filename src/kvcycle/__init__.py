"""kvcycle: an inference engine lends its KV cache's HBM and takes it back, proved per device and to the byte.

Importing this package imports neither jax nor sglang-jax: :func:`boot` chooses jax's platform first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcycle.checks import judge as judge
    from kvcycle.checks import passed as passed
    from kvcycle.cycle import run_cycle as run_cycle
    from kvcycle.engine import boot as boot
    from kvcycle.errors import EngineBusyError as EngineBusyError
    from kvcycle.errors import KVCacheStateError as KVCacheStateError
    from kvcycle.errors import KVCycleError as KVCycleError
    from kvcycle.errors import MemoryOccupationError as MemoryOccupationError
    from kvcycle.errors import RebuildError as RebuildError
    from kvcycle.kv_buffers import Freed as Freed
    from kvcycle.kv_cache import KVCache as KVCache
    from kvcycle.memory import MemorySnapshot as MemorySnapshot
    from kvcycle.memory import snapshot as snapshot
    from kvcycle.occupation import MemoryOccupation as MemoryOccupation
    from kvcycle.occupation import Occupation as Occupation
    from kvcycle.occupation import enable_memory_occupation as enable_memory_occupation
    from kvcycle.params import ParamSet as ParamSet
    from kvcycle.params import sharing as sharing
    from kvcycle.params import swap as swap
    from kvcycle.params import swapped as swapped
    from kvcycle.profile import Profile as Profile
    from kvcycle.profile_file import load_profile as load_profile
    from kvcycle.record import Record as Record
    from kvcycle.record_parts import Verdict as Verdict
    from kvcycle.server_args import ServerArgs as ServerArgs
    from kvcycle.weights import Weights as Weights

#: Public name → the module that defines it, imported when the name is first used.
_PUBLIC = {
    "EngineBusyError": "errors",
    "Freed": "kv_buffers",
    "KVCache": "kv_cache",
    "KVCacheStateError": "errors",
    "KVCycleError": "errors",
    "MemoryOccupation": "occupation",
    "MemoryOccupationError": "errors",
    "MemorySnapshot": "memory",
    "Occupation": "occupation",
    "ParamSet": "params",
    "Profile": "profile",
    "RebuildError": "errors",
    "Record": "record",
    "ServerArgs": "server_args",
    "Verdict": "record_parts",
    "Weights": "weights",
    "boot": "engine",
    "enable_memory_occupation": "occupation",
    "judge": "checks",
    "load_profile": "profile_file",
    "passed": "checks",
    "run_cycle": "cycle",
    "sharing": "params",
    "snapshot": "memory",
    "swap": "params",
    "swapped": "params",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvcycle' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvcycle.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
