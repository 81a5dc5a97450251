"""What differs from one sglang-jax to another, on schedulers made of plain objects."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from kvcycle import inband, internals
from kvcycle.errors import EngineBusyError, UnsupportedEngineError, UntestedStackWarning
from kvcycle.versions import TESTED_STACKS
from tests.unit.engines import Scheduler, Scheduler003, Scheduler010, engine_of

BOTH = pytest.mark.parametrize("version", [Scheduler003, Scheduler010])


@BOTH
def test_a_call_put_off_runs_after_the_idle_work(version: type[Scheduler003 | Scheduler010]) -> None:
    scheduler = version()
    scheduler.waiting_queue.append("request")
    channel = inband.channel_of(engine_of(scheduler))
    pending = inband.Pending(lambda: scheduler.did.append("call"), at="idle", wait_for_requests=True)
    channel.send(pending)
    scheduler.idle_iteration()
    assert scheduler.did == ["idle work"]
    scheduler.waiting_queue.clear()
    scheduler.idle_iteration()
    assert scheduler.did == ["idle work", "idle work", "call"]
    assert pending.future.done()


@BOTH
def test_a_request_that_waits_for_its_grammar_is_not_idle_and_forbids_the_flush(
    version: type[Scheduler003 | Scheduler010],
) -> None:
    scheduler = version()
    assert internals.is_fully_idle(scheduler)
    internals.flush(scheduler)
    scheduler.grammar_queue.append("request")
    assert not internals.is_fully_idle(scheduler)
    with pytest.raises(EngineBusyError) as refusal:
        internals.flush(scheduler, keep_waiting=True)
    assert str(refusal.value) == "The engine's cache cannot be flushed: requests wait for their grammar: 1."
    assert refusal.value.counts == {"waiting": 1, "running": 0}
    assert scheduler.did == ["flush"]


@BOTH
def test_a_prompt_between_two_chunks_is_not_retracted_where_it_would_be_forgotten(
    version: type[Scheduler003 | Scheduler010],
) -> None:
    scheduler = version()
    assert internals.between_batches(scheduler)
    scheduler.chunked_reqs[0] = SimpleNamespace()
    assert internals.between_batches(scheduler) == (version is Scheduler010)


def test_a_scheduler_without_what_is_needed_is_refused_with_what_was_tested() -> None:
    class Bare(Scheduler):
        _can_flush_cache = property()  # an attribute that hasattr does not find

    with pytest.raises(UnsupportedEngineError) as refusal:
        inband.channel_of(engine_of(Bare()))
    assert str(refusal.value) == (
        "This sglang-jax's scheduler has no on_idle or check_tree_cache, no is_fully_idle or _can_flush_cache; kvcycle "
        "was tested with sglang-jax 0.1.0rc0 on jax 0.10.2 and sglang-jax 0.0.3rc0 on jax 0.8.1."
    )


# Versions ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The means to change what is installed; whatever was warned of before is forgotten, and again afterwards."""
    internals._warn_untested.cache_clear()
    yield monkeypatch
    internals._warn_untested.cache_clear()


def _install(patch: pytest.MonkeyPatch, sglang_jax: str | None, jax_version: str) -> None:
    def version(distribution: str) -> str:
        assert distribution == "sglang-jax"
        if sglang_jax is None:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return sglang_jax

    patch.setattr(importlib.metadata, "version", version)
    patch.setattr(jax, "__version__", jax_version)


@pytest.mark.parametrize(
    ("sglang_jax", "jax_version", "named"),
    [
        ("0.2.0", "0.11.0", "sglang-jax 0.2.0 on jax 0.11.0"),
        ("0.1.0rc0", "0.8.1", "sglang-jax 0.1.0rc0 on jax 0.8.1"),
        (None, "0.10.2", "sglang-jax of an unknown version on jax 0.10.2"),
    ],
)
def test_an_unknown_stack_warns_once_and_goes_on(
    installed: pytest.MonkeyPatch, sglang_jax: str | None, jax_version: str, named: str
) -> None:
    _install(installed, sglang_jax, jax_version)
    with pytest.warns(UntestedStackWarning) as caught:
        channels = [inband.channel_of(engine_of(Scheduler010())) for _ in range(2)]
    sentence = (
        f"This is {named}; kvcycle was tested with sglang-jax 0.1.0rc0 on jax 0.10.2 and sglang-jax 0.0.3rc0 on jax "
        "0.8.1. It goes on: what it needs of sglang-jax is there, and the checks say whether it still does what it did."
    )
    assert [str(warning.message) for warning in caught] == [sentence]
    assert [channel.call(lambda: "lives") for channel in channels] == ["lives", "lives"]


@pytest.mark.parametrize(("sglang_jax", "jax_version"), TESTED_STACKS.items())
def test_a_tested_stack_warns_of_nothing(installed: pytest.MonkeyPatch, sglang_jax: str, jax_version: str) -> None:
    _install(installed, sglang_jax, jax_version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inband.channel_of(engine_of(Scheduler010())).call(lambda: "lives") == "lives"


def test_every_tested_stack_has_its_constraints_and_the_other_way_round(pytestconfig: pytest.Config) -> None:
    def pinned(file: Path) -> tuple[Any, ...]:
        text = file.read_text()
        return tuple(re.findall(rf"^{name}==(\S+)$", text, re.MULTILINE)[0] for name in ("sglang-jax", "jax"))

    files = sorted((pytestconfig.rootpath / "constraints").glob("*.txt"))
    assert {pinned(file) for file in files} == set(TESTED_STACKS.items())
    assert [file.stem for file in files] == sorted(f"sglang-jax-{version}" for version in TESTED_STACKS)
