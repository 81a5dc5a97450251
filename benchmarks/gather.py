"""What it would cost to bring every host's part of a record to one of them: a model, and no measurement.

``python -m benchmarks.gather`` prints it (docs/scale.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.table import Table

from kvcycle.report.terminal import console
from kvcycle.text import exact_bytes

#: Of most TPU hosts (docs/plan.md).
DEVICES_ON_HOST = 4
PHASES = 8
#: Of one device in one phase, as record.json has it: both witnesses and four owners. tests/unit/test_scale.py holds it
#: against a record.
DEVICE_PHASE_BYTES = 144


@dataclass(frozen=True)
class Network:
    """What is assumed of the way between a host and the one that gathers: nobody measured it.

    Attributes:
        round_trip_s: a key asked for and answered by the coordination service.
        bytes_per_s: what one connection carries.
    """

    round_trip_s: float = 1e-3
    bytes_per_s: float = 100e6


@dataclass(frozen=True)
class Gather:
    """One cycle's gather: hosts, devices on each, bytes of each host, bytes in all, seconds."""

    hosts: int
    devices: int
    host_bytes: int
    seconds: float

    @property
    def bytes(self) -> int:
        """What the host that gathers receives."""
        return self.hosts * self.host_bytes


def modelled(hosts: int, devices_on_host: int = DEVICES_ON_HOST, network: Network = Network()) -> Gather:
    """The gather of one cycle: the host that gathers asks one host after the other for its part.

    Args:
        hosts: all, the one that gathers included: it asks itself, too.
        devices_on_host: on each.
        network: what is assumed.
    """
    host_bytes = devices_on_host * PHASES * DEVICE_PHASE_BYTES
    return Gather(
        hosts=hosts,
        devices=hosts * devices_on_host,
        host_bytes=host_bytes,
        seconds=hosts * (network.round_trip_s + host_bytes / network.bytes_per_s),
    )


def table() -> Table:
    """The curve to a thousand hosts, and to ten thousand devices."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("hosts", "devices", "a host sends", "one host receives", "seconds"):
        made.add_column(heading, justify="right", no_wrap=True)
    for hosts, on_host in ((2, 4), (4, 4), (16, 4), (64, 4), (256, 4), (1000, 4), (1000, 10), (2500, 4)):
        one = modelled(hosts, on_host)
        sizes = (exact_bytes(one.host_bytes), exact_bytes(one.bytes))
        made.add_row(f"{one.hosts:,}", f"{one.devices:,}", *sizes, f"{one.seconds:.3g}")
    return made


if __name__ == "__main__":
    console().print("One cycle's gather, as modelled; nothing here was measured.", table())
