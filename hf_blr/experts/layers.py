"""The factors of one tensor of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_blr import ops
from hf_blr.formats import PLAIN, Codes, FactorInBits, Factors, Format
from hf_blr.formats.values import check_fit
from hf_blr.linear import BLRLinear
from hf_blr.ops.dispatch import compute_dtype
from hf_blr.ops.rules.packed import reads_packed
from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR, BLRSpec


class ExpertsLinear(BLRLinear):
    """E linear layers of one spec; every factor has a leading axis of E. They have no bias.

    Args:
        spec: the sizes of one expert's matrix `[N, K]`.
        num_experts: E.
        transposed: the dense model stores each matrix `[K, N]`.
        device, dtype: of the factors; of those that are kept in bits, the dtype that they stand for.
        storage: the format in which factors are kept.
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
        implementation_of(spec.structure)
        self.num_experts, self.transposed, self.bias = num_experts, transposed, None
        self.make(spec, storage, device, dtype, (num_experts,))
        self.reset_parameters()
        self.settle_indices()

    @staticmethod
    def stacked(layers: list[BLRLinear], transposed: bool) -> ExpertsLinear:
        """The layers' factors, one expert after the other. They must have one spec and format, and no bias."""
        first = layers[0]
        factors = stacked_factors([kept_factors(layer) for layer in layers])
        module = ExpertsLinear.of_factors(first.spec, factors, transposed, first.storage, first.dtype, first.device)
        module.train(first.training)
        return module

    @staticmethod
    def of_factors(
        spec: BLRSpec,
        factors: Factors,
        transposed: bool,
        storage: Format,
        dtype: torch.dtype,
        device: torch.device,
    ) -> ExpertsLinear:
        """A module with these factors and indices, each with a leading axis of E.

        Raises:
            ValueError: if a number is too large for the dtype.
        """
        first = next(iter(factors.values()))
        num_experts = len(first.values if isinstance(first, Codes) else first)
        stored = storage.pack(spec, factors, dtype, device, (num_experts,))
        check_fit(spec, storage, stored)
        module = ExpertsLinear(spec, num_experts, transposed, "meta", dtype, storage)
        for key, value in stored.items():
            module.put(key, value)
        module.settle_indices()
        return module

    def forward(self, x: Tensor, expert: int) -> Tensor:  # type: ignore[override]
        """x `[T, K]` -> `[T, N]`, by the factors of one expert."""
        self.look_at_indices()
        chosen = torch.tensor([expert], device=x.device)
        tensors = [tensor[0] for tensor in self.operands(x, chosen)]
        return ops.linear(self.spec.structure, x, tensors, None, self.impl or None, "")

    def operands(self, x: Tensor, chosen: Tensor | None = None) -> list[Tensor]:
        """The tensors that the ops take, for inputs of x's dtype; chosen: of these experts alone, in this order.

        Of factors in bits no others become numbers.
        """
        dtype, found = compute_dtype(x), []
        for held in (getattr(self, name) for name in self.spec.names()):
            if isinstance(held, nn.Module):
                found.append(held(dtype, chosen))
                continue
            tensor = held if chosen is None else held.index_select(0, chosen)
            found.append(tensor.to(dtype) if self.masters and tensor.is_floating_point() else tensor)
        return found

    @property
    def alone(self) -> bool:
        """Whether one expert must run after the other, since the structure has no form for rows of many."""
        return implementation_of(self.spec.structure).experts is None

    def of_rows(self, x: Tensor, rows: ops.Routed) -> Tensor:
        """x `[S, K]` -> `[S, N]`, each row by the factors of its expert."""
        self.look_at_indices()
        if ops.current_impl() == "dense":
            return rows.product(x, self.dense_weight(compute_dtype(x)))
        run: Any = implementation_of(self.spec.structure).experts
        form, chosen = self.storage.form, None
        out: Tensor
        if form is not None and rows.offsets is None and reads_packed(self.spec, form) and not self.in_training:
            out = run(rows, x, *self.held())
            return out
        if form is not None and len(x) < self.num_experts:
            # of few rows each gets numbers of its own, and no other expert's codes are read
            chosen, rows = rows.experts, rows.each_its_own()
        out = run(rows, x, *self.operands(x, chosen))
        return out

    def trained(self) -> list[Tensor]:
        """What a gradient may be wanted of, and what rows are multiplied by as numbers."""
        return [*self.factors().values(), *(p for p in self.parameters() if p.requires_grad)]

    def reset_parameters(self) -> None:
        """Each expert as a fresh layer of its structure."""
        if self.device.type == "meta":
            return
        settings: Any = {"bias": False, "device": self.device, "dtype": self.dtype, "storage": self.storage}
        fresh = [BLRLinear.from_spec(self.spec, **settings) for _ in range(self.num_experts)]
        factors = stacked_factors([kept_factors(layer) for layer in fresh])
        stored = self.stored()
        for key, value in self.storage.pack(self.spec, factors, self.dtype, self.device, (self.num_experts,)).items():
            stored[key].data.copy_(value)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense matrices `[E, N, K]`, multiplied out in this dtype or else in the layer's."""
        tensors = self.tensors(dtype)
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


def kept_factors(layer: BLRLinear) -> Factors:
    """{name: factor or index} of a layer; of what is kept in bits, codes and scales."""
    held = {name: getattr(layer, name) for name in layer.spec.names()}
    return {name: part.codes() if isinstance(part, FactorInBits) else part.detach() for name, part in held.items()}


def stacked_factors(each: list[Factors]) -> Factors:
    """Factors of one expert after the other, with a leading axis."""
    found: dict[str, Tensor | Codes] = {}
    for name, first in each[0].items():
        parts: list[Any] = [factors[name] for factors in each]
        if isinstance(first, Codes):
            found[name] = Codes(*(torch.stack(part) for part in zip(*parts, strict=True)))
        else:
            found[name] = torch.stack(parts)
    return found
