"""Float32 masters of factors that are stored in 16 bits, for as long as they train."""

from __future__ import annotations

import torch
from torch import nn

from hf_blr.linear import BLRLinear, blr_modules


class Masters:
    """Widens the factors that train, in place, and rounds them back.

    Most steps of a training are smaller than half of the last bit of a bfloat16 number and would be rounded away.
    Layers multiply by their factors in the dtype of the inputs as before, so that nothing else has to be wider.
    """

    def __init__(self) -> None:
        #: what the factors of each widened layer were
        self.dtypes: dict[BLRLinear, torch.dtype] = {}

    def widen(self, model: nn.Module) -> None:
        """To float32, of all layers with a factor that trains; those that are wide enough stay."""
        for module in blr_modules(model).values():
            factors = module.factors().values()
            if module.dtype.itemsize < 4 and any(factor.requires_grad for factor in factors):
                self.dtypes[module] = module.dtype
                cast(module, torch.float32)

    def narrow(self) -> None:
        """Back to what they were."""
        for module, dtype in self.dtypes.items():
            cast(module, dtype)
        self.dtypes.clear()


def cast(module: BLRLinear, dtype: torch.dtype) -> None:
    """The parameters stay the same objects, which an optimizer may hold already."""
    module.masters = dtype == torch.float32
    for factor in module.factors().values():
        factor.data = factor.data.to(dtype)
