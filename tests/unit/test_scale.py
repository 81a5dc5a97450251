"""Ten thousand devices on 2,500 hosts: the odd one is found, in words and files that a person can read."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import gather, scale
from benchmarks.sizes import SIZES
from kvcycle.checks import judge
from kvcycle.record import Record
from kvcycle.record_file import MAX_FILE_BYTES
from kvcycle.record_info import Part
from kvcycle.record_limits import MAX_VERDICTS
from kvcycle.record_parts import Phase, Verdict
from kvcycle.report import junit, markdown, page, terminal
from kvcycle.report.hosts import hosts_of
from tests.unit.records import BORROWED, edit_canary, edit_phase, good_record, shift
from tests.unit.soaks import good_soak

TWO = good_record(devices=4, hosts=2)
ODD = shift(TWO, BORROWED, 512, device=2)


def in_terminal(record: Record, verdicts: list[Verdict]) -> str:
    buffer = io.StringIO()
    terminal.show(record, verdicts, Console(file=buffer, width=80, highlight=False))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def many() -> Record:
    """Of ten thousand devices, one kept 512 bytes at the drop."""
    return shift(good_record(cycles=1, devices=10_000, hosts=2_500), BORROWED, 512, device=6151)


@pytest.fixture(scope="module")
def judged(many: Record) -> list[Verdict]:
    return judge(many)


# Ten thousand devices ------------------------------------------------------------------------------------------------


def test_one_device_of_ten_thousand_is_the_only_one_that_does_not_pass(judged: list[Verdict]) -> None:
    bad = [verdict for verdict in judged if verdict.verdict != "pass"]
    assert [(verdict.id, verdict.place) for verdict in bad] == [
        ("drop.frees_kv", "cycle0-device6151-ledger (host 1537)")
    ]
    assert bad[0].message.startswith("kv_cache_dropped, cycle0-device6151 (host 1537), ledger: bytes in use changed by")
    assert len(judged) > 50_000


def test_the_page_names_it_with_its_host_and_is_as_small_as_of_four(many: Record, judged: list[Verdict]) -> None:
    text = page.draw(many, judged)
    assert "device 6151 (host 1537)" in text
    assert "10,000 devices on 2,500 hosts, 4 on each." in text
    assert "hosts 0–1536, 1538–2499" in text
    assert len(text) < 200_000
    hosts = hosts_of(many, judged)
    assert hosts is not None
    assert [(row.hosts, row.count, row.outcome, row.what) for row in hosts.rows] == [
        ("host 1537", 1, "fail", "device 6151: drop.frees_kv"),
        ("hosts 0–1536, 1538–2499", 2499, "pass", ""),
    ]


def test_terminal_and_summary_name_it_in_a_screen_or_two(many: Record, judged: list[Verdict]) -> None:
    told = in_terminal(many, judged)
    assert "device6151 (host 1537)" in told
    assert "What did not pass is on 1 of 2,500 hosts: device 6151 (host 1537)." in " ".join(told.split())
    assert "10,000 cpu devices of 2,500 hosts" in told
    assert told.count("\n") < 60
    summary = markdown.summary(many, judged)
    assert "device 6151 (host 1537)" in summary
    assert len(summary) < 10_000
    (bad,) = (verdict for verdict in judged if verdict.verdict == "fail")
    assert "cycle0-device6151-ledger (host 1537): measured" in junit.failure_message(bad, many.evidence)
    assert junit.suite_properties(many, judged)["kvcycle.hosts"] == "2500"


def test_its_file_is_read_again_and_keeps_the_verdicts_that_did_not_pass(
    many: Record, judged: list[Verdict], tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    many.model_copy(update={"checks": tuple(judged)}).save(path)
    # Ten cycles of as many fit into what a file may have.
    assert 10 * path.stat().st_size < MAX_FILE_BYTES
    read = Record.load(path)
    assert read.model_copy(update={"checks": ()}) == many
    assert len(read.checks) == MAX_VERDICTS < len(judged)
    assert (read.checks[0].verdict, read.checks[0].host) == ("fail", 1537)
    assert judge(read) == judged
    phase = json.loads(path.read_text())["cycles"][0]["phases"][3]
    as_written = len(json.dumps(phase["devices"][5000], separators=(",", ":"))) + 1
    assert as_written <= gather.DEVICE_PHASE_BYTES


def test_no_part_looks_at_all_devices_for_each() -> None:
    """Counted, not timed: sixteen times as many devices are looked up sixteen times as often."""
    counted = 0

    class Counting(tuple[Part, ...]):
        __slots__ = ()

        def __iter__(self) -> Iterator[Part]:
            nonlocal counted
            counted += len(self)
            return super().__iter__()

    def looked_at(devices: int) -> int:
        nonlocal counted
        record = good_record(cycles=1, devices=devices, hosts=devices // 4)
        for name in [phase.name for phase in record.cycles[0].phases]:
            record = edit_phase(record, name, wrapped)
        record = record.model_copy(update={"canaries": Counting(record.canaries)})
        counted = 0
        verdicts = judge(record)
        page.draw(record, verdicts)
        in_terminal(record, verdicts)
        markdown.summary(record, verdicts)
        return counted

    def wrapped(phase: Phase) -> Phase:
        return phase.model_copy(update={"devices": Counting(phase.devices)})

    few, many = looked_at(16), looked_at(256)
    assert few > 0  # the control: it is counted at all
    assert 8 * few < many <= 16 * few


# Many that fail ------------------------------------------------------------------------------------------------------


def test_a_thousand_devices_that_fail_alike_are_told_once() -> None:
    record = good_record(cycles=1, devices=1000, hosts=250)

    def kept(phase: Phase) -> Phase:
        uses = tuple(use.model_copy(update={"ledger_bytes": use.ledger_bytes + 512}) for use in phase.devices)
        return phase.model_copy(update={"devices": uses, "ledger_bytes_sum": sum(use.ledger_bytes for use in uses)})

    for name in BORROWED:
        record = edit_phase(record, name, kept)
    verdicts = judge(record)
    assert sum(verdict.verdict == "fail" for verdict in verdicts) >= 1000
    told = in_terminal(record, verdicts)
    assert told.count("\nfail drop.frees_kv") == 1
    assert "and 999 alike: cycle 0, devices 1–999 (hosts 0–249)" in " ".join(told.split())
    assert told.count("\n") < 80
    hosts = hosts_of(record, verdicts)
    assert hosts is not None
    (row,) = hosts.rows
    assert (row.count, row.what) == (250, "devices 0–999: drop.frees_kv")


def test_many_that_fail_each_in_another_way_are_counted() -> None:
    record = good_record(cycles=1, devices=64, hosts=16)

    def uneven(phase: Phase) -> Phase:
        uses = tuple(use.model_copy(update={"ledger_bytes": use.ledger_bytes + 1 + use.id}) for use in phase.devices)
        return phase.model_copy(update={"devices": uses, "ledger_bytes_sum": sum(use.ledger_bytes for use in uses)})

    for name in BORROWED:
        record = edit_phase(record, name, uneven)
    told = in_terminal(record, judge(record))
    assert told.count("\nfail drop.frees_kv") == 4
    assert "and 60 more of drop.frees_kv that differ from these" in " ".join(told.split())


# Hosts are named where there is more than one ------------------------------------------------------------------------


def test_every_message_on_a_device_names_its_host() -> None:
    soak = good_soak()
    soak = soak.model_copy(update={"devices": TWO.devices})
    for verdict in [*judge(ODD), *judge(good_record(hosts=2, allocator=True)), *judge(soak)]:
        on = re.search(r"device(\d+)", verdict.scope)
        assert (verdict.host is None) == (on is None), verdict
        if on is not None:
            assert verdict.host == int(on[1]) // 2
            assert f"{verdict.scope} (host {verdict.host})" in verdict.message


def test_with_one_host_nothing_is_said_of_hosts() -> None:
    one = shift(good_record(), BORROWED, 512)
    verdicts = judge(one)
    assert all(verdict.host is None and verdict.place == verdict.name for verdict in verdicts)
    assert hosts_of(one, verdicts) is None
    for text in (in_terminal(one, verdicts), markdown.summary(one, verdicts), page.draw(one, verdicts)):
        assert "host" not in text.split("</style>")[-1]
    assert "kvcycle.hosts" not in junit.suite_properties(one, verdicts)


def test_a_page_of_two_hosts_says_which() -> None:
    text = page.draw(ODD, judge(ODD))
    assert "4 devices on 2 hosts, 2 on each. What did not pass is on 1 of 2 hosts: device 2 (host 1)." in text
    assert "cycle 0, device 2 (host 1)" in text
    assert "devices 0–3 (hosts 0–1)" in text
    clean = hosts_of(TWO, judge(TWO))
    assert clean is not None
    assert clean.summary == "4 devices on 2 hosts, 2 on each. On none did a verdict on a device not pass."
    (row,) = clean.rows
    assert (row.hosts, row.devices, row.outcome) == ("hosts 0–1", 2, "pass")


def test_a_blind_witness_is_named_with_its_host() -> None:
    blind = edit_canary(TWO, "ledger", 3, rise_bytes=0)
    hosts = hosts_of(blind, judge(blind))
    assert hosts is not None
    assert hosts.rows[0].hosts == "host 1"
    assert hosts.rows[0].outcome == "inconclusive"
    assert hosts.rows[0].what.startswith("device 3: controls.witness_sees_allocation, ")


def test_a_verdict_on_a_host_itself_is_told_as_the_hosts() -> None:
    verdict = Verdict(id="drop.frees_kv", scope="cycle0-host1", witness="rss", verdict="fail", message="m")
    hosts = hosts_of(TWO, [verdict])
    assert hosts is not None
    assert [(row.hosts, row.outcome, row.what) for row in hosts.rows] == [
        ("host 1", "fail", "drop.frees_kv"),
        ("host 0", "pass", ""),
    ]
    assert hosts.summary.endswith("What did not pass is on 1 of 2 hosts: host 1.")


def test_what_is_kept_with_a_part_is_not_of_another(tmp_path: Path) -> None:
    phase = TWO.cycles[0].phases[0]
    assert phase.device(3) is not None
    fewer = phase.model_copy(update={"devices": phase.devices[:2]})
    assert fewer.device(3) is None
    assert TWO.host_of == {0: 0, 1: 0, 2: 1, 3: 1}
    moved = TWO.model_copy(update={"devices": good_record(devices=4).devices})
    assert moved.host_of == {}
    assert Record.model_validate_json(TWO.to_json()) == TWO


# The benchmark and the model -----------------------------------------------------------------------------------------


def test_the_scenario_has_every_part_at_every_size() -> None:
    found = scale.run(SIZES["small"])
    assert [[point.x for point in curve.points] for curve in found.curves] == [[4, 16]] * 6
    assert len(found.figures) == 6
    assert all(figure.target is not None for figure in found.figures)


def test_the_gathers_model_is_its_assumptions() -> None:
    network = gather.Network(round_trip_s=0.5, bytes_per_s=1152.0)
    found = gather.modelled(3, 2, network)
    assert (found.devices, found.host_bytes, found.bytes) == (6, 2 * 8 * 144, 3 * 2 * 8 * 144)
    assert found.seconds == pytest.approx(3 * (0.5 + 2.0))
