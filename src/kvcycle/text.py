"""How numbers are written for people: exact bytes always stand beside the rounded ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache

import humanize


@lru_cache(maxsize=4096)  # of ten thousand devices most have the same few sizes
def exact_bytes(size: int) -> str:
    """``2.25 GiB (2,415,992,832 B)``; below one KiB just ``512 B``."""
    if abs(size) < 1024:
        return f"{size:,} B"
    return f"{humanize.naturalsize(size, binary=True, format='%.2f')} ({size:,} B)"


def signed_bytes(size: int) -> str:
    """As :func:`exact_bytes`, with a plus sign where memory grew."""
    return f"+{exact_bytes(size)}" if size > 0 else exact_bytes(size)


def seconds(value: float) -> str:
    """``11.4 s``, ``0.117 s``: three significant figures."""
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def printable(text: str) -> str:
    r"""The text with everything escaped that a terminal could obey or hide, line breaks too: ``\x1b``, ``\n``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop; its class where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'page_size'?)`` if a known word is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
