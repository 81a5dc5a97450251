"""Numbers for people: the exact bytes always stand beside the rounded ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcycle.text import exact_bytes, seconds, signed_bytes


@pytest.mark.parametrize(
    ("size", "text", "signed"),
    [
        (0, "0 B", "0 B"),
        (1, "1 B", "+1 B"),
        (-1, "-1 B", "-1 B"),
        (512, "512 B", "+512 B"),
        (1023, "1,023 B", "+1,023 B"),
        (-1023, "-1,023 B", "-1,023 B"),
        (1024, "1.00 KiB (1,024 B)", "+1.00 KiB (1,024 B)"),
        (-1024, "-1.00 KiB (-1,024 B)", "-1.00 KiB (-1,024 B)"),
        (2**20 - 1, "1.00 MiB (1,048,575 B)", "+1.00 MiB (1,048,575 B)"),
        (2**20, "1.00 MiB (1,048,576 B)", "+1.00 MiB (1,048,576 B)"),
        (2_415_992_832, "2.25 GiB (2,415,992,832 B)", "+2.25 GiB (2,415,992,832 B)"),
        (-9_663_750_144, "-9.00 GiB (-9,663,750,144 B)", "-9.00 GiB (-9,663,750,144 B)"),
        (2**42, "4.00 TiB (4,398,046,511,104 B)", "+4.00 TiB (4,398,046,511,104 B)"),
    ],
)
def test_bytes(size: int, text: str, signed: str) -> None:
    assert (exact_bytes(size), signed_bytes(size)) == (text, signed)


@given(st.integers(-(2**60), 2**60))
def test_the_exact_number_is_always_there(size: int) -> None:
    for text in (exact_bytes(size), signed_bytes(size)):
        assert f"{size:,} B" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (0.11742, "0.117 s"), (11.36, "11.4 s"), (99.94, "99.9 s"), (100.4, "100 s"), (1234.5, "1234 s")],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text
