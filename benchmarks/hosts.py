"""What several hosts cost beside the work itself: a gather and an agreement, without an engine.

    python -m benchmarks.hosts --hosts 2 --hosts 4 reports/latest/record.json

Starts so many processes on this machine, real jax.distributed among them. Each tells the first a phase of the record,
as it does after every phase of a cycle, and they agree, as they do before every drop. Printed are medians with their
90 % intervals, and what they are of the phase that was measured: ratios of a run on the same machine,
`simulated-on-cpu`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import load, seconds_of
from benchmarks.results import QUIET
from benchmarks.stats import Interval, differences, interval
from fixtures.places import free_port
from kvcycle import merge, rendezvous
from kvcycle import platform as platforms
from kvcycle.hosts import Hosts
from kvcycle.record import Record
from kvcycle.record_parts import Phase, PhaseName

_ROUNDS = 50
#: Ten times what sixteen hosts took on two cores.
_LIMIT_S = 300
#: The largest phase, and the shortest.
_NAMES: tuple[PhaseName, ...] = ("kv_cache_rebuilt", "flush_cache_before_kv_drop")


def _ms(found: Interval) -> str:
    return f"{found.median * 1e3:.2f} ms ({found.low * 1e3:.2f} – {found.high * 1e3:.2f})"


def _as_hosts_own(phase: Phase, rank: int) -> Phase:
    """The whole phase as if it were one host's: with devices that no other host has."""
    uses = tuple(use.model_copy(update={"id": 1000 * rank + use.id}) for use in phase.devices)
    return phase.model_copy(update={"devices": uses, "compiles_by_host": (), "rss_bytes_by_host": ()})


def _be_a_host(rank: int, count: int, address: str, record: Record) -> None:
    platforms.prepare("cpu", 1, count)
    rendezvous.join(rank, count, address, 60)
    from kvcycle.internals_processes import SharedStore

    hosts = Hosts(rank, count, SharedStore(), name="benchmark")
    agrees_s = [seconds_of(lambda: hosts.agree("drop")) for _ in range(_ROUNDS)]
    lines = [f"{count} hosts: an agreement {_ms(interval(agrees_s))}"]
    for name in _NAMES:
        phase = record.cycles[0].phase(name)
        assert phase is not None
        mine = _as_hosts_own(phase, rank)

        def tell(mine: Phase = mine) -> None:
            merge.together(hosts, Phase, mine, merge.phase)
            hosts.agree("and so on")  # so that the others do not run ahead of the first, which reads

        gather = interval(differences([seconds_of(tell) for _ in range(_ROUNDS)], agrees_s))
        lines.append(
            f"  {name}: {len(mine.model_dump_json()):,} bytes from each, a gather {_ms(gather)}, "
            f"{gather.median / phase.seconds:.3f} of the phase's {phase.seconds:.3g} s"
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
    for count in given.hosts or [2, 4]:
        with load() as busy:
            _run_all(count, given.record)
        if busy.others_share > QUIET:
            print(f"  NOT A RESULT: others took {busy.others_share:.0%} of the cores meanwhile (limit {QUIET:.0%}).")


def _run_all(count: int, record: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "benchmarks.hosts", str(record)]
    started = [subprocess.Popen([*command, "--as-host", str(rank), str(count), address]) for rank in range(count)]
    try:
        if any(process.wait(_LIMIT_S) for process in started):
            sys.exit("A host failed; see above.")
    finally:
        for process in started:  # of those that have ended nothing is left to kill
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
