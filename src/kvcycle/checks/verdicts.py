"""How a check speaks: verdicts that say phase, place, witness, expected, measured and difference in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from kvcycle.record import Record
from kvcycle.record_parts import Compiles, DeviceUse, Outcome, Phase, Verdict, Witness
from kvcycle.text import exact_bytes, signed_bytes

DEVICE_WITNESSES: tuple[Witness, ...] = ("ledger", "allocator")


def scope(cycle: int | None = None, device: int | None = None, part: str | None = None, host: int | None = None) -> str:
    """``cycle0-device2``, ``device2``, ``cycle0-host1``, ``run``: as test ids write it."""
    numbered = {"cycle": cycle, "host": host, "device": device}
    parts = [*(f"{name}{number}" for name, number in numbered.items() if number is not None), part or ""]
    return "-".join(part for part in parts if part) or "run"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a verdict holds; in its sentence the device's host is named, where the record has more than one."""

    scope: str
    host: int | None = None

    def __str__(self) -> str:
        return self.scope if self.host is None else f"{self.scope} (host {self.host})"


def on_device(record: Record, device: int, cycle: int | None = None, part: str | None = None) -> Place:
    """The place of a device, with its host."""
    return Place(scope(cycle, device, part), record.host_of.get(device))


def use_of(use: DeviceUse | None, witness: Witness) -> int | None:
    """What one witness says of a device's use, None where it does not speak."""
    if use is None:
        return None
    return use.ledger_bytes if witness == "ledger" else use.allocator_bytes


def tolerance_bytes(record: Record, witness: Witness, expected: int) -> int:
    """Bytes a witness may be off: none for the ledger, the profile's for the allocator, a fraction for RSS."""
    tolerances = record.profile.get("tolerances", {})
    if witness == "rss":
        return round(abs(expected) * float(tolerances.get("rss_fraction", 0.02)))
    return int(tolerances.get("allocator_bytes", 0)) if witness == "allocator" else 0


def outcome_of(ok: bool, text: str, blind: str | None) -> tuple[Outcome, str]:
    """The outcome, and the sentence so far: a pass whose control failed (``blind``) is inconclusive, and says why."""
    if ok and blind:
        return "inconclusive", f"{text}; but {blind}, so this proves nothing"
    return ("pass" if ok else "fail"), text


class Figures(TypedDict, total=False):
    """The fields of a verdict that say who measured what."""

    witness: Witness | None
    expected: float | None
    measured: float | None
    unit: str


def verdict_at(
    check: str,
    place: Place | str,
    outcome: Outcome,
    message: str,
    *,
    causes: Sequence[str] = (),
    **figures: Unpack[Figures],
) -> Verdict:
    """A verdict at a place, or on a scope that has no host to be named; the causes are left out of a pass.

    Args:
        check: the check's id.
        place: where it holds.
        outcome: the verdict.
        message: its sentence, whole.
        causes: what usually is behind any other outcome.
        figures: what was measured, where something was.
    """
    at = Place(place) if isinstance(place, str) else place
    told = tuple(causes) if outcome != "pass" else ()
    return Verdict(id=check, scope=at.scope, host=at.host, verdict=outcome, message=message, causes=told, **figures)


def change(
    check: str,
    place: Place | str,
    witness: Witness,
    before: Phase,
    after: Phase,
    expected: int,
    values: tuple[int, int],
    tolerance: int,
    causes: Sequence[str],
    blind: str | None = None,
) -> Verdict:
    """The verdict on a change in bytes between two phases.

    Args:
        check: the check's id.
        place: the verdict's scope.
        witness: who measured.
        before: the phase whose end the change is counted from.
        after: the phase whose end it is counted to.
        expected: the change that should be seen.
        values: bytes in use at the end of ``before`` and of ``after``.
        tolerance: how many bytes it may be off.
        causes: what usually is behind a failure.
        blind: why a pass would prove nothing (the witness's control failed); None if it saw its control.
    """
    measured = values[1] - values[0]
    off = measured - expected
    ok = abs(off) <= tolerance
    text = (
        f"{after.name}, {place}, {witness}: bytes in use changed by {signed_bytes(measured)} since {before.name}, "
        f"expected {signed_bytes(expected)}"
    )
    if not ok:
        text += f"; off by {signed_bytes(off)}, allowed {exact_bytes(tolerance)}"
    outcome, text = outcome_of(ok, text, blind)
    return verdict_at(
        check,
        place,
        outcome,
        f"{text}.",
        causes=causes,
        witness=witness,
        expected=expected,
        measured=measured,
        unit="bytes",
    )


def count(
    check: str,
    place: Place | str,
    *,
    expected: int,
    measured: int,
    unit: str,
    what: str,
    causes: Sequence[str] = (),
    blind: str | None = None,
) -> Verdict:
    """The verdict on a number that must be met exactly; ``what`` is the beginning of the sentence."""
    ok = measured == expected
    show = exact_bytes if unit == "bytes" else "{:,}".format
    text = f"{place}: {what}: {show(measured)}, expected {show(expected)}"
    if not ok and unit == "bytes":
        text += f"; off by {signed_bytes(measured - expected)}"
    outcome, text = outcome_of(ok, text, blind)
    return verdict_at(check, place, outcome, f"{text}.", causes=causes, expected=expected, measured=measured, unit=unit)


def at_most(
    check: str,
    place: Place | str,
    *,
    allowed: float,
    measured: float,
    unit: str,
    text: str,
    causes: Sequence[str],
    blind: str | None,
) -> Verdict:
    """The verdict on a figure that may not exceed another; ``text`` is the sentence without its place and full stop."""
    outcome, text = outcome_of(measured <= allowed, text, blind)
    return verdict_at(
        check, place, outcome, f"{place}: {text}.", causes=causes, expected=allowed, measured=measured, unit=unit
    )


def on_which_host(by_host: Sequence[Compiles], *, traces: bool = False) -> str:
    """Where the compiler worked, as the end of a sentence's subject: ", 3 on host 1". "" on one host, or nowhere."""
    work = [compiles.any_work + (compiles.trace if traces else 0) for compiles in by_host]
    return "".join(f", {number:,} on host {rank}" for rank, number in enumerate(work) if number and len(work) > 1)


def unmeasured(check: str, place: Place | str, why: str, witness: Witness | None = None) -> Verdict:
    """The verdict where the record lacks what the check needs."""
    return verdict_at(check, place, "inconclusive", f"{place}: {why}.", witness=witness)


def left_out(check: str, record: Record) -> Verdict | None:
    """The verdict ``not-run`` where the profile leaves generation out (a width this machine cannot run), else None."""
    if record.profile.get("cycle", {}).get("generate", True):
        return None
    return Verdict(
        id=check,
        scope="run",
        verdict="not-run",
        message="Not run: the profile leaves generation out (cycle.generate = false). This is not a pass.",
    )


def left_out_prefix(check: str, record: Record) -> Verdict | None:
    """As :func:`left_out`, and where the engine keeps no prefix cache, which then can be neither hit nor stale."""
    if (verdict := left_out(check, record)) is not None or not record.profile.get("engine", {}).get(
        "disable_radix_cache"
    ):
        return verdict
    return Verdict(
        id=check,
        scope="run",
        verdict="not-run",
        message="Not run: the engine keeps no prefix cache (engine.disable_radix_cache = true). This is not a pass.",
    )
