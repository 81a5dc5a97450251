"""Many scopes in few words: ``cycles 0–1, devices 0–3`` for eight of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

#: More would be read by nobody; the record has them all.
_MOST_PIECES = 6

#: No device's host is named.
_ONE_HOST: Mapping[int, int] = {}

_SCOPE = re.compile(r"(?:cycle(\d{1,9}))?-?(?:device(\d{1,9}))?-?(.*)", re.DOTALL)


def parts(scope: str) -> tuple[int | None, int | None, str]:
    """(cycle, device, the rest) of a scope such as ``cycle0-device2`` or ``cycle1-swap_back``."""
    cycle, device, rest = _SCOPE.fullmatch(scope).groups()  # type: ignore[union-attr]  # the last group takes any text
    return (None if cycle is None else int(cycle)), (None if device is None else int(device)), rest


def ranges(numbers: Iterable[int], most: int = 12) -> str:
    """``0–3, 5, 7``; of more than ``most`` runs of numbers only the first, and how many numbers follow."""
    found = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in found:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = runs[:most]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in shown)
    left = len(found) - sum(map(len, shown))
    return f"{text} and {left:,} more" if left else text


def named(word: str, numbers: Iterable[int], hosts: Mapping[int, int] = _ONE_HOST) -> str:
    """``device 2``, ``devices 0–3``; with their hosts ``device 2049 (host 1)``, ``devices 0–7 (hosts 0–1)``.

    Args:
        word: what is numbered.
        numbers: the numbers.
        hosts: each device's host, {} where there is one.
    """
    found = sorted(set(numbers))
    text = f"{word}{'s' if len(found) > 1 else ''} {ranges(found)}"
    on = {hosts[number] for number in found if number in hosts}
    return f"{text} ({named('host', on)})" if on else text


def cells(found: Iterable[tuple[int | None, int | None]], hosts: Mapping[int, int] = _ONE_HOST) -> list[str]:
    """Cycles and devices in words; the cycles in which the same devices are meant stand together."""
    devices_of: dict[int | None, set[int | None]] = {}
    for cycle, device in found:
        devices_of.setdefault(cycle, set()).add(device)
    cycles_of: dict[frozenset[int | None], list[int | None]] = {}
    for cycle, devices in devices_of.items():
        cycles_of.setdefault(frozenset(devices), []).append(cycle)
    pieces = []
    for same, cycles in cycles_of.items():
        of_cycle = [cycle for cycle in cycles if cycle is not None]
        on_device = [device for device in same if device is not None]
        words = [named("cycle", of_cycle)] if of_cycle else []
        words += [named("device", on_device, hosts)] if on_device else []
        pieces.append(", ".join(words))
    return pieces


def describe(scopes: Iterable[str], hosts: Mapping[int, int] = _ONE_HOST) -> str:
    """Scopes in words: ``cycles 0–1, devices 0–3``; ``cycle 0, swap back``; ``run``; with hosts as :func:`named`."""
    by_part: dict[str, list[tuple[int | None, int | None]]] = {}
    for scope in scopes:
        cycle, device, part = parts(scope)
        by_part.setdefault(part, []).append((cycle, device))
    pieces = []
    for part, found in by_part.items():
        pieces += [", ".join(word for word in (piece, part.replace("_", " ")) if word) for piece in cells(found, hosts)]
    text = "; ".join(pieces[:_MOST_PIECES])
    return text if len(pieces) <= _MOST_PIECES else f"{text}; and {len(pieces) - _MOST_PIECES:,} more places"
