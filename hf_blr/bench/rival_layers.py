"""Whole models whose projections are dense layers in few bits by other libraries."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_blr.bench.rivals import RIVALS, pytorch_int4, quantise_by_torchao
from hf_blr.ops.rules.few_tokens import FEW_TOKENS
from hf_blr.targets import find_targets


class RivalLinear(nn.Module):
    """y = x W^T by another library's kernel; at more than `FEW_TOKENS` rows W is dequantised for a product."""

    def __init__(self, linear: nn.Linear, form: str, implementation: str):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kernel, stored, self.product = RIVALS[form][implementation](linear.weight.detach())
        self.count = len(stored)
        for i, tensor in enumerate(stored):
            self.register_buffer(f"stored_{i}", tensor)

    def stored(self) -> list[Tensor]:
        return [getattr(self, f"stored_{i}") for i in range(self.count)]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        run = self.kernel if rows.shape[0] <= FEW_TOKENS else self.product
        out: Tensor = run(rows, *self.stored())
        return out.view(*x.shape[:-1], out.shape[-1])

    def bytes_read(self) -> int:
        """At few rows: without PyTorch's second form of int4 weights, which is for many."""
        return sum(t.nbytes for t in self.stored()[: 2 if self.kernel is pytorch_int4 else None])


def rival_model(model: nn.Module, form: str, implementation: str) -> None:
    """The projections in this form by this library, in place. torchao's are linear layers, for any number of rows."""
    names = find_targets(model)
    if implementation == "torchao":
        quantise_by_torchao(model, names)
        return
    for name in names:
        linear: Any = model.get_submodule(name)
        model.set_submodule(name, RivalLinear(linear, form, implementation))


def bytes_of(tensor: Tensor) -> int:
    """Of what a tensor holds, which may be other tensors, as of torchao's."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
