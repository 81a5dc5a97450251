"""What a record may hold: no number that overflows, no more than is judged in seconds, a profile that can be judged.

Checks compute with what they find in a record, from whomever it comes. So that none can fail on it, whatever would make
one fail is refused here, when the record is read.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, Field, ValidationError

from kvcycle.profile import CycleSpec, EngineArgs, Thresholds, Tolerances

#: More than any slice of TPUs has.
MAX_DEVICES = 16_384
#: Ten cycles of as many devices: judging and drawing take less than a minute up to here (docs/scale.md).
MAX_CYCLES_TIMES_DEVICES = 10 * MAX_DEVICES
#: A record's file keeps so many: they follow from what was measured, and would be most of it.
MAX_VERDICTS = 20_000
#: Two witnesses on every device, and one of the process on every host at most.
MAX_CANARIES = 3 * MAX_DEVICES

_INT64 = 2**63 - 1
_FLOAT32 = 3.4028235e38

Bytes = Annotated[int, Field(ge=0, le=_INT64, strict=True)]
Count = Annotated[int, Field(ge=0, le=_INT64, strict=True)]
Integer = Annotated[int, Field(ge=-_INT64 - 1, le=_INT64, strict=True)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
#: Engines compute them in float32 or less: no difference of two overflows.
LogProb = Annotated[float, Field(ge=-_FLOAT32, le=_FLOAT32, allow_inf_nan=False)]

#: The tables of a record's profile that checks and reports read.
_JUDGED: dict[str, type[BaseModel]] = {
    "cycle": CycleSpec,
    "tolerances": Tolerances,
    "thresholds": Thresholds,
    "engine": EngineArgs,
}


class _HasID(Protocol):
    @property
    def id(self) -> int: ...


def each_once[Devices: Sequence[_HasID]](devices: Devices) -> Devices:
    """The devices as they are.

    Raises:
        ValueError: two of them have the same id.
    """
    seen: set[int] = set()
    for device in devices:
        if device.id in seen:
            raise ValueError(f"device {device.id} is there more than once")
        seen.add(device.id)
    return devices


def check_judged_tables(profile: dict[str, Any]) -> dict[str, Any]:
    """A record's profile as it is, if what its checks read of it would do in a profile.

    A table may be missing, and a key that this version does not know is let pass: other versions wrote records too.

    Raises:
        ValueError: a value would not do; the sentence names its key.
    """
    for name, model in _JUDGED.items():
        table = profile.get(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{name}={reprlib.repr(table)} will not do: it must be a table")
        try:
            model.model_validate({key: table[key] for key in model.model_fields if key in table}, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in (name, *first["loc"]))
            raise ValueError(f"{key}={reprlib.repr(first['input'])} will not do: {first['msg']}") from error
    return profile
