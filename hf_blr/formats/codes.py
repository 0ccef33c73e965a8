"""What a fit that rounds hands to a format: codes that are chosen already, with their scales."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Codes(NamedTuple):
    """One factor `[..., n, k]` in few bits: number (.., i, j) is values[.., i, j] times the scale of its group.

    values: `[..., n, k]` int8, or float8_e4m3fn.
    scale: `[..., n, groups]` bfloat16, finite and positive; group g of a row are its k / groups numbers from g * k /
        groups on.
    """

    values: Tensor
    scale: Tensor

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The factor `[..., n, k]` in this dtype, each number rounded once."""
        # a scale below float16's range must not be cast before it multiplies
        wide = torch.promote_types(dtype, self.scale.dtype)
        groups = self.values.to(wide).unflatten(-1, (self.scale.shape[-1], -1))
        return (groups * self.scale.to(wide).unsqueeze(-1)).flatten(-2).to(dtype)
