"""What cannot be served: ``python -m kvcycle.serve`` refuses it before it boots anything, an Engine when it boots."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvcycle.errors import UnsupportedEngineError
from kvcycle.service import Service, check_served
from tests.unit.engines import Scheduler010

USUAL: dict[str, Any] = {"nnodes": 1, "multimodal": False, "disaggregation_mode": "null", "pd_disaggregation": None}


def test_one_host_and_one_engine_are_served() -> None:
    check_served(SimpleNamespace(**USUAL))
    check_served(SimpleNamespace(nnodes=1, multimodal=False))  # 0.0.3rc0 has no more of them


@pytest.mark.parametrize(
    ("name", "value"),
    [("nnodes", 2), ("multimodal", True), ("disaggregation_mode", "prefill"), ("pd_disaggregation", "pathways")],
)
def test_what_is_not_one_schedulers_memory_is_refused(name: str, value: object) -> None:
    with pytest.raises(UnsupportedEngineError) as caught:
        check_served(SimpleNamespace(**(USUAL | {name: value})))
    assert str(caught.value) == (
        f"kvcycle cannot serve an engine with {name}={value!r}: its memory is not one scheduler's to release. Start it "
        "without that, or with sgl_jax.launch_server and without release_memory_occupation."
    )


def test_an_engine_that_was_booted_with_it_is_refused_before_it_serves() -> None:
    scheduler = Scheduler010()
    vars(scheduler)["server_args"] = SimpleNamespace(nnodes=2)
    with pytest.raises(UnsupportedEngineError, match="cannot serve an engine with nnodes=2"):
        Service(scheduler)
