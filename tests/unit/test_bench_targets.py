"""Which figure has a target in which state of the pages, and how many rounds it gets: on planted seconds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import rebuild
from benchmarks.pages import ENVIRONMENT, PageState, Used
from benchmarks.sizes import SIZES

LIMIT = "rebuild ÷ fill by one thread"


def ways(pages: PageState, own_loop_s: float = 0.2, every_core_s: float = 0.06) -> Any:
    """What one engine's rounds found: a rebuild takes 0.1 s."""
    seconds = {"rebuild": [0.1], "fill": [0.1], "memset": [0.05], "own loop": [own_loop_s]}
    seconds["fill by every core"] = [every_core_s]
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
    assert LIMIT.replace("fill", "fill of fresh pages,").replace("by one", "1") in found or LIMIT in found


@pytest.mark.parametrize(
    ("own_loop_s", "every_core_s", "expected"),
    [
        (0.2, 0.06, "met"),
        (0.15, 0.06, "missed"),
        (0.1, 0.1, "out of reach"),  # the loop is as fast as the memory: nothing can be 1.7 times faster
        (0.2, 0.2, "met"),
    ],
)
def test_a_rebuild_that_is_hardly_faster_than_the_engines_own_loop_misses_where_it_could_be(
    own_loop_s: float, every_core_s: float, expected: str
) -> None:
    found = {
        figure.name: figure for figure in rebuild._figures([ways("mapped", own_loop_s, every_core_s)], [20.0], "mapped")
    }
    assert found["engine's own loop ÷ rebuild"].outcome(0.0) == expected


@pytest.mark.parametrize(("pages", "left_out"), [("mapped", True), ("default", False)])
def test_a_round_that_mapped_pages_is_not_one_of_mapped_pages(
    pages: PageState, left_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = object.__new__(rebuild._Ways)  # its own constructor needs an engine
    ways.kv, ways.pages, ways.mapped_before = SimpleNamespace(bytes=4096 * 1000), pages, 0  # type: ignore[assignment]
    ways.drops, ways.deletes, ways.unmaps = [0.1, 0.2], [0.3, 0.4], []
    ways.faults, ways.user_s, ways.system_s = [0.0, 5.0], [0.1, 0.1], [0.0, 0.2]
    faults = iter([5, 5, 55, 55] if left_out else [5, 55])
    monkeypatch.setattr(rebuild, "used", lambda: Used(next(faults), 0.0, 0.0))
    assert ways._counts() is True  # five pages are nearly none
    assert ways._counts() is not left_out
    assert ways.drops == ([0.1] if left_out else [0.1, 0.2])
    assert (len(ways.deletes), len(ways.faults), ways.unmaps) == (len(ways.drops), len(ways.drops), [])


def test_warm_rounds_end_with_the_first_that_maps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is held against its own beginning; of the rounds after them every one that maps pages is left out."""
    taken = object.__new__(rebuild._Ways)
    taken.kv, taken.pages, taken.mapped_before = SimpleNamespace(bytes=4096 * 1000), "mapped", 0  # type: ignore[assignment]
    mapped, seconds = 0, iter(range(100))
    of_rounds = iter([900, 900, 0, 0, 900, 0])  # two warm rounds too many, one that is warm; of three one is left out

    def one_round() -> float:
        nonlocal mapped
        mapped += next(of_rounds)
        for notes in (taken.drops, taken.deletes, taken.faults, taken.user_s, taken.system_s):
            notes.append(0.1)
        return float(next(seconds))

    taken.region = SimpleNamespace(fill=int, memset=int, fill_by_every_core=int)  # type: ignore[assignment]
    for name in ("drops", "deletes", "unmaps", "faults", "user_s", "system_s"):
        setattr(taken, name, [])
    monkeypatch.setattr(taken, "rebuild", lambda: 0.0)
    monkeypatch.setattr(taken, "own_loop", one_round)
    monkeypatch.setattr(taken, "fresh_jit", lambda: 0.0)
    monkeypatch.setattr(rebuild, "used", lambda: Used(mapped, 0.0, 0.0))
    taken.take(rounds=2, jit_rounds=1)
    assert taken.seconds["own loop"] == [3.0, 5.0]
    assert len(taken.drops) == 2


def test_what_has_a_target_has_rounds_enough_to_leave_the_outermost_pair_out() -> None:
    full = SIZES["full"]
    by_state = {state: full.sessions[state] * full.rounds[state] for state in ENVIRONMENT}
    timed = [
        by_state["default"],
        by_state["mapped"],
        full.snapshot_target_rounds,
        full.generate_rounds,
        full.scale_rounds,
    ]
    assert min(timed) >= 8
