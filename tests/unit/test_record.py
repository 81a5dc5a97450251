"""The record's file: what is written is what is read, and what is no record is refused in a sentence."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcycle.errors import RecordError
from kvcycle.record import Record, now
from kvcycle.record_parts import (
    OWNERS,
    PHASES,
    Compiles,
    Cycle,
    DeviceUse,
    Generate,
    Outcome,
    Owner,
    Phase,
    PhaseName,
    Verdict,
    When,
    Witness,
)
from tests.unit.records import good_record

GOOD = good_record(cycles=1, devices=2)

sizes = st.integers(0, 2**60)
counts = st.integers(0, 10**6)
times = st.floats(0, 1e9)
finite = st.floats(allow_nan=False, allow_infinity=False)
# Any text that UTF-8 can write: a device's kind, a path, an error's words.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
compiles = st.builds(Compiles, trace=counts, lower=counts, backend=counts, cache_hits=counts)
owners: st.SearchStrategy[dict[Owner, int]] = st.dictionaries(st.sampled_from(OWNERS), sizes)
uses = st.builds(DeviceUse, id=counts, ledger_bytes=sizes, allocator_bytes=st.none() | sizes, by_owner=owners)


@st.composite
def phases(draw: st.DrawFn) -> Phase:
    devices = tuple(draw(st.lists(uses, max_size=3, unique_by=lambda use: use.id)))
    return Phase(
        name=draw(st.sampled_from(PHASES)),
        t_s=draw(times),
        seconds=draw(times),
        rss_bytes=draw(st.none() | sizes),
        devices=devices,
        ledger_bytes_sum=sum(use.ledger_bytes for use in devices),
        compiles=draw(compiles),
        info=draw(st.sampled_from([None, *(phase.info for phase in GOOD.cycles[0].phases)])),
    )


witnesses: st.SearchStrategy[Witness | None] = st.none() | st.sampled_from(get_args(Witness))
outcomes: st.SearchStrategy[Outcome] = st.sampled_from(get_args(Outcome))
whens: st.SearchStrategy[When] = st.sampled_from(get_args(When))
values = st.none() | st.integers() | finite | texts
verdicts = st.builds(
    Verdict,
    id=texts,
    scope=texts,
    witness=witnesses,
    verdict=outcomes,
    expected=values,
    measured=values,
    unit=texts,
    message=texts,
    causes=st.lists(texts, max_size=2).map(tuple),
)
generates = st.builds(
    Generate,
    when=whens,
    cycle=counts,
    seconds=times,
    token_ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(tuple),
    logprobs=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=3).map(tuple),
    cached_tokens=counts,
    compiles=compiles,
)


cycles = st.builds(
    Cycle,
    phases=st.lists(phases(), max_size=2, unique_by=lambda phase: phase.name).map(
        lambda found: tuple(sorted(found, key=lambda phase: PHASES.index(phase.name)))
    ),
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    return GOOD.model_copy(
        update={
            "profile": draw(st.dictionaries(texts, values | st.lists(values, max_size=2), max_size=3)),
            "stack": GOOD.stack.model_copy(update={"libtpu": draw(st.none() | texts)}),
            "cycles": tuple(draw(st.lists(cycles, max_size=2))),
            "generates": tuple(draw(st.lists(generates, max_size=2))),
            "checks": tuple(draw(st.lists(verdicts, max_size=2))),
        }
    )


@settings(max_examples=40)
@given(record=records())
def test_a_record_is_read_as_it_was_written(record: Record, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    record.save(path)
    assert Record.load(path) == record


def test_a_good_record_survives_its_file(tmp_path: Path) -> None:
    for record in (good_record(), good_record(allocator=True)):
        path = tmp_path / "deep" / "folder" / "record.json"
        record.save(path)
        assert Record.load(path) == record
        assert path.read_text().endswith("}\n")
        assert json.loads(path.read_text())["schema"] == 1


def test_names_with_markup_survive(tmp_path: Path) -> None:
    names = {"name": "[bold]tiny[/] <script>alert(1)</script> & “quotes” \\[ \x00 \u2028 \N{SNOWMAN}"}
    GOOD.model_copy(update={"profile": names}).save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json").profile == names


# What is no record ---------------------------------------------------------------------------------------------------


@pytest.fixture
def raw() -> dict[str, Any]:
    """A good record's JSON, to be spoiled."""
    read: dict[str, Any] = json.loads(GOOD.to_json())
    return read


def refused(path: Path) -> str:
    with pytest.raises(RecordError) as caught:
        Record.load(path)
    return str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    message = f"The record {path} cannot be read: [Errno 2] No such file or directory: '{path}'."
    assert refused(path) == message


def test_a_folder(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith(f"The record {tmp_path} cannot be read: [Errno 21] Is a directory")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert refused(path).startswith(f"The record {path} cannot be read: 'utf-8' codec can't decode byte 0xff")


@pytest.mark.parametrize("length", [0, 1, 100, -3])
def test_a_file_that_was_cut_off(length: int, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(GOOD.to_json()[:length])
    message = refused(path)
    assert message.startswith(f"{path} is not JSON (")
    assert message.endswith("); was the file cut off?")


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("null", "NoneType"), ('"schema"', "str"), ("1", "int")])
def test_json_of_another_kind(text: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    assert refused(path) == f"{path} holds a JSON {kind}, not a record."


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema(schema: object, raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(raw | {"schema": schema}))
    assert refused(path) == f"{path} has record schema {schema!r}; this version of kvcycle reads schema 1."


def set_at(raw: dict[str, Any], place: str, value: object) -> None:
    *parents, last = place.split(".")
    here: Any = raw
    for part in parents:
        here = here[int(part) if part.isdigit() else part]
    here[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        ("kv.bytes", -1, "kv.bytes: Input should be greater than or equal to 0"),
        ("kv.bytes", 1.5, "kv.bytes: Input should be a valid integer"),
        ("kv.bytes", "12", "kv.bytes: Input should be a valid integer"),
        ("kv.bytes", True, "kv.bytes: Input should be a valid integer"),
        ("cycles.0.phases.3.devices.1.ledger_bytes", -1, "cycles.0.phases.3.devices.1.ledger_bytes: Input should be"),
        ("cycles.0.phases.3.ledger_bytes_sum", 7, ("cycles.0.phases.3: Value error, ledger_bytes_sum is 7 but the "
         "devices add up to 11053264")),
        ("cycles.0.phases.3.seconds", float("nan"), "cycles.0.phases.3.seconds: Input should be"),
        ("cycles.0.phases.3.seconds", float("inf"), "cycles.0.phases.3.seconds: Input should be"),
        ("generates.0.seconds", -0.5, "generates.0.seconds: Input should be greater than or equal to 0"),
        ("generates.0.logprobs.0", float("-inf"), "generates.0.logprobs.0: Input should be a finite number"),
        ("cycles.0.phases.0.name", "kv_dropped", "cycles.0.phases.0.name: Input should be 'engine_ready'"),
        ("cycles.0.phases.3.info.kind", "other", "cycles.0.phases.3.info: Input tag 'other' found using 'kind'"),
        ("evidence", "measured", "evidence: Input should be 'measured-on-tpu'"),
        ("extra", 1, "extra: Extra inputs are not permitted"),
        ("cycles.0.phases.0.extra", 1, "cycles.0.phases.0.extra: Extra inputs are not permitted"),
        ("devices", None, "devices: Input should be a valid array"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_place(
    place: str, value: object, sentence: str, raw: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    set_at(raw, place, value)
    path.write_text(json.dumps(raw))
    message = refused(path)
    assert message.startswith(f"{path} is not a valid record: {sentence}")
    assert message.endswith(" (1 in all).")


def test_a_missing_key_is_named(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    del raw["kv"]["buffers"], raw["kv"]["bytes"]
    path.write_text(json.dumps(raw))
    assert refused(path) == f"{path} is not a valid record: kv.buffers: Field required (2 in all)."
    del raw["stack"], raw["kv"]
    path.write_text(json.dumps(raw))
    assert refused(path) == f"{path} is not a valid record: stack: Field required (2 in all)."


# Writing -------------------------------------------------------------------------------------------------------------


def break_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", replace)


def break_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def to_json(_: Record) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(Record, "to_json", to_json)


@pytest.mark.parametrize("break_it", [break_replace, break_json])
def test_a_write_that_fails_leaves_the_old_file(
    break_it: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    GOOD.save(path)
    before = path.read_bytes()
    break_it(monkeypatch)
    with pytest.raises(OSError, match="no space left on device"):
        good_record(cycles=3).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_unfinished_file_lies_hidden_in_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Path] = []

    def to_json(_: Record) -> str:
        found.extend(tmp_path.iterdir())
        found[0].unlink()  # even so, what went wrong first is what is said
        raise OSError("no space left on device")

    monkeypatch.setattr(Record, "to_json", to_json)
    with pytest.raises(OSError, match="no space left on device"):
        GOOD.save(tmp_path / "record.json")
    assert [path.name.startswith(".record.json-") for path in found] == [True]


def test_a_record_is_indented_for_people() -> None:
    assert GOOD.to_json().startswith('{\n "schema": 1,\n "evidence": "simulated-on-cpu",\n')


def test_a_write_replaces_the_old_file_and_others_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    GOOD.save(path)
    other = good_record(cycles=2)
    other.save(path)
    assert Record.load(path) == other
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


# Looking things up ---------------------------------------------------------------------------------------------------


def test_phases_and_generations_are_found_by_name_and_cycle() -> None:
    record = good_record(cycles=2)
    name: PhaseName = "kv_cache_dropped"
    assert [(index, phase.name) for index, phase in record.phases(name)] == [(0, name), (1, name)]
    assert [g.cycle for g in record.generates_when("warm")] == [0, 0, 0, 1]
    assert [g.cycle for g in record.generates_when("warm", 1)] == [1]
    assert Cycle(phases=()).phase(name) is None
    assert record.cycles[0].phases[0].device(7) is None


def test_compiler_work_is_lowering_and_compiling() -> None:
    assert Compiles(trace=1, lower=2, backend=4, cache_hits=8).any_work == 6


@pytest.mark.parametrize(("witness", "name"), [("rss", "cycle0-rss"), (None, "cycle0")])
def test_a_verdict_is_named_by_scope_and_witness(witness: Witness | None, name: str) -> None:
    assert Verdict(id="x", scope="cycle0", witness=witness, verdict="pass", message="m").name == name


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        GOOD.created = "now"  # type: ignore[misc]


def test_now_is_utc_to_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XYZ+7")
    time.tzset()
    try:
        before, text, after = datetime.now(UTC), now(), datetime.now(UTC)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert before.replace(microsecond=0) <= datetime.fromisoformat(text) <= after
    assert len(text) == len("2026-11-23T23:24:47Z")
    assert text.endswith("Z")
