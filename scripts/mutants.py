"""Test the tests: mutants.py changes checks, ledger and record in small ways and counts what nobody notices.

mutmut does the work in mutants/, on copies, from nothing each time: what it remembers of an earlier run does not know
that a test has changed. The checks' mutants are first held against tests/unit/verdicts.txt in one process, since they
are pure functions: that notices most of them in a tenth of a second each, where a process and a pytest take seconds.
Settings are in pyproject.toml; docs/mutants.md says what the figures mean.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPLAINED = ROOT / "docs" / "mutants.md"
LEAST_PERCENT = 95.0
#: All others are survivors: also what no test reaches, and what crashed the interpreter.
NOTICED = ("killed", "caught by type check", "timeout")


def mutmut(*arguments: str) -> str:
    """What a command of mutmut prints."""
    return subprocess.run(["mutmut", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def statuses(listing: str) -> dict[str, str]:
    """The status of every mutant by name, from ``mutmut results --all true``."""
    return dict(re.findall(r"^\s+(\S+): (.+)$", listing, re.MULTILINE))


def change(diff: str) -> str:
    """The lines that a mutant takes and those that it puts in their place, from its diff: ``old → new``."""
    removed, added = (re.findall(rf"^[{sign}](?![{sign}]{{2}} )(.*)$", diff, re.MULTILINE) for sign in "-+")
    return " → ".join(" ".join(line.strip() for line in lines) for lines in (removed, added))


def function(name: str) -> str:
    """``checks.verdicts.change``, or ``record.Record.save``, from a mutant's name."""
    module, _, mangled = name.rpartition(".")
    plain = re.sub(r"^x_|__mutmut_\d+$", "", mangled).removeprefix("xǁ").replace("ǁ", ".")
    return f"{module.removeprefix('kvcycle.')}.{plain}"


def score(found: dict[str, str]) -> float:
    """The percentage of the mutants that was noticed."""
    return 100 * sum(status in NOTICED for status in found.values()) / len(found)


def test(*names: str) -> None:
    """Let mutmut run the tests on the mutants of these names or patterns."""
    # Its progress is a line that it draws anew, which fills a log with copies.
    output = None if sys.stdout.isatty() else subprocess.DEVNULL
    workers = len(os.sched_getaffinity(0))
    subprocess.run(["mutmut", "run", f"--max-children={workers}", *names], cwd=ROOT, check=True, stdout=output)


def screened(names: list[str]) -> set[str]:
    """Of the checks' mutants, those that change a verdict's text in tests/unit/verdicts.txt."""
    copies = ROOT / "mutants"
    done = subprocess.run(
        [sys.executable, __file__, "--screen"], cwd=copies, check=True, text=True, input="\n".join(names),
        stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": f"{copies / 'src'}:{copies}", "MUTANT_UNDER_TEST": ""},
    )  # fmt: skip
    return set(done.stdout.split())


def screen(names: list[str]) -> None:
    """In a process of its own, in which the mutated copies are imported: print the names of the noticed ones."""
    from tests.unit.test_verdict_texts import blocks, records

    def too_long(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    all_records = list(records())
    expected = list(blocks(all_records))
    for name in names:
        os.environ["MUTANT_UNDER_TEST"] = name  # what every mutated function asks for at each call
        signal.alarm(60)
        try:
            noticed = any(block != good for block, good in zip(blocks(all_records), expected, strict=True))
        except Exception:  # noqa: BLE001 - whatever a mutant raises, a test would see it
            noticed = True
        signal.alarm(0)
        if noticed:
            print(name, flush=True)


def main() -> None:
    shutil.rmtree(ROOT / "mutants", ignore_errors=True)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    say = partial(print, flush=True)
    say("Making the mutants, and asking mypy which of them it refuses: a minute or two ...")
    test("kvcycle.record_file.*")
    found = statuses(mutmut("results", "--all", "true"))
    checks = [name for name, status in found.items() if status == "not checked" and ".checks." in name]
    say(f"Holding the {len(checks):,} that are left of the checks' against tests/unit/verdicts.txt ...")
    by_text = screened(checks)
    rest = [name for name, status in found.items() if status == "not checked" and name not in by_text]
    say(f"Running the tests on the other {len(rest):,}: some minutes ...")
    test(*rest)
    found = statuses(mutmut("results", "--all", "true")) | dict.fromkeys(by_text, "killed")
    if not found or "not checked" in found.values():
        sys.exit("mutmut stopped before every mutant was tried, so there is no score.")
    explained = EXPLAINED.read_text(encoding="utf-8")
    print()
    for name, status in sorted(found.items()):
        if status not in NOTICED:
            text = change(mutmut("show", name))
            word = "explained" if text in explained else "NOT EXPLAINED"
            print(f"{status}, {word}: {function(name)} ({name})\n    {text}")
    counts = ", ".join(f"{count:,} {status}" for status, count in Counter(found.values()).most_common())
    print(f"\n{score(found):.1f} % of {len(found):,} mutants were noticed ({counts}).")
    if score(found) < LEAST_PERCENT:
        sys.exit(
            f"At least {LEAST_PERCENT:g} % must be: test what survived, or say in docs/mutants.md why nothing can."
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["--screen"]:
        screen(sys.stdin.read().split())
    else:
        main()
