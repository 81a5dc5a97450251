"""A record's file, read with suspicion: what is too large, cut off, or no record is refused in one sentence.

A record may come from anybody: reading it is bounded in memory, and a sentence that quotes it cannot steer a terminal.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from kvcycle.errors import RecordError
from kvcycle.text import exact_bytes, printable

SCHEMA = 1
#: Some two thousand cycles of four devices; parsing as much JSON takes at most about 2 GiB.
MAX_FILE_BYTES = 64 * 2**20


def read(path: Path) -> str:
    """The text of a record's file: a JSON object of this schema, whose other contents nobody has looked at yet.

    Raises:
        RecordError: the file cannot be read, is larger than :data:`MAX_FILE_BYTES`, is no JSON object, or has another
            schema number.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)  # not its size: a device or a pipe has none
        if len(data) > MAX_FILE_BYTES:
            raise refusal(f"{path} is larger than {exact_bytes(MAX_FILE_BYTES)}, the most that a record may have.")
        text = data.decode()
    except (OSError, ValueError) as error:  # a ValueError: no UTF-8, or a name that no file can have
        raise refusal(f"The record {path} cannot be read: {error}.") from error
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise refusal(f"{path} is not JSON ({error}); was the file cut off?") from error
    except (ValueError, RecursionError) as error:
        what = "a number of too many digits" if isinstance(error, ValueError) else "JSON that is nested too deeply"
        raise refusal(f"{path} holds {what}: it is not a record.") from error
    if not isinstance(raw, dict):
        raise refusal(f"{path} holds a JSON {type(raw).__name__}, not a record.")
    if "schema" not in raw:
        raise refusal(f"{path} has no record schema, so it is not a record; this version of kvcycle reads {SCHEMA}.")
    schema = raw["schema"]
    if type(schema) is not int or schema != SCHEMA:  # true == 1, and 1.0 == 1
        shown = repr(schema)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}…"
        raise refusal(f"{path} has record schema {shown}; this version of kvcycle reads schema {SCHEMA}.")
    return text


def invalid(path: Path, error: ValidationError) -> RecordError:
    """The sentence on a file that is JSON and no valid record: it names the first place that is wrong."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    return refusal(f"{path} is not a valid record: {place}: {first['msg']} ({error.error_count()} in all).")


def refusal(sentence: str) -> RecordError:
    """An error whose sentence is safe to print, whatever it quotes."""
    return RecordError(printable(sentence))
