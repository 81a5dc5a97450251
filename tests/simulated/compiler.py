"""Where the TPU compiler can be asked."""

from __future__ import annotations

import importlib.util

import pytest

from kvcycle.engine import stack

#: kvcycle.plan builds on how 0.1.0rc0 allocates, and refuses any other way.
PLANS = stack().sglang_jax != "0.0.3rc0"

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or not PLANS,
    reason="libtpu is not installed: pip install 'kvcycle[plan]'"
    if PLANS
    else "kvcycle cannot plan with sglang-jax 0.0.3rc0, and says so (test_plan.py)",
)
