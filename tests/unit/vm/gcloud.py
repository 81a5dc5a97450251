"""A stand-in for gcloud (and ssh-keyscan) that carries everything out in local folders: one is a VM's home.

It takes the options that the real one takes and refuses others; it is as strict with the host's key as OpenSSH; it runs
commands with bash and copies files. Faults are planted by :class:`tests.unit.vm.machine.StandIn`.

Run as: gcloud.py STATE_FOLDER TOOL [ARGUMENT...]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

HOST_KEY_REFUSED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
The fingerprint for the ED25519 key sent by the remote host is
{fingerprint}.
Host key verification failed."""


def leave(code: int, sentence: str = "") -> NoReturn:
    if sentence:
        print(sentence, file=sys.stderr, flush=True)
    sys.exit(code)


def main(state: Path, tool: str, argv: list[str]) -> NoReturn:
    with (state / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([tool, *argv]) + "\n")
    vm = json.loads((state / "vm.json").read_text())
    if tool == "ssh-keyscan":
        keyscan(vm, argv[-1])
    alpha = argv[:1] == ["alpha"]
    words = argv[alpha:]
    if words[:2] == ["auth", "list"]:
        print(vm["account"])
        sys.exit(0)
    if words[:3] != ["compute", "tpus", "tpu-vm"]:
        leave(2, f"ERROR: (gcloud) Invalid choice: {argv!r}")
    verb, rest = words[3], words[4:]
    if verb == "describe":
        describe(vm, rest)
    if verb == "get-guest-attributes":
        guest_attributes(vm, rest)
    if verb == "ssh":
        ssh(state, vm, parse(rest, "ssh", alpha))
    if verb == "scp":
        scp(state, vm, parse(rest, "scp", alpha))
    leave(2, f"ERROR: (gcloud.compute.tpus.tpu-vm) Invalid choice: {verb!r}")


def parse(argv: list[str], verb: str, alpha: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, prog=f"gcloud.compute.tpus.tpu-vm.{verb}")
    for flag in ("zone", "project", "ssh-key-file"):
        parser.add_argument(f"--{flag}", required=True)
    parser.add_argument("--worker", default="0")
    for switch in ("quiet", "plain", "internal-ip", *(["tunnel-through-iap"] if alpha else [])):
        parser.add_argument(f"--{switch}", action="store_true")
    parser.add_argument(f"--{verb}-flag", action="append", default=[], dest="flags")
    if verb == "ssh":
        parser.add_argument("--command")
        parser.add_argument("address")
    else:
        parser.add_argument("--recurse", action="store_true")
        parser.add_argument("paths", nargs=2)
    args = parser.parse_args(argv)
    if verb == "ssh":
        args.flags = [part for flag in args.flags for part in flag.split()]  # as the real one does
    return args


def describe(vm: dict[str, Any], argv: list[str]) -> NoReturn:
    if vm["describe_error"]:
        leave(1, vm["describe_error"])
    output = next(word.removeprefix("--format=") for word in argv if word.startswith("--format="))
    ends = [{"ipAddress": f"10.0.0.{i}", "accessConfig": {"externalIp": f"203.0.113.{i}"}} for i in range(vm["hosts"])]
    node = {"state": vm["state"], "health": "HEALTHY", "acceleratorType": "v4-8", "networkEndpoints": ends}
    if output == "json":
        print(json.dumps(node))
    elif found := re.fullmatch(r"value\(networkEndpoints\[(\d)\]\.accessConfig\.externalIp\)", output):
        print(f"203.0.113.{found[1]}")
    else:
        print(f"{vm['state']}\tHEALTHY")
    sys.exit(0)


def guest_attributes(vm: dict[str, Any], argv: list[str]) -> NoReturn:
    worker = next(word.removeprefix("--filter=worker_id:") for word in argv if word.startswith("--filter="))
    kind, text = vm["published_keys"][int(worker)].split()
    if "--format=json" in argv:
        print(json.dumps([{"namespace": "hostkeys", "key": kind, "value": text, "worker_id": int(worker)}]))
    else:
        print(f"{kind}\t{text}")
    sys.exit(0)


def keyscan(vm: dict[str, Any], host: str) -> NoReturn:
    worker = int(host.rpartition(".")[2])
    print(f"# {host}:22 SSH-2.0-OpenSSH_8.9", file=sys.stderr)
    print(f"{host} {vm['scanned_keys'][worker]}")
    sys.exit(0)


def connect(vm: dict[str, Any], args: argparse.Namespace, user_at_name: str) -> None:
    """What OpenSSH asks of a connection, or the end."""
    options: dict[str, str] = {}
    for flag in args.flags:
        key, _, value = flag.removeprefix("-o").partition("=")
        options.setdefault(key, value)  # the first one counts
    if not args.plain or options.get("StrictHostKeyChecking") != "yes" or options.get("BatchMode") != "yes":
        leave(2, "stand-in: this connection is not pinned")
    if options.get("GlobalKnownHostsFile") != "/dev/null":
        leave(2, "stand-in: this connection trusts the machine's own file of hosts as well")
    if user_at_name != f"{vm['user']}@{vm['name']}":
        leave(255, f"{user_at_name}: Permission denied (publickey).")
    known = Path(options["UserKnownHostsFile"]).read_text().splitlines()
    if f"{options['HostKeyAlias']} {vm['keys'][int(args.worker)]}" not in known:
        leave(255, HOST_KEY_REFUSED.format(fingerprint=vm["fingerprints"][int(args.worker)]))


def planted(state: Path, verb: str, command: str) -> dict[str, Any] | None:
    """The next fault for this command, used up."""
    path = state / "faults.json"
    faults = json.loads(path.read_text())
    for index, fault in enumerate(faults):
        if fault["verb"] == verb and re.search(fault["match"], command):
            fault["times"] -= 1
            path.write_text(json.dumps(faults[:index] + ([fault] if fault["times"] else []) + faults[index + 1 :]))
            return dict(fault)
    return None


def ssh(state: Path, vm: dict[str, Any], args: argparse.Namespace) -> NoReturn:
    if "-G" in args.flags:
        if args.plain:
            leave(2, "stand-in: with --plain gcloud prepares nothing")
        print(f"host 203.0.113.0\nuser {vm['user']}\nport 22")
        sys.exit(0)
    connect(vm, args, args.address)
    fault = planted(state, "ssh", args.command)
    if fault is not None and "stderr" in fault:
        leave(fault["code"], fault["stderr"])
    print("SSH: Attempting to connect to worker 0...", file=sys.stderr)
    home = state / f"home-{args.worker}"
    machine = {"HOME": str(home), "PATH": f"{home}/miniconda3/bin:{os.environ['STAND_IN_PATH']}", "USER": vm["user"]}
    machine |= vm["environment"]
    command = ["bash", "-c", args.command]
    process = begin(command, home, machine)
    if fault is not None and "drop_after_bytes" in fault:
        assert process.stdout is not None
        sys.stdout.buffer.write(process.stdout.read(fault["drop_after_bytes"]))
        sys.stdout.flush()
        end_session(process)
        print("client_loop: send disconnect: Broken pipe", file=sys.stderr)
        if not fault.get("repeated"):
            leave(255, "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].")
        print("Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].", file=sys.stderr)
        process = begin(command, home, machine)
    for line in process.stdout or ():
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
    code = process.wait()
    end_session(process)
    sys.exit(code)


def begin(command: list[str], home: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, start_new_session=True)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """The end of a connection takes along what it started, as systemd may do; what was detached from it lives on."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def scp(state: Path, vm: dict[str, Any], args: argparse.Namespace) -> NoReturn:
    source, target = args.paths
    remote = source if ":" in source else target
    address, _, path = remote.partition(":")
    connect(vm, args, address)
    fault = planted(state, "scp", path)
    if fault is not None:
        leave(fault["code"], fault["stderr"])
    there = state / f"home-{args.worker}" / path
    if remote is target:
        if path.endswith("hf-token") and Path(source).stat().st_mode & 0o777 != 0o600:
            leave(2, "stand-in: others here can read this secret")
        shutil.copy(source, there)  # with its mode
    elif args.recurse and there.is_dir():
        shutil.copytree(there.resolve(), Path(target, there.name))
    else:
        leave(1, f"scp: {path}: No such file or directory")
    sys.exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
