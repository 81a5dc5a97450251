"""The tested versions of sglang-jax, and what not all of them have: facts that a test asks the installed one for.

How kvcycle calls what they all have, by another name or in another place, is in :mod:`kvcycle.internals`.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

#: The stacks that kvcycle's tests pass on: sglang-jax, newest first, and the jax that it asks for. constraints/ has a
#: file of each.
TESTED_STACKS = {"0.1.0rc0": "0.10.2", "0.0.3rc0": "0.8.1"}

NEWEST, *OLDER = TESTED_STACKS


@dataclass(frozen=True)
class Part:
    """A part of sglang-jax that some tested version lacks: a module, or an argument of a class in it."""

    module: str
    owner: str = ""
    argument: str = ""
    absent_from: tuple[str, ...] = ("0.0.3rc0",)

    @property
    def text(self) -> str:
        """As a table names it."""
        return f"`{self.owner}({self.argument}=…)`" if self.owner else f"`{self.module.removeprefix('sgl_jax.srt.')}`"


#: The keys by which sparse attention finds tokens, kept beside the latents.
INDEXER = Part("sgl_jax.srt.mem_cache.memory_pool", "MLATokenToKVPool", "indexer_key_dim")
#: What a draft worker's next step needs of its last under overlap.
RELAY_BUFFERS = Part("sgl_jax.srt.speculative.relay_buffer")
#: Pages of the prefix cache in host memory.
HICACHE = Part("sgl_jax.srt.server_args", "ServerArgs", "hicache_storage")
#: Prefill and decode in engines of their own, which move pages between them.
DISAGGREGATION = Part("sgl_jax.srt.disaggregation")

PARTS = (INDEXER, RELAY_BUFFERS, HICACHE, DISAGGREGATION)


def installed() -> str | None:
    """The installed sglang-jax's version; None where it is run from a checkout, or is not there."""
    try:
        return importlib.metadata.version("sglang-jax")
    except importlib.metadata.PackageNotFoundError:
        return None


def has(part: Part, version: str | None) -> bool:
    """Whether a version has the part, by the table; one that the table does not know has all that the newest has."""
    return version not in part.absent_from
