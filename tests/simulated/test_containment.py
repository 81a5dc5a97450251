"""Nothing kills the report: every way in which a run was seen to end, each in a process group of its own.

The run is the suite's own, on one virtual device and mostly without generation. Its parent is a shell, directly or
behind the guard, as make's is: the shell must live.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcycle import checkpoint
from kvcycle.cli import app
from kvcycle.record import Record
from kvcycle.record_parts import PHASES, WEIGHTS_PHASES
from tests.simulated.planted import Ended, run_planted

Suite = Callable[..., Ended]


@pytest.fixture
def suite(tmp_path: Path, project_root: Path) -> Suite:
    """Run the suite with a fault planted in it; see :func:`run_planted`."""
    return partial(run_planted, tmp_path, project_root)


def assert_one_error_and_the_rest_skip(ended: Ended, *causes: str) -> None:
    """The exit code, the JUnit file and the terminal of a run whose boot or cycle failed."""
    assert ended.code == 1, ended.output
    assert ended.outcomes()["error"] == 1
    assert ended.outcomes()["skipped"] == ended.outcomes().total() - 1 >= 24
    for cause in causes:
        assert cause in ended.cause()
        assert cause in ended.output


# Boot ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        (
            "tokenizer.json",
            "{",
            "Exception: EOF while parsing an object at line 1 column 1 (tokenization_utils_fast",
        ),
        ("tokenizer*|vocab*|merges*", None, "RuntimeError: Failed to load the tokenizer."),
        ("model.safetensors", None, "RuntimeError: Cannot find any *.safetensors files in"),
    ],
    ids=["broken_tokenizer", "no_tokenizer", "no_weights"],
)
def test_a_boot_that_fails_names_the_engines_last_words(
    suite: Suite, tmp_path: Path, file: str, content: str | None, cause: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in checkpoint.ensure_builtin("tiny-qwen2").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    for pattern in file.split("|"):
        for path in model.glob(pattern):
            path.unlink()
            if content is not None:
                path.write_text(content)
    ended = suite(keys=(f"model.path={model}",))
    assert_one_error_and_the_rest_skip(ended, f"The engine did not boot. Its last words: {cause}")


def test_an_address_that_is_taken_fails_the_boot_with_the_scheduler_already_running(suite: Suite) -> None:
    # On one host the engine binds sockets in files that it has just made, which nobody can have taken: so it is given
    # a port in place of the last one that it binds.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = suite(
            before=f"""
                import dataclasses
                from sgl_jax.srt.entrypoints import engine as entrypoint
                new = entrypoint.PortArgs.init_new
                entrypoint.PortArgs.init_new = staticmethod(
                    lambda args: dataclasses.replace(new(args), rpc_ipc_name="tcp://127.0.0.1:{port}")
                )
            """
        )
    assert_one_error_and_the_rest_skip(
        ended, f"The engine did not boot: ZMQError: Address already in use (addr='tcp://127.0.0.1:{port}')"
    )


def test_a_cache_that_no_memory_holds_is_refused_before_the_boot(suite: Suite) -> None:
    ended = suite(keys=("engine.max_total_tokens=1000000000",))
    assert_one_error_and_the_rest_skip(
        ended, "tiny on virtual CPU devices needs about", "is free. Use a machine with more, or fewer layers or tokens"
    )


def test_an_allocation_that_fails_in_the_boot_is_the_engines_last_word(suite: Suite) -> None:
    # What is free is said not to bound it: the machine may be full of other things meanwhile.
    ended = suite(
        before="""
            import resource
            import kvcycle.host_memory
            kvcycle.host_memory.free_bytes = lambda: 2**40
            resource.setrlimit(resource.RLIMIT_AS, (5 * 2**30, 5 * 2**30))
        """,
        keys=("engine.max_total_tokens=2000000",),  # 4 GiB
    )
    assert_one_error_and_the_rest_skip(ended, "The engine did not boot. Its last words: ", "RESOURCE_EXHAUSTED")


# The engine dies -----------------------------------------------------------------------------------------------------


def test_a_scheduler_that_dies_while_it_generates_is_named_without_a_guard(suite: Suite) -> None:
    ended = suite(after="scheduler.run_batch = broken", keys=("cycle.generate=true",), guard=False)
    assert_one_error_and_the_rest_skip(ended, "ZeroDivisionError: planted")
    assert ended.phases() == ["engine_ready"]
    assert "latest/index.html (latest -> " in ended.output
    page = (ended.folder / "index.html").read_text(encoding="utf-8")
    assert "The run ended early. The last phase that was measured is engine_ready of cycle 0;" in page


def test_a_scheduler_that_dies_idle_is_noticed_by_the_next_step(suite: Suite) -> None:
    plant = """
        from kvcycle.kv_cache import KVCache
        drop = KVCache.drop
        def late(self, **arguments):
            setattr(scheduler, kvcycle.internals.idle_work(scheduler), broken)
            channel.thread.join()
            return drop(self, **arguments)
        KVCache.drop = late
    """
    ended = suite(after=plant)
    assert_one_error_and_the_rest_skip(ended, "The engine is dead and can only be closed: ZeroDivisionError: planted")
    assert ended.phases() == list(PHASES[:3])


def test_a_scheduler_that_dies_after_the_cycles_fails_the_last_test(suite: Suite) -> None:
    plant = """
        import kvcycle.checks
        judge = kvcycle.checks.judge
        def late(record):
            setattr(scheduler, kvcycle.internals.idle_work(scheduler), broken)
            channel.thread.join()
            return judge(record)
        kvcycle.checks.judge = late
    """
    ended = suite(after=plant)
    assert ended.code == 1, ended.output
    assert "The engine died after its cycles had been run: ZeroDivisionError: planted" in ended.cause()
    assert ended.phases() == [*PHASES, *WEIGHTS_PHASES]


def test_a_sigquit_of_the_engine_to_this_process_is_an_error_of_the_running_test(suite: Suite) -> None:
    ended = suite(after="kvcycle.internals.flush = never", send=signal.SIGQUIT, when="cycle 0: engine_ready:")
    assert_one_error_and_the_rest_skip(ended, "SIGQUIT arrived, by which the engine reports a death")
    assert ended.phases() == ["engine_ready"]


def test_a_sigquit_to_the_parent_is_taken_by_the_guard_and_the_run_does_not_pass(suite: Suite) -> None:
    ended = suite(after="os.kill(os.getppid(), signal.SIGQUIT)")
    assert ended.code == 128 + signal.SIGQUIT, ended.output
    assert set(ended.outcomes()) == {"passed", "skipped"}
    assert "guard: SIGQUIT arrived" in ended.output
    assert ended.phases() == [*PHASES, *WEIGHTS_PHASES]


# The device does not answer ------------------------------------------------------------------------------------------


def test_a_forward_that_never_ends_is_named_with_the_step_that_waited(suite: Suite) -> None:
    ended = suite(
        after="scheduler.tp_worker.worker.forward_batch_generation = never",
        keys=("cycle.generate=true", "timeouts.step_s=3"),
    )
    assert_one_error_and_the_rest_skip(
        ended,
        "cycle 0: generate cold did not end within 3 s (timeouts.step_s). The engine, which has 1 running and 0 "
        "waiting requests, can only be closed now.",
    )
    assert ended.phases() == ["engine_ready"]


def test_a_main_thread_that_no_signal_reaches_still_leaves_reports(suite: Suite) -> None:
    plant = """
        import kvcycle.deadline
        from kvcycle.params import ParamSet
        kvcycle.deadline.GRACE_S = 2
        def wait_in_native_code(*_):
            mutex = ctypes.create_string_buffer(64)
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
        ParamSet.clone = wait_in_native_code
    """
    ended = suite(after=plant, keys=("timeouts.step_s=3",))
    assert ended.code == pytest.ExitCode.INTERNAL_ERROR, ended.output
    assert ended.outcomes()["error"] == 1
    sentence = "cycle 0: sglang_param_dict2_ready did not end within 3 s (timeouts.step_s)."
    assert sentence in ended.cause()
    assert "The main thread is stuck in" in ended.output
    assert ended.phases() == list(PHASES[:4])


def test_a_hang_in_a_tests_own_body_is_its_failure(suite: Suite, tmp_path: Path) -> None:
    test = tmp_path / "test_hang.py"
    test.write_text(
        "import kvcycle, pytest\n"
        "@pytest.mark.tpu\n"
        "def test_hang(engine):\n"
        "    kvcycle.internals.flush = lambda _: __import__('threading').Event().wait()\n"
        "    kvcycle.KVCache(engine).flush()\n"
    )
    ended = suite(arguments=(str(test), "-k", "test_hang", "--timeout", "3"))
    assert ended.code == 1, ended.output
    assert ended.outcomes() == {"failure": 1}
    assert "Timeout (>3.0s) from pytest-timeout" in ended.cause()
    assert "kvcycle.KVCache(engine).flush()" in ended.cause()


# The run is ended ----------------------------------------------------------------------------------------------------


def test_a_sigterm_while_it_generates_leaves_the_reports_of_an_interrupted_run(suite: Suite) -> None:
    ended = suite(
        after="scheduler.tp_worker.worker.forward_batch_generation = never",
        keys=("cycle.generate=true",),
        send=signal.SIGTERM,
        when="generate cold",
    )
    assert ended.code == pytest.ExitCode.INTERRUPTED, ended.output
    assert ended.outcomes() == {"error": 1}
    assert "The run was interrupted by SIGTERM. The last that it said: cycle 0: generate cold" in ended.cause()
    assert ended.phases() == ["engine_ready"]


def test_a_ctrl_c_in_a_step_leaves_the_reports_of_an_interrupted_run(suite: Suite) -> None:
    ended = suite(after="kvcycle.internals.flush = never", send=signal.SIGINT, when="cycle 0: engine_ready:")
    assert ended.code == pytest.ExitCode.INTERRUPTED, ended.output
    assert ended.outcomes() == {"error": 1}
    assert "The run was interrupted by SIGINT (Ctrl-C). The last that it said: cycle 0: engine_ready" in ended.cause()
    assert ended.phases() == ["engine_ready"]


def test_a_killed_run_is_recovered_from_what_it_left(suite: Suite) -> None:
    ended = suite(after="kvcycle.internals.flush = never", send=signal.SIGKILL, when="cycle 0: engine_ready:")
    assert ended.code == 128 + signal.SIGKILL, ended.output
    assert "was killed by SIGKILL" in ended.output
    assert "kvcycle report --recover" in ended.output
    assert ended.phases() == ["engine_ready"]
    assert not (ended.folder / "junit.xml").exists()

    done = CliRunner().invoke(app, ["report", "--recover", str(ended.folder)])
    assert done.exit_code == 1, done.output
    assert ended.outcomes()["error"] == 1
    assert ended.outcomes()["skipped"] == ended.outcomes().total() - 1 >= 24
    last = "The last phase that was measured is engine_ready of cycle 0."
    assert f"The run was killed while this test ran. {last}" in ended.cause()
    assert last in done.output
    assert Record.load(ended.folder / "record.json").checks != ()
    again = CliRunner().invoke(app, ["report", "--recover", str(ended.folder)])
    assert again.exit_code == 2
    assert "junit.xml is whole, the run wrote it when it ended." in again.output.replace("\n", "")
