"""The checks on a soak: after hundreds of cycles nothing has grown, compiled, or changed its answer.

They are silent on a record without a soak. The soak itself stops by them: :func:`violation` is asked after every cycle.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from kvcycle.checks.controls import blindness, compiles_are_counted, output_varies, speaks
from kvcycle.checks.verdicts import at_most, left_out, on_device, outcome_of, tolerance_bytes, unmeasured
from kvcycle.record import Record
from kvcycle.record_parts import Owner, Soak, Verdict, Witness
from kvcycle.text import exact_bytes, signed_bytes

#: Idle points in a row that must all lie above the highest of as many before the first drop, to be called growth. The
#: engine keeps its last batch, four bytes of which come and go on CPU devices unless ``kvcycle.boot()`` booted it (see
#: ``internals.own_batch_arrays``); a leak of one byte stays, and is in all of them.
WINDOW = 5

#: The fewest points that a median of resident memory is taken of.
_MEDIAN_OF_AT_LEAST = 3

#: The shortest soak that every check can say something about.
MIN_CYCLES = 3 * _MEDIAN_OF_AT_LEAST


def no_growth(record: Record) -> Iterator[Verdict]:
    """On every device nothing stays: weights and KV cache are exact after every cycle, and no residue grows by a byte.

    Growth is :data:`WINDOW` idle points in a row above the highest of those before the first drop, by each witness.
    """
    check, soak = "soak.no_growth", record.soak
    if soak is None:
        return
    if not record.devices:
        yield unmeasured(check, "run", "the record has no device")
    for device in record.devices:
        blind = blindness(record, "ledger", device.id)
        yield _owned(check, record, soak, device.id, "weights", record.params.bytes_by_device, blind)
        yield _owned(check, record, soak, device.id, "kv", record.kv.bytes_by_device, blind)
        for witness in growth_witnesses(record, device.id):
            yield _growth(check, record, soak, device.id, witness)
    if len(soak.points) < soak.cycles:
        yield unmeasured(check, "run", f"the soak ended after {len(soak.points):,} of {soak.cycles:,} cycles")


def growth_witnesses(record: Record, device_id: int) -> list[Witness]:
    """The witnesses of a device that speak in this run."""
    witnesses: tuple[Witness, ...] = ("ledger", "allocator")
    return [witness for witness in witnesses if speaks(record, witness, device_id)]


def in_use(soak: Soak, device_id: int, witness: Witness, *, before: bool = False) -> list[int | None]:
    """Bytes in use on a device at the idle point after each cycle (or at those before the first drop)."""
    points = soak.before if before else soak.points
    if witness == "ledger":
        return [point.ledger_bytes(device_id) for point in points]
    return [point.allocator_bytes.get(device_id) for point in points]


def _owned(
    check: str, record: Record, soak: Soak, device_id: int, owner: Owner, wanted: dict[int, int], blind: str | None
) -> Verdict:
    place = on_device(record, device_id, part=owner)
    expected = wanted.get(device_id)
    held = [point.by_owner.get(owner, {}).get(device_id) for point in soak.points]
    if expected is None or not held:
        return unmeasured(check, place, f"no {owner} were measured on this device")
    for cycle, size in enumerate(held, start=1):
        if size is None:
            return unmeasured(check, place, f"this device was not sampled after {_cycle(soak, cycle)}")
        if size != expected:
            return Verdict(
                id=check,
                scope=place.scope,
                host=place.host,
                witness="ledger",
                verdict="fail",
                expected=expected,
                measured=size,
                unit="bytes",
                message=f"{_cycle(soak, cycle)}, {place}: {exact_bytes(size)} of {owner} at the idle point, expected "
                f"{exact_bytes(expected)}; off by {signed_bytes(size - expected)}.",
                causes=(f"an array of the {owner} was deleted, replaced by another, or is no longer the engine's",),
            )
    return at_most(
        check,
        place,
        allowed=expected,
        measured=expected,
        unit="bytes",
        text=f"{exact_bytes(expected)} of {owner} after every one of {len(held):,} cycles",
        causes=(),
        blind=blind,
    ).model_copy(update={"witness": "ledger"})


def _growth(check: str, record: Record, soak: Soak, device_id: int, witness: Witness) -> Verdict:
    place = on_device(record, device_id)
    before = in_use(soak, device_id, witness, before=True)
    after = in_use(soak, device_id, witness)
    known_before = [size for size in before if size is not None]
    known_after = [size for size in after if size is not None]
    if len(known_before) < len(before) or len(known_after) < len(after):
        return unmeasured(check, place, "this device was not sampled at every idle point", witness)
    if min(len(before), len(after)) < WINDOW:
        return unmeasured(
            check, place, f"growth needs {WINDOW} idle points before the first drop and after it, there are "
            f"{len(before)} and {len(after)}", witness,
        )  # fmt: skip
    ceiling = max(known_before)
    tolerance = tolerance_bytes(record, witness, 0)
    # Only what every point of a window shows has stayed: the lowest of them.
    lowest = [min(known_after[end - WINDOW : end]) for end in range(WINDOW, len(known_after) + 1)]
    grown = next((index for index, size in enumerate(lowest) if size - ceiling > tolerance), None)
    window = len(lowest) - 1 if grown is None else grown
    last, growth = window + WINDOW, lowest[window] - ceiling
    text = (
        f"{_cycle(soak, last)}, {place}, {witness}: {exact_bytes(lowest[window])} in use at the lowest of the last "
        f"{WINDOW} idle points, expected at most {exact_bytes(ceiling)}, the highest of {len(before)} before the first "
        "drop"
    )
    if grown is not None:
        text += f"; grown by {signed_bytes(growth)}, allowed {exact_bytes(tolerance)}"
    outcome, text = outcome_of(grown is None, text, blindness(record, witness, device_id))
    return Verdict(
        id=check,
        scope=place.scope,
        host=place.host,
        witness=witness,
        verdict=outcome,
        expected=ceiling,
        measured=lowest[window],
        unit="bytes",
        message=text + ".",
        causes=("something of every cycle stays alive: the second set, a copy, a cached result",)
        if grown is not None
        else (),
    )


def no_compile(record: Record) -> Iterator[Verdict]:
    """No cycle traces, lowers or compiles anything, the soak's own machinery included."""
    check, soak = "soak.no_compile", record.soak
    if soak is None:
        return
    work = [point.compiles.any_work + point.compiles.trace for point in soak.points]
    # Without generation nothing was seen to compile, so that a zero proves nothing; a compilation is one all the same.
    if not any(work) and (verdict := left_out(check, record)) is not None:
        yield verdict
        return
    yield from _first_off(
        check,
        record,
        soak,
        compiles_are_counted,
        work,
        unit="compilations",
        what="compilations and traces",
        causes=("a rebuilt buffer differs in layout", "jax.clear_caches() was called, or a new jit made every cycle"),
    )


def same_output(record: Record) -> Iterator[Verdict]:
    """Every cycle's generation begins as the warm one did: token ids, and log-probabilities within the tolerance."""
    check, soak = "soak.same_output", record.soak
    if soak is None:
        return
    if (verdict := left_out(check, record)) is not None:
        yield verdict
        return
    causes = ("the rebuilt cache, or the weights, are not what they were",)
    tokens = [point.different_tokens for point in soak.points]
    yield from _first_off(
        check,
        record,
        soak,
        output_varies,
        tokens,
        unit="tokens",
        what=f"token ids (of {soak.new_tokens}) unlike the warm generation's",
        causes=causes,
    )
    off = [point.logprobs_off for point in soak.points if point.logprobs_off is not None]
    if not off or len(off) < len(soak.points):
        yield unmeasured(check, "logprobs", "there are no log-probabilities to compare")
        return
    allowed = float(record.profile.get("tolerances", {}).get("logprob", 0.0))
    cycle, worst = max(enumerate(off, start=1), key=lambda entry: entry[1])
    yield at_most(
        check,
        "logprobs",
        allowed=allowed,
        measured=worst,
        unit="nats",
        text=f"log-probabilities differ from the warm generation's by at most {worst:g} ({_cycle(soak, cycle)}), "
        f"allowed {allowed:g}",
        causes=causes,
        blind=_blind(record, output_varies),
    )


def rss_is_bounded(record: Record) -> Iterator[Verdict]:
    """The process's resident memory ends within ``tolerances.rss_fraction`` of where it began.

    The median of the last tenth of the cycles is held against that of the second tenth; the first tenth is warm-up.
    Resident memory moves by some MiB from one sample to the next, so this finds a leak of host memory, not of bytes.
    """
    check, soak = "soak.rss_is_bounded", record.soak
    if soak is None or not (speaks(record, "rss", None) or any(p.rss_bytes is not None for p in soak.points)):
        return
    sizes = [point.rss_bytes for point in soak.points if point.rss_bytes is not None]
    if len(sizes) < len(soak.points):
        yield unmeasured(check, "run", "resident memory was not sampled after every cycle", "rss")
        return
    ends = rss_medians(sizes)
    if ends is None:
        yield unmeasured(check, "run", f"the medians need {MIN_CYCLES} cycles, there are {len(sizes)}", "rss")
        return
    first, last = ends
    allowed = tolerance_bytes(record, "rss", first)
    yield at_most(
        check,
        "run",
        allowed=allowed,
        measured=last - first,
        unit="bytes",
        text=f"{_cycle(soak, len(sizes))}: resident memory went from {exact_bytes(first)} to {exact_bytes(last)} "
        f"(medians of the second and of the last tenth of the cycles), by {signed_bytes(last - first)}, allowed "
        f"{exact_bytes(allowed)}",
        causes=("host memory leaks: a list or log that grows with every cycle", "the machine's C library is not glibc"),
        blind=blindness(record, "rss", None),
    ).model_copy(update={"witness": "rss"})


def rss_medians(sizes: Sequence[int]) -> tuple[int, int] | None:
    """The median resident memory of the second tenth of the cycles, and of the last; None if there are too few."""
    window = max(_MEDIAN_OF_AT_LEAST, len(sizes) // 10)
    if len(sizes) < 3 * window:
        return None
    return int(statistics.median(sizes[window : 2 * window])), int(statistics.median(sizes[-window:]))


#: The soak's checks by id. :data:`kvcycle.checks.CHECKS` has them as well.
SOAK_CHECKS: dict[str, Callable[[Record], Iterator[Verdict]]] = {
    "soak.no_growth": no_growth,
    "soak.no_compile": no_compile,
    "soak.same_output": same_output,
    "soak.rss_is_bounded": rss_is_bounded,
}


def violation(record: Record) -> Verdict | None:
    """The first verdict on the soak so far that is a failure; None while all is well, or too early to say."""
    return next((v for check in SOAK_CHECKS.values() for v in check(record) if v.verdict == "fail"), None)


def _first_off(
    check: str,
    record: Record,
    soak: Soak,
    control: Callable[[Record], Iterator[Verdict]],
    counts: Sequence[int | None],
    *,
    unit: str,
    what: str,
    causes: tuple[str, ...],
) -> Iterator[Verdict]:
    """The verdict on a number that must be 0 in every cycle: on the first cycle in which it was not."""
    place = "run"
    known = [count for count in counts if count is not None]
    if not known or len(known) < len(counts):
        yield unmeasured(check, place, f"there is no count of {what} after every cycle")
        return
    cycle = next((number for number, count in enumerate(known, start=1) if count), None)
    if cycle is None:
        yield at_most(
            check,
            place,
            allowed=0,
            measured=0,
            unit=unit,
            text=f"0 {what} in {len(known):,} cycles",
            causes=(),
            blind=_blind(record, control),
        )
        return
    yield Verdict(
        id=check,
        scope=place,
        verdict="fail",
        expected=0,
        measured=known[cycle - 1],
        unit=unit,
        message=f"{_cycle(soak, cycle)}: {known[cycle - 1]:,} {what}, expected 0.",
        causes=causes,
    )


def _blind(record: Record, control: Callable[[Record], Iterator[Verdict]]) -> str | None:
    failed = [verdict.id for verdict in control(record) if verdict.verdict not in ("pass", "not-run")]
    return f"its control {failed[0]} did not pass" if failed else None


def _cycle(soak: Soak, number: int) -> str:
    return f"soak cycle {number:,} of {soak.cycles:,}"
