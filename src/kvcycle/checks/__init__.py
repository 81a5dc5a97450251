"""Record → verdicts: pure functions that import neither jax nor sglang-jax.

Each check yields one verdict per scope (cycle, device) and witness that spoke. A check whose control failed is
``inconclusive``, and inconclusive fails the run; ``not-run`` says that the profile leaves the step out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvcycle.checks import controls, generation, memory, rebuild
from kvcycle.checks.soak import SOAK_CHECKS
from kvcycle.checks.weights import WEIGHTS_CHECKS
from kvcycle.collecting import no_collections
from kvcycle.record import Record
from kvcycle.record_parts import Verdict

Check = Callable[[Record], Iterator[Verdict]]

#: Every check by id: in the order of the cycle, then the controls, then the soak's. The weights' and the soak's are
#: silent on a record that was to have neither.
CHECKS: dict[str, Check] = {
    "drop.frees_kv": memory.drop_frees_kv,
    "drop.deletes_every_buffer": memory.drop_deletes_every_buffer,
    "drop.size_is_predicted": memory.drop_size_is_predicted,
    "drop.leaves_weights": memory.drop_leaves_weights,
    "params2.fits": memory.params2_fits,
    "params2.is_its_own_memory": memory.params2_is_its_own_memory,
    "swap.shares_buffers": rebuild.swap_shares_buffers,
    "rebuild.restores_bytes": memory.rebuild_restores_bytes,
    "rebuild.same_layout": rebuild.same_layout,
    "rebuild.in_place": rebuild.in_place,
    "rebuild.zeroed": rebuild.zeroed,
    "generate.no_compile": generation.no_compile,
    "generate.below_threshold": generation.below_threshold,
    "generate.same_output": generation.same_output,
    "generate.no_stale_prefix": generation.no_stale_prefix,
    "cycles.no_growth": memory.cycles_no_growth,
    **WEIGHTS_CHECKS,
    "controls.witness_sees_allocation": controls.witness_sees_allocation,
    "controls.witness_saw_boot": controls.witness_saw_boot,
    "controls.witnesses_agree": controls.witnesses_agree,
    "controls.compiles_are_counted": controls.compiles_are_counted,
    "controls.recompilation_is_seen": controls.recompilation_is_seen,
    "controls.output_varies": controls.output_varies,
    "controls.output_follows_weights": controls.output_follows_weights,
    "controls.prefix_hit_is_seen": controls.prefix_hit_is_seen,
    **SOAK_CHECKS,
}


def judge(record: Record) -> list[Verdict]:
    """Every check's verdicts on a record, in the order of :data:`CHECKS`; the record's own are not looked at."""
    with no_collections():
        return [verdict for check in CHECKS.values() for verdict in check(record)]


def passed(verdicts: list[Verdict]) -> bool:
    """Whether there are verdicts, and each passed or was left out by the profile."""
    return bool(verdicts) and all(verdict.verdict in ("pass", "not-run") for verdict in verdicts)


__all__ = ["CHECKS", "SOAK_CHECKS", "WEIGHTS_CHECKS", "Check", "judge", "passed"]
