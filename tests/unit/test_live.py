"""What a person sees while the suite runs: on a terminal, in a log, quiet and verbose."""

from __future__ import annotations

import os
import pty
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures import live as lives
from fixtures.live import LOG_EVERY_S, Live
from kvcycle.deadline import Wait, deadline, waiting
from kvcycle.errors import StepTimeoutError
from tests.unit.records import good_record
from tests.unit.suites import RunSuite, suite_on

pytest_plugins = ["pytester"]

WAIT = Wait("cycle 0: generate cold", 31.4, 900.0)
LINE = "cycle 0: kv_cache_dropped: 21.12 MiB (22,150,640 B) in use, -134,225,920 B, 0.02 s"
DETAIL = "  device 0: weights 5,526,528 B, other 104 B"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log(tmp_path: Path) -> Iterator[int]:
    """The descriptor of a file, as when the output is redirected."""
    descriptor = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """(what a terminal shows, what is written to): 80 columns."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    shown, written = pty.openpty()
    yield shown, written
    os.close(shown)
    os.close(written)


def content(descriptor: int) -> str:
    return os.pread(descriptor, 100_000, 0).decode()


def read_until(shown: int, end: str, times: int = 1) -> str:
    """What the terminal is given until it ends so, and has had so many of them: it may come in pieces."""
    text = ""
    while not text.endswith(end) or text.count(end) < times:
        text += os.read(shown, 10_000).decode()
    return text


def on_screen(text: str) -> list[str]:
    """The lines as a terminal shows them: what follows a carriage return is written over what was there."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


# In a log ------------------------------------------------------------------------------------------------------------


def test_a_line_has_the_time_since_the_beginning() -> None:
    lines: list[str] = []
    clock = Clock()
    live = Live(lines.append, None, clock)
    clock.now += 12.34
    live.tell(LINE)
    assert lines == [f"kvcycle    12.3 s  {LINE}"]


def test_a_log_says_what_is_waited_for_after_half_a_minute_of_silence_and_not_before(log: int) -> None:
    clock = Clock()
    live = Live(lambda _: None, log, clock)
    live.tell(LINE)
    clock.now += LOG_EVERY_S - 1
    live.say_what_is_waited_for(WAIT)
    assert content(log) == ""
    clock.now += 1
    live.say_what_is_waited_for(WAIT)
    live.say_what_is_waited_for(WAIT)
    assert content(log) == "kvcycle    30.0 s  waiting (31 of 900 s): cycle 0: generate cold\n"
    clock.now += LOG_EVERY_S
    live.tell(LINE)
    live.say_what_is_waited_for(WAIT)
    assert content(log).count("waiting") == 1


def test_a_log_has_no_carriage_return_and_no_escape(log: int) -> None:
    clock = Clock()
    live = Live(lambda _: None, log, clock)
    clock.now += LOG_EVERY_S
    live.say_what_is_waited_for(WAIT)
    assert content(log).isprintable() is False  # its line break
    assert content(log).rstrip("\n").isprintable()


def test_where_nothing_is_waited_for_nothing_is_said(log: int) -> None:
    clock = Clock()
    live = Live(lambda _: None, log, clock)
    clock.now += 10 * LOG_EVERY_S
    live.say_what_is_waited_for(None)
    assert content(log) == ""


# On a terminal -------------------------------------------------------------------------------------------------------


def test_a_terminal_has_one_word_that_is_written_over(terminal: tuple[int, int]) -> None:
    shown, written = terminal
    live = Live(lambda line: (os.write(written, f"{line}\n".encode()), None)[1], written, Clock())
    live.say_what_is_waited_for(WAIT)
    live.say_what_is_waited_for(Wait("the engine's boot", 2.0, 900.0))
    live.tell("booted")
    live.say_what_is_waited_for(WAIT)
    text = read_until(shown, "generate cold", 2)
    assert on_screen(text) == [
        "kvcycle     0.0 s  booted",
        "kvcycle     0.0 s  waiting (31 of 900 s): cycle 0: generate cold",
    ]
    assert "\x1b" not in text


def test_a_word_that_would_wrap_is_cut(terminal: tuple[int, int]) -> None:
    shown, written = terminal
    live = Live(lambda _: None, written, Clock())
    live.say_what_is_waited_for(Wait("x" * 200, 1.0, 900.0))
    (line,) = on_screen(read_until(shown, "x", 20))
    assert len(line) <= 79


def test_a_dumb_terminal_is_a_log(terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    _, written = terminal
    clock = Clock()
    live = Live(lambda _: None, written, clock)
    clock.now += LOG_EVERY_S
    live.say_what_is_waited_for(WAIT)
    assert "\r" not in read_until(terminal[0], "generate cold\r\n").removesuffix("\r\n")


def test_while_it_watches_it_says_what_the_main_thread_is_at(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, written = terminal
    monkeypatch.setattr(lives, "TERMINAL_EVERY_S", 0.01)
    monkeypatch.setattr(lives, "waiting", lambda: (wait := waiting()) and replace(wait, seconds=0.4))
    live = Live(lambda _: None, written, Clock())
    with live.watching(), deadline(60, lambda: StepTimeoutError("late"), "cycle 1: kv_cache_rebuilt"):
        text = read_until(shown, "kv_cache_rebuilt")  # blocks until there is a word
    assert "waiting (0 of 60 s): cycle 1: kv_cache_rebuilt" in text
    assert on_screen(text + read_until(shown, " \r"))[-1] == ""  # and cleared when it is over
    assert not [thread for thread in threading.enumerate() if thread.name == "kvcycle-live"]


# What is waited for --------------------------------------------------------------------------------------------------


def test_what_is_waited_for_is_the_innermost_deadline() -> None:
    def late() -> StepTimeoutError:
        return StepTimeoutError("late")

    assert waiting() is None
    with deadline(60, late, "outer"):
        with deadline(30, late, "inner"):
            wait = waiting()
            assert wait is not None
            assert (wait.what, wait.limit_s) == ("inner", 30)
            assert 0 <= wait.seconds < 30
        outer = waiting()
        assert outer is not None
        assert outer.what == "outer"
        assert outer.seconds >= wait.seconds
    assert waiting() is None


# Quiet and verbose ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(
    pytester: pytest.Pytester, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, config_cache: Path
) -> RunSuite:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return suite_on(pytester, pytestconfig.rootpath / "tests" / "tpu")


@pytest.mark.parametrize(
    ("flags", "lines", "details"), [((), True, False), (("-v",), True, True), (("-q",), False, False)]
)
def test_quiet_and_verbose_mean_what_they_mean_in_pytest(
    flags: tuple[str, ...], lines: bool, details: bool, run: RunSuite
) -> None:
    done = run(good_record(cycles=1), *flags, lines=[LINE], detailed=[DETAIL])
    assert done.ret == 0
    told = [line.partition(" s  ")[2] for line in done.outlines if line.startswith("kvcycle ") and " s  " in line]
    assert told == [LINE] * lines + [DETAIL] * details
    assert "PASSED [simulated-on-cpu] tiny on 4 cpu devices" in done.stdout.str()
    assert "\x1b" not in done.stdout.str()
    assert "\r" not in done.stdout.str()


def test_what_is_told_stands_on_lines_of_its_own(run: RunSuite) -> None:
    for flags in ((), ("-v",)):
        done = run(good_record(cycles=1), *flags, lines=[LINE, LINE])
        assert sum(line.startswith("kvcycle ") and line.endswith(LINE) for line in done.outlines) == 2
