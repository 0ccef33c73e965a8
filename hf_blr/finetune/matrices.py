"""Training on the matrices that factors make, once for each forward of the model.

At many tokens a step that costs as much as a forward over as many tokens as the rank, and needs no kernel for each rank
that occurs. All projections of all blocks look alike then, whether they are compressed or were left dense, so that
compiled code of one block serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_blr.dense import is_transposed, stored_bias, stored_weight
from hf_blr.experts import ExpertsLinear
from hf_blr.finetune.products import products
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.ops.table import implementation_of
from hf_blr.targets import remaining_targets

#: layers whose matrices are made together: their gradients wait for each other
TOGETHER = 16


class Projection(nn.Module):
    """A layer for one forward: x `[..., K]` times its matrix `[N, K]`, and its bias."""

    matrix: Tensor
    added: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.added)


class Matrices:
    """Hooks of a model that put matrices in the place of its projections, in forwards in training mode.

    Args:
        model: as a trainer calls it.
        dtype: of the matrices; that of the products.
        compiled: whether the model's blocks run compiled.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, compiled: bool):
        self.dtype = dtype
        layers = {name: module for name, module in blr_modules(model).items() if not isinstance(module, ExpertsLinear)}
        names = [*layers, *remaining_targets(model)]
        self.layers = {name: model.get_submodule(name) for name in names}
        self.projections = {name: Projection() for name in names}
        #: what holds each, and its name there: `set_submodule` walks the model from its root
        self.places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
        self.blocks = compiled_forwards(model) if compiled else {}

    def before(self, model: nn.Module, *_: Any) -> None:
        if not model.training:
            return
        matrices = self.matrices()
        for name, projection in self.projections.items():
            # no parameters of the projection, which no optimizer should see
            projection.__dict__["matrix"] = matrices[name]
            projection.__dict__["added"] = stored_bias(self.layers[name])
            self.put(name, projection)
        for block, forward in self.blocks.items():
            block.forward = forward

    def after(self, model: nn.Module, *_: Any) -> None:
        for name, layer in self.layers.items():
            self.put(name, layer)
        for block in self.blocks:
            block.__dict__.pop("forward", None)

    def put(self, name: str, module: nn.Module) -> None:
        owner, attribute = self.places[name]
        setattr(owner, attribute, module)

    def matrices(self) -> dict[str, Tensor]:
        """{layer: its matrix}; those of pairs many at a time."""
        found, pairs = {}, {}
        for name, layer in self.layers.items():
            if isinstance(layer, BLRLinear) and (pair := implementation_of(layer.spec.structure).pair):
                pairs[name] = pair(**layer.tensors(self.dtype))
            else:
                found[name] = self.matrix(layer)
        names = list(pairs)
        for some in (names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)):
            found |= zip(some, products([pairs[name] for name in some], self.dtype), strict=True)
        return found

    def matrix(self, layer: nn.Module) -> Tensor:
        if isinstance(layer, BLRLinear):
            return layer.dense_weight(self.dtype)
        weight = stored_weight(layer)
        # a view, since compiled code tells parameters from other tensors, and those with gradients from those without
        matrix = weight.view_as(weight).to(self.dtype)
        if self.blocks and not matrix.requires_grad:
            matrix = matrix.detach().requires_grad_()
        return matrix.T if is_transposed(layer) else matrix


@contextmanager
def on_matrices(model: nn.Module, teacher: nn.Module, dtype: torch.dtype, compiled: bool) -> Iterator[None]:
    """Inside the `with`, the model trains on its matrices; both models' blocks run compiled, if wished.

    Args:
        model: to train; experts and what is no projection stay as they are.
        teacher: runs in evaluation mode, with batches of one shape.
        dtype: of the products.
        compiled: by `torch.compile`, a block of a kind once: seconds at first.
    """
    matrices = Matrices(model, dtype, compiled)
    handles = [
        model.register_forward_pre_hook(matrices.before, prepend=True),
        model.register_forward_hook(matrices.after, always_call=True, prepend=True),
    ]
    blocks = compiled_forwards(teacher) if compiled else {}
    for block, forward in blocks.items():
        block.forward = forward
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            del block.forward


def compiled_forwards(model: nn.Module) -> dict[nn.Module, Any]:
    """{block: its forward, compiled}; what comes first calls it compiles it."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return {block: torch.compile(block.forward, dynamic=False) for block in blocks}
