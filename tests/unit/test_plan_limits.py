"""The search for the token limit, against a compiler of plain arithmetic; and the compiler's words, read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcycle.plan.abstract import AbstractEngine
from kvcycle.plan.compiler import Answer, Size, TPUCompiler, first_line, memory_refusal
from kvcycle.plan.limits import find_limit
from kvcycle.plan.model import PlanError

PROGRAM_BYTES = 48_640


class FakeCompiler:
    """Holds buffers, which are plain sizes, up to its capacity."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.compiles = 0

    def hold(self, buffers: list[int]) -> Answer:
        self.compiles += 1
        total = sum(buffers)
        fits = total + PROGRAM_BYTES <= self.capacity_bytes
        return Answer(total if fits else None, PROGRAM_BYTES, None if fits else "Ran out of memory.")

    def size(self, buffers: list[int]) -> Size:
        return Size(sum(buffers))

    def headroom(self, held_bytes: int, answer: Answer) -> int:
        return self.capacity_bytes - held_bytes - answer.program_bytes


class FakeEngine:
    """A pool of one buffer: padding, and so much a page."""

    def __init__(self, page: int, page_bytes: int, padding_bytes: int) -> None:
        self.page, self.page_bytes, self.padding_bytes = page, page_bytes, padding_bytes
        self.kv: list[int] = []

    def resize(self, tokens: int) -> None:
        assert tokens % self.page == 0
        self.kv = [self.padding_bytes + tokens // self.page * self.page_bytes]


def limit_of(capacity: int, beside: int, page: int, page_bytes: int, padding: int) -> tuple[Any, FakeCompiler]:
    compiler = FakeCompiler(capacity)
    found = find_limit(
        cast(TPUCompiler, compiler),
        cast(AbstractEngine, FakeEngine(page, page_bytes, padding)),
        page,
        beside=[beside],
    )
    return found, compiler


@given(
    capacity=st.integers(2**20, 2**37),
    beside=st.integers(0, 2**36),
    page=st.sampled_from([1, 16, 64, 128]),
    page_bytes=st.integers(512, 2**22),
    padding=st.integers(0, 2**22),
)
def test_the_limit_fits_and_one_page_more_does_not(
    capacity: int, beside: int, page: int, page_bytes: int, padding: int
) -> None:
    found, compiler = limit_of(capacity, beside, page, page_bytes, padding)
    room = capacity - PROGRAM_BYTES - beside - padding
    assert found.tokens == max(room // page_bytes, 0) * page
    assert found.refused_tokens == found.tokens + page
    assert found.missing_bytes > 0
    assert (found.headroom_bytes is None) == (found.tokens == 0)
    # The arithmetic starts where it ends: not a bisection of a whole device.
    assert compiler.compiles <= 8


def test_no_room_for_a_page_is_a_limit_of_none() -> None:
    found, _ = limit_of(capacity=2**20, beside=2**21, page=16, page_bytes=512, padding=0)
    assert (found.tokens, found.refused_tokens) == (0, 16)
    assert found.missing_bytes == 2**21 + PROGRAM_BYTES - 2**20


def test_the_search_recovers_from_a_guess_that_is_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcycle.plan import limits

    for shift in (-100_000, 100_000):
        original = limits._Search.bracket
        monkeypatch.setattr(
            limits._Search, "bracket", lambda self, guess, by=shift, go=original: go(self, max(guess + by, 0))
        )
        found, compiler = limit_of(capacity=2**30, beside=2**20, page=1, page_bytes=2048, padding=0)
        assert found.tokens == (2**30 - 2**20 - PROGRAM_BYTES) // 2048
        assert compiler.compiles < 60
        monkeypatch.setattr(limits._Search, "bracket", original)


REFUSAL = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in \
memory space hbm. Used 30.75G of 30.75G hbm. Exceeded hbm capacity by 512B.

Total hbm usage >= 32.00G:
    reserved          1.25G
    program           45.5K
    arguments        30.75G
"""


def test_a_refusal_for_memory_is_told_from_other_failures() -> None:
    assert memory_refusal(RuntimeError(REFUSAL)) == (
        "Ran out of memory in memory space hbm. Used 30.75G of 30.75G hbm. Exceeded hbm capacity by 512B."
    )
    assert memory_refusal(RuntimeError("RESOURCE_EXHAUSTED: no more")) == "RESOURCE_EXHAUSTED: no more"
    assert memory_refusal(RuntimeError("UNIMPLEMENTED: not on this TPU")) is None


def test_the_refused_programs_own_size_is_read_from_the_refusal() -> None:
    asked = SimpleNamespace(hold=lambda _: pytest.fail("the refusal says it"))
    size = TPUCompiler._refused_program_bytes(cast(TPUCompiler, asked), REFUSAL, 434)
    assert size == int(45.5 * 1024) + 2560


@pytest.mark.parametrize("true_mib", [16_126, 31_485, 98_041])
def test_the_capacity_is_checked_against_the_compiler_and_found_where_it_differs(true_mib: int) -> None:
    asked: list[int] = []

    def grants(size: int) -> bool:
        asked.append(size)
        return size + PROGRAM_BYTES <= true_mib * 2**20

    compiler = cast(TPUCompiler, SimpleNamespace(_grants=grants))
    assert TPUCompiler._capacity(compiler, true_mib * 2**20) == true_mib * 2**20
    assert len(asked) == 2
    for wrong in (true_mib - 1, true_mib + 1, 2 * true_mib):
        assert TPUCompiler._capacity(compiler, wrong * 2**20) == true_mib * 2**20


def test_the_verdict_decides_over_a_sum_that_contradicts_it_by_a_tile() -> None:
    compiler = cast(TPUCompiler, SimpleNamespace(capacity_bytes=10_000))
    assert TPUCompiler.headroom(compiler, 9_000, Answer(9_000, 2_000, None)) == 0
    assert TPUCompiler.headroom(compiler, 1_000, Answer(None, 2_000, "Ran out of memory.")) == -512


def test_an_error_without_words_is_named_by_its_class() -> None:
    assert first_line(ValueError("one.\ntwo")) == "one"
    assert first_line(NotImplementedError()) == "NotImplementedError"


def test_a_stack_that_allocates_elsewhere_is_refused_by_name() -> None:
    from kvcycle.plan.abstract import _replace

    module = SimpleNamespace(__name__="sgl_jax.srt.mem_cache.memory_pool", there=1)
    _replace(module, "there", 2)
    assert module.there == 2
    with pytest.raises(
        PlanError, match=r"cannot plan with sglang-jax .*: sgl_jax\.srt\.mem_cache\.memory_pool has no "
    ):
        _replace(module, "_get_kv_zero_allocator", None)
