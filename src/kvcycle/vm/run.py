"""The steps of ``kvcycle vm run``: bring the code, make the environment, start, follow, bring the reports."""

from __future__ import annotations

import codecs
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from kvcycle.errors import RecoveryError, VMError, VMRunLostError
from kvcycle.report.recover import recover
from kvcycle.text import printable
from kvcycle.vm import explain, remote
from kvcycle.vm.explain import CONNECTION_FAILED
from kvcycle.vm.remote import Job, Status
from kvcycle.vm.session import Session, harmless
from kvcycle.vm.source import Source, bundle
from kvcycle.vm.stream import End, LogStream

#: What kvcycle exits with if the suite ran and its verdict, or the evidence for it, did not arrive.
UNKNOWN = 125
#: Before a broken connection is taken up again. gcloud itself has then tried for most of a minute.
RECONNECT_WAIT_S = 5.0


def new_run_id() -> str:
    """The run's name: the UTC time."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")


@dataclass
class VMRun:
    """One run of the suite on the hosts of a session.

    Attributes:
        stop_command: what ends the run, for a person to type.
        report_dir: where the run gets its folder.
        write: takes the log's text as it arrives.
        token: the hub's token, or None; it travels in a file, and is in no command line and no log.
        reconnects: how often in a row a broken connection is taken up again before kvcycle gives up.
    """

    session: Session
    job: Job
    source: Source
    stop_command: str
    report_dir: Path
    write: Callable[[str], None]
    token: str | None = None
    reconnects: int = 5
    run_id: str = field(default_factory=new_run_id)

    def execute(self) -> int:
        """Do all of it, and return the suite's exit code.

        Raises:
            VMError: it could not be started.
            VMRunLostError: it was started, and the connection to it was lost.
        """
        session = self.session
        statuses = {
            worker: Status.parse(session.ssh(worker, "Asking for runs", remote.call("status")))
            for worker in session.workers
        }
        decision = remote.decide(statuses, self.job.identity, self.stop_command)
        if decision.follow is not None:
            self.run_id = decision.follow
            session.say(decision.why)
        else:
            self._bring()
            self._prepare()
            self._start()
        return self._follow_and_collect()

    @property
    def folder(self) -> Path:
        """Where the log and the reports go, here."""
        return self.report_dir / f"{self.session.target.name}-{self.run_id}"

    def _bring(self) -> None:
        path = bundle(self.session.shell, self.source, self.session.work)
        try:
            for worker in self.session.workers:
                self.session.scp_to(worker, "Copying the code", path, remote.bundle_name(self.source.revision))
                answer = self.session.ssh(worker, "Checking the code out", remote.bring(self.source.revision))
                if f"revision {self.source.revision}" not in answer.splitlines():
                    raise VMError(f"Worker {worker} did not confirm commit {self.source.revision}; it said {answer!r}.")
                self.session.say(f"worker {worker}: the code is there, {self.source.label}")
        finally:
            path.unlink(missing_ok=True)

    def _prepare(self) -> None:
        with ThreadPoolExecutor(max_workers=len(self.session.workers)) as pool:
            try:
                list(pool.map(self._prepare_one, self.session.workers))
            except BaseException:
                self.session.shell.close()
                raise

    def _prepare_one(self, worker: int) -> None:
        made: list[str] = []

        def on_line(line: bytes) -> None:
            kind, _, rest = printable(line.decode(errors="replace").rstrip()).partition(" ")
            if kind == "progress":
                self.session.say(f"worker {worker}: {rest[:100]}")
            elif kind == "environment":
                made.append(rest)

        self.session.ssh(worker, "Preparing the environment", self.job.prepare(), on_line)
        if not made:
            raise VMError(f"Worker {worker} did not say which environment it has: start again.")
        self.session.say(f"worker {worker}: environment {made[-1]}, {self.job.stack}")

    def _start(self) -> None:
        started: list[int] = []
        try:
            for worker in self.session.workers:
                if self.token is not None:
                    self._send_token(worker)
                started.append(worker)
                command = self.job.start(
                    self.run_id, worker, token=self.token is not None, meeting=self.session.meeting
                )
                self.session.ssh(worker, "Starting the suite", command)
        except BaseException:
            for worker in started:  # a run on some of the hosts is none
                self.session.try_ssh(worker, f"{remote.call('stop', 'term')}; rm -f {remote.token_name(self.run_id)}")
            raise
        hosts = "" if len(started) == 1 else f" on {len(started)} workers"
        self.session.say(f"started the run {self.run_id}{hosts}; it lives on if this connection breaks")

    def _send_token(self, worker: int) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self.session.work, prefix="hf-token-") as file:  # mode 0600
            file.write(self.token or "")
            file.flush()
            self.session.scp_to(worker, "Sending the hub's token", Path(file.name), remote.token_name(self.run_id))

    def _follow_and_collect(self) -> int:
        ends: list[End] = []
        complete = True
        try:
            for number, worker in enumerate(self.session.workers):
                folder = self.folder if len(self.session.workers) == 1 else self.folder / f"worker{worker}"
                folder.mkdir(parents=True, exist_ok=True)
                log = folder / f"{self.run_id}.log"
                if number:
                    self.session.say(f"waiting for worker {worker}, whose log goes to {log} alone")
                with log.open("wb") as file:
                    end = self._follow(worker, file, show=not number)
                ends.append(end)
                complete = self._collect(worker, folder, end) and complete
        except KeyboardInterrupt:
            self.session.say(explain.goes_on(self.session.target, self.run_id, self.stop_command))
            raise
        codes = [end.code for end in ends]
        for worker, code in zip(self.session.workers, codes, strict=True):
            self.session.say(f"worker {worker}: {_ended(code)}")
        self.session.say(f"Reports: {self.folder}")
        failed = next((code for code in codes if code), 0)
        return failed or (UNKNOWN if None in codes or not complete else 0)

    def _follow(self, worker: int, file: BinaryIO, *, show: bool) -> End:
        """Write the log as it comes, over as many connections as it takes."""
        stream, attempts = LogStream(), 0
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def on_line(line: bytes) -> bool:
            if new := stream.feed(line):
                file.write(new)
                file.flush()
                if show:
                    self.write(harmless(decoder.decode(new)))
            return stream.end is not None

        while True:
            before = stream.offset
            done = self.session.try_ssh(worker, remote.call("follow", self.run_id, str(before)), on_line)
            if stream.end is not None:
                return stream.end
            if done.code == remote.NO_RUN or "Host key verification failed" in "\n".join(done.stderr):
                raise VMRunLostError(
                    explain.failure("Following the run", done, self.session.target, worker, self.session.pins)
                )
            attempts = 1 if stream.offset > before else attempts + 1
            goes_on = explain.goes_on(self.session.target, self.run_id, self.stop_command)
            if attempts > self.reconnects:
                raise VMRunLostError(
                    f"The connection to {self.session.target.name} was lost at byte {stream.offset:,} of the log, and "
                    f"{self.reconnects} attempts to take it up again failed. {goes_on}"
                )
            how = "" if done.code in (0, CONNECTION_FAILED) else f" (gcloud's exit code was {done.code})"
            self.session.say(
                f"The connection broke at byte {stream.offset:,} of the log{how}; the run goes on there. "
                f"Connecting again, attempt {attempts} of {self.reconnects}."
            )
            time.sleep(RECONNECT_WAIT_S)

    def _collect(self, worker: int, folder: Path, end: End) -> bool:
        """Bring the reports, and return whether they came: without them a pass has no evidence, and is none."""
        try:
            # Of several hosts, which are one run, the first writes them.
            if not self._bring_reports(worker, folder) and worker == self.session.workers[0]:
                self.session.say(f"worker {worker}: the suite left no reports; {folder} has its log")
            self.session.ssh(worker, "Noting that the reports were brought", remote.call("collected", self.run_id))
        except VMError as error:
            self.session.say(f"{error}\nThe reports are still there: ~/{remote.reports_name(self.run_id)}")
            return False
        if end.code is None and worker == self.session.workers[0]:
            try:
                recover(folder, "The run ended without a word while this test ran: the VM restarted, or it was killed.")
            except RecoveryError as error:
                self.session.say(str(error))
        return True

    def _bring_reports(self, worker: int, folder: Path) -> bool:
        answer = self.session.ssh(worker, "Asking for the reports", remote.call("reports", self.run_id))
        if "reports yes" not in answer.splitlines():
            return False
        # gcloud's scp would take a colon in a path of the user's for a host: it writes to a folder of kvcycle's.
        with tempfile.TemporaryDirectory(dir=self.session.work, prefix="reports-") as arrived:
            self.session.scp_from(worker, "Bringing the reports", remote.reports_name(self.run_id), Path(arrived))
            shutil.copytree(Path(arrived, "latest"), folder, dirs_exist_ok=True)
        return True


def _ended(code: int | None) -> str:
    if code is None:
        return "the run ended without an exit code: the VM restarted, or the run was killed"
    return f"the suite exited with {code}"
