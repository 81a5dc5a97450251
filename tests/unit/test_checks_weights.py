"""The checks on the weights' release: green on a good record, red on their faults, silent where there was none."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvcycle.checks import WEIGHTS_CHECKS, judge, passed
from kvcycle.record import Record
from kvcycle.record_parts import WEIGHTS_PHASES, Compiles, PhaseName, Verdict
from tests.unit import planted
from tests.unit.planted import named, only
from tests.unit.records import (
    DIGESTS,
    LEAVES,
    OTHER_TOKENS,
    WEIGHTS,
    edit_canary,
    edit_generates,
    edit_info,
    edit_phase,
    good_record,
    shift,
    with_profile,
    without_generates,
    without_phase,
)

ON_CPU = good_record(release_weights=True)
ON_TPU = good_record(allocator=True, release_weights=True)
RELEASED: PhaseName = "weights_released"
RESUMED: PhaseName = "weights_resumed"


def of_weights(record: Record) -> list[Verdict]:
    return [verdict for verdict in judge(record) if verdict.id in WEIGHTS_CHECKS]


@pytest.mark.parametrize("record", [ON_CPU, ON_TPU, good_record(cycles=1, devices=1, release_weights=True)])
def test_a_good_record_passes_every_check(record: Record) -> None:
    verdicts = of_weights(record)
    assert {verdict.id: verdict.verdict for verdict in verdicts} == dict.fromkeys(WEIGHTS_CHECKS, "pass")
    assert passed(judge(record))
    assert [verdict.causes for verdict in verdicts if verdict.causes] == []


@dataclass(frozen=True)
class Fault(planted.Fault):
    """A fault planted in a record with the weights' phases, and a verdict of the one check that it turns red."""

    base: Record = ON_CPU


def compiled(record: Record, **work: int) -> Record:
    return edit_phase(record, RESUMED, lambda phase: phase.model_copy(update={"compiles": Compiles(**work)}))


_HELD = "an array of the weights is still held elsewhere, or a copy of it is alive on the device"
_LEFT = "the resume left a copy alive on the device, or an array empty"
_CHANGED = "the copy in host memory was changed meanwhile, or an array came back in another layout or place"
_SPEC = "an array came back with another sharding, uncommitted, or in another layout"
_OUTPUT = "the resumed weights are not what they were (see weights.restored_bits)"
_NAME = "7 model.layers.7.scale"

FAULTS = [
    Fault(
        "weights.released_exact",
        "cycle0-device1-ledger",
        lambda record: shift(record, WEIGHTS_PHASES, 512),
        "weights_released, cycle0-device1, ledger: bytes in use changed by -5.27 MiB (-5,526,016 B) since "
        "after_drop_param_dict2, expected -5.27 MiB (-5,526,528 B); off by +512 B, allowed 0 B.",
        _HELD,
    ),
    Fault(
        "weights.released_exact",
        "cycle0-device1-allocator",
        lambda record: shift(record, WEIGHTS_PHASES, 512, "ledger", "allocator"),
        "weights_released, cycle0-device1, allocator: bytes in use changed by -5.27 MiB (-5,526,016 B) since "
        "after_drop_param_dict2, expected -5.27 MiB (-5,526,528 B); off by +512 B, allowed 0 B.",
        _HELD,
        base=ON_TPU,
    ),
    Fault(
        "weights.released_exact",
        "cycle1-arrays",
        lambda record: edit_info(record, RELEASED, 1, deleted_arrays=LEAVES - 1),
        "cycle1-arrays: arrays of weights deleted: 50, expected 51.",
        "delete() did not take effect",
    ),
    Fault(
        "weights.restored_exact",
        "cycle0-device1-ledger",
        lambda record: shift(record, (RESUMED,), 1),
        "weights_resumed, cycle0-device1, ledger: bytes in use changed by +5.27 MiB (5,526,529 B) since "
        "weights_released, expected +5.27 MiB (5,526,528 B); off by +1 B, allowed 0 B.",
        _LEFT,
    ),
    Fault(
        "weights.restored_bits",
        "cycle0",
        lambda record: edit_info(record, RESUMED, digests=DIGESTS | {_NAME: "f" * 32}),
        f"cycle0: arrays (of 51) that are not what they were; first: {_NAME}: 1, expected 0.",
        _CHANGED,
    ),
    Fault(
        "weights.restored_bits",
        "cycle1",
        lambda record: edit_info(
            record, RESUMED, 1, digests={name: bits for name, bits in DIGESTS.items() if name != _NAME}
        ),
        f"cycle1: arrays (of 51) that are not what they were; first: {_NAME}: 1, expected 0.",
        _CHANGED,
    ),
    Fault(
        "weights.restored_bits",
        "cycle0",
        lambda record: edit_info(record, RESUMED, model_shared=LEAVES - 2),
        "cycle0: arrays (of 51) that are not what they were; and 2 of the model's own parameters are other arrays than "
        "the runner's: 2, expected 0.",
        "only one of the weights' two owners was given the arrays: the runner's list, or the model",
        what="-model",
    ),
    Fault(
        "weights.same_output",
        "cycle0-generate",
        lambda record: edit_generates(record, "after_weights", 0, token_ids=OTHER_TOKENS),
        "cycle0-generate: token ids (of 8) unlike the warm generation's; first at position 0: 328 became 234: 8, "
        "expected 0.",
        _OUTPUT,
    ),
    Fault(
        "weights.same_output",
        "cycle1-generate_logprobs",
        lambda record: edit_generates(record, "after_weights", 1, logprobs=(-4.0, *(-3.5,) * 7)),
        "cycle1-generate_logprobs: log-probabilities differ from the warm generation's by at most 0.484375, allowed 0.",
        "the arithmetic differs: another executable, another layout, or other contents",
    ),
    Fault(
        "weights.no_compile",
        "cycle0-resume",
        lambda record: compiled(record, trace=1),
        "cycle0-resume: compilations and traces while resuming the weights: 1, expected 0.",
        _SPEC,
    ),
    Fault(
        "weights.no_compile",
        "cycle1-generate",
        lambda record: edit_generates(record, "after_weights", 1, compiles=Compiles(trace=9, lower=1, backend=1)),
        "cycle1-generate: compilations in the generation after it: 2, expected 0.",
        _SPEC,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_turns_its_check_red(fault: Fault) -> None:
    verdicts = judge(fault.plant(fault.base))
    assert {verdict.id for verdict in verdicts if verdict.verdict != "pass"} == {fault.check}
    verdict = only(verdicts, fault.check, fault.name)
    assert (verdict.verdict, verdict.message) == ("fail", fault.message)
    assert fault.likely in verdict.causes


def test_every_check_has_a_planted_fault() -> None:
    assert {fault.check for fault in FAULTS} == set(WEIGHTS_CHECKS)


# Silence, and what is missing ----------------------------------------------------------------------------------------


def test_a_record_of_a_run_that_was_to_keep_its_weights_has_no_verdict_on_them() -> None:
    assert of_weights(good_record()) == []
    bare = good_record().model_copy(update={"profile": {"name": "bare"}})  # as versions before this wrote them
    assert of_weights(bare) == []


def test_a_record_that_lacks_what_its_profile_promised_never_passes() -> None:
    promised = with_profile(good_record(), "cycle", release_weights=True)
    verdicts = of_weights(promised)
    assert {verdict.id: verdict.verdict for verdict in verdicts} == dict.fromkeys(WEIGHTS_CHECKS, "inconclusive")
    message = "cycle1-device3: the run ended before weights_released."
    assert only(verdicts, "weights.released_exact", "cycle1-device3-ledger").message == message


def test_phases_that_no_profile_promised_are_judged_all_the_same() -> None:
    unpromised = with_profile(shift(ON_CPU, (RESUMED,), 1), "cycle", release_weights=False)
    assert named(judge(unpromised), "fail") == {"weights.restored_exact[cycle0-device1-ledger]"}


@pytest.mark.parametrize(
    ("phase", "checks"),
    [
        (RELEASED, {"weights.released_exact", "weights.restored_exact", "weights.restored_bits"}),
        (RESUMED, {"weights.restored_exact", "weights.restored_bits", "weights.no_compile"}),
    ],
)
def test_without_a_phase_its_checks_are_inconclusive(phase: PhaseName, checks: set[str]) -> None:
    verdicts = judge(without_phase(ON_CPU, phase))
    assert {verdict.id for verdict in verdicts if verdict.verdict == "inconclusive"} == checks
    assert named(verdicts, "fail") == set()


@pytest.mark.parametrize(
    ("phase", "lost"),
    [
        (RELEASED, {"weights.released_exact[cycle0-arrays]", "weights.restored_bits[cycle0]"}),
        (RESUMED, {"weights.restored_bits[cycle0]"}),
    ],
)
def test_without_a_phases_info_its_checks_are_inconclusive(phase: PhaseName, lost: set[str]) -> None:
    verdicts = judge(edit_phase(ON_CPU, phase, lambda found: found.model_copy(update={"info": None})))
    assert named(verdicts, "inconclusive") == lost


def test_without_digests_nothing_was_compared() -> None:
    blank = edit_info(edit_info(ON_CPU, RELEASED, digests={}), RESUMED, digests={})
    assert named(judge(blank), "inconclusive") == {"weights.restored_bits[cycle0]"}


def test_without_the_generation_its_checks_are_inconclusive() -> None:
    verdicts = judge(without_generates(ON_CPU, "after_weights"))
    assert {v.id for v in verdicts if v.verdict == "inconclusive"} == {"weights.same_output", "weights.no_compile"}


def test_without_its_control_a_pass_proves_nothing() -> None:
    blind = of_weights(edit_canary(ON_CPU, "ledger", 1, rise_bytes=0))
    assert named(blind, "inconclusive") == {
        f"weights.{check}_exact[cycle{cycle}-device1-ledger]" for check in ("released", "restored") for cycle in (0, 1)
    }
    silent = of_weights(edit_generates(ON_CPU, "cold", compiles=Compiles()))
    assert {v.id for v in silent if v.verdict == "inconclusive"} == {"weights.no_compile"}


def test_a_profile_without_generation_still_judges_bytes_and_bits() -> None:
    quiet = with_profile(ON_CPU, "cycle", generate=False).model_copy(update={"generates": ()})
    outcomes = {verdict.id: verdict.verdict for verdict in of_weights(quiet)}
    assert outcomes == {
        "weights.released_exact": "pass",
        "weights.restored_exact": "pass",
        "weights.restored_bits": "pass",
        "weights.same_output": "not-run",
        "weights.no_compile": "not-run",
    }


def test_the_expected_bytes_are_the_weights_own() -> None:
    verdict = only(judge(ON_TPU), "weights.released_exact", "cycle0-device0-allocator")
    assert (verdict.expected, verdict.measured, verdict.unit) == (-WEIGHTS, -WEIGHTS, "bytes")
