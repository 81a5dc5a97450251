"""The page as text: what it says of good and of spoiled records, how it stays small, and that names cannot steer it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvcycle.checks import judge
from kvcycle.record import Record
from kvcycle.record_parts import PHASES, Device, Verdict
from kvcycle.report import page, scopes
from kvcycle.report.page import curves, memory, tables, verdicts
from kvcycle.report.page.answers import answers, headline
from tests.unit.records import (
    BORROWED,
    KV_BYTES,
    OTHER,
    WEIGHTS,
    edit_canary,
    edit_cycle,
    edit_generates,
    edit_info,
    edit_phase,
    edit_use,
    good_record,
    shift,
    with_profile,
    without_phase,
)
from tests.unit.soaks import edit_soak, good_soak, hold, soak_of

GOOD = good_record()
TPU = good_record(allocator=True)
LEAK = hold(good_soak(), range(1, 41), lambda cycle: 512 * cycle)


def draw(record: Record) -> str:
    return page.draw(record, judge(record))


def pictures(record: Record) -> memory.Pictures:
    return memory.picture(record, judge(record))


def words(record: Record) -> list[str]:
    return [answer.word for answer in answers(record, judge(record))]


# The three answers ---------------------------------------------------------------------------------------------------


def test_a_good_run_is_three_times_yes_with_figures() -> None:
    given, fitted, went_on = answers(TPU, judge(TPU))
    assert [given.word, fitted.word, went_on.word] == ["yes"] * 3
    assert given.figures == (
        "The drop of 4 buffers freed 128.01 MiB (134,225,920 B) on 4 devices, in each of 2 cycles: to the byte what "
        "config arithmetic predicted."
    )
    assert fitted.figures == (
        "A second parameter set took 21.08 MiB (22,106,112 B) on 4 devices, in each of 2 cycles, to the byte the "
        "engine's own weights. At the fullest moment device 0 had 30.64 GiB (32,899,803,032 B) left."
    )
    assert went_on.figures == (
        "Nothing was compiled in 2 rebuilds and 6 generations after that; the cold one compiled 12 programs. After a "
        "rebuild it took 2.8 s at most, warm 2.6 s, cold 17 s."
    )
    assert (given.reason, given.checks) == ("", ())


NO_FIT = edit_info(GOOD, "sglang_param_dict2_ready", error="RESOURCE_EXHAUSTED: 21 MiB on device 3")
SPOILED = {
    "a byte was not freed": (shift(GOOD, ["kv_cache_dropped"], 1), ["no", "no", "yes"], "off by +1 B, allowed 0 B."),
    "no room for the second set": (NO_FIT, ["yes", "no", "yes"], "RESOURCE_EXHAUSTED: 21 MiB on device 3"),
    "it compiled": (
        edit_generates(GOOD, "after_rebuild", compiles=GOOD.generates[0].compiles),
        ["yes", "yes", "no"],
        "compilations in the generation after_rebuild (12 lowered, 12 compiled): 24, expected 0.",
    ),
    "it said something else": (
        edit_generates(GOOD, "after_rebuild", token_ids=(1,) * 8), ["yes", "yes", "no"], "unlike the warm generation's",
    ),
    "the ledger is blind": (
        edit_canary(GOOD, "ledger", 2, rise_bytes=0), ["not proven", "not proven", "yes"], "so this proves nothing",
    ),
    "it did not generate": (
        with_profile(GOOD, "cycle", generate=False), ["yes", "yes", "not proven"], "This is not a pass.",
    ),
    "it broke off": (without_phase(GOOD, "kv_cache_dropped"), ["not proven", "not proven", "yes"], "the run ended"),
}  # fmt: skip


@pytest.mark.parametrize(("record", "wanted", "why"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_run_is_answered_by_what_was_spoiled(record: Record, wanted: list[str], why: str) -> None:
    assert words(record) == wanted
    changed = next(answer for answer in answers(record, judge(record)) if answer.word != "yes")
    assert why in changed.reason
    assert changed.checks


def test_nothing_judged_proves_nothing() -> None:
    assert [answer.word for answer in answers(GOOD, [])] == ["not proven"] * 3
    assert "FAILED" in page.draw(GOOD, [])
    assert "Nothing was judged." in page.draw(GOOD, [])


def test_the_headline_has_the_label_and_what_was_validated() -> None:
    head = headline(TPU, judge(TPU))
    assert (head.good, head.where, head.early) == (True, "4 TPU v4 devices", "")
    facts = dict(head.facts)
    assert facts["Stack"][0] == "sglang-jax 0.1.0rc0"
    assert facts["Devices"] == ("4 × TPU v4", "limit 30.75 GiB (33,017,561,088 B) each")
    assert "KV cache 128.01 MiB (134,225,920 B), 4 buffers, MHATokenToKVPool" in facts["Geometry"]
    text = draw(GOOD)
    assert "simulated-on-cpu" in text
    assert "The real engine ran on virtual CPU devices" in text
    assert "measured-on-tpu" not in text


def test_a_run_that_broke_off_says_where() -> None:
    early = edit_cycle(GOOD, 1, phases=GOOD.cycles[1].phases[:5])
    sentence = "The run ended early. The last phase that was measured is sglang_param_dict2_ready of cycle 1;"
    assert headline(early, judge(early)).early.startswith(sentence)
    assert "FAILED" in draw(early)
    none = early.model_copy(update={"cycles": (), "generates": ()})
    assert headline(none, judge(none)).early == "No phase was measured: the run ended before its first."
    half = edit_soak(LEAK, points=soak_of(LEAK).points[:7])
    assert "and 7 of 40 cycles of its soak" in headline(half, judge(half)).early
    assert headline(LEAK, judge(LEAK)).early == ""
    plan = early.model_copy(update={"evidence": "compiled-for-tpu"})
    assert headline(plan, []).early == ""


# The picture ---------------------------------------------------------------------------------------------------------


def test_devices_of_the_same_bytes_share_a_picture_and_the_odd_one_has_its_own() -> None:
    (alone,) = pictures(GOOD).drawn
    assert (alone.title, alone.count, alone.worst) == ("cycles 0–1, devices 0–3", 8, None)
    both = pictures(shift(GOOD, BORROWED, 512 * 1024))
    assert [(one.title, one.worst) for one in both.drawn] == [
        ("cycle 0, devices 0, 2–3; cycle 1, devices 0–3", None),
        ("cycle 0, device 1", "fail"),
    ]
    odd = both.drawn[1].bars
    assert [bar.flag for bar in odd if bar.flag] == ["did not pass"]
    assert next(bar.phase for bar in odd if bar.flag) == "kv_cache_dropped"


def test_a_bar_says_its_bytes_exactly() -> None:
    bars = {bar.phase: bar for bar in pictures(TPU).drawn[0].bars}
    dropped = bars["kv_cache_dropped"]
    assert [(segment.name, segment.text) for segment in dropped.segments] == [
        ("Weights", "5.27 MiB (5,526,528 B)"),
        ("Other arrays", "104 B"),
        ("Allocator's rest", "69.76 MiB (73,148,416 B)"),
    ]
    assert dict(dropped.facts)["Predicted"] == "5.27 MiB (5,526,632 B)"
    assert dict(dropped.facts)["Left to the limit"] == "30.68 GiB (32,938,886,040 B)"
    assert "KV cache dropped (kv_cache_dropped): 5.27 MiB (5,526,632 B) in use." in dropped.spoken
    assert "Weights 5.27 MiB (5,526,528 B)" in dropped.spoken


def test_the_predicted_line_stays_where_it_is_when_the_bar_does_not() -> None:
    def bar(record: Record) -> memory.Bar:
        found = pictures(record).drawn[-1]
        return next(bar for bar in found.bars if bar.phase == "kv_cache_dropped")

    good, kept = bar(GOOD), bar(shift(GOOD, ["kv_cache_dropped"], KV_BYTES))
    top = sum(segment.fraction for segment in good.segments)
    assert good.expected_at == pytest.approx(top)
    assert kept.expected_at == pytest.approx(good.expected_at)
    assert sum(segment.fraction for segment in kept.segments) > 2 * top
    assert dict(kept.facts)["Difference"] == "+32.00 MiB (33,556,480 B)"


def test_what_cannot_be_seen_shares_a_picture_and_says_its_range() -> None:
    name = PHASES[1]  # which no check compares with another
    held = WEIGHTS + KV_BYTES + OTHER
    owners: dict[str, Any] = {"weights": WEIGHTS, "kv": KV_BYTES, "params2": 0}

    def other(more: int) -> memory.Pictures:
        return pictures(edit_use(GOOD, name, ledger_bytes=held + more, by_owner=owners | {"other": OTHER + more}))

    (one,) = other(32).drawn
    generated = next(bar for bar in one.bars if bar.phase == name)
    assert next(segment.text for segment in generated.segments if segment.layer == "other") == "104 to 136 B"
    assert generated.total == "39,083,112 to 39,083,144 B"
    assert len(other(2**20).drawn) == 2


def test_what_has_no_owner_is_drawn_all_the_same() -> None:
    hidden = edit_use(GOOD, PHASES[1], ledger_bytes=WEIGHTS + KV_BYTES + OTHER + 2**20)
    bar = pictures(hidden).drawn[-1].bars[1]
    assert bar.segments[-1].text == "1.00 MiB (1,048,680 B)"


@pytest.mark.parametrize("devices", [16, 256])
def test_many_devices_that_all_differ_are_a_few_pictures(devices: int) -> None:
    record = good_record(cycles=1, devices=devices)

    def uneven(phase: Any) -> Any:
        uses = tuple(
            use.model_copy(
                update={
                    "ledger_bytes": use.ledger_bytes + use.id * 2**20,
                    "by_owner": dict(use.by_owner) | {"kv": use.by_owner["kv"] + use.id * 2**20},
                }
            )
            for use in phase.devices
        )
        return phase.model_copy(update={"devices": uses, "ledger_bytes_sum": sum(use.ledger_bytes for use in uses)})

    for name in PHASES:
        record = edit_phase(record, name, uneven)
    found = pictures(record)
    titles = [one.title for one in found.drawn]
    assert len(titles) <= memory.MOST_PICTURES
    for device in (0, devices // 2, devices - 1):
        assert f"cycle 0, device {device}" in titles
    assert found.left_out.startswith(f"{devices - len(titles)} more devices (in their cycles) differ")
    assert len(draw(record)) < 500_000


def test_a_page_of_many_alike_devices_is_as_small_as_of_four() -> None:
    assert len(draw(good_record(devices=256))) < 1.2 * len(draw(GOOD))


def test_the_limit_is_drawn_with_the_bars_where_it_is_near_and_on_its_own_axis_where_it_is_far() -> None:
    def limited(limit: int) -> memory.Picture:
        devices = tuple(Device(id=device.id, kind=device.kind, limit_bytes=limit) for device in GOOD.devices)
        return pictures(GOOD.model_copy(update={"devices": devices})).drawn[0]

    peak = 2 * WEIGHTS + KV_BYTES + OTHER
    near = limited(peak * 5 // 4)
    assert (near.whole_ticks, near.limit_scale) == ((), 1.0)
    assert near.limit_note == "limit 53.18 MiB (55,762,050 B): 80.0% of it in use at the fullest moment"
    far = limited(peak * 10)
    assert far.whole_ticks[-1].fraction <= (far.limit_scale or 0)
    assert (far.limit_scale or 0) > 5
    over = limited(peak // 2)
    assert (over.limit_scale or 0) == pytest.approx(0.5)
    assert pictures(GOOD).drawn[0].limit_scale is None


@pytest.mark.parametrize(
    ("top", "texts"),
    [
        (44_609_640, ["0", "10 MiB", "20 MiB", "30 MiB", "40 MiB"]),
        (3_801_784_320, ["0", "1 GiB", "2 GiB", "3 GiB"]),
        (104, ["0", "25 B", "50 B", "75 B", "100 B"]),
        (1, ["0", "1 B"]),
        (2**63, ["0", "2 EiB", "4 EiB", "6 EiB", "8 EiB"]),
    ],
)
def test_the_axis_has_round_numbers(top: int, texts: list[str]) -> None:
    assert [tick.text for tick in memory._ticks(top, 1.0)] == texts


# Tables and verdicts -------------------------------------------------------------------------------------------------


def test_cycles_that_are_alike_share_a_table() -> None:
    found = tables.cycle_tables(GOOD, judge(GOOD))
    (alone,) = found.tables
    assert (alone.cycle, alone.alike, alone.outcome, found.left_out) == (0, "cycle 1", "pass", 0)
    dropped = next(row for row in alone.rows if row.name == "kv_cache_dropped")
    assert (dropped.change, dropped.expected, dropped.difference, dropped.outcome) == (
        -134_225_920, -134_225_920, 0, "pass",
    )  # fmt: skip
    odd = shift(GOOD, BORROWED, 512, cycle=1)
    first, second = tables.cycle_tables(odd, judge(odd)).tables
    assert (first.outcome, second.cycle, second.outcome) == ("pass", 1, "fail")
    assert [row.difference for row in second.rows if row.outcome == "fail"] == [512]


def test_failures_come_first_with_their_causes_and_equal_verdicts_share_a_row() -> None:
    groups = verdicts.check_groups(judge(shift(GOOD, BORROWED, 512)), {})
    assert groups[0].id == "drop.frees_kv"
    assert [group.worst for group in groups].count("fail") == len(verdicts.red(groups))
    failed, *others = groups[0].rows
    assert (failed.places, failed.witness, failed.difference) == ("cycle 0, device 1", "ledger", "+512 B")
    assert failed.causes[0].startswith("a buffer was not deleted")
    assert [(row.places, row.count) for row in others] == [
        ("cycle 0, devices 0, 2–3; cycle 1, devices 0–3", 7),
        ("cycles 0–1", 2),
    ]
    assert groups[0].counts == "9 pass, 1 fail"
    assert "``" not in "".join(group.meaning for group in groups)


def test_more_rows_than_anybody_reads_are_counted() -> None:
    many = [
        Verdict(id="x", scope=f"device{number}", verdict="fail", measured=number, message="m") for number in range(99)
    ]
    (group,) = verdicts.check_groups(many, {})
    assert (len(group.rows), group.left_out, group.meaning) == (verdicts.MOST_ROWS, 99 - verdicts.MOST_ROWS, "")


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (["run"], "run"),
        (["device2"], "device 2"),
        (["cycle0-device0", "cycle0-device1", "cycle1-device0", "cycle1-device1"], "cycles 0–1, devices 0–1"),
        (["cycle0-swap_back", "cycle1-swap_back"], "cycles 0–1, swap back"),
        ([f"device{n}" for n in range(0, 40, 2)], "devices 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22 and 8 more"),
        ([f"part{number}" for number in range(9)], "part0; part1; part2; part3; part4; part5; and 3 more places"),
        (["cycle" + "9" * 5000], "cycle 999999999, " + "9" * 4991),
        (["", "\n-x"], "; \n-x"),
    ],
)  # fmt: skip
def test_scopes_in_words(found: list[str], text: str) -> None:
    assert scopes.describe(found) == text


# The soak ------------------------------------------------------------------------------------------------------------


def test_the_soak_has_its_curves_and_figures() -> None:
    view = curves.soak(LEAK)
    assert view is not None
    assert dict(view.figures)["Growth, all devices"] == "+20.00 KiB (20,480 B)"
    growth, rss, times = view.plots
    assert [line.name for line in growth.lines] == ["device 1", "devices 0, 2–3"]
    assert growth.lines[0].values == tuple(512 * cycle for cycle in range(1, 41))
    start, end = growth.lines[1].points.split()  # of a flat line no more than its ends is drawn
    assert (start.split(",")[0], end.split(",")[0], start.split(",")[1]) == ("0.0", "1000.0", end.split(",")[1])
    assert rss.allowed.startswith("allowed for the last tenth's median: ")
    assert times.low == "0"
    text = draw(LEAK)
    assert "The soak: 40 of 40 cycles on one engine" in text
    data = json.loads(text.split('id="soak-data">')[1].split("</script>")[0])
    assert data[0][0]["values"][-1] == 20_480
    assert curves.soak(GOOD) is None
    assert 'id="soak"' not in draw(GOOD)


def test_many_devices_of_a_soak_are_a_few_curves() -> None:
    record = good_soak(devices=16)
    points = tuple(
        point.model_copy(update={"by_owner": point.by_owner | {"other": {d: OTHER + d * index for d in range(16)}}})
        for index, point in enumerate(soak_of(record).points)
    )
    view = curves.soak(edit_soak(record, points=points))
    assert view is not None
    assert [line.name for line in view.plots[0].lines][::5] == ["device 15", "device 0"]
    assert view.plots[0].left_out == "10 more devices lie between the highest and the lowest."


def test_a_soak_that_did_not_begin_has_a_page_too() -> None:
    text = draw(edit_soak(LEAK, points=(), before=()))
    assert "The soak: 0 of 40 cycles" in text
    assert "<polyline" not in text


# What it must not do -------------------------------------------------------------------------------------------------


class Structure(HTMLParser):
    """The elements of a page and their attributes' names: all that a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attributes)))
        self.links += [value or "" for name, value in attributes if name in ("href", "src", "action", "data", "srcset")]


@pytest.mark.parametrize("record", [GOOD, TPU, LEAK], ids=["good", "tpu", "soak"])
def test_the_page_is_one_file_that_asks_for_nothing(record: Record) -> None:
    text = draw(record)
    assert all(link.startswith("#") or link == "data:," for link in Structure(text).links)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", text)


EVIL = (
    "</title></script><script>alert(1)</script><img src=x onerror=alert(1)>\"' onfocus='alert(1)\x1b[2J\u202e{{ 7*7 }}"
)


def test_names_in_a_record_are_text() -> None:
    raw = json.loads(NO_FIT.to_json())
    plain = page.draw(NO_FIT, judge(NO_FIT))
    raw["profile"]["name"] = raw["profile"]["description"] = EVIL
    raw["profile"]["model"]["path"] = raw["profile"]["engine"]["page_size_"] = EVIL
    for key in raw["stack"]:
        raw["stack"][key] = EVIL
    for device in raw["devices"]:
        device["kind"] = EVIL
    raw["created"] = raw["kv"]["predicted_by"] = raw["kv"]["predicted_how"] = raw["kv"]["pools"][0]["type"] = EVIL
    raw["cycles"][0]["phases"][4]["info"]["error"] = EVIL
    evil = Record.model_validate_json(json.dumps(raw))
    text = page.draw(evil, judge(evil))
    # The description is one line more: the good record has none.
    lines = Structure(text).elements
    lines.remove(("dd",))
    assert lines == Structure(plain).elements
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert "{{ 7*7 }}" in text


def test_names_in_a_verdict_are_text() -> None:
    given = {"id": EVIL, "scope": EVIL, "message": EVIL, "causes": (EVIL,), "unit": EVIL}

    def drawn(**values: Any) -> list[tuple[str, ...]]:
        bad = Verdict.model_validate({"verdict": "fail", "expected": "1", "measured": "2"} | values)
        return Structure(page.draw(GOOD, [bad])).elements

    assert drawn(**given, expected=EVIL, measured=EVIL) == drawn(**dict.fromkeys(given, "x") | {"causes": ("x",)})


def test_a_page_that_cannot_be_written_is_a_sentence_and_no_more(tmp_path: Path) -> None:
    def broken() -> str:
        raise ValueError("a fault of the template\nsecond line")

    said = page.try_to_write(tmp_path / "index.html", broken)
    assert said == (
        f"The page {tmp_path / 'index.html'} could not be written: a fault of the template. What was measured is whole."
    )
    assert page.written(tmp_path / "none", lambda: "text").endswith(f"whole.\nReports: {tmp_path / 'none'}")
    assert page.written(tmp_path, lambda: "text") == f"Reports: {tmp_path / 'index.html'}"
    page.write(GOOD, judge(GOOD), tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == draw(GOOD)
