"""The suite over two hosts: two processes on this machine with two virtual devices each, and real jax.distributed."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import psutil

from kvcycle.record import Record
from kvcycle.record_parts import PHASES
from tests.simulated.planted import run_planted

#: Small: what is proved here does not grow with the cache or the answer.
_SMALL = ("engine.tp_size=4", "engine.max_total_tokens=4096", "cycle.max_new_tokens=8", "cycle.warm_generates=1")
_TWO = ("--kv-hosts", "2")


def _living(script: Path) -> list[psutil.Process]:
    """Processes that still run the planted suite, on either host."""
    return [process for process in psutil.process_iter(["cmdline"]) if str(script) in (process.info["cmdline"] or ())]


#: What is proved here is not how long anything takes: with one core for each host, equal generations differ threefold.
_TAKES_WHAT_IT_SHOULD = """
    import kvcycle.generate
    ask = kvcycle.generate._ask

    def at_its_usual_pace(engine, profile, when, cycle):
        seconds = 9.0 if when in ("cold", "after_clear_caches") else 1.0
        return ask(engine, profile, when, cycle).model_copy(update={"seconds": seconds})

    kvcycle.generate._ask = at_its_usual_pace
"""


def test_two_hosts_are_one_run_with_one_record_and_one_verdict(tmp_path: Path, project_root: Path) -> None:
    ended = run_planted(
        tmp_path, project_root, after=_TAKES_WHAT_IT_SHOULD, arguments=_TWO, limit_s=400,
        keys=(*_SMALL, "cycle.generate=true", "tolerances.rss_fraction=0.08"),
    )  # fmt: skip
    assert ended.code == 0, ended.output
    assert set(ended.outcomes()) == {"passed"}
    assert _living(tmp_path / "planted.py") == []

    record = Record.load(ended.folder / "record.json")
    assert [(device.id, device.host) for device in record.devices] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert {verdict.verdict for verdict in record.checks} == {"pass"}
    freed = [verdict for verdict in record.checks if verdict.id == "drop.frees_kv"]
    assert {verdict.scope for verdict in freed if verdict.witness == "ledger"} == {
        f"cycle0-device{d}" for d in range(4)
    }
    assert {verdict.scope for verdict in freed if verdict.witness == "rss"} == {"cycle0-host0", "cycle0-host1"}
    assert all(v.measured == v.expected == -4097 * 4 * 2 * 128 * 2 for v in freed if v.witness == "ledger")
    (cold,), (after,) = record.generates_when("cold"), record.generates_when("after_rebuild")
    # The same executables on both, each with its own compiler, and none of them again after the rebuild.
    assert [compiles.backend > 0 for compiles in cold.compiles_by_host] == [True, True]
    assert [compiles.any_work for compiles in after.compiles_by_host] == [0, 0]
    assert "of 2 hosts" in ended.output
    assert {path.name for path in ended.folder.iterdir()} >= {"record.json", "junit.xml", "index.html", "host1.log"}


_REFUSE_THEN_DIE = """
    import kvcycle.kv_buffers, kvcycle.params
    rank, buffers = scheduler.node_rank, kvcycle.kv_buffers.Buffers
    kv, found, clone = kvcycle.KVCache(engine), buffers._found, kvcycle.params.ParamSet.clone

    def cannot(self):
        raise kvcycle.KVCacheStateError("planted: a buffer is not here")

    if rank == 1:
        buffers._found = cannot
    before = kv.snapshot().bytes_of("kv")
    try:
        kv.drop()
    except kvcycle.KVCacheStateError as error:
        with open(os.path.join(os.path.dirname(sys.argv[0]), f"host{rank}.txt"), "w") as said:
            said.write(f"{kv.state}, {before - kv.snapshot().bytes_of('kv')} B lost: {error}")
    buffers._found = found

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        kvcycle.params.ParamSet.clone = die
"""


def test_what_one_host_cannot_none_does_and_one_that_dies_ends_all_with_a_report(
    tmp_path: Path, project_root: Path
) -> None:
    """One boot for both: first host 1 refuses a drop, then it is killed between the drop and the rebuild."""
    ended = run_planted(tmp_path, project_root, after=_REFUSE_THEN_DIE, keys=_SMALL, arguments=_TWO, limit_s=200)
    assert ended.code == 1, ended.output
    assert _living(tmp_path / "planted.py") == []

    sentence = "planted: a buffer is not here"
    first, second = ((tmp_path / f"host{rank}.txt").read_text() for rank in (0, 1))
    assert re.fullmatch(rf"resident, 0 B lost: Host 1 could not \(.*\), so no host did\. It says: {sentence}", first)
    assert second == f"resident, 0 B lost: {sentence}"

    killed = f"Host 1 was killed by {signal.SIGKILL.name} before the run did; its log is"
    assert killed in ended.cause()
    assert killed in ended.output
    assert killed in (ended.folder / "summary.md").read_text()
    assert ended.outcomes()["error"] == 1
    assert ended.outcomes()["skipped"] == ended.outcomes().total() - 1 >= 24
    assert ended.phases() == list(PHASES[:4])
    record = Record.load(ended.folder / "record.json")
    assert [use.id for use in record.cycles[0].phases[3].devices] == [0, 1, 2, 3]
