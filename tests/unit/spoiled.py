"""Good records that are spoiled, and what the command line says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcycle.cli import app
from tests.unit.records import good_record

GOOD = good_record(cycles=1, devices=2)
JSON = GOOD.to_json()

#: What an attacker, or a careless tool, would put where text belongs: escape sequences, markup, line breaks, bidi.
EVIL = "\x1b]0;owned\x07\x1b[2J[bold]x[/bold][/]\n\r\t\x00\x7f\x9b31m\u202e\u2028:bomb:\\"
#: The only characters that the terminal may be sent for it.
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J[bold]x[/bold][/]\\n\\r\\t\\x00\\x7f\\x9b31m\\u202e\\u2028:bomb:\\"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record.json"


@pytest.fixture
def raw() -> dict[str, Any]:
    """A good record's JSON, to be spoiled."""
    read: dict[str, Any] = json.loads(JSON)
    return read


def set_at(raw: Any, place: str, value: object) -> None:
    *parents, last = (int(part) if part.isdigit() else part for part in place.split("."))
    for part in parents:
        raw = raw[part]
    raw[last] = value


def refused(path: Path) -> str:
    """The sentence, from the command line: exit code 2, nothing else printed, and no traceback."""
    result = CliRunner().invoke(app, ["report", str(path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.endswith((".\n", "?\n"))
    assert harmless(result.stderr)
    with_good = path.parent / "good.json"
    GOOD.save(with_good)
    for pair in ([path, with_good], [with_good, path]):
        compared = CliRunner().invoke(app, ["compare", *map(str, pair)])
        assert (compared.exit_code, compared.stdout, compared.stderr) == (2, "", result.stderr)
    return result.stderr.removesuffix("\n")


def not_passed(path: Path) -> str:
    """What the command line prints of a record that it reads and that does not pass."""
    result = CliRunner().invoke(app, ["report", str(path)])
    assert result.exit_code == 1
    assert harmless(result.stdout)
    assert "FAILED [" in result.stdout
    return result.stdout


def harmless(text: str) -> bool:
    """Whether every character is one that a terminal shows."""
    return all(character.isprintable() or character == "\n" for character in text)
