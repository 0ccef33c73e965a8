"""The experts module of a model, with factors in the place of its 3-D parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr import ops
from hf_blr.experts.conventions import holds_experts
from hf_blr.experts.layers import ExpertsLinear
from hf_blr.experts.plain import PlainExperts
from hf_blr.experts.tensors import PROJECTIONS
from hf_blr.ops import Routed


class Experts(nn.Module):
    """Takes the place of an experts module by taking over its object: attributes, biases, hooks and gate stay.

    Each projection is a parameter `[E, N, K]` (`[E, K, N]` where the model stores it so), an `ExpertsLinear`, a list of
    E linear layers, or `PlainExperts`. What the dense class computes with the first, this one computes with all.
    """

    #: what the module was, and is again once all of it is dense
    dense_class: type[nn.Module]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[T, H]`, experts and their weights `[T, k]` -> `[T, H]`.

        With Transformers' `experts_implementation="eager"` one expert runs after the other. So do experts that are
        modules of their own, structures without a form for experts, and experts on several devices.
        """
        own: Any = self
        layers = [getattr(self, key) for key in self.projections()]
        if any(isinstance(p, PlainExperts) for p in layers):
            return self.together(ops.gathered_rows(top_k_index), hidden_states, top_k_weights)
        alone = any(isinstance(p, nn.ModuleList) or (isinstance(p, ExpertsLinear) and p.alone) for p in layers)
        eager = getattr(getattr(self, "config", None), "_experts_implementation", None) == "eager"
        if alone or eager or getattr(self, "_is_expert_parallel", False):
            return self.one_by_one(hidden_states, top_k_index, top_k_weights)
        numbers = [t for p in layers for t in (p.trained() if isinstance(p, ExpertsLinear) else [p])]
        rows = ops.route_rows(hidden_states, top_k_index, own.num_experts, numbers)
        return self.together(rows, hidden_states, top_k_weights)

    def together(self, rows: Routed, hidden_states: Tensor, top_k_weights: Tensor) -> Tensor:
        """The forward of all pairs of a token and an expert at once."""
        result = self.mlp(rows.enter(hidden_states, top_k_weights.shape[-1]), partial(self.of_rows, rows))
        return rows.leave(result, top_k_weights).to(hidden_states.dtype)

    def one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The forward in a loop over the experts that were chosen."""
        own: Any = self
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            # an index beyond the last expert stands for none
            if expert >= own.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            result = self.mlp(hidden_states[token], partial(self.project, expert))
            result = result * top_k_weights[token, place, None]
            out.index_add_(0, token, result.to(out.dtype))
        return out

    def projections(self) -> tuple[str, str]:
        """The names of the first projection and of the last."""
        return "gate_up_proj" if getattr(self, "has_gate", True) else "up_proj", "down_proj"

    def mlp(self, x: Tensor, multiply: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Rows `[S, H]` -> `[S, H]`, with (projection, rows) -> rows."""
        own: Any = self
        first, last = self.projections()
        inner = multiply(first, x)
        inner = self._apply_gate(inner) if getattr(self, "has_gate", True) else own.act_fn(inner)
        result = multiply(last, inner)
        return own.post_expert_norm(result) if getattr(self, "has_post_expert_norm", False) else result

    def of_rows(self, rows: Routed, key: str, x: Tensor) -> Tensor:
        """x `[S, K]` -> `[S, N]`, by one projection of each row's expert."""
        own: Any = self
        layer = getattr(self, key)
        if isinstance(layer, (ExpertsLinear, PlainExperts)):
            out = layer.of_rows(x, rows)
        else:
            out = rows.product(x, layer.mT if own.is_transposed else layer)
        return out + rows.own(getattr(self, f"{key}_bias")) if own.has_bias else out

    def _apply_gate(self, inner: Tensor) -> Tensor:
        """`[T, 2 I]` -> `[T, I]`, as the dense class does it."""
        gate: Any = self.dense_class
        gated: Tensor = gate._apply_gate(self, inner)
        return gated

    def project(self, expert: int, key: str, x: Tensor) -> Tensor:
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


class EveryExpert(Experts):
    """Likewise of experts that are all handed rows of every token; see `conventions.meets_all`."""

    has_gate, has_bias, is_transposed = True, False, True

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states `[E * T, H]`, the T rows of the first expert first -> `[E * T, H]`."""
        own: Any = self
        numbers = torch.arange(own.num_experts, device=hidden_states.device)
        chosen = numbers.repeat_interleave(hidden_states.shape[0] // own.num_experts)[:, None]
        return super().forward(hidden_states, chosen, hidden_states.new_ones(chosen.shape))

    def one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # a row of zeros is of a token that did not choose the expert, and says nothing of its inputs
        own: Any = self
        chosen = torch.where(hidden_states.any(-1, keepdim=True), top_k_index, own.num_experts)
        return super().one_by_one(hidden_states, chosen, top_k_weights)

    def _apply_gate(self, inner: Tensor) -> Tensor:
        own: Any = self
        gate, up = inner.chunk(2, dim=-1)
        gated: Tensor = up * own.act_fn(gate)
        return gated


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
        owner.__class__ = Experts if holds_experts(owner) else EveryExpert
        owner.dense_class = dense_class  # type: ignore[assignment]
    elif not factored and isinstance(owner, Experts):
        owner.__class__ = owner.__dict__.pop("dense_class")
