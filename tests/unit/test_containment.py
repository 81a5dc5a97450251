"""What an engine's last words are made of."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

import pytest

from kvcycle.containment import LastWords, cause_in


def told(function: Callable[[], object]) -> str:
    """As the engine logs an exception."""
    try:
        function()
    except Exception:  # noqa: BLE001 - whatever it is, its traceback is what is read
        return f"Scheduler hit an exception: {traceback.format_exc()}"
    raise AssertionError("it did not raise")


def chained() -> None:
    try:
        int("no number")
    except ValueError as error:
        raise RuntimeError("first line\n  of several\n") from error


def in_several_lines() -> None:
    raise ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\n" + 20 * "--")


@pytest.mark.parametrize(
    ("function", "exception", "line"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero", 0),
        (chained, "RuntimeError: first line of several", 4),
        (in_several_lines, "ValueError: RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.", 1),
    ],
)
def test_the_cause_is_the_exception_and_its_place(function: Callable[[], object], exception: str, line: int) -> None:
    place = f"test_containment.py:{function.__code__.co_firstlineno + line}, in {function.__name__}"
    assert cause_in(told(function)) == f"{exception} ({place})"


def test_a_message_without_a_traceback_is_its_own_cause_and_a_long_one_is_cut() -> None:
    assert cause_in("Watchdog timeout\n (watchdog_timeout=300)\n") == "Watchdog timeout (watchdog_timeout=300)"
    assert cause_in(" \n") == "an empty message"
    cut = cause_in("word " * 1000)
    assert len(cut) <= 500
    assert cut.endswith("word …")


def record(level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord("sgl_jax", level, __file__, 1, message, None, None)


@pytest.mark.parametrize(
    "note",
    [
        "Scheduler hit an exception: x",
        "ModelWorkerClient hit an exception: x",
        "ModelWorker sync thread hit an exception: x",
        "TokenizerManager hit an exception: x",
        "DetokenizerManager hit an exception: x",
        "Watchdog timeout (watchdog_timeout=300)",
    ],
)
def test_a_death_is_told_at_once_and_another_message_only_remembered(note: str) -> None:
    deaths: list[str] = []
    words = LastWords(deaths.append)
    assert words.text == "it left no message"
    words.emit(record(logging.WARNING, "a warning is nobody's last word"))
    words.emit(record(logging.ERROR, "an error"))
    assert (words.text, deaths) == ("an error", [])
    words.emit(record(logging.ERROR, note))
    assert deaths == [note]
    assert words.text == note
