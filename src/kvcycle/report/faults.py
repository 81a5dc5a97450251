"""The campaign of faults as a matrix, fault by check, for a terminal; and as JSON for whoever draws it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from kvcycle.checks import CHECKS
from kvcycle.faults.campaign import Result, uncovered

_LEGEND = "F fails, I is inconclusive, as it should; f i a consequence; . passes; ! a false alarm; M missed"
_STYLE = {"F": "bold green", "I": "bold green", "f": "dim", "i": "dim", "!": "bold red", "M": "bold red", ".": "dim"}


def show_matrix(results: Sequence[Result], console: Console) -> None:
    """Print a row for every fault and a column for every check, then what was not caught, and the count."""
    numbers = [f"{number:2}" for number in range(1, len(CHECKS) + 1)]
    width = max((len(result.fault.id) for result in results), default=0)
    for digit in (0, 1):
        console.print(" " * (width + 2) + " ".join(number[digit] for number in numbers), style="bold", soft_wrap=True)
    for result in results:
        row = Text(result.fault.id.ljust(width + 2), style="" if result.caught else "bold red")
        for check in CHECKS:
            sign = mark(result, check)
            row.append(sign, style=_STYLE.get(sign, "")).append(" ")
        row.append(f"{result.seconds:6.1f} s", style="dim")
        console.print(row, soft_wrap=True)
    console.print(_LEGEND, style="dim", soft_wrap=True)
    names = [f"{number} {check}" for number, check in zip(numbers, CHECKS, strict=True)]
    half = -(-len(names) // 2)
    for left, right in zip(names[:half], [*names[half:], ""], strict=False):
        console.print(f"  {left:44}{right}", soft_wrap=True)
    for result in results:
        if not result.caught:
            console.print(Text(f"NOT CAUGHT {result.fault.id} ({result.fault.what}): {why_not(result)}", "bold red"))


def why_not(result: Result) -> str:
    """What is wrong with a fault that was not caught, in a sentence."""
    parts = []
    if result.missed:
        parts.append(f"{', '.join(result.missed)} did not turn red")
    if result.false_alarms:
        parts.append(f"{', '.join(result.false_alarms)} turned red and should not have: {result.alarm}")
    if not result.named:
        parts.append(f"no message says {result.fault.says!r}; the first says: {result.message or 'nothing'}")
    return "; ".join(parts).removesuffix(".") + "."


def summary(results: Sequence[Result], *, whole: bool = True) -> tuple[str, bool]:
    """One line, and whether all is well: every fault caught and, of a whole catalogue, every check covered."""
    caught = sum(result.caught for result in results)
    idle = uncovered(results) if whole else []
    line = f"{caught} of {len(results)} faults caught"
    if whole:
        line += f", {len(CHECKS) - len(idle)} of {len(CHECKS)} checks turned red by one"
    if idle:
        line += f"; nothing shows that these can fail: {', '.join(idle)}"
    return line, caught == len(results) > 0 and not idle


def save(results: Sequence[Result], path: Path) -> None:
    """Write the results as JSON."""
    path.write_text(
        json.dumps(
            [
                {
                    "id": result.fault.id,
                    "what": result.fault.what,
                    "run": result.fault.run,
                    "red": sorted(result.fault.red),
                    "outcomes": result.outcomes,
                    "caught": result.caught,
                    "missed": result.missed,
                    "false_alarms": result.false_alarms,
                    "message": result.message,
                    "seconds": round(result.seconds, 3),
                }
                for result in results
            ],
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )


def mark(result: Result, check: str) -> str:
    """One character for what a check made of a fault; the legend says which."""
    outcome = result.outcomes.get(check)
    if check in result.missed:
        return "M"
    if check in result.false_alarms:
        return "!"
    if outcome in ("fail", "inconclusive"):
        letter = "F" if outcome == "fail" else "I"
        return letter if check in result.fault.red else letter.lower()
    return "." if outcome == "pass" else " "
