"""How a cycle's generation is compared with the warm one; the loop itself is in tests/simulated."""

from __future__ import annotations

import pytest

from kvcycle.record_parts import Generate
from kvcycle.soak import compared

WARM = Generate(when="warm", cycle=0, seconds=1.0, token_ids=(3, 1, 4, 1, 5, 9), logprobs=(-1.0, -2.0, -3.0, -4.0))


@pytest.mark.parametrize(
    ("token_ids", "logprobs", "expected"),
    [
        ((3, 1, 4, 1), (-1.0, -2.0, -3.0, -4.0), (0, 0.0)),
        ((3, 1, 4, 2), (-1.0, -2.0, -3.0, -4.5), (1, 0.5)),
        ((3, 2, 4, 2), (-1.5, -2.0, -3.0, -4.0), (2, 0.5)),
        ((3, 1), (-1.0, -2.0), (2, 0.0)),
        ((3, 1, 4, 1, 5), (-1.0, -2.0, -3.0, -4.0, -5.0), (1, 0.0)),
        ((), (), (4, None)),
    ],
    ids=["same", "one-other", "two-others", "too-short", "too-long", "nothing"],
)
def test_a_generation_against_the_beginning_of_the_warm_one(
    token_ids: tuple[int, ...], logprobs: tuple[float, ...], expected: tuple[int, float | None]
) -> None:
    generated = WARM.model_copy(update={"token_ids": token_ids, "logprobs": logprobs})
    assert compared(WARM, generated, 4) == expected


def test_without_a_generation_there_is_nothing_to_compare() -> None:
    assert compared(None, WARM, 4) == compared(WARM, None, 4) == (None, None)
