"""The experts module of a model, with factors in the place of its 3-D parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.experts.layers import ExpertsLinear
from hf_blr.experts.tensors import PROJECTIONS


class Experts(nn.Module):
    """Takes the place of an experts module by taking over its object: attributes, biases, hooks and gate stay.

    Each projection is a parameter `[E, N, K]` (`[E, K, N]` where the model stores it so), an `ExpertsLinear`, or a list
    of E linear layers. What the dense class computes with the first, this one computes with all three.
    """

    #: what the module was, and is again once all of it is dense
    dense_class: type[nn.Module]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[T, H]`, experts and their weights `[T, k]` -> `[T, H]`, expert after expert."""
        own: Any = self
        out = torch.zeros_like(hidden_states)
        gated = getattr(self, "has_gate", True)
        entry = "gate_up_proj" if gated else "up_proj"
        for expert in top_k_index.unique().tolist():
            # an index beyond the last expert stands for none
            if expert >= own.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            inner = self.project(entry, hidden_states[token], expert)
            inner = self._apply_gate(inner) if gated else own.act_fn(inner)
            result = self.project("down_proj", inner, expert)
            if getattr(own, "has_post_expert_norm", False):
                result = own.post_expert_norm(result)
            result = result * top_k_weights[token, place, None]
            out.index_add_(0, token, result.to(out.dtype))
        return out

    def _apply_gate(self, inner: Tensor) -> Tensor:
        """`[T, 2 I]` -> `[T, I]`, as the dense class does it."""
        gate: Any = self.dense_class
        gated: Tensor = gate._apply_gate(self, inner)
        return gated

    def project(self, key: str, x: Tensor, expert: int) -> Tensor:
        """x `[T, K]` -> `[T, N]`, by one projection of one expert."""
        own: Any = self
        layer = getattr(self, key)
        if isinstance(layer, ExpertsLinear):
            out = layer(x, expert)
        elif isinstance(layer, nn.ModuleList):
            out = layer[expert](x)
        else:
            out = nn.functional.linear(x, layer[expert].mT if own.is_transposed else layer[expert])
        return out + getattr(self, f"{key}_bias")[expert] if own.has_bias else out


def put_layer(model: nn.Module, name: str, layer: nn.Module | nn.Parameter) -> None:
    """Puts a module, or the 3-D parameter of a dense model, in the place of a projection of experts.

    The module that holds it becomes an `Experts`, or its own class again if all of it is dense now.
    """
    parent, _, key = name.rpartition(".")
    owner = model.get_submodule(parent)
    for kept in (owner._parameters, owner._modules):
        kept.pop(key, None)
    setattr(owner, key, layer)
    factored = any(projection in owner._modules for projection in PROJECTIONS)
    if factored and not isinstance(owner, Experts):
        dense_class = type(owner)
        owner.__class__ = Experts
        owner.dense_class = dense_class  # type: ignore[assignment]
    elif not factored and isinstance(owner, Experts):
        owner.__class__ = owner.__dict__.pop("dense_class")
