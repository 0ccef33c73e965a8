"""Whether a module still computes the same, asked of a small random input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_blr.linear import BLRLinear
from hf_blr.ops import use_impl

#: what is called with hidden states
Function = Callable[[Tensor], Any]


@torch.no_grad()
def on_trial(function: Function, projection: BLRLinear) -> Tensor | None:
    """What a function makes of a random `[1, 2, K]`, in plain PyTorch; None if it wants something else."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, projection.in_features, generator=generator).to(projection.device, projection.dtype)
    try:
        with use_impl("reference"):
            return function(x)
    except Exception:
        # a forward with other arguments: it stays as it is
        return None


def alike(expected: Any, found: Any) -> bool:
    """Whether both are tensors that differ by no more than rounding."""
    if not all(isinstance(t, Tensor) for t in (expected, found)) or expected.shape != found.shape:
        return False
    scale = float(expected.abs().max())
    return bool((expected - found).abs().max() <= 8 * torch.finfo(expected.dtype).eps * scale)
