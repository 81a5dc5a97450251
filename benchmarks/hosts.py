"""What several hosts cost beside the work itself: a gather and an agreement, without an engine.

    python -m benchmarks.hosts --hosts 2 --hosts 4 reports/latest/record.json

Starts so many processes on this machine, real jax.distributed among them. Each tells the first a phase of the record,
as it does after every phase of a cycle, and they agree, as they do before every drop. Printed are medians, and what
they are of the phase that was measured: ratios of a run on the same machine, `simulated-on-cpu`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fixtures.places import free_port
from kvcycle import merge, rendezvous
from kvcycle import platform as platforms
from kvcycle.hosts import Hosts
from kvcycle.record import PHASES, Phase, PhaseName, Record

_ROUNDS = 50
#: The largest phase, and the shortest.
_NAMES: tuple[PhaseName, ...] = ("kv_cache_rebuilt", "flush_cache_before_kv_drop")


def _median_s(do: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _as_hosts_own(phase: Phase, rank: int) -> Phase:
    """The whole phase as if it were one host's: with devices that no other host has."""
    uses = tuple(use.model_copy(update={"id": 1000 * rank + use.id}) for use in phase.devices)
    return phase.model_copy(update={"devices": uses, "compiles_by_host": (), "rss_bytes_by_host": ()})


def _be_a_host(rank: int, count: int, address: str, record: Record) -> None:
    platforms.prepare("cpu", 1, count)
    rendezvous.join(rank, count, address, 60)
    from kvcycle.internals import SharedStore

    hosts = Hosts(rank, count, SharedStore(), name="benchmark")
    agree_s = _median_s(lambda: hosts.agree("drop"))
    lines = [f"{count} hosts: an agreement {agree_s * 1e3:.2f} ms"]
    for name in _NAMES:
        phase = record.cycles[0].phase(name)
        assert phase is not None
        mine = _as_hosts_own(phase, rank)

        def tell(mine: Phase = mine) -> None:
            merge.together(hosts, Phase, mine, merge.phase)
            hosts.agree("and so on")  # so that the others do not run ahead of the first, which reads

        gather_s = _median_s(tell) - agree_s
        lines.append(
            f"  {name}: {len(mine.model_dump_json()):,} bytes from each, a gather {gather_s * 1e3:.2f} ms, "
            f"{gather_s / phase.seconds:.3f} of the phase's {phase.seconds:.3g} s"
        )
    if rank == 0:
        print("\n".join(lines), flush=True)
    rendezvous.leave()


def main() -> None:
    """Start the hosts, or be one."""
    parser = argparse.ArgumentParser(description="What a gather and an agreement of several hosts cost.")
    parser.add_argument("record", type=Path)
    parser.add_argument("--hosts", type=int, action="append", default=None)
    parser.add_argument("--as-host", nargs=3, metavar=("RANK", "COUNT", "ADDRESS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_host:
        _be_a_host(int(given.as_host[0]), int(given.as_host[1]), given.as_host[2], Record.load(given.record))
        return
    assert set(_NAMES) <= set(PHASES)
    for count in given.hosts or [2, 4]:
        address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "benchmarks.hosts", str(given.record)]
        started = [
            subprocess.Popen([*command, "--as-host", str(rank), str(count), address], env=os.environ.copy())
            for rank in range(count)
        ]
        if any(process.wait(300) for process in started):
            sys.exit("A host failed; see above.")


if __name__ == "__main__":
    main()
