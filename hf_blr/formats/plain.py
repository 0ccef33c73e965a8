"""The plain format: factors in the dtype of the layer that they replace. Other formats derive from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_blr.formats.codes import Codes
from hf_blr.ops.rules.bits import CodeForm
from hf_blr.structures import INDEX, BLRSpec, StoredTensor

#: by name: numbers, or the codes and scales that a fit has chosen for them
Factors = Mapping[str, Tensor | Codes]


@dataclass(frozen=True)
class Format:
    """Factors as they are, in the layer's dtype; indices as int32."""

    name: str = "plain"

    @property
    def settings(self) -> dict[str, int]:
        """What else than its name a plan says of the format."""
        return {}

    @property
    def form(self) -> CodeForm | None:
        """What the choice of kernels for bits depends on; None without any."""
        return None

    def in_bits(self, spec: BLRSpec, leading: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
        """{factor: shape} of those that a module keeps in another form than as one parameter.

        leading: axes before those of the spec, (E,) for experts; so in all that takes it.
        """
        return {}

    def stored(self, spec: BLRSpec, leading: tuple[int, ...] = ()) -> dict[str, StoredTensor]:
        """{state-dict key: shape and kind} of what a module keeps, in a fixed order."""
        return {name: StoredTensor((*leading, *shape), kind) for name, (shape, kind) in spec.tensors().items()}

    def dtype_of(self, kind: str, dtype: torch.dtype | None) -> torch.dtype | None:
        """Of a stored tensor of this kind in a layer of `dtype` (None: PyTorch's default)."""
        return torch.int32 if kind == INDEX else dtype

    def num_bytes(self, spec: BLRSpec, dtype: torch.dtype, leading: tuple[int, ...] = ()) -> int:
        """Of all that a layer of this dtype stores, but for its bias."""
        dtypes = [(math.prod(shape), self.dtype_of(kind, dtype)) for shape, kind in self.stored(spec, leading).values()]
        return sum(count * (dtype if of is None else of).itemsize for count, of in dtypes)

    def misfit(self, spec: BLRSpec) -> str | None:
        """Why a layer of these sizes cannot be stored so, and what to do; None if it can."""
        return None

    def waste(self, spec: BLRSpec) -> str | None:
        """Why a layer of these sizes is no smaller so than plain in 16 bits, and what to do; None if it is."""
        return None

    def pack(
        self,
        spec: BLRSpec,
        tensors: Factors,
        dtype: torch.dtype,
        device: torch.device,
        leading: tuple[int, ...] = (),
    ) -> dict[str, Tensor]:
        """{state-dict key: tensor} that a module keeps for these factors and indices, in memory of its own.

        A fit may return views: of larger tensors, which would stay in memory, or of transposed ones, which multiply
        with other rounding than the same factors read back from a file.

        Args:
            spec: the sizes.
            tensors: of the spec; factors in any float dtype or, where the format stores bits, as `Codes`.
            dtype, device: of the layer.

        Raises:
            ValueError: if codes are handed to a format that stores none, or do not fit it.
        """
        kept = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, Codes):
                raise ValueError(f"the {self.name} format keeps {name} as numbers, got codes; hand in their values")
            own = self.dtype_of(spec.kinds[name], dtype)
            kept[name] = tensor.to(device, own).clone(memory_format=torch.contiguous_format)
        return kept


PLAIN = Format()
