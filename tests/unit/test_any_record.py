"""Anything at all in a record's place is refused or judged, and shown harmlessly."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from kvcycle.checks import judge
from kvcycle.errors import RecordError
from kvcycle.record import Record
from kvcycle.report import page, terminal
from tests.unit.records import good_record
from tests.unit.spoiled import EVIL, harmless


def places(value: object, here: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a JSON value, the whole first."""
    yield here
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*here, key))


BOTH = [json.loads(good_record(cycles=1, devices=2, allocator=allocator).to_json()) for allocator in (False, True)]
PLACES = [list(places(read)) for read in BOTH]

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400])
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from([*PLACES[0][1:][:3], "ledger", "rss", "warm", "pass", "kv_cache_dropped", EVIL])
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def spoiled(draw: st.DrawFn) -> Any:
    """A good record's JSON with up to three values replaced, removed, or copied from elsewhere in it."""
    which = draw(st.integers(0, 1))
    value: Any = copy.deepcopy(BOTH[which])
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(PLACES[which]))
        if not place:
            continue
        parent = value
        try:
            for part in place[:-1]:
                parent = parent[part]
            change: Callable[[], object] = draw(
                st.sampled_from([lambda: draw(anything), lambda: at(BOTH[which], draw(st.sampled_from(PLACES[which])))])
            )
            if draw(st.booleans()):
                parent[place[-1]] = change()
            else:
                del parent[place[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has taken the place away
    return value


def at(value: Any, place: tuple[str | int, ...]) -> Any:
    for part in place:
        value = value[part]
    return value


@settings(max_examples=150)
@given(value=spoiled())
def test_any_change_is_refused_or_judged(value: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "spoiled.json"
    path.write_text(json.dumps(value))
    try:
        record = Record.load(path)
    except RecordError as error:
        assert harmless(str(error))  # noqa: PT017 - it need not be refused
        return
    verdicts = judge(record)
    buffer = io.StringIO()
    terminal.show(record, verdicts, Console(file=buffer, width=80, highlight=False))
    assert harmless(buffer.getvalue())
    assert harmless(page.draw(record, verdicts))
    path.write_text(record.to_json())
    assert judge(Record.load(path)) == verdicts
