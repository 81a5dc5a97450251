"""Which figure has a target in which state of the pages, and how many rounds it gets: on planted seconds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import rebuild
from benchmarks.pages import ENVIRONMENT, PageState, Used
from benchmarks.sizes import SIZES

LIMIT = "rebuild ÷ fill by one thread"


def ways(pages: PageState, own_loop_s: float = 0.2, every_core_s: float = 0.06, memset_s: float = 0.06) -> Any:
    """What one engine's rounds found: a rebuild takes 0.1 s."""
    seconds = {"rebuild": [0.1], "fill": [0.1], "memset": [0.05], "own loop": [own_loop_s]}
    seconds |= {"fill by every core": [every_core_s], "memset by every core": [memset_s]}
    if pages == "default":
        seconds["fresh jit"] = [1.0]
    return SimpleNamespace(
        seconds={name: rounds * 8 for name, rounds in seconds.items()},
        first_s=0.1, compiles=[0], compiles_elsewhere=36,
        faults=[0.0], user_s=[0.1], system_s=[0.0], drops=[0.01] * 8, deletes=[0.01] * 8, unmaps=[],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ("default", {"fresh jit per layer ÷ rebuild", "new engine, tiny weights ÷ rebuild"}),
        ("mapped", {LIMIT, "engine's own loop ÷ rebuild", "drop - deleting as much"}),
        ("fresh", set()),
        ("huge", set()),
    ],
)  # fmt: skip
def test_each_ratio_is_judged_where_nothing_else_blurs_it(pages: PageState, expected: set[str]) -> None:
    found = {figure.name: figure for figure in rebuild._figures([ways(pages)], [20.0], pages)}
    assert {name for name, figure in found.items() if figure.target} == expected | {"compilations in a rebuild"}
    assert "engine's own loop ÷ rebuild" in found, "printed in every state"
    assert any(name.startswith("rebuild ÷ fill ") for name in found), "printed in every state"


@pytest.mark.parametrize(
    ("own_loop_s", "every_core_s", "memset_s", "expected"),
    [
        (0.2, 0.06, 0.06, "met"),
        (0.15, 0.06, 0.1, "missed"),
        (0.15, 0.1, 0.06, "missed"),  # the library's memset would do
        (0.1, 0.1, 0.08, "out of reach"),  # the loop is as fast as the memory: nothing can be 1.7 times faster
        (0.2, 0.2, 0.2, "met"),
    ],
)
def test_a_rebuild_that_is_hardly_faster_than_the_engines_own_loop_misses_where_it_could_be(
    own_loop_s: float, every_core_s: float, memset_s: float, expected: str
) -> None:
    taken = ways("mapped", own_loop_s, every_core_s, memset_s)
    found = {figure.name: figure for figure in rebuild._figures([taken], [20.0], "mapped")}
    assert found["engine's own loop ÷ rebuild"].outcome() == expected


#: What is noted of every round, beside what the ways took.
NOTES = ("drops", "deletes", "faults", "user_s", "system_s")


def taker(pages: PageState, rounds: int) -> Any:
    """What takes rounds on an engine, without one, which its own constructor needs; with notes of so many rounds."""
    taken: Any = object.__new__(rebuild._Ways)
    taken.kv, taken.pages, taken.unmaps = SimpleNamespace(bytes=4096 * 100_000), pages, []
    taken.mapped_before = taken.strays = 0
    for notes in NOTES:
        setattr(taken, notes, [float(number) for number in range(rounds)])
    return taken


@pytest.mark.parametrize(
    ("pages", "cache_pages", "mapped", "is_of_it"),
    [
        ("mapped", 100_000, 999, True),  # less than a hundredth of the cache
        ("mapped", 100_000, 1000, False),
        ("mapped", 200, 99, True),  # a small cache: what Python itself maps
        ("mapped", 200, 100, False),
        ("default", 200, 10**6, True),
    ],
)
def test_a_round_that_mapped_pages_is_not_one_of_mapped_pages(
    pages: PageState, cache_pages: int, mapped: int, is_of_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = taker(pages, rounds=2)
    taken.kv.bytes = 4096 * cache_pages
    monkeypatch.setattr(rebuild, "used", lambda: Used(mapped, 0.0, 0.0))
    assert taken._is_of_its_state() is is_of_it
    assert taken._is_of_its_state() is True  # the next is held against its own beginning
    assert taken.strays == (not is_of_it)


def in_rounds(taken: Any, of_rounds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take two rounds that count; the rounds map so many pages, and the engine's loop takes 0, 1, 2, … seconds."""
    mapped, seconds, left = 0, iter(range(100)), iter(of_rounds)

    def one_round() -> float:
        nonlocal mapped
        mapped += next(left)
        for notes in NOTES:
            getattr(taken, notes).append(0.1)
        return float(next(seconds))

    taken.region = SimpleNamespace(fill=int, memset=int, fill_by_every_core=int, memset_by_every_core=int)
    monkeypatch.setattr(taken, "rebuild", lambda: 0.0)
    monkeypatch.setattr(taken, "own_loop", one_round)
    monkeypatch.setattr(taken, "fresh_jit", lambda: 0.0)
    monkeypatch.setattr(rebuild, "used", lambda: Used(mapped, 0.0, 0.0))
    taken.take(rounds=2, jit_rounds=1)


def test_warm_rounds_end_with_the_first_that_maps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is held against its own beginning; of the rounds after them every one that maps pages is left out."""
    taken = taker("mapped", rounds=0)
    # Two warm rounds too many, one that is warm; of three one is left out.
    in_rounds(taken, [9000, 9000, 0, 0, 9000, 0], monkeypatch)
    assert taken.seconds["own loop"] == [3.0, 5.0]
    assert (len(taken.drops), taken.strays) == (2, 0)


def test_rounds_that_map_pages_and_cannot_be_left_out_count_with_their_notes_and_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rebuild, "SPARE_ROUNDS", 1)
    taken = taker("mapped", rounds=0)
    in_rounds(taken, [9000, 9000, 9000, 9000, 0], monkeypatch)  # two warm ones, one left out, one that counts
    assert taken.seconds["own loop"] == [3.0, 4.0]
    assert (len(taken.drops), taken.strays) == (2, 1)


def test_what_has_a_target_has_rounds_enough_to_leave_the_outermost_pair_out() -> None:
    full = SIZES["full"]
    by_state = {state: full.sessions[state] * full.rounds[state] for state in ENVIRONMENT}
    timed = [
        by_state["default"],
        by_state["mapped"],
        full.snapshot_target_rounds,
        full.snapshot_linear_rounds,
        full.generate_rounds,
        full.scale_rounds,
    ]
    assert min(timed) >= 8
