"""libtpu's compiler as an oracle for memory: how large buffers are on a TPU, and whether they fit. No TPU is needed.

Only the planning process imports this: it starts jax, on CPU, and libtpu beside it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvcycle.plan.model import PlanError
from kvcycle.plan.topologies import Topology

#: What a program takes besides its arguments and its code: 512 B of output and 2 KiB more. Found by bisection on
#: every generation with libtpu 0.0.42.1: arguments + code + this is at most the capacity, to the tile.
_AROUND_BYTES = 512 + 2048
_GRAIN_BYTES = 512
_MIB = 2**20
_UNIT = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
#: A probe's own code takes 45 to 100 KiB, so half a MiB leaves room for it and less than a MiB of doubt.
_PROBE_SLACK_BYTES = _MIB // 2


@dataclass(frozen=True)
class Answer:
    """What the compiler says about holding some buffers at once: bytes on one device.

    ``argument_bytes`` is None if it refused, ``refusal`` None if it did not; ``program_bytes`` is what the program
    that holds them takes itself.
    """

    argument_bytes: int | None
    program_bytes: int
    refusal: str | None


@dataclass(frozen=True)
class Size:
    """Bytes on one device; ``exact`` is False where a single buffer was too large to ask about."""

    bytes: int
    exact: bool = True

    def __add__(self, other: Size) -> Size:
        return Size(self.bytes + other.bytes, self.exact and other.exact)


class TPUCompiler:
    """The compiler for one topology."""

    def __init__(self, topology: Topology) -> None:
        """Start libtpu for the topology.

        Raises:
            PlanError: libtpu does not know the topology, or does not start.
        """
        self.topology = topology
        try:
            described = topologies.get_topology_desc(**topology.description_arguments)
        except Exception as error:
            raise PlanError(
                f"libtpu cannot describe {topology.name} "
                f"({topology.description_arguments['topology_name']}): {first_line(error)}."
            ) from error
        self.devices: list[jax.Device] = list(described.devices)
        shown = (len(self.devices), len({device.process_index for device in self.devices}))
        expected = (topology.devices, topology.hosts)
        if shown != expected:
            raise PlanError(
                f"libtpu shows {_on_hosts(*shown)} for {topology.name}, and {_on_hosts(*expected)} were expected; this "
                "version of kvcycle does not know this libtpu."
            )
        self.compiles = 0
        self.capacity_bytes = self._capacity(topology.capacity_bytes)

    def hold(self, buffers: Sequence[Any]) -> Answer:
        """Ask whether a device can hold these buffers at once.

        Args:
            buffers: abstract arrays (shape, dtype, sharding); the same one twice counts twice.
        """
        self.compiles += 1
        try:
            compiled = jax.jit(lambda *_: jnp.int32(0), keep_unused=True).lower(*buffers).compile()
        except jax.errors.JaxRuntimeError as error:
            refusal = memory_refusal(error)
            if refusal is None:
                raise
            return Answer(None, self._refused_program_bytes(str(error), len(buffers)), refusal)
        used: Any = compiled.memory_analysis()
        return Answer(used.argument_size_in_bytes, used.generated_code_size_in_bytes + _AROUND_BYTES, None)

    def headroom(self, held_bytes: int, answer: Answer) -> int:
        """Bytes of a device's capacity that are left beside ``held_bytes`` and the program; negative if missing.

        The compiler's verdict decides: where its granularity (a tile, up to 4 KiB) contradicts the sum, the sum yields.
        """
        left = self.capacity_bytes - held_bytes - answer.program_bytes
        return max(left, 0) if answer.refusal is None else min(left, -_GRAIN_BYTES)

    def size(self, buffers: Sequence[Any]) -> Size:
        """Bytes that these buffers take on one device, in the compiler's own layouts, whether they fit or not."""
        if not buffers:
            return Size(0)
        answer = self.hold(buffers)
        if answer.argument_bytes is not None:
            return Size(answer.argument_bytes)
        kinds = Counter((buffer.shape, buffer.dtype, buffer.sharding) for buffer in buffers)
        total = Size(0)
        for (shape, dtype, sharding), count in kinds.items():
            one = self._size_of_one(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
            total += Size(one.bytes * count, one.exact)
        return total

    def _size_of_one(self, buffer: Any) -> Size:
        answer = self.hold([buffer])
        if answer.argument_bytes is not None:
            return Size(answer.argument_bytes)
        shard = buffer.sharding.shard_shape(buffer.shape)
        rows = 2**10
        if len(shard) >= 3 and shard[0] > rows:
            # Tiles span the last two axes, so a buffer grows with its first one in proportion.
            parts = buffer.shape[0] // shard[0]
            fewer = self.hold(
                [jax.ShapeDtypeStruct((rows * parts, *buffer.shape[1:]), buffer.dtype, sharding=buffer.sharding)]
            )
            if fewer.argument_bytes is not None:
                exact = -(-fewer.argument_bytes * shard[0] // rows)
                return Size(-(-exact // _GRAIN_BYTES) * _GRAIN_BYTES)
        return Size(math.prod(shard) * buffer.dtype.itemsize, exact=False)

    def _refused_program_bytes(self, words: str, buffers: int) -> int:
        """What the refused program takes itself: the refusal says it, but not if the arguments alone are too large."""
        stated = re.search(r"^\s+program\s+([\d.]+)([KMG]?)\s*$", words, re.MULTILINE)
        if stated:
            return round(float(stated[1]) * _UNIT[stated[2]] / _GRAIN_BYTES) * _GRAIN_BYTES + _AROUND_BYTES
        # A program of as many small arguments: its code is within 5 KiB of the refused one's.
        small = jax.ShapeDtypeStruct((128,), jnp.uint32, sharding=self._everywhere(PartitionSpec()))
        return self.hold([small] * buffers).program_bytes

    def _capacity(self, expected: int) -> int:
        """The HBM that the compiler grants on a device: ``expected``, a whole number of MiB, or else by bisection."""
        if self._grants(expected - _PROBE_SLACK_BYTES) and not self._grants(expected + _PROBE_SLACK_BYTES):
            return expected
        low, high = 1, 2**20  # MiB: one TiB is more than any device has
        while high - low > 1:
            middle = (low + high) // 2
            if self._grants(middle * _MIB - _PROBE_SLACK_BYTES):
                low = middle
            else:
                high = middle
        return low * _MIB

    def _grants(self, size: int) -> bool:
        """Whether a device holds ``size`` bytes, asked for in pieces of up to one GiB."""
        pieces = [2**30] * (size // 2**30) + ([size % 2**30] if size % 2**30 else [])
        sharding = self._everywhere(PartitionSpec("all"))
        buffers = [
            jax.ShapeDtypeStruct((len(self.devices), piece // 4), jnp.uint32, sharding=sharding) for piece in pieces
        ]
        return self.hold(buffers).refusal is None

    def _everywhere(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(Mesh(np.array(self.devices), ("all",)), spec)


def _on_hosts(devices: int, hosts: int) -> str:
    return f"{devices:,} devices on {hosts:,} host{'' if hosts == 1 else 's'}"


def memory_refusal(error: Exception) -> str | None:
    """The compiler's own sentence if it refused for lack of memory, None if it failed for another reason."""
    words = str(error)
    if "RESOURCE_EXHAUSTED" not in words:
        return None
    # "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory …"
    found = re.search(r"(Ran out of memory.*?)(?:\n|$)", words)
    return found[1].strip() if found else first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its full stop, or the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
