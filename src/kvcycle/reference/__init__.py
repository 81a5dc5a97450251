"""The reference run's figures, as data: what was measured by hand, once, on one TPU VM.

Used by tests and reports to stand beside a run's own figures; nothing that measures or predicts reads them.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kvcycle.record_parts import PHASES, Evidence, PhaseName


class ReferenceRun(BaseModel):
    """One run of the reference: bytes in use summed over the devices after each phase that was noted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_total_tokens: int
    kv_bytes: int
    kv_buffers: int
    params_bytes: int
    bytes_in_use: dict[PhaseName, int]
    seconds: dict[str, float]

    def changes(self) -> dict[PhaseName, int]:
        """The change in bytes at each phase whose predecessor in the file was noted as well."""
        noted = [name for name in PHASES if name in self.bytes_in_use]
        return {after: self.bytes_in_use[after] - self.bytes_in_use[before] for before, after in pairwise(noted)}

    def unexplained_bytes(self, change: int) -> int:
        """By how much a change differs from the run's own KV or weights' size: 0 for all but one figure.

        The second run's ``kv_cache_rebuilt`` rose by 212,992 bytes more than its KV cache; what else was allocated in
        that phase was not noted.
        """
        return min((abs(change) - size for size in (self.kv_bytes, self.params_bytes)), key=abs)


class Reference(BaseModel):
    """The reference with its source and evidence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    evidence: Evidence
    measured_by: str
    what: str
    stack: dict[str, str]
    runs: tuple[ReferenceRun, ...]


def load() -> Reference:
    """The reference run on a TPU v4-8."""
    text = (Path(__file__).parent / "qwen2.5-3b-v4-8.json").read_text(encoding="utf-8")
    return Reference.model_validate_json(text)


def run_for(model_config: dict[str, object], max_total_tokens: int | None, tp_size: int) -> ReferenceRun | None:
    """The reference's run of this geometry, None if there is none."""
    shape = [model_config.get(key) for key in ("model_type", "num_hidden_layers", "hidden_size", "num_key_value_heads")]
    if shape != ["qwen2", 36, 2048, 2] or tp_size != 4:
        return None
    return next((run for run in load().runs if run.max_total_tokens == max_total_tokens), None)
