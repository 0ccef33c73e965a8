"""The plain format: factors in the dtype of the layer that they replace. Other formats derive from it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.structures import FACTOR, INDEX, BLRSpec, StoredTensor


class Format:
    """Factors as they are, in the layer's dtype; indices as int32."""

    name = "plain"

    def stored(self, spec: BLRSpec) -> dict[str, StoredTensor]:
        """{state-dict key: shape and kind} of what a module keeps, in a fixed order."""
        return spec.tensors()

    def dtype_of(self, kind: str, dtype: torch.dtype | None) -> torch.dtype | None:
        """Of a stored tensor of this kind in a layer of `dtype` (None: PyTorch's default)."""
        return torch.int32 if kind == INDEX else dtype

    def trains(self, kind: str) -> bool:
        """Whether stored tensors of this kind are parameters; the others are buffers."""
        return kind == FACTOR

    def pack(
        self, spec: BLRSpec, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """What a module keeps for these factors and indices, in memory of its own.

        A fit may return views: of larger tensors, which would stay in memory, or of transposed ones, which multiply
        with other rounding than the same factors read back from a file.
        """
        kinds = spec.kinds
        return {
            name: tensor.to(device, self.dtype_of(kinds[name], dtype)).clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }

    def unpack(self, spec: BLRSpec, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The factors and indices in the order in which the ops take them, differentiable in what trains."""
        return stored


PLAIN = Format()
