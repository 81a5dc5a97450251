"""A record's file, read with suspicion: what is too large, cut off, or no record is refused in one sentence.

A record may come from anybody: reading it is bounded in memory, and a sentence that quotes it cannot steer a terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from kvcycle.errors import RecordError
from kvcycle.text import exact_bytes, printable

SCHEMA = 1
#: Ten cycles of ten thousand devices, with both witnesses and the weights' phases, are some 200 MB.
MAX_FILE_BYTES = 256 * 2**20
#: Commas and opening brackets, which bound what a file's values take in memory: up to about 2 GiB. The same ten cycles
#: have some nine million.
MAX_MARKS = 12_000_000
#: Of one object or list. None in a record has more than an entry for each device, or for each array of the weights.
MAX_ENTRIES = 65_536


class _TooWideError(Exception):
    """An object or a list has too many entries."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object, if neither it nor a list in it is too long: pydantic would copy it into each error that it has."""
    if len(pairs) > MAX_ENTRIES:
        raise _TooWideError
    for _, value in pairs:
        if type(value) is list:
            _check_list(value)
    return dict(pairs)


def _check_list(values: list[object]) -> None:
    if len(values) > MAX_ENTRIES:
        raise _TooWideError
    for value in values:
        if type(value) is list:
            _check_list(value)


def read(path: Path, required: Iterable[str] = ()) -> str:
    """The text of a record's file: a JSON object of this schema, whose other contents nobody has looked at yet.

    Args:
        path: the file.
        required: keys that the object must have. pydantic would copy the whole file into the error of each.

    Raises:
        RecordError: the file cannot be read, is larger than :data:`MAX_FILE_BYTES` or of more than :data:`MAX_MARKS`
            values, is no JSON object, or has another schema number.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)  # not its size: a device or a pipe has none
        if len(data) > MAX_FILE_BYTES:
            raise refusal(f"{path} is larger than {exact_bytes(MAX_FILE_BYTES)}, the most that a record may have.")
        if sum(map(data.count, (b",", b"[", b"{"))) > MAX_MARKS:
            raise refusal(f"{path} holds more than {MAX_MARKS:,} values, the most that a record may have.")
        text = data.decode()
    except (OSError, ValueError) as error:  # a ValueError: no UTF-8, or a name that no file can have
        raise refusal(f"The record {path} cannot be read: {error}.") from error
    try:
        raw = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise refusal(f"{path} is not JSON ({error}); was the file cut off?") from error
    except _TooWideError as error:
        too_wide = f"holds an object or a list of more than {MAX_ENTRIES:,} entries"
        raise refusal(f"{path} {too_wide}: it is not a record.") from error
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
    if missing := [key for key in required if key not in raw]:
        raise refusal(f"{path} is not a valid record: {missing[0]}: Field required ({len(missing)} in all).")
    return text


def invalid(path: Path, error: ValidationError) -> RecordError:
    """The sentence on a file that is JSON and no valid record: it names the first place that is wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    return refusal(f"{path} is not a valid record: {place}: {first['msg']} ({error.error_count()} in all).")


def refusal(sentence: str) -> RecordError:
    """An error whose sentence is safe to print, whatever it quotes."""
    return RecordError(printable(sentence))
