"""``plan`` and ``max_tokens``: the TPU compiler's word on a profile and a topology, from a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import ValidationError

import kvcycle
from kvcycle.errors import KVCycleError, PlatformError, ProfileError
from kvcycle.plan.model import MaxTokens, Plan, PlanError
from kvcycle.plan.protocol import Failure, Reply, Request
from kvcycle.plan.topologies import Topology, find_topology, with_devices
from kvcycle.profile import Profile
from kvcycle.text import seconds

#: Deadlines of the planning process. The buffers of a 36-layer model take it 15 s on two cores, its steps minutes.
TIMEOUT_S = 600.0
FORWARD_TIMEOUT_S = 3600.0

#: What lets libtpu compile on a machine without a TPU, or beside a process that uses one; found with libtpu 0.0.42.1.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
}
_FAILURES: dict[Failure, type[KVCycleError]] = {"profile": ProfileError, "platform": PlatformError, "plan": PlanError}
_LAST_LINES = 5


def plan(
    profile: Profile,
    topology: str,
    *,
    forward: bool = False,
    prefill_tokens: int | None = None,
    timeout_s: float | None = None,
) -> Plan:
    """Ask the TPU compiler what a profile's cycle takes on a topology, and whether it fits. No TPU is needed.

    Args:
        profile: with ``engine.max_total_tokens``.
        topology: a slice's name, for example ``v4-8`` or ``v5litepod-4``.
        forward: also compile the model's prefill and decode steps; minutes for a model of 36 layers.
        prefill_tokens: the prefill to compile, in tokens, padded to the engine's bucket; by default the smallest.
        timeout_s: the planning process's deadline.

    Raises:
        ProfileError: there is no such topology, or the profile does not go with it.
        PlatformError: libtpu is not installed.
        PlanError: the stack or the compiler refuses for another reason than memory, or did not answer in time.
    """
    reply = ask(profile, topology, forward=forward, prefill_tokens=prefill_tokens, timeout_s=timeout_s)
    assert reply.plan is not None
    return reply.plan


def max_tokens(profile: Profile, topology: str, *, timeout_s: float | None = None) -> MaxTokens:
    """Find the largest ``engine.max_total_tokens`` that fits on a topology, with a second parameter set and without.

    Args:
        profile: its own ``max_total_tokens`` is not looked at.
        topology: a slice's name, for example ``v4-8``.
        timeout_s: the planning process's deadline.

    Raises:
        ProfileError, PlatformError, PlanError: as :func:`plan`.
    """
    reply = ask(profile, topology, phases=False, max_tokens=True, timeout_s=timeout_s)
    assert reply.max_tokens is not None
    return reply.max_tokens


def ask(
    profile: Profile,
    topology: str,
    *,
    phases: bool = True,
    forward: bool = False,
    prefill_tokens: int | None = None,
    max_tokens: bool = False,
    timeout_s: float | None = None,
) -> Reply:
    """Let one planning process make a plan, the token limits, or both; see :func:`plan` and :func:`max_tokens`."""
    found = find_topology(topology)
    _check(profile, found)
    if phases and profile.engine.max_total_tokens is None:
        raise ProfileError(
            f"The profile {profile.name!r} has no engine.max_total_tokens, so the engine would take what memory it "
            "finds on the VM. Set it, or ask for the largest that fits (--max-tokens)."
        )
    folder = profile.config_folder()
    if folder is None:
        raise ProfileError(
            f"The geometry of {profile.model.path!r} is not known here: set model.config to a folder with the model's "
            "config.json (the weights are not needed)."
        )
    request = Request(
        profile=profile,
        config_folder=folder,
        topology=found.name,
        phases=phases,
        forward=forward,
        prefill_tokens=prefill_tokens,
        max_tokens=max_tokens,
    )
    deadline = timeout_s or (FORWARD_TIMEOUT_S if forward else TIMEOUT_S)
    reply = _run(request, deadline)
    if reply.failure is not None:
        raise _FAILURES[reply.failure](reply.message)
    return reply


def _check(profile: Profile, topology: Topology) -> None:
    profile.check_geometry("tpu")
    needed, there = profile.devices_needed, topology.devices
    chosen = profile.engine_args("tpu").get("device_indexes")
    if needed == there or (chosen is not None and len(chosen) == needed and needed <= there):
        return
    other = with_devices(needed, topology.generation)
    ways = [f"plan for {other.name}" if other else "", f"set engine.tp_size={there}"]
    if needed < there:
        ways.append(f"set engine.device_indexes={list(range(needed))!r}")
    raise ProfileError(
        f"engine.tp_size={needed} spans {needed} device{'s' if needed > 1 else ''}, and {topology.name} has {there}: "
        f"sglang-jax uses all devices that it finds. {' or '.join(way for way in ways if way).capitalize()}."
    )


def _run(request: Request, deadline: float) -> Reply:
    root = str(Path(kvcycle.__file__).resolve().parents[1])
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
    with tempfile.TemporaryDirectory(prefix="kvcycle-plan-") as name:
        asked, answered = Path(name) / "request.json", Path(name) / "answer.json"
        asked.write_text(request.model_dump_json(), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "kvcycle.plan.worker", str(asked), str(answered)],
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=deadline,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise PlanError(_too_slow(request, deadline)) from error
        try:
            return Reply.model_validate_json(answered.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise PlanError(
                f"The planning process for {request.topology} ended with exit code {done.returncode} and no answer; "
                f"its last words: {_last_words(done.stderr)}"
            ) from error


def _too_slow(request: Request, deadline: float) -> str:
    engine = request.profile.engine_args("tpu")
    sentence = f"The plan for {request.topology} was not ready within {seconds(deadline)}, and was stopped."
    if request.forward and str(engine.get("attention_backend", "fa")).startswith("fa") and engine["page_size"] < 16:
        # Seen with 0.1.0rc0: the kernel unrolls one DMA a page.
        return f"{sentence} The fa attention does not finish compiling with small pages: set engine.page_size=128."
    return f"{sentence} Allow more time, or leave --forward out."


def _last_words(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return " / ".join(lines[-_LAST_LINES:]) or "(none)"
