"""What viewers of JUnit files show of a check that did not pass, and of the run: numbers in words, exact.

They show a test's name, class, file, line and time, and of a failure its message in a list and its text on a click;
hardly one shows a test's properties. So whatever a person needs is in the failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvcycle.checks import passed
from kvcycle.record import Record
from kvcycle.record_parts import OUTCOMES, Evidence, Verdict
from kvcycle.text import printable

SUITE_NAME = "kvcycle"


def failure_message(verdict: Verdict, evidence: Evidence) -> str:
    """One line for a list of failures: check, place, and by how much; a verdict without numbers in its own words."""
    head = f"{verdict.verdict} [{evidence}] {verdict.id} {verdict.place}"
    if verdict.expected is None or verdict.measured is None:
        return printable(f"{head}: {verdict.message}")
    limit = f"{_word(verdict)} {_number(verdict.expected)} {verdict.unit}".rstrip()
    return printable(f"{head}: measured {_number(verdict.measured)}, {limit}{_off(verdict, ', off by ')}")


def failure_text(verdict: Verdict, evidence: Evidence) -> str:
    """The whole of it: the sentence, the numbers one below the other, likely causes, and where to read on."""
    lines = [f"{verdict.verdict} [{evidence}] {verdict.id} {verdict.place}", printable(verdict.message), ""]
    if verdict.expected is not None and verdict.measured is not None:
        numbers = {_word(verdict): _number(verdict.expected), "measured": _number(verdict.measured)}
        if difference := _off(verdict, ""):
            numbers["difference"] = difference
        width = max(map(len, numbers.values()))
        lines += [f"  {name:<11} {value:>{width}} {verdict.unit}".rstrip() for name, value in numbers.items()]
    lines += [f"  evidence    {evidence}"]
    lines += [printable(f"  likely: {cause}") for cause in verdict.causes]
    return "\n".join([*lines, f"  what to do: docs/checks.md, {verdict.id}"])


def suite_properties(record: Record, verdicts: Sequence[Verdict]) -> dict[str, str]:
    """What a run was and how it ended, by name: a machine's copy of the report's first lines."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    properties = {
        "kvcycle.evidence": record.evidence,
        "kvcycle.verdict": "passed" if passed(list(verdicts)) else "failed",
        "kvcycle.verdicts": ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]),
        "kvcycle.created": record.created,
        "kvcycle.devices": f"{len(record.devices)} {', '.join(sorted({device.kind for device in record.devices}))}",
        **({"kvcycle.hosts": str(len(set(record.host_of.values())))} if record.host_of else {}),
        "kvcycle.cycles": str(len(record.cycles)),
        "kvcycle.kv_bytes": str(record.kv.bytes),
        "kvcycle.params_bytes": str(record.params.bytes_on_devices),
    }
    if record.boot is not None:
        properties["kvcycle.boot_s"] = f"{record.boot.seconds:.3f}"
    return {name: printable(value) for name, value in properties.items()}


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _word(verdict: Verdict) -> str:
    """What the expected figure is called: of times and log-probabilities it is a limit, met or not."""
    return "limit" if verdict.unit in ("seconds", "nats") else "expected"


def _off(verdict: Verdict, before: str) -> str:
    """The difference with its sign; nothing where there is none, or where the two are no numbers."""
    expected, measured = verdict.expected, verdict.measured
    if isinstance(expected, str | None) or isinstance(measured, str | None) or measured == expected:
        return ""
    off = measured - expected
    return f"{before}{off:+,}" if isinstance(off, int) else f"{before}{off:+.6g}"
