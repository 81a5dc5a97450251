"""What is looked up in a record's parts again and again is put in order once: no scan of all devices for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from pydantic import BaseModel


def remembered[Source, Index](part: BaseModel, name: str, source: Source, build: Callable[[Source], Index]) -> Index:
    """What ``build`` makes of one of a part's fields, made at the first call and kept with the part.

    Args:
        part: the part; nothing in it changes (it is frozen), but a copy with another field takes along what is kept.
        name: under which it is kept; no field's.
        source: the field's value. What was made of another value is not used.
        build: makes the index.
    """
    kept = part.__dict__.get(f"_{name}")
    if kept is None or kept[0] is not source:
        # Past the model: what is kept is no part of a record, is not compared and not written.
        kept = part.__dict__[f"_{name}"] = (source, build(source))
    return cast("Index", kept[1])
