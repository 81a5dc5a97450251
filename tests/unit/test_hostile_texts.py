"""Text that would steer the terminal: none of a record or a verdict reaches it as it is."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvcycle.checks import judge
from kvcycle.record import Record
from kvcycle.report import terminal
from kvcycle.text import printable
from tests.unit.spoiled import EVIL, SHOWN, harmless, not_passed, path, raw, refused, set_at

__all__ = ["path", "raw"]


def everywhere(raw: dict[str, Any]) -> None:
    """Puts the evil text wherever a record has free text that is shown."""
    raw["profile"]["name"] = EVIL
    raw["stack"] = dict.fromkeys(raw["stack"], EVIL)
    for device in raw["devices"]:
        device["kind"] = EVIL
    raw["kv"] |= {"predicted_by": EVIL, "predicted_how": EVIL, "claimed_bytes": 1}
    raw["kv"]["pools"][0]["type"] = EVIL
    phases = {phase["name"]: phase["info"] for phase in raw["cycles"][0]["phases"]}
    phases["sglang_param_dict2_ready"]["error"] = EVIL
    rebuild = phases["kv_cache_rebuilt"]
    slot, layout = rebuild["layouts_after"].popitem()
    rebuild["layouts_before"] |= {EVIL: layout}
    rebuild["layouts_after"] |= {EVIL: layout | {"dtype": EVIL}, slot: layout}
    rebuild |= {"moved_owners": [EVIL], "nonzero_slots": [EVIL]}


def test_no_text_of_a_record_steers_the_terminal(raw: dict[str, Any], path: Path) -> None:
    everywhere(raw)
    path.write_text(json.dumps(raw))
    text = "".join(not_passed(path).split())
    for part in (
        f"FAILED [simulated-on-cpu] {SHOWN} on 2 {SHOWN} devices, sglang-jax {SHOWN}, jax {SHOWN}: ",
        f"predicted by {SHOWN}: {SHOWN}",
        f"fail params2.fits: cycle0: {SHOWN}",
        f"first: {SHOWN}: dtype was bfloat16 and is {SHOWN}: 1, expected 0.",
        f"first: {SHOWN}: 1, expected 0.",
        f"predicted by {SHOWN}: 1 B, expected",
    ):
        assert part.replace(" ", "") in text


def test_own_colors_are_the_only_escapes_of_a_terminal(raw: dict[str, Any]) -> None:
    everywhere(raw)
    record = Record.model_validate_json(json.dumps(raw))
    buffer = io.StringIO()
    terminal.show(record, judge(record), Console(file=buffer, force_terminal=True, highlight=False))
    text = buffer.getvalue()
    assert "\x1b[1;31mFAILED\x1b[0m" in text
    assert harmless(re.sub(r"\x1b\[[0-9;]*m", "", text))


def test_verdicts_of_others_do_not_steer_the_terminal_either(raw: dict[str, Any]) -> None:
    verdict = {"id": EVIL, "scope": EVIL, "message": EVIL, "causes": [EVIL]}
    raw["checks"] = [verdict | {"verdict": outcome} for outcome in ("pass", "fail", "inconclusive", "not-run")]
    record = Record.model_validate_json(json.dumps(raw))
    buffer = io.StringIO()
    terminal.show(record, record.checks, Console(file=buffer, width=500, highlight=False))
    assert harmless(buffer.getvalue())
    assert f"fail {SHOWN}: {SHOWN}\n    likely: {SHOWN}\n" in buffer.getvalue()
    assert f"not run: {SHOWN}: {SHOWN}\n" in buffer.getvalue()


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (f"{EVIL}", f"{SHOWN}: Extra inputs are not permitted (1 in all)."),
        ("evidence", "evidence: Input should be 'measured-on-tpu', "),
        ("cycles.0.phases.3.info.kind", f"cycles.0.phases.3.info: Input tag '{SHOWN}' found using 'kind' does"),
        (
            f"cycles.0.phases.3.devices.0.by_owner.{EVIL}",
            f"cycles.0.phases.3.devices.0.by_owner.{SHOWN}.[key]: Input should be 'weights', 'kv', ",
        ),
    ],
)  # fmt: skip
def test_a_refusal_shows_what_it_quotes_harmlessly(place: str, sentence: str, raw: dict[str, Any], path: Path) -> None:
    set_at(raw, place, EVIL)
    path.write_text(json.dumps(raw))
    assert refused(path).startswith(f"{path} is not a valid record: {sentence}")


@given(text=st.text(max_size=20))
def test_any_text_is_made_printable(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["2.25 GiB (2,415,992,832 B)", "P('data', None) over {'data': 1}", "…×–’ ☃ 语"])
def test_plain_text_is_left_alone(text: str) -> None:
    assert printable(text) == text
