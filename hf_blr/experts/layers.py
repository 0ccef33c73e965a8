"""The factors of one tensor of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_blr import ops
from hf_blr.formats import PLAIN, Format
from hf_blr.linear import BLRLinear
from hf_blr.ops.dispatch import compute_dtype
from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR, BLRSpec


class ExpertsLinear(BLRLinear):
    """E linear layers of one spec; every factor has a leading axis of E. They have no bias.

    Args:
        spec: the sizes of one expert's matrix `[N, K]`.
        num_experts: E.
        transposed: the dense model stores each matrix `[K, N]`.
        device, dtype: of the factors.
    """

    def __init__(
        self,
        spec: BLRSpec,
        num_experts: int,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        storage: Format = PLAIN,
    ):
        nn.Module.__init__(self)
        if storage != PLAIN:
            raise ValueError(f"experts keep their factors in the plain format, got {storage.name}")
        implementation_of(spec.structure)
        self.spec, self.storage, self.num_experts = spec, storage, num_experts
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.transposed, self.bias = transposed, None
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        for name, (shape, kind) in spec.tensors().items():
            value = torch.empty((num_experts, *shape), device=device, dtype=storage.dtype_of(kind, dtype))
            if kind == FACTOR:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.reset_parameters()

    @staticmethod
    def stacked(layers: list[BLRLinear], transposed: bool) -> ExpertsLinear:
        """The layers' factors, one expert after the other. They must have one spec, and no bias."""
        first = layers[0]
        module = ExpertsLinear(first.spec, len(layers), transposed, "meta", first.dtype)
        for name in first.spec.names():
            module.put(name, torch.stack([getattr(layer, name).detach() for layer in layers]))
        module.train(first.training)
        return module

    def forward(self, x: Tensor, expert: int) -> Tensor:  # type: ignore[override]
        """x `[T, K]` -> `[T, N]`, by the factors of one expert."""
        tensors = [tensor[expert] for tensor in self.operands(x)]
        return ops.linear(self.spec.structure, x, tensors, None, self.impl or None, "")

    @property
    def alone(self) -> bool:
        """Whether one expert must run after the other, since the structure has no form for rows of many."""
        return implementation_of(self.spec.structure).experts is None

    def of_rows(self, x: Tensor, rows: ops.Routed) -> Tensor:
        """x `[S, K]` -> `[S, N]`, each row by the factors of its expert."""
        if ops.current_impl() == "dense":
            return rows.product(x, self.dense_weight(compute_dtype(x)))
        form: Any = implementation_of(self.spec.structure).experts
        out: Tensor = form(rows, x, *self.operands(x))
        return out

    def reset_parameters(self) -> None:
        """Each expert as a fresh layer of its structure."""
        if self.device.type == "meta":
            return
        for expert in range(self.num_experts):
            fresh = BLRLinear.from_spec(self.spec, bias=False, device=self.device, dtype=self.dtype)
            for name, value in fresh.stored().items():
                getattr(self, name).data[expert] = value.detach()

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense matrices `[E, N, K]`, multiplied out in this dtype or else in the layer's."""
        tensors = self.tensors()
        wide = {name: tensors[name].to(dtype or self.dtype) for name in self.spec.names(FACTOR)}
        dense: Any = implementation_of(self.spec.structure).dense
        each = ({name: t[i] for name, t in {**tensors, **wide}.items()} for i in range(self.num_experts))
        return torch.stack([dense(**expert) for expert in each])

    @property
    def weight(self) -> Tensor:
        """The dense matrices as the replaced parameter would hold them, detached."""
        dense = self.dense_weight().detach()
        return dense.mT if self.transposed else dense

    def to_dense(self) -> nn.Module:
        raise TypeError("factors of experts become dense with the module that holds them: call hf_blr.to_dense(model)")

    @property
    def num_parameters(self) -> int:
        """Numbers that all experts keep."""
        return self.num_experts * self.spec.num_parameters

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {super().extra_repr()}"
