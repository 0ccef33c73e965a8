"""A dense layer in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dense_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., K]`, w `[N, K]` -> `[..., N]`."""
    return F.linear(x, w, bias)


def dense_dense(w: Tensor) -> Tensor:
    """The matrix `[N, K]` that `dense_linear` multiplies by."""
    return w


def fits(in_features: int, w: Tensor) -> bool:
    return in_features == w.shape[-1]
