"""``kvcycle soak``: exit codes and what is left in the run's folder. The soak itself is in tests/simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcycle import soak_command
from kvcycle.checks import judge
from kvcycle.cli import app
from kvcycle.errors import EngineCrashedError
from kvcycle.profile import Platform, Profile
from kvcycle.record import Record
from tests.unit.records import with_profile
from tests.unit.soaks import edit_soak, good_soak, hold, soak_of

GOOD = good_soak()


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, record: Record | Exception, *arguments: str) -> Any:
    """The command with a soak that comes back with this record."""

    def boot_and_soak(profile: Profile, platform: Platform, cycles: int, save_to: Path, _: object) -> Record:
        if isinstance(record, Exception):
            raise record
        judged = record.model_copy(update={"checks": tuple(judge(record))})
        judged.save(save_to)
        return judged

    monkeypatch.setattr(soak_command, "_boot_and_soak", boot_and_soak)
    return CliRunner().invoke(app, ["soak", "--cycles", "40", "--report-dir", str(folder), *arguments])


def test_a_soak_that_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = run(monkeypatch, tmp_path, GOOD)
    assert done.exit_code == 0
    assert "PASSED [simulated-on-cpu] tiny" in done.output
    assert sorted(path.name for path in (tmp_path / "latest").iterdir()) == ["index.html", "record.json"]


def test_a_violation_is_exit_code_1_and_its_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    leak = hold(GOOD, range(1, 7), lambda cycle: 512 * cycle)
    done = run(monkeypatch, tmp_path, edit_soak(leak, points=soak_of(leak).points[:5]))
    assert done.exit_code == 1
    assert "fail soak.no_growth: soak cycle 5 of 40, device1, ledger: " in done.output
    assert "grown by +512 B, allowed 0 B." in " ".join(done.output.split())


def test_an_interrupted_soak_is_exit_code_130_and_no_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = run(monkeypatch, tmp_path, edit_soak(GOOD, points=soak_of(GOOD).points[:20]))
    assert done.exit_code == 130
    assert "inconclusive soak.no_growth: run: the soak ended after 20 of 40 cycles." in done.output
    assert "FAILED [simulated-on-cpu]" in done.output
    assert (tmp_path / "latest" / "index.html").exists()


def test_a_whole_cycle_that_does_not_pass_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = edit_soak(with_profile(GOOD, "thresholds", min_distinct_tokens=99), points=(), before=())
    done = run(monkeypatch, tmp_path, begun)
    assert done.exit_code == 1
    assert "soak: none of its 40 cycles was run" in done.output


def test_what_kvcycle_refuses_is_a_sentence_and_exit_code_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = run(monkeypatch, tmp_path, EngineCrashedError("The engine died while it was asked: no memory"))
    assert (done.exit_code, done.stderr) == (2, "The engine died while it was asked: no memory\n")
    done = run(monkeypatch, tmp_path, GOOD, "--set", "cycle.nonsense=1")
    assert done.exit_code == 2
    assert "has no key 'cycle.nonsense'" in done.stderr


@pytest.mark.parametrize("arguments", [["--cycles", "8"], ["--cycles", "10001"], ["--platform", "gpu"]], ids=" ".join)
def test_what_the_options_refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]) -> None:
    assert run(monkeypatch, tmp_path, GOOD, *arguments).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_report_judges_a_soaks_record_again(tmp_path: Path) -> None:
    leak = hold(GOOD, range(1, 41), lambda cycle: 512 * cycle)
    leak.save(tmp_path / "record.json")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "record.json")])
    assert done.exit_code == 1
    assert "soak: 40 of 40 cycles on 4 devices" in done.output
    assert "fail soak.no_growth: soak cycle 5 of 40, device1, ledger: " in done.output
