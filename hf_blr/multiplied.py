"""The dense matrix that a layer's factors stand for: to be read, scaled, or put in the layer's place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.dense import build_dense
from hf_blr.ops.table import implementation_of
from hf_blr.readonly import ReadOnly
from hf_blr.stored import StoredFactors
from hf_blr.structures import FACTOR


class MultipliedOut(StoredFactors):
    """Factors whose dense matrix can be read as a layer's `weight`, and differentiated.

    Args: as of `StoredFactors`.
    """

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense matrix `[N, K]`, multiplied out in this dtype or else in the layer's; differentiable in factors."""
        dtype = dtype or self.dtype
        tensors = self.tensors(dtype)
        factors = {name: tensors[name].to(dtype) for name in self.spec.names(FACTOR)}
        return implementation_of(self.spec.structure).dense(**{**tensors, **factors})

    @property
    def weight(self) -> Tensor:
        """The dense matrix as the replaced layer would hold it, differentiable in the factors while gradients are on.

        It is there to be read; writing to it raises RuntimeError. A positive number by which it is multiplied or
        divided in place scales the layer: RWKV divides some weights so before it runs. While a dense checkpoint streams
        in, a placeholder parameter of this name stands in the module; it is what the loader must see then.
        """
        placeholder = self._parameters.get("weight")
        if placeholder is not None:
            return placeholder
        dense = self.dense_weight()
        dense = dense.T if self.transposed else dense
        if not torch.compiler.is_compiling():
            dense = dense.as_subclass(ReadOnly)
            dense.scaled_by = self.scale
        # transformers' _init_weights re-initialises what does not carry this mark
        dense._is_hf_initialized = True  # type: ignore[attr-defined]
        return dense

    def to_dense(self) -> nn.Module:
        """The `nn.Linear` (or `Conv1D`) with the same matrix, dtype and device; multiplied out in float32 or better."""
        wide = torch.promote_types(self.dtype, torch.float32)
        weight = self.dense_weight(wide).detach().to(self.dtype)
        dense = build_dense(weight, self.bias, self.transposed)
        dense.train(self.training)
        # what is kept in bits cannot say whether the matrix would train
        return dense.requires_grad_(next((factor.requires_grad for factor in self.factors().values()), True))

    @torch.no_grad()
    def scale(self, number: float) -> None:
        """Multiplies the matrix by a positive number, in place; the first factor takes it."""
        held: Any = getattr(self, self.spec.names(FACTOR)[0])
        if isinstance(held, nn.Parameter):
            held.mul_(number)
        else:
            held.scale(number)
