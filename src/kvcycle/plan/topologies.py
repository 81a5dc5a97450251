"""Names that cloud users type for TPU slices (v4-8, v5litepod-4, v6e-8, tpu7x-8), and what libtpu calls them.

The number in a name counts TensorCores on v4, v5p and TPU7x, which have two a chip, and chips on v5e and v6e. A JAX
device is a chip everywhere but on TPU7x, where it is half of one. A host has four chips, and a process of JAX runs on
each; v5e and v6e also come as one host of eight chips or of one. Nothing here imports jax.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

from kvcycle.errors import ProfileError

_MIB = 2**20

#: Slices by chips, as Cloud TPU shapes them (cloud.google.com/tpu/docs, "TPU configurations").
_CUBES: dict[int, tuple[int, ...]] = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
}
_SQUARES: dict[int, tuple[int, ...]] = {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}


@dataclass(frozen=True)
class Generation:
    """One generation of TPUs.

    Attributes:
        name: as in the names of its slices.
        aliases: other ways to write it.
        libtpu: libtpu's name of it.
        counted_per_chip: what a chip adds to the number in a slice's name.
        devices_per_chip: JAX devices that one chip shows.
        capacity_bytes: HBM of one device that the compiler grants a program.
        shapes: chips → the shape of the slice.
        chip_config: libtpu's chip configuration, None for its default.
        one_host: slices of so many chips are one host, though not of 2x2 chips.
    """

    name: str
    aliases: tuple[str, ...]
    libtpu: str
    counted_per_chip: int
    devices_per_chip: int
    capacity_bytes: int
    shapes: dict[int, tuple[int, ...]]
    chip_config: str | None = None
    one_host: frozenset[int] = frozenset()


#: The capacities were measured with libtpu 0.0.42.1 and jax 0.10.2, on every slice listed here: the largest program
#: that the compiler does not refuse with RESOURCE_EXHAUSTED, by bisection. They are the HBM of a device (32, 16, 96,
#: 31.5 and 95 GiB, as the refusals say) less what the compiler reserves (1283, 258, 263, 260 and 260 MiB). Where the
#: installed libtpu grants another amount, the plan finds and uses that.
GENERATIONS: tuple[Generation, ...] = (
    Generation("v4", (), "v4", 2, 1, 31_485 * _MIB, _CUBES, chip_config="megacore"),
    Generation("v5e", ("v5litepod", "v5lite"), "v5e", 1, 1, 16_126 * _MIB, _SQUARES, one_host=frozenset({1, 8})),
    Generation("v5p", (), "v5p", 2, 1, 98_041 * _MIB, _CUBES),
    Generation("v6e", (), "v6e", 1, 1, 31_996 * _MIB, _SQUARES, one_host=frozenset({1, 8})),
    Generation(
        "v7x",
        ("tpu7x", "v7", "tpuv7x"),
        "tpu7x",
        2,
        2,
        97_020 * _MIB,
        {1: (1, 1, 1), **_CUBES},
        one_host=frozenset({1}),
    ),
)


@dataclass(frozen=True)
class Topology:
    """One slice: its name, how many hosts and JAX devices it has, and how libtpu is asked for it."""

    name: str
    generation: Generation
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many chips the slice has."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """How many JAX devices the slice shows."""
        return self.chips * self.generation.devices_per_chip

    @property
    def host_shape(self) -> tuple[int, ...]:
        """The chips of one host, as libtpu is told them: 2x2, or all of a slice that is one host."""
        if self.chips in self.generation.one_host:
            return (*self.shape, 1)[:3]
        return (2, 2, 1)

    @property
    def hosts(self) -> int:
        """How many hosts (VMs, and processes of JAX) the slice has."""
        return self.chips // math.prod(self.host_shape)

    @property
    def capacity_bytes(self) -> int:
        """HBM of one device that the compiler grants a program, in bytes; measured, see :data:`GENERATIONS`."""
        return self.generation.capacity_bytes

    @property
    def description_arguments(self) -> dict[str, Any]:
        """The arguments of ``jax.experimental.topologies.get_topology_desc``."""
        shape = "x".join(str(side) for side in self.shape)
        arguments: dict[str, Any] = {"platform": "tpu", "topology_name": f"{self.generation.libtpu}:{shape}"}
        if self.generation.chip_config is not None:
            # Without it v4 shows two devices a chip, one for each core, which no Cloud TPU does.
            arguments["chip_config_name"] = self.generation.chip_config
        if self.host_shape != (2, 2, 1):
            # libtpu assumes hosts of 2x2 chips: a single chip cannot fill one, and eight would be two.
            arguments["chips_per_host_bounds"] = self.host_shape
        return arguments


def topology_names() -> list[str]:
    """All names of slices, without their aliases: v4-8, v4-16, …, v7x-512."""
    return [
        f"{generation.name}-{chips * generation.counted_per_chip}"
        for generation in GENERATIONS
        for chips in generation.shapes
    ]


def find_topology(name: str) -> Topology:
    """The slice of that name, however it is spelled: ``v5litepod-4`` and ``V5E-4`` are ``v5e-4``.

    Raises:
        ProfileError: there is no such slice; the sentence has the nearest names, or those of that generation.
    """
    match = re.fullmatch(r"([a-z0-9]*[a-z][a-z0-9]*)-(\d+)", name.strip().lower())
    generation = _generation(match[1]) if match else None
    if match and generation:
        count = int(match[2])
        shape = generation.shapes.get(count // generation.counted_per_chip)
        if shape is not None and count % generation.counted_per_chip == 0:
            return Topology(f"{generation.name}-{count}", generation, shape)
        sizes = ", ".join(
            f"{generation.name}-{chips * generation.counted_per_chip}" for chips in sorted(generation.shapes)
        )
        unit = "TensorCores" if generation.counted_per_chip > 1 else "chips"
        raise ProfileError(
            f"There is no topology {name!r}: the number counts {unit}, and {generation.name} comes as {sizes}."
        )
    known = topology_names()
    close = difflib.get_close_matches(name.strip().lower(), known, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    kinds = ", ".join(f"{g.name}-{min(g.shapes) * g.counted_per_chip}" for g in GENERATIONS)
    raise ProfileError(f"There is no topology {name!r}. {hint}There are {kinds}, and larger slices of these.")


def with_devices(devices: int, generation: Generation) -> Topology | None:
    """The slice of a generation that shows exactly so many devices; None if there is none."""
    for chips, shape in generation.shapes.items():
        if chips * generation.devices_per_chip == devices:
            return Topology(f"{generation.name}-{chips * generation.counted_per_chip}", generation, shape)
    return None


def _generation(word: str) -> Generation | None:
    return next((g for g in GENERATIONS if word == g.name or word in g.aliases), None)
