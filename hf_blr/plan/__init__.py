"""Which module becomes what."""

from hf_blr.plan.check import check_kinds, check_layer, check_plan
from hf_blr.plan.layers import LayerPlan, Plan, layers_from_plan, plan_from_layers, plan_in_place
from hf_blr.plan.resolve import dense_plan, resolve_plan

__all__ = [
    "LayerPlan",
    "Plan",
    "check_kinds",
    "check_layer",
    "check_plan",
    "dense_plan",
    "layers_from_plan",
    "plan_from_layers",
    "plan_in_place",
    "resolve_plan",
]
