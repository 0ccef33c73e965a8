"""The dense layers that can be replaced: reading their weight as `[N, K]`, and building them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D


def conv1d_class() -> type[Conv1D]:
    """GPT-2's linear layer, whose weight is stored `[K, N]`."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def is_dense_linear(module: nn.Module) -> bool:
    """Exactly `nn.Linear` or `Conv1D`: a subclass may hide a packed weight or a different forward."""
    return type(module) is nn.Linear or type(module) is conv1d_class()


def is_transposed(module: nn.Module) -> bool:
    return type(module) is conv1d_class()


def stored_weight(module: nn.Module) -> Tensor:
    """The weight as the layer holds it."""
    # to torch's stubs an attribute of an unknown module is a tensor or a module
    weight: Any = module.weight
    return weight


def stored_bias(module: nn.Module) -> Tensor | None:
    """The bias that the layer holds, if any."""
    bias: Any = module.bias
    return bias


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight as `[N, K]`, a view without a copy."""
    weight = stored_weight(module).detach()
    return weight.T if is_transposed(module) else weight


def set_dense_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Overwrites the weight, in place, by `[N, K]` in any float dtype."""
    dense_weight(module).copy_(weight)


def feature_sizes(module: nn.Module) -> tuple[int, int]:
    """(K, N)."""
    n, k = dense_weight(module).shape
    return k, n


def build_dense(weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> nn.Module:
    """An `nn.Linear`, or a `Conv1D` if `transposed`, holding weight `[N, K]` and bias `[N]`."""
    n, k = weight.shape
    module: nn.Linear | Conv1D
    if transposed:
        module = conv1d_class()(n, k).to(device=weight.device, dtype=weight.dtype)
        # Conv1D has a bias whether one is wanted or not
        values = {"weight": weight.T.contiguous(), "bias": torch.zeros_like(weight[:, 0]) if bias is None else bias}
    else:
        module = nn.Linear(k, n, bias=bias is not None, device="meta")
        values = {"weight": weight.contiguous()} | ({} if bias is None else {"bias": bias})
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value.detach()))
    return module
