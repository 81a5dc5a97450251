"""The suite in tests/tpu asserts every check but the soak's: each has a test whose ``check`` marker names it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.scopes import verdict_names
from kvcycle.checks import CHECKS, SOAK_CHECKS, judge
from kvcycle.profile import Platform
from kvcycle.profile_file import load_profile
from tests.unit.records import good_record

SUITE = Path(__file__).parents[1] / "tpu"


def markers() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(test, check, scopes) of every ``@pytest.mark.check(ID, per=SCOPES)`` in the suite, read without importing it."""
    for path in sorted(SUITE.glob("test_*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            for decorator in function.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.check":
                    keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in decorator.keywords}
                    yield f"{path.name}::{function.name}", ast.literal_eval(decorator.args[0]), keywords["per"]


def test_every_check_has_one_test_and_every_test_a_check() -> None:
    checks = [check for _, check, _ in markers()]
    assert sorted(checks) == sorted(CHECKS.keys() - SOAK_CHECKS.keys())


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_every_verdict_has_a_test_id_and_every_test_id_a_verdict(platform: Platform) -> None:
    profile = load_profile("tiny", {"engine.tp_size": 2, "cycle.cycles": 3})
    ids = {(check, name) for _, check, per in markers() for name in verdict_names(per, profile, platform)}
    record = good_record(cycles=3, devices=2, allocator=platform == "tpu")
    assert ids == {(verdict.id, verdict.name) for verdict in judge(record)}
