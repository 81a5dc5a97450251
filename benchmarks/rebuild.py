"""Drop and rebuild of 36 layers and 2.25 GiB, against the limit and against every other way to get the buffers back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import kvcycle
from benchmarks import engines
from benchmarks.measure import Way, in_turn, load, seconds_of
from benchmarks.pages import TITLES, PageState, Region, used
from benchmarks.results import Figure, Scenario, Target
from benchmarks.sizes import Sizes
from benchmarks.stats import differences, ratios
from kvcycle import compiles, inband, internals
from kvcycle.buffers import delete
from kvcycle.text import exact_bytes

_PAGE_BYTES = 4096
#: The states in which a rebuild is held against the limit, memory that is mapped already.
_LIMITED: tuple[PageState, ...] = ("default", "mapped")
#: Rounds that may be left out, since they mapped pages where none should be.
SPARE_ROUNDS = 8
#: What a round may map all the same: so much of the KV cache, and a hundred pages of Python's own.
_FEW, _FEW_PAGES = 0.01, 100


def run(sizes: Sizes, pages: PageState) -> Scenario:
    """Boot, and take every way in turn on the live engine; again on the next engine."""
    profile = engines.profile(sizes.layers, sizes.tokens)
    boots: list[float] = []
    found: list[_Ways] = []
    region: Region | None = None  # one for all engines: the first write of a page takes longer than all others together
    with load() as busy, engines.malloc_as_started(pages):
        for _ in range(sizes.sessions[pages]):
            started = time.perf_counter()
            booted = kvcycle.boot(profile, "cpu")
            boots.append(time.perf_counter() - started)
            with booted as engine:
                if region is None and pages in _LIMITED:
                    kv = kvcycle.KVCache(engine)
                    region = Region(kv.bytes, len(kv.specs) * engines.DEVICES)
                ways = _Ways(engine, pages, region)
                ways.take(sizes.rounds[pages], min(sizes.jit_rounds, sizes.rounds[pages]))
                found.append(ways)
    if region is not None:
        region.unmap()
    size = found[0].kv.bytes
    strays = sum(ways.strays for ways in found)
    return Scenario(
        name=f"rebuild-{pages}",
        title=f"{TITLES[pages]}: {sizes.layers} layers, {exact_bytes(size)}, {engines.DEVICES} devices",
        figures=tuple(_figures(found, boots, pages)),
        seconds=busy.seconds,
        others_share=busy.others_share,
        disturbed=f"{strays} rounds mapped pages where every page should be mapped already" if strays else "",
    )


class _Ways:
    """The ways to fill as much memory, and what was measured of them on one engine."""

    def __init__(self, engine: Any, pages: PageState, region: Region | None) -> None:
        self.kv = kvcycle.KVCache(engine)
        self.channel = inband.channel_of(engine)
        self.pool = internals.pools_of(engine)["token_to_kv_pool"]
        self.pages = pages
        self.region = region
        self.drops: list[float] = []
        self.deletes: list[float] = []
        self.unmaps: list[float] = []
        #: Where a rebuild's time goes: pages mapped meanwhile, in percent of its own, and processor time.
        self.faults: list[float] = []
        self.user_s: list[float] = []
        self.system_s: list[float] = []
        self.compiles: list[int] = []
        self.compiles_elsewhere = 0
        self.mapped_before = 0
        #: Rounds that count and are not of the state, when no more could be left out.
        self.strays = 0
        self.first_s = 0.0
        self.seconds: dict[str, list[float]] = {}

    def take(self, rounds: int, jit_rounds: int) -> None:
        """The first rebuild of this engine; then rounds that do not count, and those that do.

        One does not count; where every page shall be mapped already, all until that is so, and none in which pages were
        mapped after all, since a heap grew. With default malloc the last ``jit_rounds`` of those that do are with fresh
        jits, which are never warm: what they leave behind disturbs no other way.
        """
        self.first_s = self.rebuild()
        ways: dict[str, Way] = {"rebuild": self.rebuild}
        if self.region is not None:
            region = self.region
            ways["fill"] = lambda: seconds_of(region.fill)
            ways["memset"] = lambda: seconds_of(region.memset)
            ways["fill by every core"] = lambda: seconds_of(region.fill_by_every_core)
            ways["memset by every core"] = lambda: seconds_of(region.memset_by_every_core)
        else:
            ways["fill"] = self.fresh_fill
        if self.pages != "huge":
            ways["own loop"] = self.own_loop
        spare = SPARE_ROUNDS if self.pages == "mapped" else 0
        for _ in range(1 + spare):
            self._forget_notes()
            in_turn(ways, 1)
            if self._mapped_none():
                break
        self._forget_notes()
        if self.pages == "default":
            self.seconds = in_turn(ways, rounds - jit_rounds)
            for name, seconds in in_turn(ways | {"fresh jit": self.fresh_jit}, jit_rounds).items():
                self.seconds[name] = [*self.seconds.get(name, ()), *seconds]
            return
        self.seconds = in_turn(ways, rounds, counts=self._is_of_its_state, spare=spare, left_out=self._leave_out)
        if self.pages == "mapped":
            self.fresh_jit()  # not timed: that the counter sees compilations

    def _notes(self) -> tuple[list[float], ...]:
        """What is noted of every round."""
        return self.drops, self.deletes, self.unmaps, self.faults, self.user_s, self.system_s

    def _forget_notes(self) -> None:
        """None of the rounds so far counts; the next begins."""
        for notes in self._notes():
            notes.clear()
        self.mapped_before = used().faults

    def _is_of_its_state(self) -> bool:
        """Whether the round that has ended is; the next begins."""
        is_of_it = self.pages != "mapped" or self._mapped_none()
        self.strays += not is_of_it
        self.mapped_before = used().faults
        return is_of_it

    def _leave_out(self) -> None:
        """The round that has ended does not count."""
        self.strays -= 1
        for notes in self._notes():
            del notes[-1:]

    def _mapped_none(self) -> bool:
        """Whether the round that has ended mapped none of its pages, or nearly none."""
        few = max(_FEW_PAGES, _FEW * self.kv.bytes / _PAGE_BYTES)
        return used().faults - self.mapped_before < few

    def rebuild(self) -> float:
        """kvcycle's: drop, and the seconds of the rebuild."""
        self.drops.append(seconds_of(self.kv.drop))
        before = used()
        with compiles.counting() as span:
            seconds = seconds_of(self.kv.rebuild)
        after = used()
        self.faults.append((after.faults - before.faults) * _PAGE_BYTES / self.kv.bytes * 100)
        self.user_s.append(after.user_s - before.user_s)
        self.system_s.append(after.system_s - before.system_s)
        self.compiles.append(span.compiles.trace + span.compiles.lower + span.compiles.backend)
        return seconds

    def own_loop(self) -> float:
        """The engine's: what its pool was made with, which calls one jitted allocator for each layer."""
        held = self.pool.kv_buffer

        def allocate() -> list[Any]:
            self.pool._create_buffers()
            return list(self.pool.kv_buffer)

        try:
            seconds, deleted_s = self._other_way(allocate)
        finally:
            self.pool.kv_buffer = held  # the slots are this list's
        self.deletes.append(deleted_s)
        return seconds

    def fresh_jit(self) -> float:
        """A jit for each layer, as engines do that build their buffers as at the start; counted, to see it compile."""
        specs = self.kv.specs

        def allocate() -> list[Any]:
            return [
                jax.jit(lambda spec=spec: jnp.zeros(spec.shape, spec.dtype), out_shardings=spec.sharding)()
                for spec in specs
            ]

        with compiles.counting() as span:
            seconds, _ = self._other_way(allocate)
        self.compiles_elsewhere = span.compiles.backend
        return seconds

    def fresh_fill(self) -> float:
        """Map as much, fill it and unmap it: the seconds of mapping and filling."""
        regions: list[Region] = []

        def map_and_fill() -> None:
            regions.append(Region(self.kv.bytes))
            regions[0].fill()

        seconds = seconds_of(map_and_fill)
        self.unmaps.append(seconds_of(regions[0].unmap))
        return seconds

    def _other_way(self, allocate: Callable[[], list[Any]]) -> tuple[float, float]:
        """While dropped, on the scheduler's thread as a rebuild: seconds of allocating, and of deleting it again."""
        arrays: list[Any] = []

        def fill() -> None:
            arrays.extend(allocate())
            jax.block_until_ready(arrays)

        with self.kv.released():
            seconds = seconds_of(lambda: self.channel.call(fill))
            deleted_s = seconds_of(lambda: self.channel.call(lambda: delete(arrays)))
        return seconds, deleted_s


def _figures(found: list[_Ways], boots: list[float], pages: PageState) -> list[Figure]:
    def rounds(name: str) -> list[float]:
        return [seconds for ways in found for seconds in ways.seconds[name]]

    # Each yardstick is for one state. The limit, and the engine's own loop, write the same memory and do nothing else:
    # they are judged where no page is mapped anew, as none of the limit's is. With default malloc 5 to 35 % of them
    # are, at random and as the machine has it: noise, and of neither's making. A fresh jit compiles, which no page
    # fault hides: default malloc, as engines have it.
    rebuilds, own_memory = rounds("rebuild"), pages in _LIMITED
    limit = "fill by one thread" if own_memory else "fill of fresh pages, 1 thread"
    figures = [
        Figure(name="rebuild", unit="ms", rounds=_ms(rebuilds)),
        Figure(
            name=f"rebuild ÷ {limit}",
            unit="x",
            rounds=ratios(rebuilds, rounds("fill")),
            target=Target(sense="at most", limit=1.5) if pages == "mapped" else None,
        ),
    ]
    if own_memory:
        figures += [
            Figure(name=f"rebuild ÷ {label}", unit="x", rounds=ratios(rebuilds, rounds(way)))
            for way, label in {
                "fill by every core": "fill by every core",
                "memset": "memset by one thread",
                "memset by every core": "memset by every core, by buffer",
            }.items()
        ]
    if "own loop" in found[0].seconds:
        loops, target = rounds("own loop"), None
        if pages == "mapped":
            # What a rebuild could do at best in this round, without machine code of its own. One memset of all the
            # memory is faster on some machines, but separate buffers are not one memory.
            fastest = list(map(min, rounds("fill by every core"), rounds("memset by every core")))
            best = ratios(loops, fastest)
            target = Target(sense="at least", limit=1.7, best=best)
        figures.append(
            Figure(name="engine's own loop ÷ rebuild", unit="x", rounds=ratios(loops, rebuilds), target=target)
        )
    if "fresh jit" in found[0].seconds:
        figures.append(
            Figure(
                name="fresh jit per layer ÷ rebuild",
                unit="x",
                rounds=ratios(rounds("fresh jit"), _beside(found, "fresh jit")),
                target=Target(sense="at least", limit=6.0),
            )
        )
    if pages == "default":
        later = [statistics.median(ways.seconds["rebuild"]) for ways in found]
        figures += [
            Figure(
                name="new engine, tiny weights ÷ rebuild",
                unit="x",
                rounds=ratios(boots, later),
                target=Target(sense="at least", limit=20.0),
            ),
            Figure(name="first rebuild ÷ later ones", unit="x", rounds=ratios([ways.first_s for ways in found], later)),
        ]
    figures += [
        Figure(name="pages mapped anew by a rebuild", unit="%", rounds=_all(found, "faults")),
        Figure(name="a rebuild's processor time: user", unit="ms", rounds=_ms(_all(found, "user_s"))),
        Figure(name="system (mapping pages)", unit="ms", rounds=_ms(_all(found, "system_s"))),
    ]
    figures.append(
        Figure(
            name="compilations in a rebuild",
            unit="compilations",
            rounds=_all(found, "compiles"),
            target=Target(sense="at most", limit=0),
        )
    )
    if own_memory:
        elsewhere = tuple(float(ways.compiles_elsewhere) for ways in found)
        figures.append(Figure(name="the same counter, fresh jits", unit="compilations", rounds=elsewhere))
    return figures + _drop_figures(found, pages)


def _beside(found: list[_Ways], name: str) -> list[float]:
    """The rebuilds of the rounds in which this way was taken: each engine's last."""
    return [seconds for ways in found for seconds in ways.seconds["rebuild"][-len(ways.seconds[name]) :]]


def _drop_figures(found: list[_Ways], pages: PageState) -> list[Figure]:
    """Every drop against a deletion of as many arrays in the same round: what is left is not the system's unmapping.

    The target is for where the system unmaps nothing: elsewhere two unmappings differ by more than it allows.
    """
    figures = [Figure(name="drop", unit="ms", rounds=_ms(_all(found, "drops")))]
    unmaps, deletes = _all(found, "unmaps"), _all(found, "deletes")
    if unmaps:
        figures.append(Figure(name="unmapping as much, by itself", unit="ms", rounds=_ms(unmaps)))
    if deletes:
        more = differences(figures[0].rounds, _ms(deletes))
        target = Target(sense="at most", limit=5.0) if pages == "mapped" else None
        figures.append(Figure(name="drop - deleting as much", unit="ms", rounds=more, target=target))
    return figures


def _ms(seconds: Sequence[float]) -> tuple[float, ...]:
    return tuple(one * 1000 for one in seconds)


def _all(found: list[_Ways], name: str) -> tuple[float, ...]:
    return tuple(float(value) for ways in found for value in getattr(ways, name))
