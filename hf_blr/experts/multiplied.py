"""Factors multiplied out: dense layers and 3-D parameters in their place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hf_blr.experts.layers import ExpertsLinear
from hf_blr.experts.module import put_layer
from hf_blr.linear import BLRLinear


def multiply_out(model: nn.Module, modules: Mapping[str, BLRLinear]) -> None:
    """Puts the dense layer, or the tensor of experts, that each of these modules stands for in its place."""
    for name, module in modules.items():
        if isinstance(module, ExpertsLinear):
            put_layer(model, name, dense_experts(module))
        else:
            model.set_submodule(name, module.to_dense())


def dense_experts(module: ExpertsLinear) -> nn.Parameter:
    """The 3-D parameter that the factors stand for, in the layout of the model; multiplied out in float32 or better."""
    weight = module.dense_weight(torch.promote_types(module.dtype, torch.float32)).detach().to(module.dtype)
    # what is kept in bits cannot say whether the matrix would train
    trains = next((factor.requires_grad for factor in module.factors().values()), True)
    return nn.Parameter((weight.mT if module.transposed else weight).contiguous(), requires_grad=trains)
