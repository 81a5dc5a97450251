"""The plan's tables, its command and its process, without libtpu: the compiler's answers are made up."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvcycle.cli import app
from kvcycle.errors import ProfileError
from kvcycle.plan import PlanError, ask, command, max_tokens, plan, table
from kvcycle.plan.model import ForwardPlan, MaxTokens, PhasePlan, Plan, TokenLimit
from kvcycle.plan.protocol import Reply
from kvcycle.plan.worker import HELD
from kvcycle.profile_file import load_profile
from kvcycle.record import Record
from kvcycle.record_parts import PHASES, Owner
from tests.unit.records import good_record

RUNNER = CliRunner()

CAPACITY = 33_014_415_360
PROGRAM = 48_640
SIZES: dict[Owner, int] = {"weights": 1_562_243_072, "kv": 603_998_208, "params2": 1_562_243_072}


def planned(capacity: int = CAPACITY, **changes: Any) -> Plan:
    """A plan of the reference's sizes on a device of some capacity."""
    phases = []
    for name in PHASES:
        held = HELD[name]
        size = sum(SIZES[owner] for owner in held)
        left = capacity - size - PROGRAM
        phases.append(
            PhasePlan(
                name=name,
                held=held,
                bytes_per_device=size,
                bytes_sum=4 * size,
                program_bytes=PROGRAM,
                headroom_bytes=left,
                fits=left >= 0,
                refusal=None if left >= 0 else "Ran out of memory.",
            )
        )
    whole = {
        "record": good_record().model_copy(
            update={"evidence": "compiled-for-tpu", "profile": load_profile("tiny").model_dump(mode="json")}
        ),
        "topology": "v4-8",
        "capacity_bytes": capacity,
        "phases": tuple(phases),
        "largest_prefill_tokens": 1024,
        "fits": all(phase.fits for phase in phases),
        "headroom_bytes": min(phase.headroom_bytes for phase in phases),
        "seconds": 12.0,
        "peak_rss_bytes": 600 * 2**20,
    }
    return Plan.model_validate(whole | changes)


def step(left: int | None = 30_000_000_000, **changes: Any) -> ForwardPlan:
    """A prefill that leaves so many bytes on a device; None if it was refused."""
    common: dict[str, Any] = {"step": "prefill", "batch": 16, "tokens": 64, "kv_bytes": SIZES["kv"], "seconds": 70.0}
    if left is None:
        refused = {"fits": False, "fits_with_params2": False, "refusal": "Ran out of memory in memory space hbm."}
        return ForwardPlan.model_validate(common | refused | changes)
    accepted = {
        "argument_bytes": 2_166_375_936,
        "output_bytes": 605_215_232,
        "alias_bytes": SIZES["kv"],
        "temporary_bytes": 72_317_952,
        "program_bytes": 80_141_312,
        "kv_donated": True,
        "headroom_bytes": left,
        "headroom_with_params2_bytes": left - SIZES["weights"],
        "fits": True,
        "fits_with_params2": left >= SIZES["weights"],
    }
    return ForwardPlan.model_validate(common | accepted | changes)


def limits(together: int = 1_621_626, alone: int = 1_706_384, **changes: Any) -> MaxTokens:
    """Token limits on a v4-8."""

    def limit(tokens: int) -> TokenLimit:
        return TokenLimit(
            tokens=tokens,
            headroom_bytes=6_656 if tokens else None,
            refused_tokens=tokens + 1,
            missing_bytes=11_776,
            refusal="Ran out of memory.",
        )

    whole: dict[str, Any] = {
        "profile": "tiny",
        "topology": "v4-8",
        "page_size": 1,
        "capacity_bytes": CAPACITY,
        "with_params2": limit(together),
        "without_params2": limit(alone),
        "params2_fits_alone": True,
        "compiles": 12,
        "seconds": 10.0,
        "peak_rss_bytes": 600 * 2**20,
    }
    return MaxTokens.model_validate(whole | changes)


def shown(value: Plan | MaxTokens, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    if isinstance(value, Plan):
        table.show(value, console)
    else:
        table.show_max_tokens(value, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 110])
def test_exact_bytes_stand_beside_rounded_ones_and_nothing_is_cut_off(width: int) -> None:
    text = shown(planned(forward=(step(), step(step="decode", tokens=16))), width)
    assert text.splitlines()[0].startswith("[compiled-for-tpu] tiny on v4-8: ")
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    joined = " ".join(text.split())
    for number in ("14,913,937,408 B", "3,728,484,352 B", "29,285,882,368 B", "72,317,952 B", "33,014,415,360 B"):
        assert number in joined
    assert "13.89 GiB" in joined
    assert "in full (603,998,208 B)" in joined
    assert "FITS [compiled-for-tpu] on v4-8" in joined


def test_what_does_not_fit_is_named_with_its_bytes() -> None:
    tight = planned(capacity=SIZES["weights"] * 2 + PROGRAM)
    assert tight.first_misfit is not None
    text = " ".join(shown(tight).split())
    missing = SIZES["kv"]
    assert (
        f"DOES NOT FIT [compiled-for-tpu] on v4-8: kv_cache_rebuilt (weights + KV + 2nd set) is 576.02 MiB "
        f"({missing:,} B) over on each device, and 1 more phase" in text
    )


def test_a_step_that_does_not_fit_is_named() -> None:
    beside = planned(forward=(step(left=SIZES["weights"] - 1000),), fits=False)
    assert (
        "prefill of 64 tokens (16 requests) beside a second parameter set is 1,000 B over on each device"
        in " ".join(table.verdict(beside).split())
    )
    refused = planned(forward=(step(left=None),), fits=False)
    assert table.verdict(refused).endswith("prefill of 64 tokens (16 requests): Ran out of memory in memory space hbm.")
    assert "refused" in shown(refused)


def test_a_second_copy_of_the_kv_cache_is_not_called_donated() -> None:
    text = shown(planned(forward=(step(alias_bytes=0, kv_donated=False),)))
    assert "no: 0 B" in text
    assert "in full" not in text


def test_notes_say_what_is_not_counted_and_what_the_engine_would_do() -> None:
    text = " ".join(shown(planned(engine_token_cap=700_000, forward=(step(),))).split())
    assert "the reference run (measured-on-tpu) had 292,593,664 B of it" in text
    assert "from 16,384 to about 700,000" in text
    assert "--prefill-tokens 1024" in text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (limits(), "Dropping buys 84,758 tokens (5.2% more)"),
        (limits(together=0, alone=500), "Dropping buys all 500 tokens: beside a second parameter set no KV cache fits"),
        (limits(together=0, alone=500, params2_fits_alone=False), "Two parameter sets do not fit on a device together"),
        (limits(together=0, alone=0), "The weights alone leave no room"),
    ],
)
def test_one_line_says_what_dropping_buys(value: MaxTokens, words: str) -> None:
    text = " ".join(shown(value).split())
    assert text.startswith("[compiled-for-tpu] tiny on v4-8")
    assert words in text
    assert f"{value.without_params2.tokens:,}" in text


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Reply | Exception]:
    """What the planning process is made to answer, by topology."""
    given: dict[str, Reply | Exception] = {}

    def answered(_profile: object, topology: str, **_: object) -> Reply:
        reply = given[topology]
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr(command, "ask", answered)
    return given


def test_exit_codes(answers: dict[str, Reply | Exception]) -> None:
    small = planned(capacity=2**30)
    answers |= {"v4-8": Reply(plan=planned()), "v5e-4": Reply(plan=small), "v6e-4": PlanError("It refuses.")}
    base = ["plan", "-p", "tiny"]
    assert RUNNER.invoke(app, [*base, "-t", "v4-8", "--fail-if-it-does-not-fit"]).exit_code == 0
    assert RUNNER.invoke(app, [*base, "-t", "v5litepod-4"]).exit_code == 0
    assert RUNNER.invoke(app, [*base, "-t", "v4-8", "-t", "v5e-4", "--fail-if-it-does-not-fit"]).exit_code == 1
    refused = RUNNER.invoke(app, [*base, "-t", "v6e-4", "-t", "v4-8"])
    assert refused.exit_code == 2
    assert "It refuses." in refused.stderr
    assert "FITS [compiled-for-tpu] on v4-8" in refused.stdout  # the others are planned all the same


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "tiny", "-t", "v4-9"], "There is no topology 'v4-9'"),
        (["-p", "tinny", "-t", "v4-8"], "There is no profile 'tinny'"),
        (["-p", "tiny", "-t", "v4-8", "--set", "engine.page_sise=1"], "engine.page_sise"),
        (["-p", "tiny", "-t", "v4-8", "-t", "v5e-4", "--record", "x.json"], "--record takes one topology"),
        (["-p", "tiny", "-t", "v4-16"], "engine.tp_size=4 spans 4 devices, and v4-16 has 8"),
        (["-p", "tiny", "-t", "v4-8", "--set", "engine.tp_size=3"], "does not divide the model's 4 attention heads"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments: list[str], words: str) -> None:
    result = RUNNER.invoke(app, ["plan", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_json_and_record_files(answers: dict[str, Reply | Exception], tmp_path: Path) -> None:
    answers |= {"v4-8": Reply(plan=planned(), max_tokens=limits()), "v5e-4": PlanError("It refuses.")}
    base = ["plan", "-p", "tiny", "-t", "v4-8"]
    whole, record = tmp_path / "plan.json", tmp_path / "record.json"
    assert RUNNER.invoke(app, [*base, "--json", str(whole), "--record", str(record)]).exit_code == 0
    read = json.loads(whole.read_text())
    assert read["evidence"] == "compiled-for-tpu"
    assert Plan.model_validate_json(json.dumps(read["plans"][0])) == planned()
    assert MaxTokens.model_validate_json(json.dumps(read["max_tokens"][0])) == limits()
    assert Record.load(record).evidence == "compiled-for-tpu"

    piped = RUNNER.invoke(app, [*base, "-t", "v5e-4", "--json", "-"])
    assert piped.exit_code == 2
    assert json.loads(piped.stdout)["failures"] == {"v5e-4": "It refuses."}

    unwritable = RUNNER.invoke(app, [*base, "--json", str(tmp_path / "no" / "plan.json")])
    assert unwritable.exit_code == 2
    assert "cannot be written" in unwritable.stderr


def test_a_profile_without_tokens_has_limits_but_no_plan() -> None:
    profile = load_profile("tiny", {"engine.max_total_tokens": None})
    with pytest.raises(ProfileError, match=r"no engine\.max_total_tokens, .* \(--max-tokens\)"):
        plan(profile, "v4-8")


def test_a_hub_id_without_a_config_is_a_sentence() -> None:
    with pytest.raises(ProfileError, match=r"The geometry of 'org/name' is not known here: set model\.config"):
        ask(load_profile("tiny", {"model.path": "org/name"}), "v4-8")


def test_devices_may_be_chosen_but_not_left_over() -> None:
    with pytest.raises(ProfileError, match=r"Plan for v7x-8|Set engine\.tp_size=8 or set engine\.device_indexes"):
        plan(load_profile("tiny"), "v7x-8")
    with pytest.raises(ProfileError, match=r"engine\.tp_size=4 spans 4 devices, and v5e-1 has 1.*Plan for v5e-4"):
        plan(load_profile("tiny"), "v5e-1")


def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Let the planning process be a shell script."""
    file = tmp_path / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def test_a_process_that_dies_is_a_sentence_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process(monkeypatch, tmp_path, "echo 'F0000 the compiler aborted' >&2; exit 134")
    with pytest.raises(PlanError, match="ended with exit code 134 and no answer; its last words: F0000 the compiler"):
        plan(load_profile("tiny"), "v4-8")


def test_a_process_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process(monkeypatch, tmp_path, "exec sleep 60")
    with pytest.raises(PlanError, match=r"was not ready within 0\.2 s, and was stopped\. Allow more time"):
        max_tokens(load_profile("tiny"), "v4-8", timeout_s=0.2)
    paged = load_profile("tiny", {"engine.attention_backend": "fa"})
    with pytest.raises(PlanError, match=r"does not finish compiling with small pages: set engine\.page_size=128"):
        plan(paged, "v5e-4", forward=True, timeout_s=0.2)


def test_the_callers_environment_reaches_the_process_and_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setenv("PYTHONPATH", "mine")
    process(monkeypatch, tmp_path, 'echo "$JAX_PLATFORMS $TPU_SKIP_MDS_QUERY $PYTHONPATH" >&2; exit 1')
    with pytest.raises(PlanError, match=r"its last words: cpu 1 \S*src:mine"):
        plan(load_profile("tiny"), "v4-8")
    assert os.environ["JAX_PLATFORMS"] == "tpu"
