"""Experts as linear layers of their own, for as long as they are fitted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_blr.experts.layers import ExpertsLinear
from hf_blr.experts.module import put_layer
from hf_blr.experts.tensors import ExpertsTensor, layer_named
from hf_blr.linear import BLRLinear


class OpenedExperts(nn.ModuleList):
    """The experts of one tensor as linear layers `<name>.<expert>`, whose weights are views of it."""

    def __init__(self, tensor: ExpertsTensor):
        stored = tensor.owner.get_parameter(tensor.key)
        super().__init__(linear_on(weight, stored.requires_grad) for weight in tensor.weight.detach())
        # not as parts of this module: its experts hold the same numbers
        self.__dict__.update(stored=stored, transposed=tensor.transposed)
        self.train(tensor.owner.training)

    def closed(self) -> nn.Module | nn.Parameter:
        """The factors of all experts in one module, or the tensor, if not all of them have factors of one spec."""
        layers: Any = list(self)
        if (
            all(isinstance(layer, BLRLinear) for layer in layers)
            and len({(layer.spec, layer.storage) for layer in layers}) == 1
        ):
            return ExpertsLinear.stacked(layers, self.__dict__["transposed"])
        stored: nn.Parameter = self.__dict__["stored"]
        matrices = stored.data.mT if self.__dict__["transposed"] else stored.data
        for expert, layer in enumerate(layers):
            if isinstance(layer, BLRLinear):
                matrices[expert] = layer.dense_weight(torch.float32).detach().to(stored)
        return stored


def linear_on(weight: torch.Tensor, trains: bool) -> nn.Linear:
    """A layer without bias on this memory `[N, K]`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=trains)
    return layer


@contextmanager
def opened(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """For a while, each expert of these tensors is a linear layer; other names are passed over.

    At the end, however it comes, a tensor all of whose experts are factors is an `ExpertsLinear`, and dense otherwise.
    """
    tensors = {name: layer for name in names if isinstance(layer := layer_named(model, name), ExpertsTensor)}
    for name, tensor in tensors.items():
        put_layer(model, name, OpenedExperts(tensor))
    try:
        yield
    finally:
        for name in tensors:
            experts: Any = model.get_submodule(name)
            put_layer(model, name, experts.closed())


def expanded(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{layer: the name that it comes from}, with each opened tensor of experts as its experts, in their order.

    Tensors that were not opened have no layers to fit.
    """
    found: dict[str, str] = {}
    for name in names:
        experts = layer_named(model, name)
        if isinstance(experts, ExpertsTensor):
            continue
        if isinstance(experts, OpenedExperts):
            found |= {f"{name}.{number}": name for number in range(len(experts))}
        else:
            found[name] = name
    return found


def lies_in_experts(model: nn.Module, name: str) -> bool:
    """Whether a layer is one of several experts of one tensor, now opened."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), OpenedExperts)
