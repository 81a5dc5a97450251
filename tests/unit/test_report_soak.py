"""What a person sees of a soak: in the terminal, and in a log."""

from __future__ import annotations

import io
from statistics import median_low

import pytest
from rich.console import Console

from kvcycle.checks import SOAK_CHECKS, judge
from kvcycle.record import Record
from kvcycle.report import terminal
from kvcycle.report.soak import buckets, duration, progress_line, show, sparkline
from kvcycle.soak_command import SoakProgress
from tests.unit.records import OTHER, RSS_BASE, good_record
from tests.unit.soaks import edit_points, edit_soak, good_soak, hold, set_points, soak_of

GOOD = good_soak()
LEAK = hold(GOOD, range(1, 41), lambda cycle: 512 * cycle)
#: A v4-8's bytes after a thousand cycles, by two witnesses: as wide as the numbers get.
WIDE = good_soak(1000, allocator=True)


def shown(record: Record, width: int = 80) -> str:
    buffer = io.StringIO()
    show(record, judge(record), Console(file=buffer, width=width, highlight=False))
    return buffer.getvalue()


def cells(text: str, beginning: str) -> list[str]:
    row = next(line for line in text.splitlines() if beginning in line)
    return [cell.strip() for cell in row.split("│")[1:-1]]


@pytest.mark.parametrize("record", [GOOD, LEAK, WIDE], ids=["good", "leak", "wide"])
@pytest.mark.parametrize("width", [80, 110])
def test_no_line_is_wider_than_the_terminal_and_no_number_cut_off(record: Record, width: int) -> None:
    text = shown(record, width)
    assert [line for line in text.splitlines() if len(line) > width] == []
    assert "…" not in text
    assert "\x1b" not in text


def test_the_table_has_the_bytes_of_every_device_at_both_ends() -> None:
    text = shown(LEAK)
    assert "soak: 40 of 40 cycles on 4 devices (simulated-on-cpu)" in text
    assert cells(text, "device 0, ledger") == ["device 0, ledger, bytes", "39,083,112", "39,083,112", "+0"]
    assert cells(text, "device 1, ledger") == ["device 1, ledger, bytes", "39,083,112", "39,103,592", "+20,480"]
    assert cells(text, "resident memory, ") == ["resident memory, medians", "580,108,288", "580,108,288", "+0"]
    assert cells(text, "seconds a cycle") == ["seconds a cycle, median", "", "1.500", ""]
    assert cells(text, "compilations") == ["compilations and traces", "", "0", ""]
    assert cells(text, "same 4 tokens") == ["cycles with the same 4 tokens", "", "40 of 40", ""]
    assert cells(shown(WIDE), "device 3, allocator")[0] == "device 3, allocator, bytes"


def test_of_many_devices_those_that_are_alike_share_a_row() -> None:
    record = good_soak(devices=256)
    grown = tuple(
        point.model_copy(
            update={"by_owner": point.by_owner | {"other": dict(point.by_owner["other"]) | {7: OTHER + 512}}}
        )
        for point in soak_of(record).points
    )
    rows = [line for line in shown(edit_soak(record, points=grown)).splitlines() if "ledger, bytes" in line]
    assert [line.split("│")[1].strip() for line in rows] == [
        "device 7, ledger, bytes",
        "devices 0–6, 8–255, ledger, bytes",
    ]
    assert "+512" in rows[0]


def test_each_check_has_a_line() -> None:
    def outcomes(record: Record) -> list[list[str]]:
        return [line.split() for line in shown(record).splitlines() if " soak." in line]

    assert outcomes(GOOD) == [["pass", check] for check in SOAK_CHECKS]
    assert outcomes(LEAK)[0] == ["fail", "soak.no_growth"]
    assert ["pass", "soak.rss_is_bounded"] not in outcomes(WIDE)


def test_the_small_plots_say_from_where_to_where() -> None:
    lines = shown(LEAK).splitlines()
    at = next(index for index, line in enumerate(lines) if "growth, all devices" in line)
    assert lines[at].split()[-1][0] + lines[at].split()[-1][-1] == "▁█"
    assert lines[at + 1].strip() == "512 B to 20.00 KiB (20,480 B)"
    assert "553.23 MiB (580,108,288 B), flat" in shown(GOOD)


def test_a_soak_without_a_cycle_and_a_record_without_a_soak() -> None:
    assert shown(good_record()) == ""
    empty = edit_soak(GOOD, points=(), before=())
    assert shown(empty) == "soak: none of its 40 cycles was run\n"
    assert progress_line(empty) == "the soak has not begun"


def test_the_terminal_ends_with_the_soak_and_the_verdict() -> None:
    buffer = io.StringIO()
    terminal.show(LEAK, judge(LEAK), Console(file=buffer, width=80, highlight=False))
    text = buffer.getvalue()
    assert (
        text.index("kv_cache_dropped") < text.index("soak: 40 of 40") < text.index("fail soak.no_growth: soak cycle 5")
    )
    assert text.splitlines()[-1].startswith("FAILED [simulated-on-cpu] tiny on 4 cpu devices, ")


@pytest.mark.parametrize(
    ("values", "line"),
    [([0, 0, 0], "▁▁▁"), ([0, 7], "▁█"), ([5], "▁"), (list(range(8)), "▁▂▃▄▅▆▇█"), ([-4, 0, -4], "▁█▁")],
)
def test_sparkline(values: list[int], line: str) -> None:
    assert sparkline(values) == line


def test_one_cycle_of_a_thousand_that_grew_is_seen_and_one_peak_of_resident_memory_is_not() -> None:
    values = [*[0] * 500, 1, *[0] * 499]
    assert buckets(values, max, 20) == [*[0] * 10, 1, *[0] * 9]
    assert buckets(values, median_low, 20) == [0] * 20
    assert buckets([3, 1, 2], max, 20) == [3, 1, 2]
    assert buckets([], max) == []


@pytest.mark.parametrize(
    ("value_s", "text"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3540, "59 min"), (3600, "1 h 00 min"), (3900, "1 h 05 min")],
)
def test_duration(value_s: float, text: str) -> None:
    assert duration(value_s) == text


def test_the_line_in_a_log() -> None:
    half = edit_soak(LEAK, points=soak_of(LEAK).points[:20])
    assert progress_line(half) == (
        "cycle 20 of 40, 1.5 s each, 30 s left: growth +10,240 B, 0 compilations, resident 553.23 MiB (580,108,288 B)"
    )


@pytest.mark.parametrize("terminal_", [False, True], ids=["log", "terminal"])
def test_progress_is_a_bar_on_a_terminal_and_plain_lines_in_a_log(terminal_: bool) -> None:
    buffer = io.StringIO()
    console = Console(file=buffer, width=110, force_terminal=terminal_, highlight=False)
    with SoakProgress(console, 40) as progress:
        progress.say("booting [tiny]")
        for done in range(1, 41):
            progress.cycle_ended(edit_soak(GOOD, points=soak_of(GOOD).points[:done]))
    text = buffer.getvalue()
    assert "booting [tiny]" in text
    if terminal_:
        assert "40/40" in text
        assert "growth +0 B" in text
    else:
        assert "\x1b" not in text
        said = [line.split("  ")[-1] for line in text.splitlines()]
        assert [line.split(",")[0] for line in said[1:]] == ["cycle 1 of 40", "cycle 40 of 40"]


def test_resident_memory_is_drawn_as_it_was() -> None:
    swinging = edit_points(
        GOOD, range(1, 41), lambda p, cycle: p.model_copy(update={"rss_bytes": RSS_BASE + cycle * 4096})
    )
    assert "553.24 MiB (580,112,384 B) to 553.39 MiB (580,272,128 B)" in shown(swinging)
    assert "resident" not in shown(set_points(GOOD, range(1, 41), rss_bytes=None))
