"""A run as Markdown, for the page of a CI run: the verdict, one table, what failed; the rest is folded."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from kvcycle.checks import CHECKS, passed
from kvcycle.checks.generation import thresholds_s
from kvcycle.record import Record
from kvcycle.record_parts import OUTCOMES, PhaseName, Soak, Verdict
from kvcycle.report.alike import Told, told
from kvcycle.report.hosts import count_of_devices, hosts_of, of_hosts
from kvcycle.report.markup import code, plain
from kvcycle.report.phases import JUDGED, WORST_FIRST, by_check, by_cycle, expected_changes, worst
from kvcycle.report.soak import compilations, growth_sum
from kvcycle.report.terminal import WHEN, verdict_line
from kvcycle.text import seconds, signed_bytes

#: Of what did not pass, so many are told at once; as many more are folded, and then only counted.
_TOLD, _FOLDED = 10, 100
#: Of so many cycles every phase is shown, and of the one in the table.
_MAX_CYCLES = 8
#: A test's own words, where it is not a check of the record that failed.
FailedTest = tuple[str, str]


def summary(record: Record, verdicts: Sequence[Verdict], failed_tests: Sequence[FailedTest] = ()) -> str:
    """The Markdown of a judged record: verdict and evidence label first, one table, failures, the rest folded.

    Args:
        record: what was measured.
        verdicts: what the checks say of it.
        failed_tests: (name, message) of tests that failed though no verdict says so: the engine died at the end.
    """
    judged = by_cycle(verdicts)
    index = _cycle_to_show(record, judged)
    parts = [_headline(record, verdicts, failed_tests)]
    if index is None:
        parts.append("No phase was measured.")
    else:
        parts += [_table_title(record, index), _changes_table(record, judged.get(index, []), index)]
        parts += _of_other_cycles(record, judged, index)
    if (hosts := hosts_of(record, verdicts)) is not None:
        parts.append(plain(hosts.summary))
    if record.soak is not None:
        parts.append(_soak_line(record, record.soak))
    parts += _failures(record, verdicts, failed_tests)
    for number in sorted({*range(min(len(record.cycles), _MAX_CYCLES)), *([index] if index is not None else [])}):
        parts.append(_folded(f"Cycle {number}: every phase", _phases_table(record, number)))
    if record.generates:
        parts.append(_folded("Latencies and compilations", _latencies_table(record)))
    parts.append(_folded("Checks", _checks_table(verdicts)))
    parts.append(_folded("What was run", _facts_table(record)))
    return "\n\n".join(parts) + "\n"


def summary_without_record(outcome: str, reason: str) -> str:
    """The Markdown of a run that measured nothing: what became of it, and why."""
    return f"## kvcycle: {plain(outcome)}\n\n{plain(reason)}\n"


def _headline(record: Record, verdicts: Sequence[Verdict], failed_tests: Sequence[FailedTest]) -> str:
    line = verdict_line(record, verdicts).plain
    word, said = line.split(" ", 1)
    if failed_tests and word == "PASSED":
        word, said = "FAILED", f"{said}; {_count(len(failed_tests), 'test')} failed beside the checks"
    return f"## {'✅' if word == 'PASSED' else '❌'} {word} {plain(said)}"


def _cycle_to_show(record: Record, judged: dict[int, list[Verdict]]) -> int | None:
    """The first cycle that did not pass; the first of all where every one did, None where there is none."""
    for index, _ in enumerate(record.cycles):
        if not passed(judged.get(index, [])):
            return index
    return 0 if record.cycles else None


def _table_title(record: Record, index: int) -> str:
    devices = count_of_devices(record)
    return plain(f"Cycle {index}: change in bytes in use, summed over {devices}, by the ledger [{record.evidence}]")


def _changes_table(record: Record, verdicts: Sequence[Verdict], index: int) -> str:
    expected, of_check = expected_changes(record), by_check(verdicts)
    rows = []
    for name, measured in _changes(record, index).items():
        if name not in JUDGED:
            continue
        found = of_check.get(JUDGED[name], [])
        outcome = worst(found)
        by = sorted({verdict.witness or verdict.scope for verdict in found if verdict.verdict == outcome})
        rows.append(
            [
                code(name),
                signed_bytes(expected[name]) if name in expected else "–",
                signed_bytes(measured),
                f"{measured - expected[name]:+,}" if name in expected and measured != expected[name] else "0",
                "pass" if outcome == "pass" else f"**{outcome or 'not judged'}** ({plain(', '.join(by) or '–')})",
            ]
        )
    if not rows:
        return "The cycle ended before the KV cache was dropped."
    return _table(["phase", "expected", "measured", "Δ bytes", "verdict"], rows, right=(1, 2, 3))


def _of_other_cycles(record: Record, judged: dict[int, list[Verdict]], shown: int) -> list[str]:
    told: dict[str, list[int]] = {}
    for index, _ in enumerate(record.cycles):
        if index == shown:
            continue
        if not passed(judged.get(index, [])):
            words = "did not pass"
        elif _judged_changes(record, index) == _judged_changes(record, shown):
            words = f"passed, every change to the byte as in cycle {shown}"
        else:
            words = f"passed, with other changes than cycle {shown}"
        told.setdefault(words, []).append(index)
    return [f"{_cycles(indices)}: {words}." for words, indices in told.items()]


def _soak_line(record: Record, soak: Soak) -> str:
    grown = growth_sum(record, soak)
    growth = f"growth {grown[-1]:+,} B" if grown else "growth not measured"
    return f"Soak: {len(soak.points):,} of {soak.cycles:,} cycles, {growth}, {compilations(soak):,} compilations."


def _failures(record: Record, verdicts: Sequence[Verdict], failed_tests: Sequence[FailedTest]) -> list[str]:
    bad = [verdict for verdict in verdicts if verdict.verdict in ("fail", "inconclusive")]
    bad.sort(key=lambda verdict: WORST_FIRST.index(verdict.verdict))
    items = [f"- **failed** {code(name)}: {plain(message)}" for name, message in failed_tests]
    items += [_item(line) for line in told(bad, record.host_of)]
    if not items:
        return []
    parts = ["### What did not pass", "\n".join(items[:_TOLD])]
    if rest := items[_TOLD : _TOLD + _FOLDED]:
        beyond = len(items) - _TOLD - len(rest)
        more = f"\n\nAnd {beyond:,} more: see record.json." if beyond else ""
        parts.append(_folded(f"{len(items) - _TOLD:,} more that did not pass", "\n".join(rest) + more))
    return parts


def _item(line: Told) -> str:
    verdict = line.verdict
    more = f"\n  - {plain(line.more)}" if line.more else ""
    causes = "".join(f"\n  - likely: {plain(cause)}" for cause in verdict.causes[:5])
    return f"- **{verdict.verdict}** {code(verdict.id)} {code(verdict.name)}: {plain(verdict.message)}{more}{causes}"


def _phases_table(record: Record, index: int) -> str:
    changes = _changes(record, index)
    rows = [
        [
            code(phase.name),
            f"{phase.ledger_bytes_sum:,}",
            f"{changes[phase.name]:+,}" if phase.name in changes else "",
            f"{phase.seconds:.3f}",
            f"{phase.compiles.backend:,}",
        ]
        for phase in record.cycles[index].phases
    ]
    return _table(["phase", "bytes in use", "change", "seconds", "compilations"], rows, right=(1, 2, 3, 4))


def _latencies_table(record: Record) -> str:
    rows = []
    for when, label in WHEN:
        if found := record.generates_when(when):
            times = [generate.seconds for generate in found]
            rows.append(
                [
                    label,
                    f"{statistics.median(times) if when == 'warm' else max(times):.3f}",
                    f"{max(generate.compiles.backend for generate in found):,}",
                ]
            )
    if (limits := thresholds_s(record)) is not None:
        rows.append(["threshold for after the rebuild", f"{limits[1]:.3f}", "0"])
    return _table(["generate", "seconds", "compilations"], rows, right=(1, 2))


def _checks_table(verdicts: Sequence[Verdict]) -> str:
    of_check = by_check(verdicts)
    counts = {check: Counter(verdict.verdict for verdict in of_check.get(check, [])) for check in CHECKS}
    rows = [
        [code(check), *(f"{count[outcome]:,}" if count[outcome] else "" for outcome in OUTCOMES)]
        for check, count in counts.items()
        if count
    ]
    rows.sort(key=lambda row: not (row[2] or row[3]))
    return _table(["check", *OUTCOMES], rows, right=range(1, len(OUTCOMES) + 1))


def _facts_table(record: Record) -> str:
    kv, stack = record.kv, record.stack
    kinds = ", ".join(sorted({device.kind for device in record.devices}))
    facts = {
        "evidence": record.evidence,
        "profile": str(record.profile.get("name", "?")),
        "model": str((record.profile.get("model") or {}).get("path", "?")),
        "devices": f"{len(record.devices):,} {kinds}{of_hosts(record)}",
        "KV cache": f"{kv.buffers:,} buffers, {signed_bytes(kv.bytes).removeprefix('+')}",
        "predicted by": f"{kv.predicted_by}: {kv.predicted_how}" if kv.predicted_by else "nothing",
        "weights": f"{record.params.arrays:,} arrays, {signed_bytes(record.params.bytes_on_devices).removeprefix('+')}",
        "boot": seconds(record.boot.seconds) if record.boot else "not by kvcycle",
        **stack.model_dump(exclude_none=True),
        "created": record.created,
    }
    return _table(["", ""], [[plain(name), plain(value)] for name, value in facts.items()])


def _changes(record: Record, index: int) -> dict[PhaseName, int]:
    phases = record.cycles[index].phases
    return {after.name: after.ledger_bytes_sum - before.ledger_bytes_sum for before, after in pairwise(phases)}


def _judged_changes(record: Record, index: int) -> dict[PhaseName, int]:
    return {name: change for name, change in _changes(record, index).items() if name in JUDGED}


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    aligned = set(right)
    lines = [heading, ["---:" if index in aligned else "---" for index, _ in enumerate(heading)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _folded(title: str, body: str) -> str:
    # The blank lines make Markdown of what is inside.
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _cycles(indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return f"Cycle {indices[0]}"
    if list(indices) == list(range(indices[0], indices[-1] + 1)):
        return f"Cycles {indices[0]} to {indices[-1]}"
    told = ", ".join(str(index) for index in indices[:20])
    return f"Cycles {told}" + (f" and {len(indices) - 20} more" if len(indices) > 20 else "")
