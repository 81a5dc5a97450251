"""Engines in processes of their own: one that the user booted, one that crashes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcycle import checkpoint

Run = Callable[..., subprocess.CompletedProcess[str]]

# Each print has one text: several are written one by one (python -u), and the engine's log may come in between.
_USER_SCRIPT = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
from sgl_jax.srt.entrypoints.engine import Engine

import kvcycle

engine = Engine(
    model_path={model!r}, device="cpu", attention_backend="native", enable_single_process=True, tp_size=2,
    disable_precompile=True, skip_server_warmup=True, max_total_tokens=1024, max_prefill_tokens=256,
    chunked_prefill_size=256, max_running_requests=4, page_size=16, dtype="bfloat16", log_level="error",
)
ask = dict(prompt="Hello", sampling_params=dict(temperature=0, max_new_tokens=4, ignore_eos=True))
before = engine.generate(**ask)
kv = kvcycle.KVCache(engine)
with kv.released() as freed:
    print(f"freed {{freed.bytes}} {{freed.buffers}} {{kv.state}}")
after = engine.generate(**ask)
assert after["text"] == before["text"], (before, after)
print(f"same output {{kv.state}}")
os._exit(0)  # the engine is the user's own, and so is leaving it
"""

_CRASH_SCRIPT = """
import kvcycle
from kvcycle import internals
from kvcycle.errors import EngineCrashedError

profile = kvcycle.load_profile("tiny", {{"engine.tp_size": 1, "engine.max_total_tokens": 1024}})
with kvcycle.boot(profile, "cpu") as engine:
    kv = kvcycle.KVCache(engine)
    scheduler = internals.scheduler_of(engine)

    def broken(*_):
        raise ZeroDivisionError("planted in the scheduler's loop")

    scheduler.{where} = broken
    try:
        engine.generate(prompt="Hello", sampling_params=dict(temperature=0, max_new_tokens=2))
    except EngineCrashedError as error:
        print(f"caught: {{error}}")
    try:
        kv.drop()
    except EngineCrashedError as error:
        print(f"drop: {{error}}")
print("left in order")
"""

_LOOP_CRASH_SCRIPT = """
import kvcycle
from kvcycle import inband, internals
from kvcycle.errors import EngineCrashedError
from sgl_jax.srt.managers import tokenizer_manager

kill = tokenizer_manager.kill_process_tree
profile = kvcycle.load_profile("tiny", {{"engine.tp_size": 1, "engine.max_total_tokens": 1024}})
with kvcycle.boot(profile, "cpu") as engine:
    channel = inband.channel_of(engine)
    channel.lacking.add("a test")  # the request waits, and is not compiled for
    channel.call(lambda: channel.scheduler.{socket}.send_pyobj("no message of the engine's"))
    try:
        engine.generate(prompt="Hello", sampling_params=dict(temperature=0, max_new_tokens=2))
    except EngineCrashedError as error:
        print(f"caught: {{error}}")
    print(f"replaced: {{tokenizer_manager.kill_process_tree is not kill}}")
print(f"given back: {{tokenizer_manager.kill_process_tree is kill}}")
"""


@pytest.fixture
def run_script(guarded: Run, tmp_path: Path) -> Run:
    """Run a script that stands outside the project."""

    def run(text: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(text)
        return guarded(str(script), cwd=tmp_path, timeout_s=120)

    return run


def test_a_users_own_engine_can_be_released(run_script: Run) -> None:
    model = str(checkpoint.ensure_builtin("tiny-qwen2"))
    done = run_script(_USER_SCRIPT.format(model=model))
    assert done.returncode == 0, done.stdout
    # 4 layers x (1024 + 16) tokens x 2 heads x 2 x 128 x 2 B
    assert "freed 4259840 4 dropped" in done.stdout
    assert "same output resident" in done.stdout


def test_a_crash_in_the_scheduler_becomes_an_error_in_the_caller(run_script: Run) -> None:
    done = run_script(_CRASH_SCRIPT.format(where="get_next_batch_to_run"))
    assert done.returncode == 0, done.stdout
    died = "caught: The engine died while serving a request: ZeroDivisionError: planted in the scheduler's loop"
    dead = "caught: The engine is dead and can only be closed: ZeroDivisionError: planted in the scheduler's loop"
    assert died in done.stdout or dead in done.stdout
    assert "drop: The engine is dead and can only be closed" in done.stdout
    assert "left in order" in done.stdout


@pytest.mark.parametrize("socket", ["send_to_tokenizer", "send_to_detokenizer"])
def test_a_crash_beside_the_scheduler_becomes_an_error_in_the_caller(run_script: Run, socket: str) -> None:
    done = run_script(_LOOP_CRASH_SCRIPT.format(socket=socket))
    assert done.returncode == 0, done.stdout
    assert re.search(r"caught: The engine (died while|is dead).*: ValueError: Invalid object: no message", done.stdout)
    assert "replaced: True" in done.stdout
    assert "given back: True" in done.stdout
