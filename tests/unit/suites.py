"""The hardware suite's own tests run on a record that is already there, in this process: no engine boots."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvcycle.record import Record

RunSuite = Callable[..., pytest.RunResult]

#: And without the plugin that collects all garbage, five times, at the end of each session.
PLUGINS = ("options", "suite", "scopes", "reporting", "ending")
_REPORTERS = (
    "-p",
    "pytest_reportlog.plugin",
    "-p",
    "pytest_benchmark.plugin",
    "--benchmark-disable",
    "-p",
    "no:unraisableexception",
)

#: Instead of the engine and its cycles: what they would have said, and the record that they would have made.
_CONFTEST = """
from pathlib import Path

import pytest

from fixtures.suite import _Breaking
from kvcycle import checks
from kvcycle.record import Record


@pytest.fixture(scope="session")
def record(request, suite, settings, progress, details, tell_junit):
    with _Breaking(request, "the cycle could not be run"):
        for line in {lines!r}:
            progress(line)
        for line in {detailed!r}:
            details(line)
    measured = Record.load(Path({path!r}))
    if {error!r}:
        if measured.cycles:
            measured.save(settings.run_dir / "record.json")
        suite.broken = "skipped since it failed"
        pytest.fail({error!r}, pytrace=False)
    suite.verdicts = checks.judge(measured)
    suite.record = measured.model_copy(update={{"checks": tuple(suite.verdicts)}})
    suite.record.save(settings.run_dir / "record.json")
    tell_junit(suite.record)
    return suite.record
"""

_INI = """[pytest]
addopts = --import-mode=importlib
junit_family = xunit1
junit_suite_name = kvcycle
junit_duration_report = call
markers =
    tpu: the suite
    check(id, per): a check
"""


def suite_on(pytester: pytest.Pytester, source: Path) -> RunSuite:
    """A function that runs the suite's tests on a record; the reports are in ``pytester.path / "reports/latest"``.

    Args:
        pytester: the session to run in.
        source: the folder of the suite's tests.

    What it is told of progress are ``lines``, and of details ``detailed``; ``more`` is a module of further tests.
    Of a run that ends with an ``error``, the record is what was measured before; without a cycle there was nothing.
    """

    def run(
        record: Record,
        *arguments: str,
        lines: Sequence[str] = (),
        detailed: Sequence[str] = (),
        error: str = "",
        more: str = "",
    ) -> pytest.RunResult:
        folder = pytester.path / "tests" / "tpu"
        if not folder.exists():
            # What measures latencies has an engine of its own.
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("test_06_*", "__pycache__"))
        if more:
            (folder / "test_99_more.py").write_text(more)
        path = pytester.path / "given.json"
        record.save(path)
        pytester.makeini(_INI)
        pytester.makeconftest(_CONFTEST.format(path=str(path), lines=list(lines), detailed=list(detailed), error=error))
        plugins = [argument for name in PLUGINS for argument in ("-p", f"fixtures.{name}")]
        keys = ("--kv-set", "cycle.release_weights=false", "--kv-cycles", str(len(record.cycles) or 1))
        platform = ("--kv-platform", "cpu")
        selected = ("-m", "tpu", *platform, *keys, *arguments, "tests/tpu")
        # Where this session has collected the suite itself, its modules would be taken for those of the copy.
        originals = {name: module for name, module in sys.modules.items() if name.startswith("tests.tpu")}
        for name in originals:
            del sys.modules[name]
        try:
            return pytester.runpytest_inprocess(*plugins, *_REPORTERS, *selected)
        finally:
            sys.modules.update(originals)

    return run


def reports(pytester: pytest.Pytester) -> Path:
    """The folder of the newest run."""
    return pytester.path / "reports" / "latest"
