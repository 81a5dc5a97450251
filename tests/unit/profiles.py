"""What is wrong with a profile, as its tests ask for it."""

from __future__ import annotations

from typing import Any

import pytest

from kvcycle.errors import ProfileError
from kvcycle.profile import Platform
from kvcycle.profile_file import load_profile


def refused(overrides: dict[str, Any], platform: Platform = "cpu") -> str:
    """The sentence with which the tiny profile is refused, with these keys of it changed."""
    with pytest.raises(ProfileError) as caught:
        load_profile("tiny", overrides).check_geometry(platform)
    return str(caught.value)
