"""The factors of one tensor of experts in plain PyTorch, for exporters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_blr import ops
from hf_blr.linear import BLRLinear
from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR


class PlainFactors(nn.Module):
    """The factors of a layer as parameters and its indices as buffers, those in bits as numbers of its dtype.

    Args:
        module: the layer, whose factors are taken over.
    """

    def __init__(self, module: BLRLinear):
        super().__init__()
        self.structure, self.names = module.spec.structure, module.spec.names()
        self.in_features, self.out_features = module.in_features, module.out_features
        for name, tensor in module.tensors().items():
            if name in module.spec.names(FACTOR):
                self.register_parameter(name, nn.Parameter(tensor.detach()))
            else:
                self.register_buffer(name, tensor)

    def held(self) -> list[Tensor]:
        """Factors and indices in the order of the structure."""
        return [getattr(self, name) for name in self.names]

    def extra_repr(self) -> str:
        return f"{self.structure}, in_features={self.in_features}, out_features={self.out_features}"


class PlainExperts(PlainFactors):
    """What an `ExpertsLinear` computes, without a registered op."""

    def of_rows(self, x: Tensor, rows: ops.Routed) -> Tensor:
        """x `[S, K]` -> `[S, N]`, each row by the factors of its expert."""
        run: Any = implementation_of(self.structure).experts
        out: Tensor = run(rows, x, *self.held())
        return out
