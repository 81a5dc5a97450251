"""The top of the page: the verdict, what was validated, and the three sentences that a person wants."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvcycle.checks import passed
from kvcycle.record import Record
from kvcycle.record_info import Params2Info
from kvcycle.record_parts import PHASES, Evidence, PhaseName, Verdict
from kvcycle.report.hosts import count_of_devices, of_hosts
from kvcycle.report.page.verdicts import counts
from kvcycle.report.phases import expected_changes
from kvcycle.report.scopes import named
from kvcycle.text import exact_bytes, seconds

Word = Literal["yes", "no", "not proven"]

#: What each label means, as docs/record.md has it.
EVIDENCE: dict[Evidence, str] = {
    "measured-on-tpu": "The engine ran on a TPU.",
    "measured-on-gpu": "The engine ran on a GPU.",
    "simulated-on-cpu": "The real engine ran on virtual CPU devices: bytes, compilations and tokens are real, "
    "HBM and its speed are not.",
    "compiled-for-tpu": "The TPU compiler laid the arrays out; nothing ran.",
}


@dataclass(frozen=True)
class Headline:
    """The verdict in large letters, and the facts under it; ``early`` says where a run broke off."""

    good: bool
    name: str
    where: str
    evidence_means: str
    counts: str
    facts: tuple[tuple[str, tuple[str, ...]], ...]
    early: str


@dataclass(frozen=True)
class Answer:
    """One question, its answer in a word, the figures, and for anything but a yes the reason and where to read on."""

    question: str
    word: Word
    figures: str
    reason: str
    checks: tuple[str, ...]


def headline(record: Record, verdicts: Sequence[Verdict]) -> Headline:
    """The verdict and what it is about."""
    kinds = Counter(device.kind for device in record.devices)
    return Headline(
        good=passed(list(verdicts)),
        name=str(record.profile.get("name", "?")),
        where=", ".join(f"{count:,} {kind}" for kind, count in kinds.items()) + f" devices{of_hosts(record)}",
        evidence_means=EVIDENCE[record.evidence],
        counts=counts(verdicts) or "nothing was judged",
        facts=_facts(record),
        early=_early(record),
    )


def answers(record: Record, verdicts: Sequence[Verdict]) -> tuple[Answer, ...]:
    """The three questions."""
    return (
        _answer(
            "Was the memory given back?",
            verdicts,
            ("drop.frees_kv", "drop.deletes_every_buffer", "drop.leaves_weights"),
            _given_back(record),
        ),
        _answer(
            "Did the second set fit?",
            verdicts,
            ("params2.fits", "params2.is_its_own_memory"),
            _fitted(record),
        ),
        _answer(
            "Did it go on without recompiling?",
            verdicts,
            ("generate.no_compile", "generate.below_threshold", "generate.same_output"),
            _went_on(record),
        ),
    )


def _answer(question: str, verdicts: Sequence[Verdict], checks: tuple[str, ...], figures: str) -> Answer:
    found = [verdict for verdict in verdicts if verdict.id in checks]
    bad = [verdict for verdict in found if verdict.verdict == "fail"]
    blind = [verdict for verdict in found if verdict.verdict == "inconclusive"]
    spoke = {verdict.id for verdict in found}
    silent = [check for check in checks if check not in spoke]
    left_out = [verdict for verdict in found if verdict.verdict == "not-run"]
    word: Word = "no" if bad else "not proven" if blind or silent or left_out else "yes"
    because = bad or blind or left_out
    if because:
        reason = because[0].message + (f" And {len(because) - 1:,} more like it." if len(because) > 1 else "")
        return Answer(question, word, figures, reason, tuple(dict.fromkeys(verdict.id for verdict in because)))
    return Answer(question, word, figures, f"Nothing was judged by {', '.join(silent)}." if silent else "", ())


def _given_back(record: Record) -> str:
    freed = [-change for change in _changes(record, "flush_cache_before_kv_drop", "kv_cache_dropped")]
    if not freed:
        return ""
    wanted = -expected_changes(record)["kv_cache_dropped"]
    text = (
        f"The drop of {record.kv.buffers:,} buffers freed {_span(freed)} on {count_of_devices(record)}{_every(freed)}"
    )
    if set(freed) == {wanted}:
        how = f"what {record.kv.predicted_by} predicted" if record.kv.predicted_by else "what the shards add up to"
        return f"{text}: to the byte {how}."
    return f"{text}; expected {exact_bytes(wanted)}."


def _fitted(record: Record) -> str:
    phases = [phase for _, phase in record.phases("sglang_param_dict2_ready")]
    if any(isinstance(phase.info, Params2Info) and phase.info.error is not None for phase in phases):
        return ""  # the verdict says why
    taken = _changes(record, "kv_cache_dropped", "sglang_param_dict2_ready")
    if not taken:
        return ""
    text = f"A second parameter set took {_span(taken)} on {count_of_devices(record)}{_every(taken)}"
    wanted = expected_changes(record)["sglang_param_dict2_ready"]
    text += ", to the byte the engine's own weights" if set(taken) == {wanted} else f"; expected {exact_bytes(wanted)}"
    limits = {device.id: device.limit_bytes for device in record.devices if device.limit_bytes is not None}
    room = (
        (limits[use.id] - max(use.ledger_bytes, use.allocator_bytes or 0), use.id)
        for cycle in record.cycles
        for phase in cycle.phases
        for use in phase.devices
        if use.id in limits
    )
    if (least := min(room, default=None)) is not None:
        fullest = named("device", [least[1]], record.host_of)
        return f"{text}. At the fullest moment {fullest} had {exact_bytes(least[0])} left."
    return f"{text}."


def _went_on(record: Record) -> str:
    rebuilt = [phase.compiles.any_work + phase.compiles.trace for _, phase in record.phases("kv_cache_rebuilt")]
    after = [
        generate
        for when in ("after_rebuild", "with_params2", "after_swap_back")
        for generate in record.generates_when(when)
    ]
    if not rebuilt or not after:
        return ""
    work = sum(rebuilt) + sum(generate.compiles.any_work for generate in after)
    what = f"{work:,} lowerings and compilations" if work else "Nothing was compiled"
    text = f"{what} in {_count(len(rebuilt), 'rebuild')} and {_count(len(after), 'generation')} after that"
    cold, warm = record.generates_when("cold"), record.generates_when("warm")
    if cold:
        text += f"; the cold one compiled {_count(cold[0].compiles.backend, 'program')}"
    again = [generate.seconds for generate in record.generates_when("after_rebuild")]
    if again and warm and cold:
        median = statistics.median(generate.seconds for generate in warm)
        text += f". After a rebuild it took {seconds(max(again))} at most, warm {seconds(median)}"
        text += f", cold {seconds(cold[0].seconds)}"
    return f"{text}."


def _changes(record: Record, before: PhaseName, after: PhaseName) -> list[int]:
    """The change between two phases, over all devices, in every cycle that has both."""
    pairs = ((cycle.phase(before), cycle.phase(after)) for cycle in record.cycles)
    return [two.ledger_bytes_sum - one.ledger_bytes_sum for one, two in pairs if one is not None and two is not None]


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return exact_bytes(low) if low == high else f"{exact_bytes(low)} to {exact_bytes(high)}"


def _every(values: list[int]) -> str:
    return f", in {'each of ' * (len(set(values)) == 1)}{len(values):,} cycles" if len(values) > 1 else ""


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _facts(record: Record) -> tuple[tuple[str, tuple[str, ...]], ...]:
    profile, stack = record.profile, record.stack
    model, engine = _table(profile, "model"), _table(profile, "engine")
    tokens = engine.get("max_total_tokens")
    geometry = [f"{key} {engine[key]}" for key in ("tp_size", "dp_size", "page_size") if key in engine]
    limits = sorted({device.limit_bytes for device in record.devices if device.limit_bytes is not None})
    kinds = Counter(device.kind for device in record.devices)
    pools = ", ".join(pool.type for pool in record.kv.pools[:4])
    facts: list[tuple[str, list[str]]] = [
        ("Model", [str(model.get("path", "?")), str(profile.get("description") or "")]),
        (
            "Geometry",
            [
                ", ".join(geometry),
                f"{tokens:,} tokens" if isinstance(tokens, int) else "",
                f"weights {exact_bytes(record.params.bytes_on_devices)}",
                f"KV cache {exact_bytes(record.kv.bytes)}, {record.kv.buffers:,} buffers"
                + (f", {pools}" * bool(pools)),
            ],
        ),
        (
            "Devices",
            [
                ", ".join(f"{count:,} × {kind}" for kind, count in kinds.items()) + of_hosts(record),
                f"limit {' or '.join(map(exact_bytes, limits[:3]))} each" if limits else "no limit is known",
            ],
        ),
        (
            "Stack",
            [
                f"sglang-jax {stack.sglang_jax}",
                f"jax {stack.jax}, jaxlib {stack.jaxlib}" + (f", libtpu {stack.libtpu}" if stack.libtpu else ""),
                f"kvcycle {stack.kvcycle}, Python {stack.python}",
            ],
        ),
        ("Witnesses", [_witnesses(record)]),
        ("Run", [record.created, _length(record)]),
    ]
    return tuple((name, tuple(line for line in lines if line)) for name, lines in facts)


def _table(profile: dict[str, object], name: str) -> dict[str, object]:
    found = profile.get(name)
    return found if isinstance(found, dict) else {}


def _witnesses(record: Record) -> str:
    speaks = {canary.witness for canary in record.canaries}
    words = {
        "ledger": "the ledger of every live buffer",
        "allocator": "the device's allocator",
        "rss": "the process's resident memory",
    }
    return ", ".join(text for name, text in words.items() if name in speaks) or "none was seen to see"


def _length(record: Record) -> str:
    if record.soak is not None:
        return f"a soak of {len(record.soak.points):,} of {record.soak.cycles:,} cycles"
    boot = f", boot {seconds(record.boot.seconds)}" if record.boot else ""
    return _count(len(record.cycles), "cycle") + boot


def _early(record: Record) -> str:
    """Where a run broke off: one that was measured, and whose last cycle lacks phases, or that lacks cycles."""
    if record.evidence == "compiled-for-tpu":
        return ""
    wanted = _table(record.profile, "cycle").get("cycles", 0)
    cycles = record.cycles
    missing = [] if not cycles else [name for name in PHASES if cycles[-1].phase(name) is None]
    if record.soak is None and not missing and isinstance(wanted, int) and len(cycles) >= max(wanted, 1):
        return ""
    if record.soak is not None and not missing and len(record.soak.points) >= record.soak.cycles:
        return ""
    last = next(((index, cycle) for index, cycle in reversed(list(enumerate(cycles))) if cycle.phases), None)
    if last is None:
        return "No phase was measured: the run ended before its first."
    index, cycle = last
    after = f", and {len(record.soak.points):,} of {record.soak.cycles:,} cycles of its soak" if record.soak else ""
    return (
        f"The run ended early. The last phase that was measured is {cycle.phases[-1].name} of cycle {index}{after}; "
        "what comes after it is not proven."
    )


__all__ = ["EVIDENCE", "Answer", "Headline", "answers", "headline"]
