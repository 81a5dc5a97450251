"""The parts of ``kvcycle vm`` that run nothing: command lines, the pin, the log's lines, what is decided and said."""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcycle.errors import VMError
from kvcycle.vm import explain, gcloud, host_key, remote
from kvcycle.vm.gcloud import Node, Route, Target
from kvcycle.vm.remote import Job, Status, decide
from kvcycle.vm.shell import Done
from kvcycle.vm.stream import End, LogStream
from tests.unit.vm.machine import fingerprint
from tests.unit.vm.machine import host_key as a_host_key

TARGET = Target("my-tpu", "us-central2-b", "my-project", "root")
JOB = Job("0" * 40, "sglang-jax-0.1.0rc0", None, ("-m", "tpu"), (0,))


# --- the log's lines --------------------------------------------------------------------------------------------------


def frames(log: bytes, offset: int, length: int) -> bytes:
    """What remote.sh prints of a log that has ended with 1."""
    lines = b"\n"
    for at in range(offset, len(log), length):
        part = log[at : at + length]
        lines += b"kvcycle-log %d %d %s\n" % (at, len(part), base64.b64encode(part))
    return lines + b"kvcycle-alive\nkvcycle-end %d ended 1\n" % len(log)


@given(
    log=st.binary(max_size=300),
    length=st.integers(1, 40),
    cuts=st.lists(st.tuples(st.integers(0, 500), st.booleans()), max_size=6),
)
def test_wherever_connections_break_every_byte_arrives_once(
    log: bytes, length: int, cuts: list[tuple[int, bool]]
) -> None:
    """Each cut ends a connection; then gcloud repeats its command (True), or kvcycle asks from where it is (False)."""
    stream, arrived, asked = LogStream(), b"", 0
    rest = b""
    for cut, repeated in [*cuts, (10**9, False)]:
        if not repeated:
            rest, asked = b"", stream.offset  # another process: what was cut off is gone
        output = rest + frames(log, asked, length)[:cut]
        *lines, rest = output.split(b"\n")
        for line in lines:
            arrived += stream.feed(line + b"\n")
    assert arrived == log
    assert stream.end == End(1)


@pytest.mark.parametrize(
    "line",
    [
        b"kvcycle-log 0 4 YWJj",  # cut off
        b"kvcycle-log 0 3 YWJ?",
        b"kvcycle-log x 3 YWJj",
        b"kvcycle-log 9 3 YWJj",  # not what comes next
        b"kvcycle-end 3 ended 0",  # not all of it is here
        b"kvcycle-end 0 ended zero",
        b"kvcycle-end 0 something",
        b"Welcome to this machine",
        b"",
    ],
)
def test_a_line_that_is_not_whole_or_not_next_changes_nothing(line: bytes) -> None:
    stream = LogStream()
    assert stream.feed(line) == b""
    assert stream == LogStream()
    assert stream.feed(b"kvcycle-log 0 3 YWJj\n") == b"abc"


def test_a_run_without_an_exit_code_has_ended_all_the_same() -> None:
    stream = LogStream()
    stream.feed(b"kvcycle-end 0 lost\n")
    assert stream.end == End(None)


# --- command lines ----------------------------------------------------------------------------------------------------


def test_the_connection_is_pinned_and_gclouds_own_options_are_left_away() -> None:
    command = gcloud.ssh(TARGET, 2, Path("/own/known_hosts"), "whoami; date")
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "root@my-tpu"]
    for word in (
        "--plain",  # or gcloud's known_hosts file, which comes first, would be the one that counts
        "--worker=2",
        "--ssh-flag=-oUserKnownHostsFile=/own/known_hosts",
        "--ssh-flag=-oGlobalKnownHostsFile=/dev/null",
        "--ssh-flag=-oStrictHostKeyChecking=yes",
        "--ssh-flag=-oHostKeyAlias=kvcycle-my-tpu-2",
        "--command=whoami; date",
    ):
        assert word in command
    assert not any(" " in word for word in command if word.startswith("--ssh-flag"))


@pytest.mark.parametrize(
    ("route", "track", "flag"),
    [(Route.EXTERNAL, [], None), (Route.INTERNAL, [], "--internal-ip"), (Route.IAP, ["alpha"], "--tunnel-through-iap")],
)
def test_the_route_is_in_every_connection(route: Route, track: list[str], flag: str | None) -> None:
    target = Target("my-tpu", "us-central2-b", "my-project", "root", route)
    here, there = Path("/own/a"), "kvcycle-vm/b"
    for command in (
        gcloud.introduce(target, 0),
        gcloud.ssh(target, 0, here, "true"),
        gcloud.scp_to(target, 0, here, here, there),
        gcloud.scp_from(target, 0, here, there, here),
    ):
        assert command[1 : 1 + len(track)] == track
        assert command[1 + len(track)] == "compute"
        assert [word for word in command if word in ("--internal-ip", "--tunnel-through-iap")] == (
            [flag] if flag else []
        )


def test_arguments_are_quoted_once_for_the_vms_shell() -> None:
    job = Job("0" * 40, "s", "my env", ("-k", "a and $(b)", "it's"), (0, 1))
    words = shlex.split(job.start("RUN", 1, token=True, meeting="10.0.0.2:10011"))
    assert words[2:] == [
        *("start", "RUN", job.identity, "s", "my env", "1", "2", "10.0.0.2:10011", "kvcycle-vm/incoming/RUN.hf-token"),
        *("-k", "a and $(b)", "it's", "--kv-report-dir=../runs/RUN/reports"),
    ]


def test_a_run_is_another_if_anything_of_it_is_another() -> None:
    others = [
        Job("1" * 40, JOB.stack, None, JOB.pytest_arguments, (0,)),
        Job(JOB.revision, "other", None, JOB.pytest_arguments, (0,)),
        Job(JOB.revision, JOB.stack, "env", JOB.pytest_arguments, (0,)),
        Job(JOB.revision, JOB.stack, None, ("-mtpu",), (0,)),
        Job(JOB.revision, JOB.stack, None, JOB.pytest_arguments, (0, 1)),
    ]
    assert len({job.identity for job in [JOB, *others]}) == 6


# --- what gcloud says -------------------------------------------------------------------------------------------------


def described(**changes: object) -> str:
    ends = [
        {"ipAddress": "10.0.0.1", "accessConfig": {"externalIp": "203.0.113.1"}},
        {"ipAddress": "10.0.0.2"},
    ]
    return json.dumps({"state": "READY", "health": "HEALTHY", "networkEndpoints": ends} | changes)


def test_hosts_meet_at_the_first_ones_internal_address() -> None:
    assert gcloud.meeting_place(Node.parse(described()), "my-tpu") == "10.0.0.1:10011"
    nowhere = Node.parse(described(networkEndpoints=[{}, {}]))
    with pytest.raises(VMError, match=r"^gcloud names no internal address of my-tpu's host 0, at which the hosts"):
        gcloud.meeting_place(nowhere, "my-tpu")


def test_the_address_is_the_one_that_gcloud_takes() -> None:
    node = Node.parse(described())
    assert node.host(0, Route.EXTERNAL) == "203.0.113.1"
    assert node.host(0, Route.INTERNAL) == "10.0.0.1"
    assert node.host(1, Route.EXTERNAL) == "10.0.0.2"  # it has no other
    assert gcloud.workers_of(node, "all", "my-tpu") == (0, 1)
    assert gcloud.workers_of(node, "1", "my-tpu") == (1,)


def test_of_several_networks_a_hosts_first_one_counts() -> None:
    node = Node.parse(described(networkConfigs=[{}, {}]))
    assert node.hosts == (("203.0.113.1", "10.0.0.1"),)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"state": "READY", "networkEndpoints": [1]}'])
def test_a_description_that_is_none(text: str) -> None:
    with pytest.raises(VMError, match="gcloud described the VM in a way that kvcycle does not know"):
        Node.parse(text)


def test_a_vm_in_maintenance_gives_no_verdict() -> None:
    node = Node.parse(described(health="UNHEALTHY_MAINTENANCE"))
    assert (gcloud.not_ready(node, TARGET) or "").startswith(
        "my-tpu is READY but UNHEALTHY_MAINTENANCE: a verdict from it"
    )
    assert gcloud.not_ready(Node.parse(described()), TARGET) is None


# --- the pin ----------------------------------------------------------------------------------------------------------


def test_the_pinned_key_is_found_among_those_that_are_offered() -> None:
    keys = [a_host_key(1), a_host_key(2)]
    offered = host_key.parse_keyscan("# a comment\nshort line\n" + "".join(f"203.0.113.1 {key}\n" for key in keys))
    chosen = host_key.choose(offered, host_key.parse_pins([fingerprint(keys[1]) + "="]), TARGET, 0)
    assert host_key.known_hosts_line("alias", chosen) == f"alias {keys[1]}\n"
    with pytest.raises(VMError, match="is not the host that is pinned"):
        host_key.choose(offered[:1], [fingerprint(keys[1])], TARGET, 0)


def test_what_is_no_key_goes_into_no_file() -> None:
    assert host_key.parse_keyscan("h ssh-ed25519 !!!\nh x;y QUJD\n") == []
    assert host_key.parse_guest_attributes('[{"key": "ssh-ed25519\\nevil", "value": "QUJD"}]') == []
    assert host_key.parse_guest_attributes("no JSON") == []


# --- runs that are there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("state none\n", Status()),
        ("run R\nidentity I\nstate running\n", Status("R", "I", "running")),
        ("run R\nidentity I\nstate ended 1\ncollected yes\n", Status("R", "I", "ended", End(1), True)),
        ("run R\nidentity I\nstate lost\n", Status("R", "I", "lost", End(None))),
    ],
)
def test_what_the_vm_says_of_its_newest_run(output: str, expected: Status) -> None:
    assert Status.parse(output) == expected


def test_what_the_vm_says_and_nobody_understands() -> None:
    with pytest.raises(VMError, match="what kvcycle does not understand: 'state odd'"):
        Status.parse("state odd")


RUNNING = Status("R", JOB.identity, "running")
ENDED = Status("R", JOB.identity, "ended", End(0))
BROUGHT = Status("R", JOB.identity, "ended", End(0), collected=True)
OTHER = Status("Q", "other", "running")


@pytest.mark.parametrize(
    ("statuses", "follow"),
    [
        ([Status()], None),
        ([RUNNING], "R"),
        ([RUNNING, ENDED], "R"),
        ([ENDED], "R"),
        ([BROUGHT], None),
        ([BROUGHT, ENDED], "R"),
        ([Status("R", "other", "ended", End(0))], None),
        ([Status("R", JOB.identity, "lost", End(None))], "R"),
        ([ENDED, Status()], None),
    ],
)
def test_what_is_done_about_runs_that_are_there(statuses: list[Status], follow: str | None) -> None:
    assert decide(dict(enumerate(statuses)), JOB.identity, "stop").follow == follow


@pytest.mark.parametrize("statuses", [[OTHER], [RUNNING, Status()], [RUNNING, OTHER], [Status(), RUNNING]])
def test_another_run_is_left_alone(statuses: list[Status]) -> None:
    with pytest.raises(VMError, match=r"Another run lives there \(.* on worker .*or end it: the stop command"):
        decide(dict(enumerate(statuses)), JOB.identity, "the stop command")


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_failure_nobody_foresaw_is_said_with_its_last_lines_and_without_gclouds_progress() -> None:
    lines = ("SSH: Attempting to connect to worker 0...", "kvcycle-vm/remote-x.sh: 12: kill: Illegal \x1bnumber")
    said = explain.failure("Ending the run", Done(2, "", lines), TARGET, 0)
    assert said == (
        "Ending the run failed on my-tpu, worker 0: exit code 2.\n"
        "  kvcycle-vm/remote-x.sh: 12: kill: Illegal \\x1bnumber"
    )


def test_the_script_has_another_name_when_its_text_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = remote.script_name()
    (tmp_path / "remote.sh").write_text(remote.SCRIPT.read_text() + "\n")
    monkeypatch.setattr(remote, "SCRIPT", tmp_path / "remote.sh")
    assert remote.script_name() != before
