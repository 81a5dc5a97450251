"""The checks on going on: no compilation, no stall, the same output, nothing stale."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from kvcycle.checks.controls import compiles_are_counted, output_varies, prefix_hit_is_seen, recompilation_is_seen
from kvcycle.checks.verdicts import at_most, count, left_out, left_out_prefix, on_which_host, scope, unmeasured
from kvcycle.record import Record
from kvcycle.record_parts import Generate, Verdict, When
from kvcycle.text import seconds


def failed_control(*controls: Iterator[Verdict]) -> str | None:
    """The first control that did not pass, as the reason why a pass would prove nothing."""
    for control in controls:
        for verdict in control:
            if verdict.verdict != "pass":
                return f"its control {verdict.id} did not pass"
    return None


def _after_rebuild(record: Record, cycle: int) -> Generate | None:
    found = record.generates_when("after_rebuild", cycle)
    return found[0] if found else None


def no_compile(record: Record) -> Iterator[Verdict]:
    """Neither the rebuild nor the generations after it, on the first and on the second weights, compile anything."""
    check = "generate.no_compile"
    if (verdict := left_out(check, record)) is not None:
        yield verdict
        return
    blind = failed_control(compiles_are_counted(record))
    causes = (
        "a rebuilt buffer differs in layout (see rebuild.same_layout)",
        "jax.clear_caches() was called, or the pool's static attributes changed",
    )
    for index, cycle in enumerate(record.cycles):
        rebuilt = cycle.phase("kv_cache_rebuilt")
        if rebuilt is None:
            yield unmeasured(check, scope(index, part="rebuild"), "there was no rebuild")
        else:
            work = rebuilt.compiles
            yield count(
                check,
                scope(index, part="rebuild"),
                expected=0,
                measured=work.any_work + work.trace,
                unit="compilations",
                what=f"compilations and traces while rebuilding{on_which_host(rebuilt.compiles_by_host, traces=True)}",
                causes=causes,
                blind=blind,
            )
        parts: tuple[tuple[When, str], ...] = (
            ("after_rebuild", "generate"),
            ("with_params2", "params2"),
            ("after_swap_back", "swap_back"),
        )
        for when, part in parts:
            found = record.generates_when(when, index)
            if not found:
                yield unmeasured(check, scope(index, part=part), f"there was no generation {when}")
                continue
            work = found[0].compiles
            yield count(
                check,
                scope(index, part=part),
                expected=0,
                measured=work.any_work,
                unit="compilations",
                what=f"compilations in the generation {when} ({work.lower} lowered, {work.backend} compiled)"
                + on_which_host(found[0].compiles_by_host),
                causes=causes,
                blind=blind,
            )


def thresholds_s(record: Record) -> tuple[float, float] | None:
    """(cold seconds, allowed seconds): the lesser of factor x median warm and fraction x cold; None if unmeasured."""
    cold, warm = record.generates_when("cold"), record.generates_when("warm")
    if not cold or not warm:
        return None
    limits = record.profile.get("thresholds", {})
    by_warm = float(limits.get("latency_factor_of_warm", 3.0)) * statistics.median(g.seconds for g in warm)
    by_cold = float(limits.get("latency_fraction_of_cold", 0.5)) * cold[0].seconds
    return cold[0].seconds, min(by_warm, by_cold)


def below_threshold(record: Record) -> Iterator[Verdict]:
    """The generation after the rebuild is as fast as a warm one, within the profile's factor, and far from cold."""
    check = "generate.below_threshold"
    if (verdict := left_out(check, record)) is not None:
        yield verdict
        return
    limits = thresholds_s(record)
    blind = failed_control(recompilation_is_seen(record))
    for index, _ in enumerate(record.cycles):
        after = _after_rebuild(record, index)
        if after is None or limits is None:
            yield unmeasured(check, scope(index), "cold, warm and after-rebuild times are not all there")
            continue
        cold_s, allowed_s = limits
        yield at_most(
            check,
            scope(index),
            allowed=allowed_s,
            measured=after.seconds,
            unit="seconds",
            text=f"the generation after the rebuild took {seconds(after.seconds)}, allowed {seconds(allowed_s)} (cold "
            f"{seconds(cold_s)})",
            causes=("it compiled (see generate.no_compile)", "the machine was busy with something else"),
            blind=blind,
        )


def same_output(record: Record) -> Iterator[Verdict]:
    """Greedy output after the rebuild, and after the swap back, equals the warm one: ids, and log-probabilities."""
    parts: tuple[tuple[When, str], ...] = (("after_rebuild", "generate"), ("after_swap_back", "swap_back"))
    cause = "the rebuilt cache, or the weights, are not what they were"
    yield from output_as_warm("generate.same_output", record, parts, cause)


def output_as_warm(check: str, record: Record, parts: tuple[tuple[When, str], ...], cause: str) -> Iterator[Verdict]:
    """Whether in every cycle the generations of these kinds equal the warm one; ``parts`` names their scopes."""
    if (verdict := left_out(check, record)) is not None:
        yield verdict
        return
    warm = record.generates_when("warm")
    blind = failed_control(output_varies(record))
    allowed = float(record.profile.get("tolerances", {}).get("logprob", 0.0))
    for index, _ in enumerate(record.cycles):
        for when, part in parts:
            found = record.generates_when(when, index)
            if not warm or not found:
                yield unmeasured(check, scope(index, part=part), "there are no two outputs to compare")
                continue
            before, after = warm[0], found[0]
            different = sum(a != b for a, b in zip(before.token_ids, after.token_ids, strict=False)) + abs(
                len(before.token_ids) - len(after.token_ids)
            )
            yield count(
                check,
                scope(index, part=part),
                expected=0,
                measured=different,
                unit="tokens",
                what=f"token ids (of {len(before.token_ids)}) unlike the warm generation's{_first(before, after)}",
                causes=(cause,),
                blind=blind,
            )
            yield _same_logprobs(check, scope(index, part=f"{part}_logprobs"), before, after, allowed, blind)


def _first(before: Generate, after: Generate) -> str:
    for position, (a, b) in enumerate(zip(before.token_ids, after.token_ids, strict=False)):
        if a != b:
            return f"; first at position {position}: {a} became {b}"
    return ""


def _same_logprobs(
    check: str, place: str, before: Generate, after: Generate, allowed: float, blind: str | None
) -> Verdict:
    if not before.logprobs or len(before.logprobs) != len(after.logprobs):
        return unmeasured(check, place, "there are no log-probabilities to compare")
    worst = max(abs(a - b) for a, b in zip(before.logprobs, after.logprobs, strict=True))
    return at_most(
        check,
        place,
        allowed=allowed,
        measured=worst,
        unit="nats",
        text=f"log-probabilities differ from the warm generation's by at most {worst:g}, allowed {allowed:g}",
        causes=("the arithmetic differs: another executable, another layout, or other contents",),
        blind=blind,
    )


def no_stale_prefix(record: Record) -> Iterator[Verdict]:
    """The generation after the rebuild takes no token from the prefix cache: what it knew was deleted."""
    check = "generate.no_stale_prefix"
    if (verdict := left_out_prefix(check, record)) is not None:
        yield verdict
        return
    blind = failed_control(prefix_hit_is_seen(record))
    for index, _ in enumerate(record.cycles):
        after = _after_rebuild(record, index)
        if after is None:
            yield unmeasured(check, scope(index), "there was no generation after the rebuild")
            continue
        yield count(
            check,
            scope(index),
            expected=0,
            measured=after.cached_tokens,
            unit="tokens",
            what="tokens that the generation after the rebuild took from the prefix cache",
            causes=("the drop did not flush the prefix cache: its keys and values are zeros now",),
            blind=blind,
        )
