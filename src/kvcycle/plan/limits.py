"""The largest max_total_tokens that the compiler accepts: bisection, started where the arithmetic says it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcycle.plan.model import MaxTokens, PlanError, TokenLimit, peak_rss_bytes

if TYPE_CHECKING:
    from kvcycle.plan.abstract import AbstractEngine
    from kvcycle.plan.compiler import Answer, TPUCompiler

#: No device holds more tokens than this at one byte each.
_MOST_TOKENS = 2**40


def max_tokens(compiler: TPUCompiler, engine: AbstractEngine, started: float) -> MaxTokens:
    """Find the limits beside one parameter set and beside two.

    Args:
        compiler: for the topology.
        engine: whose pools are resized; they are left at some other size.
        started: ``time.perf_counter()`` when the planning began.
    """
    page = int(engine.server_args.page_size)
    asked_before = compiler.compiles
    both = [*engine.params, *engine.params]
    return MaxTokens(
        profile=engine.profile.name,
        topology=compiler.topology.name,
        page_size=page,
        capacity_bytes=compiler.capacity_bytes,
        with_params2=find_limit(compiler, engine, page, beside=both),
        without_params2=find_limit(compiler, engine, page, beside=engine.params),
        params2_fits_alone=compiler.hold(both).refusal is None,
        compiles=compiler.compiles - asked_before,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


def find_limit(compiler: TPUCompiler, engine: AbstractEngine, page: int, *, beside: Sequence[Any]) -> TokenLimit:
    """Find the largest number of tokens whose KV cache fits beside other buffers.

    The compiler accepts the returned number and refuses one page more: both were asked, not computed.

    Args:
        compiler: for the topology.
        engine: whose pools are resized; they are left at some other size.
        page: the page size in tokens.
        beside: the buffers that a device holds as well.
    """
    search = _Search(compiler, engine, page, beside)
    alone = compiler.hold(beside)
    if alone.refusal is not None:
        held = compiler.size(beside).bytes
        return TokenLimit(
            tokens=0,
            refused_tokens=page,
            missing_bytes=-compiler.headroom(held, alone),
            refusal=alone.refusal,
        )
    # KV grows in proportion with its pages: two sizes give the line, and the line the first guess.
    few, many = 64, 128
    at_few, at_many = search.kv_bytes(few), search.kv_bytes(many)
    slope = max((at_many - at_few) // (many - few), 1)
    left = compiler.headroom(compiler.size(beside).bytes, alone)
    low, high = search.bracket(max((left - at_few) // slope + few, 0))
    while high - low > 1:
        middle = (low + high) // 2
        if search.fits(middle):
            low = middle
        else:
            high = middle
    return search.limit(low, high)


class _Search:
    """Asks for numbers of pages, and remembers the answers."""

    def __init__(self, compiler: TPUCompiler, engine: AbstractEngine, page: int, beside: Sequence[Any]) -> None:
        self.compiler, self.engine, self.page, self.beside = compiler, engine, page, beside
        self.answers: dict[int, Answer] = {}

    def buffers(self, pages: int) -> list[Any]:
        self.engine.resize(pages * self.page)
        return self.engine.kv

    def kv_bytes(self, pages: int) -> int:
        return self.compiler.size(self.buffers(pages)).bytes

    def fits(self, pages: int) -> bool:
        if pages not in self.answers:
            self.answers[pages] = self.compiler.hold([*self.beside, *self.buffers(pages)])
        return self.answers[pages].refusal is None

    def bracket(self, guess: int) -> tuple[int, int]:
        """Pages that fit (or 0) and pages that do not, close to each other if the guess is good."""
        guess, step = max(guess, 1), 1
        if not self.fits(guess):
            low, high = guess - 1, guess
            while low > 0 and not self.fits(low):
                step *= 4
                low, high = max(low - step, 0), low
            return low, high
        low, high = guess, guess + 1
        while self.fits(high):
            if high * self.page > _MOST_TOKENS:
                raise PlanError(f"The compiler accepts {high * self.page} tokens; this is no limit to speak of.")
            step *= 4
            low, high = high, high + step
        return low, high

    def limit(self, pages: int, refused: int) -> TokenLimit:
        answer = self.answers[refused]
        held = self.compiler.size(self.beside).bytes
        return TokenLimit(
            tokens=pages * self.page,
            headroom_bytes=self.compiler.headroom(held + self.kv_bytes(pages), self.answers[pages]) if pages else None,
            refused_tokens=refused * self.page,
            missing_bytes=-self.compiler.headroom(held + self.kv_bytes(refused), answer),
            refusal=answer.refusal or "",
        )
