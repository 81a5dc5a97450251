"""The summary as CI pages show it: rendered by a Markdown parser, since what counts is what a reader sees."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from kvcycle.checks import judge
from kvcycle.record import Record
from kvcycle.report.markdown import summary
from kvcycle.report.markup import MAX_CHARACTERS, code, plain
from tests.unit.records import (
    BORROWED,
    edit_canary,
    edit_cycle,
    edit_info,
    edit_kv,
    good_record,
    shift,
    without_phase,
)

GOOD = good_record()
RED = shift(GOOD, BORROWED, 1)
#: The page drops a summary that is larger (GitHub: 1 MiB).
PAGE_LIMIT_BYTES = 2**20
PARSER = MarkdownIt("commonmark").enable("table")


def of(record: Record) -> str:
    return summary(record, judge(record))


def table(text: str, heading: str = "phase") -> dict[str, list[str]]:
    """The rows of the first table whose first column has this heading."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        rows[first.replace("<code>", "").replace("</code>", "")] = cells
    return rows


def test_the_verdict_with_its_label_comes_first() -> None:
    assert of(GOOD).splitlines()[0] == (
        "## ✅ PASSED \\[simulated-on-cpu\\] tiny on 4 cpu devices, sglang-jax 0.1.0rc0, jax 0.10.2: 99 pass"
    )
    assert of(RED).splitlines()[0].startswith("## ❌ FAILED \\[simulated-on-cpu\\] ")
    assert of(good_record(allocator=True)).startswith("## ✅ PASSED \\[measured-on-tpu\\] tiny on 4 TPU v4 devices")


def test_the_table_has_expected_measured_and_the_difference_to_the_byte() -> None:
    assert table(of(RED)) == {
        "kv_cache_dropped": [
            "-128.01 MiB (-134,225,920 B)", "-128.01 MiB (-134,225,919 B)", "+1", "**fail** (ledger)",
        ],
        "sglang_param_dict2_ready": ["+21.08 MiB (22,106,112 B)", "+21.08 MiB (22,106,112 B)", "0", "pass"],
        "kv_cache_rebuilt": ["+128.01 MiB (134,225,920 B)", "+128.01 MiB (134,225,920 B)", "0", "pass"],
        "after_drop_param_dict2": ["-21.08 MiB (-22,106,112 B)", "-21.08 MiB (-22,106,113 B)", "-1", "pass"],
    }  # fmt: skip


def test_of_several_cycles_the_one_that_did_not_pass_is_shown() -> None:
    text = of(shift(GOOD, BORROWED, 1, cycle=1))
    assert "Cycle 1: change in bytes in use" in text
    assert table(text)["kv_cache_dropped"][2] == "+1"
    assert "Cycle 0: passed, with other changes than cycle 1." in text
    assert "Cycles 1 to 2: passed, every change to the byte as in cycle 0." in of(good_record(cycles=3))
    both = shift(shift(good_record(cycles=3), BORROWED, 1), BORROWED, 1, cycle=2)
    assert "Cycle 2: did not pass." in of(both)


def test_what_did_not_pass_comes_before_what_is_folded() -> None:
    text = of(RED)
    assert text.index("### What did not pass") < text.index("<details>")
    assert text.count("\n- **fail**") == 1
    assert "  - likely: a buffer was not deleted, or something else still holds it" in text
    assert "What did not pass" not in of(GOOD)


def test_another_witness_that_disagrees_is_named() -> None:
    text = of(shift(good_record(allocator=True), BORROWED, 512, "allocator"))
    assert table(text)["kv_cache_dropped"][2:] == ["0", "**fail** (allocator)"]


def test_many_failures_are_folded_and_the_rest_counted() -> None:
    blind = edit_canary(good_record(cycles=8, devices=2), "ledger", 1, rise_bytes=0)
    verdicts = judge(blind)
    text = summary(blind, verdicts, [(f"test {number}", "why") for number in range(100)])
    shown, folded = text.split("<details>", 1)
    assert shown.count("\n- **") == 10
    bad = 100 + sum(verdict.verdict == "inconclusive" for verdict in verdicts)
    assert f"<summary>{bad - 10} more that did not pass</summary>" in folded
    assert f"And {bad - 110} more: see record.json." in folded


def test_failures_that_say_the_same_are_one() -> None:
    blind = edit_canary(good_record(cycles=40, devices=2), "ledger", 1, rise_bytes=0)
    text = of(blind)
    assert text.count("\n- **inconclusive** ") == 5  # of 161 verdicts
    assert text.count("\n  - and 39 alike: cycles 1–39, device 1\n") == 4


def test_everything_that_is_folded_is_whole_markdown() -> None:
    html = PARSER.render(of(RED))
    assert html.count("<details>") == html.count("</details>") == 5
    assert html.count("<table>") == 6
    assert "| ---" not in html


HOSTILE = [
    "<script>alert(1)</script>", "</details><h1>PASSED</h1>", "**PASSED**", "a | b | c", "`code`", "[x](javascript:1)",
    "![x](y.png)", "# heading\n## two", "&lt;b&gt;", "_x_", "~~gone~~", "\\", "\\|", "<!--", "\x1b[31mred", "]]>",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_record_says_stays_text(name: str) -> None:
    """Said in every place that holds words, and seen through a Markdown parser: the same tags as of a harmless name."""

    def saying(word: str) -> str:
        record = edit_kv(
            RED.model_copy(
                update={
                    "profile": RED.profile | {"name": word, "model": {"path": word}},
                    "devices": tuple(device.model_copy(update={"kind": word}) for device in RED.devices),
                    "stack": RED.stack.model_copy(update={"jax": word, "sglang_jax": word}),
                    "created": word,
                }
            ),
            predicted_by=word,
            predicted_how=word,
        )
        record = edit_info(record, "sglang_param_dict2_ready", error=word)
        return summary(record, judge(record), [(word, word)])

    tags = PARSER.render(saying("harmless")).replace(">", "<").split("<")[1::2]
    html = PARSER.render(saying(name))
    assert html.replace(">", "<").split("<")[1::2] == tags
    assert len(saying(name).splitlines()) == len(saying("harmless").splitlines())


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("kv_cache_dropped", "kv_cache_dropped"),
        ("see https://example.org", "see https&#58;//example.org"),
        ("www.example.org", "www&#46;example.org"),
        ("@someone costs $x$", "&#64;someone costs &#36;x&#36;"),
        ("a\nb", "a\\\\nb"),
    ],
)
def test_no_link_no_mention_no_formula(text: str, escaped: str) -> None:
    assert plain(text) == escaped


def test_what_is_too_long_is_cut() -> None:
    assert len(plain("x" * 10_000)) == MAX_CHARACTERS
    assert plain("x" * 10_000).endswith("…")
    assert code("a|b") == "<code>a\\|b</code>"


def test_the_largest_record_fits_a_page() -> None:
    record = good_record(cycles=24, devices=24)
    record = edit_canary(record, "ledger", 0, rise_bytes=0)
    record = record.model_copy(update={"profile": record.profile | {"name": "|" * 100_000}})
    assert len(of(record).encode()) < PAGE_LIMIT_BYTES


def test_a_run_that_ended_early_is_shown_as_far_as_it_came() -> None:
    short = good_record(cycles=1)
    for name in BORROWED:
        short = without_phase(short, name)
    assert "the run ended before kv_cache_dropped" in of(short)
    assert "No phase was measured." in of(short.model_copy(update={"cycles": (), "generates": ()}))
    begun = edit_cycle(good_record(cycles=1), 0, phases=GOOD.cycles[0].phases[:1])
    assert "The cycle ended before the KV cache was dropped." in of(begun)
