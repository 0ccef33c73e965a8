"""Whether a plan fits a model, before anything is changed."""

from __future__ import annotations

import torch
from torch import nn

from hf_blr.config import BLRConfig
from hf_blr.dense import at_hand, feature_sizes, is_dense_linear, is_transposed, stored_weight
from hf_blr.experts import ExpertsTensor, layer_named
from hf_blr.factorize.finite import check_finite
from hf_blr.plan.layers import LayerPlan, Plan

#: what a dense layer may be made of
NUMBERS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_kinds(model: nn.Module, config: BLRConfig) -> None:
    """Raises TypeError, with what to do, for what is no model, or no config for one."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(
            f"the model must be a loaded one, got {given}: load it first, or compress it while it loads with "
            "from_pretrained(name, blr_config=config)"
        )
    if not isinstance(config, BLRConfig):
        unpacked = ": give BLRConfig(**config)" if isinstance(config, dict) else ""
        raise TypeError(f"the config must be a BLRConfig, got a {type(config).__name__}{unpacked}")


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raises ValueError if a planned layer is not a dense layer of the planned size, or cannot be fitted."""
    placed = getattr(model, "hf_device_map", None) or {}
    places = {str(device) for device in placed.values()}
    if {"cpu", "disk"} & places and places - {"cpu", "disk"}:
        raise ValueError(
            "the model is partly offloaded from a GPU to the CPU or disk, where its layers cannot be replaced; load it "
            'on one device, without device_map, or with the CPU and "disk" alone'
        )
    for name, layer in plan.items():
        try:
            module = layer_named(model, name)
        except AttributeError:
            raise ValueError(f"{name}: the plan lists it, and {type(model).__name__} has no such module") from None
        check_layer(name, module, layer)
        with at_hand(module):
            weight = stored_weight(module)
            if weight.is_meta:
                raise ValueError(
                    f"{name}: the weight is on the meta device; load the model's weights first. Those that device_map "
                    "leaves on the disk are read by transformers 5.13 and later"
                )
            if weight.dtype not in NUMBERS:
                raise ValueError(
                    f"{name}: the weight is of {weight.dtype}, expected floating-point numbers of 16 bits or more; "
                    'load the model with dtype="bfloat16"'
                )
            check_finite(f"{name}.weight", weight, "the checkpoint is damaged or overflowed its dtype")


def check_layer(name: str, module: nn.Module, layer: LayerPlan, remedy: str = "") -> None:
    """Raises ValueError unless the module is a dense layer of the kind and sizes that the plan was made for."""
    sizes = layer.spec.in_features, layer.spec.out_features
    planned = layer_in_words(sizes, layer.bias, layer.transposed, layer.experts)
    found = f"a {type(module).__name__}"
    if isinstance(module, ExpertsTensor):
        found = layer_in_words(feature_sizes(module), False, module.transposed, module.num_experts)
    elif is_dense_linear(module):
        found = layer_in_words(feature_sizes(module), module.bias is not None, is_transposed(module))
    if found != planned:
        raise ValueError(f"{name}: the plan says {planned}, the model has {found}{remedy and f'; {remedy}'}")


def layer_in_words(sizes: tuple[int, int], bias: bool, transposed: bool, experts: int = 0) -> str:
    if experts:
        stored = ", stored transposed" if transposed else ""
        return f"{experts} experts of {sizes[0]} -> {sizes[1]} features{stored}"
    kind = "a Conv1D" if transposed else "a linear layer"
    return f"{kind} of {sizes[0]} -> {sizes[1]} features {'with' if bias else 'without'} a bias"
