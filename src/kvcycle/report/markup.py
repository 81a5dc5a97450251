"""Text from a record, made harmless for Markdown: whatever it says, it stays text."""

from __future__ import annotations

import html
import re

from kvcycle.text import printable

#: Longer ones are cut: a page that shows summaries has a limit of its own, and drops what is beyond it.
MAX_CHARACTERS = 600

_MARKDOWN = re.compile(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
#: What viewers make a link, a mention or a formula of, though nothing around it says so.
_AUTOMATIC = re.compile(r"(?i)(?<=[a-z])(:)(?=//)|(?<=www)(\.)|([@$])")


def plain(text: str) -> str:
    r"""The text for a line, list or table of Markdown: no tag, markup, link, mention, formula or line break.

    An underscore inside a word (``kv_cache_dropped``) is no markup, and stays as it is.
    """
    escaped = _MARKDOWN.sub(lambda found: f"\\{found[0]}", html.escape(_cut(text), quote=False))
    return _AUTOMATIC.sub(lambda found: f"&#{ord(found[0])};", escaped)


def code(text: str) -> str:
    """The text in a fixed-width font, as a tag: in a table Markdown's own backticks would not hold a ``|``."""
    return f"<code>{plain(text)}</code>"


def _cut(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= MAX_CHARACTERS else f"{shown[: MAX_CHARACTERS - 1]}…"
