"""What the caller and the planning process say to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from kvcycle.plan.model import MaxTokens, Plan
from kvcycle.profile import Profile

#: Which error the sentence belongs to: ProfileError, PlatformError or PlanError.
Failure = Literal["profile", "platform", "plan"]


class Request(BaseModel):
    """What to plan. ``max_tokens`` asks for the token limits as well; ``phases`` is False to ask for them only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: Profile
    config_folder: Path
    topology: str
    phases: bool = True
    forward: bool = False
    prefill_tokens: int | None = None
    max_tokens: bool = False


class Reply(BaseModel):
    """What came of it: a plan and token limits, or one sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: Plan | None = None
    max_tokens: MaxTokens | None = None
    failure: Failure | None = None
    message: str = ""
