"""What fits: the TPU compiler's word on a profile, for machines that have no TPU. Evidence ``compiled-for-tpu``."""

from __future__ import annotations

from kvcycle.plan.api import ask, max_tokens, plan
from kvcycle.plan.model import ForwardPlan, MaxTokens, PhasePlan, Plan, PlanError, TokenLimit
from kvcycle.plan.topologies import Topology, find_topology, topology_names

__all__ = [
    "ForwardPlan",
    "MaxTokens",
    "PhasePlan",
    "Plan",
    "PlanError",
    "TokenLimit",
    "Topology",
    "ask",
    "find_topology",
    "max_tokens",
    "plan",
    "topology_names",
]
