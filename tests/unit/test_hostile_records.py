"""Files that lie: each is refused in a sentence, or judged and not passed."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvcycle import record_file
from kvcycle.checks import judge, passed
from kvcycle.errors import RecordError
from kvcycle.profile import MAX_CYCLES
from kvcycle.record import Record
from kvcycle.record_limits import MAX_CANARIES, MAX_DEVICES
from tests.unit.spoiled import GOOD, JSON, not_passed, path, raw, refused, set_at

__all__ = ["path", "raw"]

# No record at all ----------------------------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere(path: Path) -> None:
    data = JSON.encode()
    lengths = [*range(200), *range(200, len(data), 97), *range(len(data) - 20, len(data))]
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(RecordError) as caught:
            Record.load(path)
        sentence = str(caught.value)
        assert sentence.startswith((f"{path} is not JSON (", f"The record {path} cannot be read: 'utf-8' codec can't"))
    path.write_bytes(data[:1000])
    sentence = refused(path)
    assert sentence.startswith(f"{path} is not JSON (")
    assert re.search(r" \(char (9\d\d|1000)\)\); was the file cut off\?$", sentence)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


DEEP = "{} holds JSON that is nested too deeply: it is not a record."
DEEP_FOR_PYDANTIC = "the whole: Invalid JSON: recursion limit exceeded at line 6 column 210 (1 in all)."
HALF = "the whole: Invalid JSON: unexpected end of hex escape at line 6 column 18 (1 in all)."
FILES = {
    "binary": (
        bytes(range(128, 256)),
        "The record {} cannot be read: 'utf-8' codec can't decode byte 0x80 in position 0: invalid start byte.",
    ),
    "a number": (b"12", "{} holds a JSON int, not a record."),
    "deep": (nested(10**6).encode(), DEEP),
    "deep inside": (JSON.replace('"tiny"', nested(10**5), 1).encode(), DEEP),
    "deep for pydantic": (
        JSON.replace('"tiny"', nested(500), 1).encode(), "{} is not a valid record: " + DEEP_FOR_PYDANTIC
    ),
    "5000 digits": (
        JSON.replace('"tiny"', "9" * 5000, 1).encode(), "{} holds a number of too many digits: it is not a record."
    ),
    "half a surrogate": (JSON.replace('"tiny"', '"\\ud800"', 1).encode(), "{} is not a valid record: " + HALF),
    "no schema": (b"{}", "{} has no record schema, so it is not a record; this version of kvcycle reads 1."),
}  # fmt: skip


@pytest.mark.parametrize(("data", "sentence"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_record(data: bytes, sentence: str, path: Path) -> None:
    path.write_bytes(data)
    assert refused(path) == sentence.format(path)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"\n\n", "Expecting value: line 3 column 1 (char 2)"),
        (b"\xef\xbb\xbf" + JSON.encode(), "Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0)"),
        (JSON.encode() + b"{}", "Extra data: line "),
        (b"\x00" * 100, "Expecting value: line 1 column 1 (char 0)"),
    ],
    ids=["empty", "blank", "BOM", "two records", "zeros"],
)
def test_a_file_that_is_no_json(data: bytes, why: str, path: Path) -> None:
    path.write_bytes(data)
    sentence = refused(path)
    assert sentence.startswith(f"{path} is not JSON ({why}")
    assert sentence.endswith("); was the file cut off?")


def test_a_folder_and_a_file_that_is_not_there(tmp_path: Path, path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    inside = folder / "record.json"  # a run's folder stands for its record
    assert refused(folder) == f"The record {inside} cannot be read: [Errno 2] No such file or directory: '{inside}'."
    inside.mkdir()
    assert refused(folder) == f"The record {inside} cannot be read: [Errno 21] Is a directory: '{inside}'."
    assert refused(path) == f"The record {path} cannot be read: [Errno 2] No such file or directory: '{path}'."


def test_a_file_that_may_not_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    path.touch()
    monkeypatch.setattr(Path, "open", denied)  # whoever runs the tests may be root, who may read anything
    with pytest.raises(RecordError) as caught:
        Record.load(path)
    assert str(caught.value) == f"The record {path} cannot be read: [Errno 13] Permission denied: '{path}'."


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(RecordError, match=r"^The record a\\x00b cannot be read: .*null (byte|character).*\.$"):
        Record.load(Path("a\x00b"))


def test_a_name_that_would_steer_the_terminal(tmp_path: Path) -> None:
    name = tmp_path / "a\x1b[2Jb.json"
    name.write_text("[]")
    assert refused(name) == f"{tmp_path}/a\\x1b[2Jb.json holds a JSON list, not a record."


@pytest.mark.parametrize(
    ("schema", "shown"),
    [
        (True, "True"),
        (1.0, "1.0"),
        ("1", "'1'"),
        ("\x1b[2J\u202e", r"'\x1b[2J\u202e'"),
        ([1], "[1]"),
        ("x" * 10**5, "'" + "x" * 39 + "…"),
        ("x" * 38, "'" + "x" * 38 + "'"),
        (10**400, "1" + "0" * 39 + "…"),
        (-1, "-1"),
        (2, "2"),
    ],
    ids=["true", "a float", "text", "an escape", "a list", "long text", "40 characters", "huge", "negative", "another"],
)
def test_another_schema(schema: object, shown: str, raw: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(raw | {"schema": schema}))
    assert refused(path) == f"{path} has record schema {shown}; this version of kvcycle reads schema 1."


# Too much ------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_too_large(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(JSON)
    size = len(JSON.encode())
    monkeypatch.setattr(record_file, "MAX_FILE_BYTES", size)
    assert Record.load(path) == GOOD
    monkeypatch.setattr(record_file, "MAX_FILE_BYTES", size - 1)
    sentence = refused_by_load(path)
    assert sentence.startswith(f"{path} is larger than ")
    assert sentence.endswith(f" ({size - 1:,} B), the most that a record may have.")


def test_no_more_is_read_than_a_record_may_have(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Endless(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size is not None
            asked.append(size)
            return bytes(size)

    def endless(*_: object) -> Endless:
        return Endless()

    monkeypatch.setattr(record_file, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(Path, "open", endless)  # what /dev/zero would give, and a pipe can
    assert refused_by_load(path) == f"{path} is larger than 1,000 B, the most that a record may have."
    assert asked == [1001]


def test_a_million_phases(raw: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phase = {"name": "engine_ready", "t_s": 0, "seconds": 0, "devices": [], "ledger_bytes_sum": 0}
    text = json.dumps(raw | {"cycles": [{"phases": ["PHASES"]}]}, separators=(",", ":"))
    monkeypatch.setattr(record_file, "MAX_MARKS", 10**6)
    path.write_text(text.replace('"PHASES"', ",".join([json.dumps(phase)] * 2 * 10**5)))
    assert refused_by_load(path) == f"{path} holds more than 1,000,000 values, the most that a record may have."
    path.write_text(text.replace('"PHASES"', ",".join([json.dumps(phase)] * 10**4)))
    assert refused(path).startswith(
        f"{path} is not a valid record: cycles.0.phases: Tuple should have at most 10 items after validation, not "
    )


def refused_by_load(path: Path) -> str:
    with pytest.raises(RecordError) as caught:
        Record.load(path)
    return str(caught.value)


def test_more_than_is_judged_in_seconds(raw: dict[str, Any], path: Path) -> None:
    def sentence(**changes: object) -> str:
        path.write_text(json.dumps(raw | changes))
        return refused(path).removeprefix(f"{path} is not a valid record: ")

    empty: dict[str, Any] = {"phases": []}
    devices = [{"id": index, "kind": "cpu"} for index in range(MAX_DEVICES + 1)]
    assert sentence(cycles=[empty] * (MAX_CYCLES + 1)).startswith("cycles: Tuple should have at most 1000 items after")
    assert sentence(devices=devices).startswith("devices: Tuple should have at most 16384 items after validation")
    assert sentence(cycles=[empty] * 11, devices=devices[:-1]) == (
        "the whole: Value error, 11 cycles of 16384 devices are more than a record may hold (cycles x devices at most "
        "163,840) (1 in all)."
    )
    assert sentence(generates=[raw["generates"][0]] * 10_001).startswith("generates: Tuple should have at most 10000")
    canaries = [raw["canaries"][0]] * (MAX_CANARIES + 1)
    assert sentence(canaries=canaries).startswith("canaries: Tuple should have at most 49152 items")
    for key in ("residue_before", "residue_after"):
        cycle = raw["cycles"][0] | {key: [{}] * 1001}
        assert sentence(cycles=[cycle]).startswith(f"cycles.0.{key}: Tuple should have at most 1000 items after")


def test_as_many_devices_as_a_record_may_hold_are_judged(raw: dict[str, Any], path: Path) -> None:
    devices = [{"id": index, "kind": "cpu", "host": index // 8} for index in range(MAX_DEVICES)]
    path.write_text(json.dumps(raw | {"cycles": [{"phases": []}], "devices": devices}))
    verdicts = judge(Record.load(path))
    assert len(verdicts) > 4 * MAX_DEVICES
    assert not passed(verdicts)


def test_more_values_than_fit_into_memory(raw: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(raw)
    marks = sum(map(text.count, ",[{"))
    path.write_text(text)
    monkeypatch.setattr(record_file, "MAX_MARKS", marks)
    assert Record.load(path) == GOOD
    monkeypatch.setattr(record_file, "MAX_MARKS", marks - 1)
    assert refused_by_load(path) == f"{path} holds more than {marks - 1:,} values, the most that a record may have."


@pytest.mark.parametrize(
    "many", [{str(number): 0 for number in range(70_000)}, {"devices": [0] * 70_000}, {"x": [[], [[0] * 70_000]]}],
    ids=["keys", "a list", "a list in a list"],
)  # fmt: skip
def test_more_entries_than_anything_in_a_record_has(many: dict[str, Any], raw: dict[str, Any], path: Path) -> None:
    # Each would be an error of its own, or a copy in one.
    path.write_text(json.dumps(raw | many))
    assert refused_by_load(path) == f"{path} holds an object or a list of more than 65,536 entries: it is not a record."


def test_of_a_thousand_wrong_entries_the_first_is_named(raw: dict[str, Any], path: Path) -> None:
    wrong = [{"id": number, "kind": 0} for number in range(1000)]
    path.write_text(json.dumps(raw | {"devices": wrong}))
    assert refused(path) == f"{path} is not a valid record: devices.0.kind: Input should be a valid string (1 in all)."


# Values that are none ------------------------------------------------------------------------------------------------

INT64 = "Input should be less than or equal to 9223372036854775807"
AGAIN = "Value error, device 0 is there more than once"
VALUES = [
    ("kv.bytes", -1, "Input should be greater than or equal to 0"),
    ("kv.bytes", 10**400, INT64),
    ("kv.bytes", 2**63, INT64),
    ("kv.bytes", 1.0, "Input should be a valid integer"),
    ("kv.bytes", True, "Input should be a valid integer"),
    ("kv.bytes", float("nan"), "Input should be a valid integer"),
    ("kv.bytes_by_device.0", -1, "Input should be greater than or equal to 0"),
    ("kv.claimed_bytes", 1e300, "Input should be a valid integer"),
    ("canaries.0.rise_bytes", 1.5, "Input should be a valid integer"),
    ("canaries.0.rise_bytes", "16777216", "Input should be a valid integer"),
    ("canaries.0.fall_bytes", -(2**63) - 1, "Input should be greater than or equal to -9223372036854775808"),
    ("generates.0.seconds", float("nan"), "Input should be "),
    ("generates.0.seconds", float("inf"), "Input should be "),
    ("generates.0.seconds", 1e300, "Input should be less than or equal to 1000000000"),
    ("generates.0.seconds", "17", "Input should be a valid number"),
    ("generates.0.token_ids.0", 1.0, "Input should be a valid integer"),
    ("generates.0.token_ids.0", 10**400, INT64),
    ("generates.0.logprobs.0", 1e300, "Input should be less than or equal to 34028235"),
    ("generates.0.logprobs.0", -1e300, "Input should be greater than or equal to -34028235"),
    ("generates.0.logprobs.0", float("nan"), "Input should be "),
    ("cycles.0.swap.leaves", "51", "Input should be a valid integer"),
    ("cycles.0.swap", [], "Input should be an object"),
    ("stack.jax", 1, "Input should be a valid string"),
    ("profile", [], "Input should be an object"),
    ("devices", [{"id": 0, "kind": "cpu"}] * 2, AGAIN),
    ("cycles.0.phases.3.devices", [{"id": 0, "ledger_bytes": 0}] * 2, AGAIN),
    ("boot.before", [{"id": 0, "ledger_bytes": 0}] * 2, AGAIN),
    ("boot.after", [{"id": 0, "ledger_bytes": 0}] * 2, AGAIN),
]


@pytest.mark.parametrize(("place", "value", "sentence"), VALUES)
def test_a_value_that_is_none(place: str, value: object, sentence: str, raw: dict[str, Any], path: Path) -> None:
    set_at(raw, place, value)
    path.write_text(json.dumps(raw))
    assert refused(path).startswith(f"{path} is not a valid record: {place}: {sentence}")


def test_a_verdict_of_infinity(raw: dict[str, Any], path: Path) -> None:
    verdict = {"id": "x", "scope": "run", "verdict": "pass", "message": "m"}
    for key in ("expected", "measured"):
        path.write_text(json.dumps(raw | {"checks": [verdict | {key: float("inf")}]}))
        assert refused(path).startswith(
            f"{path} is not a valid record: checks.0.{key}.int: Input should be a valid int"
        )


#: The profile is free otherwise: what checks read of it is not.
PROFILE = [
    ("cycle.cycles", 10**9, "1000000000", "Input should be less than or equal to 1000"),
    ("cycle.cycles", "2", "'2'", "Input should be a valid integer"),
    ("cycle.cycles", float("nan"), "nan", "Input should be a valid integer"),
    ("cycle.generate", "false", "'false'", "Input should be a valid boolean"),
    ("cycle", 5, "5", "it must be a table"),
    ("cycle", None, "None", "it must be a table"),
    ("tolerances", [1], "[1]", "it must be a table"),
    ("tolerances.allocator_bytes", "4096", "'4096'", "Input should be a valid integer"),
    ("tolerances.allocator_bytes", -1, "-1", "Input should be greater than or equal to 0"),
    ("tolerances.allocator_bytes", 2**63, "9223372036854775808", "Input should be less than 9223372036854775808"),
    ("tolerances.rss_fraction", [0.5], "[0.5]", "Input should be a valid number"),
    ("tolerances.rss_fraction", 1, "1", "Input should be less than 1"),
    ("tolerances.rss_fraction", float("nan"), "nan", "Input should be "),
    ("tolerances.logprob", float("inf"), "inf", "Input should be a finite number"),
    ("thresholds.latency_factor_of_warm", float("nan"), "nan", "Input should be "),
    ("thresholds.latency_factor_of_warm", float("inf"), "inf", "Input should be a finite number"),
    ("thresholds.latency_fraction_of_cold", float("nan"), "nan", "Input should be "),
    ("thresholds.min_distinct_tokens", 1, "1", "Input should be greater than or equal to 2"),
    (
        "thresholds.min_distinct_tokens",
        10**400,
        f"1{'0' * 17}...{'0' * 19}",
        "Input should be less than 92233720368547",
    ),
    ("engine.disable_precompile", 0, "0", "Input should be a valid boolean"),
    ("engine", "x" * 999, f"'{'x' * 12}...{'x' * 13}'", "it must be a table"),
]


@pytest.mark.parametrize(("key", "value", "shown", "why"), PROFILE)
def test_a_profile_that_cannot_be_judged(
    key: str, value: object, shown: str, why: str, raw: dict[str, Any], path: Path
) -> None:
    set_at(raw["profile"], key, value)
    path.write_text(json.dumps(raw))
    sentence = f"{path} is not a valid record: profile: Value error, {key}={shown} will not do: {why}"
    assert refused(path).startswith(sentence)


def test_phases_out_of_order(raw: dict[str, Any], path: Path) -> None:
    phases = raw["cycles"][0]["phases"]
    phases[3], phases[4] = phases[4], phases[3]
    path.write_text(json.dumps(raw))
    assert refused(path).startswith(
        f"{path} is not a valid record: cycles.0: Value error, the phases are not in the cycle's order, each once: "
        "engine_ready, generate_result, flush_cache_before_kv_drop, sglang_param_dict2_ready, kv_cache_dropped, "
    )


def test_a_profile_of_another_version_is_judged(raw: dict[str, Any], path: Path) -> None:
    raw["profile"] = {"name": "tiny", "cycle": {"cycles": 1, "new_key": "x"}, "new_table": [1]}
    path.write_text(json.dumps(raw))
    assert passed(judge(Record.load(path)))
    path.write_text(json.dumps(raw | {"profile": {}}))
    assert passed(judge(Record.load(path)))


def test_a_profile_asks_for_cycles_that_are_not_there(raw: dict[str, Any], path: Path) -> None:
    set_at(raw, "profile.cycle.cycles", 1000)
    path.write_text(json.dumps(raw))
    text = not_passed(path)
    assert "inconclusive cycles.no_growth: cycle1: the run ended before this cycle." in text
    assert "    and 998 alike: cycles 2–999\n" in text
    assert "999 inconclusive" in text
