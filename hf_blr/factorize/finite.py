"""NaN and infinity, refused before a fit sees them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_finite(name: str, weight: Tensor, remedy: str = "") -> None:
    """Raises ValueError that counts the values that are NaN or infinite, and says what to do."""
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {weight.numel()} values are NaN or infinite{remedy and f'; {remedy}'}")
