"""Layers that multiply in float8 while they train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_blr import ops
from hf_blr.inference.fusion import of_one_kind
from hf_blr.inference.grouped import PATIENCE, ProjectionGroup
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.ops.float8_training import emulates, why_not_float8
from hf_blr.ops.rules.bits import LEAST_FLOAT8


def open_float8(model: nn.Module) -> tuple[list[str], str]:
    """Lets layers whose factors are numbers multiply in float8 in training mode, until `close_float8`.

    Returns:
        (the layers, in words what else there is to know or "").

    Raises:
        ValueError: if no layer of the model can, with the reason.
    """
    layers = blr_modules(model)
    reasons = {name: why_not_float8(layer.spec) for name, layer in layers.items() if layer.factors()}
    opened = [name for name, reason in reasons.items() if reason is None]
    if not opened:
        why = next(iter(reasons.values()), "its factors are kept in bits")
        raise ValueError(f"no layer of {type(model).__name__} can train in float8: {why}; leave train_float8 out")
    for name in opened:
        layers[name].float8 = True
    for name, parent in model.named_modules():
        for modules in of_one_kind(name, parent, input_of):
            group = GroupInFloat8(list(modules.values()))
            for index, module in enumerate(group.modules):
                module.float8_group = group, index
    said = []
    if len(opened) < len(layers):
        refused = {name: reason for name, reason in reasons.items() if reason is not None}
        why = ", ".join(dict.fromkeys(refused.values())) or "factors are kept in bits"
        said.append(f"{len(layers) - len(opened)} layers train in the dtype of the model: {why}")
    if emulates(next(iter(layers[opened[0]].factors().values()))):
        wanted = "a GPU of compute capability {}.{}".format(*LEAST_FLOAT8)
        said.append(f"float8 numbers are multiplied in float32, which saves no time; it takes {wanted} to save any")
    return opened, "; ".join(said)


def close_float8(model: nn.Module) -> None:
    """Lets all layers multiply in the dtype of the model again."""
    for layer in blr_modules(model).values():
        layer.float8, layer.float8_group = False, None


def input_of(module: nn.Module) -> tuple[Any, ...] | None:
    """What layers must have in common to multiply together; None where one does not multiply in float8."""
    if not isinstance(module, BLRLinear) or not module.float8:
        return None
    return module.in_features, module.device


class GroupInFloat8(ProjectionGroup):
    """Layers that train in float8 on one input: one cast of it, and one product each for y, dx and dv."""

    def compute(self, x: Tensor) -> tuple[Tensor, ...]:
        layers = [(module.spec.structure, module.operands(x), module.bias) for module in self.modules]
        return tuple(ops.linears_in_float8(x, layers))

    def may_wait(self, index: int, x: Tensor) -> bool:
        return True

    def worthwhile(self, x: Tensor) -> bool:
        if self.unclaimed >= PATIENCE or any(module.impl for module in self.modules):
            return False
        together = all(module.float8 and module.training for module in self.modules)
        return together and (torch.compiler.is_compiling() or not x.is_inference())

    def state(self, index: int, x: Tensor) -> list[Any] | None:
        found = super().state(index, x)
        return None if found is None else [*found, torch.is_grad_enabled()]
