"""What was done in a phase, as a record tells it beside the phase's figures: one class for each kind of phase."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvcycle.record_limits import Bytes, Count


class Part(BaseModel):
    """A part of a record: nothing in it that is not declared, and nothing that changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Layout(Part):
    """What a device buffer is, short of its contents."""

    shape: tuple[Count, ...]
    dtype: str
    sharding: str
    memory_kind: str
    committed: bool
    weak_type: bool


class DropInfo(Part):
    """What the drop did: how many buffers there were, were deleted, and could not be."""

    kind: Literal["drop"] = "drop"
    buffers: Count
    deleted_buffers: Count
    missing_delete_method: Count
    bytes_by_device: dict[int, Bytes]


class Params2Info(Part):
    """The second parameter set: what was asked for, what of it aliases the first, and the error if it did not fit."""

    kind: Literal["params2"] = "params2"
    arrays: Count
    requested_bytes_by_device: dict[int, Bytes]
    buffers: Count
    buffers_shared_with_engine: Count
    error: str | None = None


class RebuildInfo(Part):
    """The rebuild: every slot's layout before and after, and what is no longer where it was."""

    kind: Literal["rebuild"] = "rebuild"
    layouts_before: dict[str, Layout]
    layouts_after: dict[str, Layout]
    moved_owners: tuple[str, ...] = ()
    nonzero_slots: tuple[str, ...] = ()


class WeightsReleasedInfo(Part):
    """The release of the weights: what was deleted, what host memory keeps, and a digest of every array before it."""

    kind: Literal["weights_released"] = "weights_released"
    arrays: Count
    deleted_arrays: Count
    host_bytes: Bytes
    digests: dict[str, str]


class WeightsResumedInfo(Part):
    """The resume: a digest of every array after it, and how many of the model's own parameters are those arrays."""

    kind: Literal["weights_resumed"] = "weights_resumed"
    digests: dict[str, str]
    model_params: Count
    model_shared: Count


PhaseInfo = Annotated[
    DropInfo | Params2Info | RebuildInfo | WeightsReleasedInfo | WeightsResumedInfo, Field(discriminator="kind")
]
