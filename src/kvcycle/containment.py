"""Keeps a crash of the engine from taking the process, its parent and the report with it.

At any exception in the scheduler's loop, the forward thread or at boot, sglang-jax sends SIGQUIT to its own process or
to its parent (make, the shell, the CI runner) and kills its whole tree. Here the crash becomes an error in the caller
instead, with the engine's own last words. Nothing else of sglang-jax is replaced than what is named here, and each part
is given back where it outlives the engine. Seen on sglang-jax 0.1.0rc0 and 0.0.3rc0:

- ``entrypoints.engine._set_envs_and_config``, during the boot: it installs the SIGQUIT handler that kills the tree, so
  ours follows it at once;
- ``parent_process`` of the scheduler (its watchdog), of the overlap worker (its forward thread) and of the worker
  behind it (its expert thread): the addressee of their SIGQUIT. What the scheduler's loop and the detokenizer send goes
  to this process, where our handler takes it;
- ``managers.tokenizer_manager.kill_process_tree``, until the engine is closed: called when the tokenizer's loop fails;
- the SIGTERM and SIGQUIT handlers of the engine's event loop: with them a SIGTERM is swallowed while the loop is not
  running, and a SIGQUIT kills; SIGCHLD's, which reaps children that are not the engine's;
- ``tokenizer_manager.generate_request`` of the engine: a request whose engine has died would wait for ever.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import re
import signal
import textwrap
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from kvcycle import hosts
from kvcycle.deadline import deadline
from kvcycle.errors import EngineBootError, EngineCrashedError
from kvcycle.inband import Channel

_SIGNALS = (signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD)
#: Beginnings of the messages with which a part of the engine reports its own death.
_DEATH_NOTES = (
    "Scheduler hit an exception",
    "ModelWorkerClient hit an exception",
    "ModelWorker sync thread hit an exception",
    "TokenizerManager hit an exception",
    "DetokenizerManager hit an exception",
    "Watchdog timeout",
)
#: A cause that goes on for longer is cut: an exception of XLA's may hold a whole computation.
_CAUSE_CHARACTERS = 500
_FRAME = re.compile(r'^\s+File "(.+)", line (\d+), in (.+)$', re.MULTILINE)


class LastWords(logging.Handler):
    """Remembers the engine's latest error messages, and tells at once when one of them is its death note."""

    def __init__(self, on_death: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._recent: deque[str] = deque(maxlen=5)
        self._on_death = on_death

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging, on whatever thread speaks."""
        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            self._recent.append(message)
        if message.startswith(_DEATH_NOTES):
            self._on_death(cause_in(message))

    @property
    def text(self) -> str:
        """The cause that the latest error names."""
        return cause_in(self._recent[-1]) if self._recent else "it left no message"


def cause_in(message: str) -> str:
    """The exception at the end of a traceback, in one line, and the place that raised it; without jax's remarks.

    A message without a traceback is its own cause.
    """
    lines = message.strip().splitlines()
    starts = [index for index, line in enumerate(lines) if line.endswith("Traceback (most recent call last):")]
    place = ""
    if starts:
        last = lines[starts[-1] + 1 :]
        frames = list(itertools.takewhile(lambda line: line[:1].isspace(), last))
        if found := _FRAME.findall("\n".join(frames)):
            file, line, function = found[-1]
            place = f" ({Path(file).name}:{line}, in {function})"
        lines = list(itertools.takewhile(lambda line: not line.startswith("----"), last[len(frames) :]))
    text = " ".join(line.strip() for line in lines if line.strip())
    return (textwrap.shorten(text, _CAUSE_CHARACTERS, placeholder=" …") or "an empty message") + place


class Containment:
    """What surrounds one engine from before its boot until after its close; see the module's text."""

    def __init__(self) -> None:
        self.crash: str | None = None
        self._channel: Channel | None = None
        self._wake: list[Callable[[], None]] = []
        self._handlers: dict[signal.Signals, Any] = {}
        self._give_back: list[Callable[[], None]] = []
        self.last_words = LastWords(self.note_crash)

    def note_crash(self, cause: str) -> None:
        """Remember the first cause of death, and let every waiting caller know."""
        if self.crash is None:
            self.crash = cause
        if self._channel is not None:
            self._channel.crash = self.crash
        for wake in list(self._wake):
            with suppress(RuntimeError):  # a loop that is closed has no waiting caller
                wake()

    @contextmanager
    def booting(self, deadline_s: float) -> Iterator[None]:
        """Turn a crash in the ``with`` block, or a boot beyond its deadline, into an EngineBootError."""
        from sgl_jax.srt.entrypoints import engine as entrypoint

        original = entrypoint._set_envs_and_config

        def set_envs_and_config(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            signal.signal(signal.SIGQUIT, self._fail_boot)

        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        logging.getLogger("sgl_jax").addHandler(self.last_words)
        signal.signal(signal.SIGQUIT, self._fail_boot)
        stop_listening = hosts.listen(self._lose_in_boot)
        entrypoint._set_envs_and_config = set_envs_and_config
        try:
            with deadline(deadline_s, lambda: self._boot_took_too_long(deadline_s), "the engine's boot"):
                if hosts.lost() is not None:  # before anybody listened
                    self._fail_boot()
                yield
        except EngineBootError:
            self.end()
            raise
        except Exception as error:
            self.end()
            raise EngineBootError(f"The engine did not boot: {type(error).__name__}: {cause_in(str(error))}") from error
        except BaseException:
            self.end()
            raise
        finally:
            stop_listening()
            entrypoint._set_envs_and_config = original
            _keep_message_contexts()

    def surround(self, channel: Channel) -> None:
        """Surround the engine that has booted: its death is noted, and told to whoever waits for an answer."""
        self._channel = channel
        engine, scheduler = channel.engine, channel.scheduler
        worker = scheduler.tp_worker
        for part in (scheduler, worker, getattr(worker, "worker", worker)):
            part.parent_process = _Addressee(self)
        # Learn which thread is the scheduler's: a crash is logged before its SIGQUIT is sent, so whoever gives the
        # signal handlers back must see that thread end first.
        channel.call(lambda: None)
        self._give_back.append(hosts.listen(self.note_crash))
        if engine.tokenizer_manager is not None:  # None on a host that takes no requests
            self._contain_the_tokenizer(engine, engine.tokenizer_manager)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGQUIT, self._note_signal)

    def _contain_the_tokenizer(self, engine: Any, manager: Any) -> None:
        from sgl_jax.srt.managers import tokenizer_manager as module

        def note_instead_of_killing(*_args: Any, **_kwargs: Any) -> None:
            self.note_crash(self.last_words.text)
            raise asyncio.CancelledError  # ends the failed task before its sys.exit(), which would end the caller

        self._give_back.append(partial(setattr, module, "kill_process_tree", module.kill_process_tree))
        module.kill_process_tree = note_instead_of_killing
        # Created here rather than at the first request, so that the signal handlers it sets can be taken back.
        manager.auto_create_handle_loop()
        for number in (signal.SIGTERM, signal.SIGQUIT):
            engine.loop.remove_signal_handler(number)
        self._fail_requests_at_crash(manager)

    def end(self) -> None:
        """Give the process its signal handlers back and stop listening."""
        logging.getLogger("sgl_jax").removeHandler(self.last_words)
        while self._give_back:
            self._give_back.pop()()
        for number, handler in self._handlers.items():
            late = number == signal.SIGQUIT and self.crash is not None  # on its way still, and by default it kills
            with suppress(ValueError):  # not the main thread: then none was set either
                signal.signal(number, _take_no_notice if late else handler)

    def _lose_in_boot(self, sentence: str) -> None:
        """Another host is lost: the main thread would wait for it, and takes no notice but of a signal."""
        self.crash = self.crash or sentence
        if (main := threading.main_thread().ident) is not None:
            signal.pthread_kill(main, signal.SIGQUIT)

    def _fail_boot(self, *_: Any) -> None:
        if (sentence := hosts.lost()) is not None:
            raise EngineBootError(f"The engine did not boot. {sentence}")
        cause = self.crash or self.last_words.text
        self.note_crash(cause)
        raise EngineBootError(f"The engine did not boot. Its last words: {cause}")

    def _note_signal(self, *_: Any) -> None:
        self.note_crash(f"SIGQUIT arrived, by which the engine reports a death; its last words: {self.last_words.text}")

    def _boot_took_too_long(self, deadline_s: float) -> EngineBootError:
        return EngineBootError(
            f"The engine did not boot within {deadline_s:g} s (timeouts.boot_s). Its last words: {self.last_words.text}"
        )

    def _fail_requests_at_crash(self, manager: Any) -> None:
        original = manager.generate_request

        async def generate_request(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            loop = asyncio.get_running_loop()
            died: asyncio.Future[None] = loop.create_future()

            def tell() -> None:
                if not died.done():
                    died.set_result(None)

            def wake() -> None:
                loop.call_soon_threadsafe(tell)

            self._wake.append(wake)
            chunks = original(*args, **kwargs)
            try:
                while True:
                    if self.crash is not None:
                        raise EngineCrashedError(f"The engine is dead and can only be closed: {self.crash}")
                    step = asyncio.ensure_future(anext(chunks))
                    await asyncio.wait({step, died}, return_when=asyncio.FIRST_COMPLETED)
                    if not step.done():
                        step.cancel()
                        raise EngineCrashedError(f"The engine died while serving a request: {self.crash}")
                    try:
                        chunk = step.result()
                    except StopAsyncIteration:
                        return
                    yield chunk
            finally:
                self._wake.remove(wake)

        manager.generate_request = generate_request


def _take_no_notice(*_: Any) -> None:
    """A handler, since an ignored signal would stay ignored in every child process."""


_kept: list[Any] = []


def _keep_message_contexts() -> None:
    """Keep every zmq context alive until the process ends.

    The engine never closes its sockets. A context that is garbage collected waits for them for ever, which hangs the
    process in its last line; one that lives until the interpreter's own end does not wait.
    """
    import zmq

    _kept.extend(thing for thing in gc.get_objects() if issubclass(type(thing), zmq.Context))


class _Addressee:
    """Stands where the engine keeps its parent process, and takes the signal that was meant for it."""

    def __init__(self, containment: Containment) -> None:
        self._containment = containment

    def send_signal(self, _number: int) -> None:
        """Note the crash instead of killing make, the shell or the CI runner."""
        self._containment.note_crash(self._containment.last_words.text)
